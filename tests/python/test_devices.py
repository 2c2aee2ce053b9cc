"""Default devices of the caller, and arguments that are on another device than the rest."""

import re

import pytest
import tether
import torch
import torch.distributed.tensor
from paths import on_both_paths
from torch._subclasses.fake_tensor import FakeTensorMode


def batch_of(**more):
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(size, generator=generator)

    return {
        "logps": -normal(6).abs(),
        "advantages": normal(2),
        "response_mask": torch.tensor([True, True, False, True, True, True]),
        "old_logps": -normal(6).abs(),
        "ref_logps": -normal(6).abs(),
        "entropies": normal(6).abs(),
        "offsets": torch.tensor([0, 3, 6]),
        **more,
    }


def calls():
    """Every public function with tensors, with all its arguments that are tensors."""
    generator = torch.Generator().manual_seed(6)

    def normal(*size):
        return torch.randn(size, generator=generator)

    batch = batch_of(beta=0.1, entropy_coef=0.1, objective="grpo")
    rows, mask = normal(2, 3), torch.tensor([[True, True, False], [True, True, True]])
    logits, targets = normal(2, 3, 8), torch.tensor([[1, 7, -100], [0, 3, 5]])
    log_p = torch.log_softmax(normal(2, 3, 8), -1)
    head = {"head_ids": logits.topk(2).indices}
    linear = {"hidden": normal(6, 4), "weight": normal(8, 4), "bias": normal(8)}
    linear["targets"] = targets.clamp_min(0).view(-1)
    of_logits = {name: batch[name] for name in batch if name not in ("logps", "entropies")}
    pairs = {name: batch[name] for name in ("response_mask", "ref_logps", "offsets")}
    pairs |= {"nll_mask": batch["response_mask"], "baselines": normal(2)}
    pairs |= {"answer_weights": torch.ones(2), "nll_coef": 0.5}
    answers = {**pairs, "labels": torch.tensor([True, False]), "objective": "kto"}
    tokens = {"rewards": rows, "response_mask": mask, "bootstrap": normal(2)}
    return {
        "policy_loss": batch,
        "policy_token_losses": batch,
        "local_counts": batch,
        "aggregate": {
            "terms": batch["logps"],
            "response_mask": batch["response_mask"],
            "offsets": batch["offsets"],
        },
        "kl_terms": {
            name: batch[name]
            for name in ("logps", "ref_logps", "response_mask", "old_logps", "offsets")
        },
        "preference_loss": {"logps": batch["logps"], **answers},
        "dpo_loss": {"logps": batch["logps"], **pairs},
        "value_loss": {
            "values": normal(6),
            "returns": normal(6),
            "old_values": normal(6),
            "response_mask": batch["response_mask"],
            "offsets": batch["offsets"],
        },
        "token_logps": {
            "logits": logits,
            "targets": targets,
            "gradient_buffer": torch.zeros(2, 3, 8),
            "entropies": True,
            "statistics": True,
        },
        "linear_token_logps": {**linear, "entropies": True, "statistics": True},
        "linear_policy_loss": {**linear, **of_logits, "entropies": True},
        "linear_preference_loss": {**linear, **answers},
        "categorical_kl": {"q_logits": logits, "p_logits": log_p, "mask": mask},
        "top_k_kl": {
            "q_logits": logits,
            **head,
            "head_logps": log_p.gather(-1, head["head_ids"]),
            "targets": targets,
            "target_logps": log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0],
        },
        "head_logps": {"logits": logits, **head},
        "advantage": {
            "estimator": "gae",
            **tokens,
            "values": rows,
            "done": ~mask,
            "truncated": ~mask,
            "truncation_values": rows,
            "lambdas": normal(2).sigmoid(),
            "log_ratios": rows,
        },
        "generalized_advantage_estimation": {
            **tokens,
            "values": rows,
            "done": ~mask,
            "truncated": ~mask,
            "truncation_values": rows,
            "lambdas": normal(2).sigmoid(),
        },
        "discounted_returns": tokens,
        "group_advantage": {"rewards": normal(4), "groups": torch.tensor([1, 1, 0, 0])},
        "moments": {"values": rows, "response_mask": mask},
        "whiten": {"values": rows, "response_mask": mask},
        "kl_report": {
            "log_ratios": batch["logps"],
            "response_mask": batch["response_mask"],
            "offsets": batch["offsets"],
        },
        "mismatch_report": {
            "old_logps": batch["logps"],
            "rollout_logps": batch["logps"] - 0.5,
            "response_mask": batch["response_mask"],
            "offsets": batch["offsets"],
        },
        "batch_weights": {
            "rule": "fipo",
            "logps": batch["logps"],
            "response_mask": batch["response_mask"],
            "old_logps": batch["logps"] - 0.1,
            "rollout_logps": batch["logps"],
            "advantages": batch["logps"],
            "entropies": batch["logps"],
            "turn_ids": torch.zeros_like(batch["logps"], dtype=torch.int64),
            "offsets": batch["offsets"],
        },
        "support": {
            "targets": torch.tensor([[1, 7, -100], [0, 3, 5]]),
            "token_ids": torch.tensor([1, 2, 6, 0, 4, 3]),
            "offsets": torch.tensor([0, 2, 3, 3, 5, 6, 6]),
        },
        "response_targets": {
            "input_ids": torch.arange(12).view(2, 6),
            "prompt_lengths": torch.tensor([2, 3]),
            "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        },
    }


CALLS = calls()


def numbers(out):
    """All tensors and numbers of a result, whatever it is made of."""
    if isinstance(out, torch.Tensor) or out is None:
        return [out]
    if isinstance(out, tuple):
        return [each for part in out for each in numbers(part)]
    return numbers(tuple(vars(out).values())) if hasattr(out, "__dict__") else [torch.tensor(out)]


LEAVES = ("logps", "entropies", "values", "logits", "hidden", "weight", "bias", "q_logits")
CONSTANT = ("batch_weights", "whiten", "moments", "advantage", "generalized_advantage_estimation")


def evaluated(function, arguments):
    """The results and, where there are any, the gradients."""
    leaves = {
        name: each.detach().clone().requires_grad_()
        for name, each in arguments.items()
        if name in LEAVES and isinstance(each, torch.Tensor) and function not in CONSTANT
    }
    out = numbers(getattr(tether, function)(**arguments | leaves))
    roots = [each for each in out if isinstance(each, torch.Tensor) and each.requires_grad]
    if not roots:
        return out
    sum(each.sum().double() for each in roots).backward()
    return out + [each.grad for each in leaves.values()]


LISTS = {"advantages", "batch_weight_rules", "dialects", "objectives", "weights"}
MODULES = {"objective", "reference", "weight"}
SWITCHES = {"check_ids"}


def test_every_public_function_is_here():
    public = {name for name in tether.__all__ if name[0].islower()}
    assert public - LISTS - MODULES - SWITCHES == set(CALLS)


@pytest.mark.parametrize("function", CALLS)
def test_a_negated_view_is_its_numbers(function):
    def negated(name, each):
        number = isinstance(each, torch.Tensor) and each.is_floating_point()
        return torch._neg_view(-each) if number and name != "gradient_buffer" else each

    arguments = CALLS[function]
    expected = numbers(getattr(tether, function)(**arguments))
    views = {name: negated(name, each) for name, each in arguments.items()}
    for actual, a in zip(numbers(getattr(tether, function)(**views)), expected, strict=True):
        assert a is None or torch.equal(actual, a)


@pytest.mark.parametrize("function", CALLS)
def test_the_default_device_changes_nothing(function):
    expected = evaluated(function, CALLS[function])
    with torch.device("meta"):
        actual = evaluated(function, CALLS[function])
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.device.type == "cpu":
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("family", ["policy", "preference", "value"])
def test_the_default_device_changes_no_objective(family, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether._ops.KERNELS", frozenset())
    function = f"{family}_loss"
    for name, row in tether.objectives(family).items():
        arguments = CALLS[function] | {"objective": name}
        if family == "policy":
            arguments["rollout_logps"] = arguments["logps"] - 0.1
        elif family == "preference" and name != "kto":
            pairs = {"labels": None, "offsets": torch.tensor([0, 3, 6])}
            arguments |= {key: each for key, each in pairs.items() if key in arguments}
        tensors = {k: torch.tensor(v.default) for k, v in row.options.items() if "." not in k}
        if "label_smoothing" in tensors:  # 0 is not legal for each
            arguments["label_smoothing"] = torch.tensor(0.1)
        expected = evaluated(function, arguments)
        with torch.device("meta"):
            actual = evaluated(function, arguments)
        for a, b in zip(actual, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or a.device.type == "meta" or torch.equal(a, b)


@pytest.mark.parametrize(
    "function, name",
    [
        (function, name)
        for function, arguments in CALLS.items()
        for name in [n for n, each in arguments.items() if isinstance(each, torch.Tensor)][1:]
    ],
)
def test_an_argument_on_another_device_is_refused(function, name):
    arguments = CALLS[function]
    with pytest.raises(ValueError) as caught:
        getattr(tether, function)(**arguments | {name: arguments[name].to("meta")})
    sentence = f"{function}: {name} must be on cpu like \\w+, got meta"
    assert re.fullmatch(sentence, str(caught.value))


def test_options_and_counts_on_meta_are_refused():
    batch = batch_of()
    nothing = torch.tensor(0.1, device="meta")
    for settings, name in (
        ({"beta": nothing}, "beta"),
        ({"normalizer": tether.Normalizer(policy=nothing)}, "normalizer.policy"),
    ):
        with pytest.raises(ValueError) as caught:
            tether.policy_loss(**batch, **settings)
        assert str(caught.value) == f"policy_loss: {name} must be a number, got a tensor on meta"


def test_tensors_that_hold_nothing_have_the_shape_of_the_results(monkeypatch):
    """Options are tensors of the mode too, and are not read."""
    monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    with FakeTensorMode():
        x = torch.ones(2, 3)
        options = {"beta": 0.1, "epsilon_low": 0.1, "epsilon_high": 0.2}
        for _ in range(5):
            out = tether.policy_loss(x, x[:, 0], x, old_logps=x, ref_logps=x, **options)
    assert (out.loss.shape, out.metrics.sums.shape) == ((), (14, 2))


def test_distributed_tensors_are_refused(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        tensor = distributed.tensor.distribute_tensor
        for function, name in (
            ("policy_loss", "logps"),
            ("policy_loss", "response_mask"),
            ("linear_token_logps", "weight"),
            ("token_logps", "logits"),
            ("whiten", "values"),
        ):
            wrong = {name: tensor(CALLS[function][name], mesh)}
            with pytest.raises(TypeError) as caught:
                getattr(tether, function)(**CALLS[function] | wrong)
            assert str(caught.value) == (
                f"{function}: {name} must be a plain tensor, got a DTensor. Pass its to_local() or "
                "full_tensor()"
            )
    finally:
        distributed.destroy_process_group()


def bad_ids():
    """(function, argument, place, id): an id that is none, of every argument that has ids."""
    of_rows = ("token_logps", "linear_token_logps", "linear_policy_loss", "linear_preference_loss")
    for function in of_rows:
        yield from ((function, "targets", place, bad) for place, bad in ((3, 8), (0, -3)))
    for name, last in (("targets", 5), ("head_ids", 7)):
        yield from (("top_k_kl", name, place, bad) for place, bad in ((last, 8), (1, -3)))
    yield from (("head_logps", "head_ids", place, bad) for place, bad in ((5, 9), (0, -100)))


@pytest.mark.parametrize(("function", "name", "place", "bad"), list(bad_ids()))
def test_a_bad_id_has_one_sentence_on_every_path(function, name, place, bad, monkeypatch):
    arguments = {k: each for k, each in CALLS[function].items() if k != "gradient_buffer"}
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[place] = bad
    run = getattr(tether, function)
    with pytest.raises(IndexError) as caught:
        run(**arguments)
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    with pytest.raises(IndexError) as elsewhere:
        run(**arguments)
    assert str(elsewhere.value) == str(caught.value)
    rule = rf"{function}: {name} must be in \[0, 8\)( or ignore_index -100)?, got {bad} at"
    assert re.match(rule, str(caught.value))


def test_a_bad_id_is_nan_where_nobody_looks():
    logits, targets = torch.randn(3, 5), torch.tensor([1, 9, -2])
    logps, entropies = tether.reference.token_logps(logits, targets)
    assert logps.isnan().tolist() == [False, True, True] and entropies.isfinite().all()
    kl = tether.reference.top_k_kl(logits, targets[:, None], logits[:, :1] - 9, tail="bucket")
    assert kl.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("objective", ["cispo", "dppo_tv"])
@pytest.mark.parametrize("bounds", [(2.0, 3.0), (0.0, 0.5), (0.9, 1.1)])
def test_tokens_truncated_on_either_side_of_1_are_counted_alike(objective, bounds, monkeypatch):
    ratios = torch.tensor([[0.3, 0.7, 1.0, 1.5, 2.5, 4.0]] * 2, dtype=torch.float64)
    logps, advantages = ratios.log() - 1, torch.tensor([1.0, -1.0])
    low, high = bounds

    def run():
        found = tether.policy_loss(
            logps,
            advantages,
            torch.ones(2, 6, dtype=torch.bool),
            objective=objective,
            old_logps=-torch.ones_like(logps),
            ratio_low=low,
            ratio_high=high,
        ).metrics.to_dict()
        return [found[f"clip_fraction_{name}"] for name in ("low", "high", "dual")]

    first, second = on_both_paths(run, monkeypatch)
    assert second == pytest.approx(first, abs=1e-15)
    below, above = (ratios[0] < low).sum().item(), (ratios[0] > high).sum().item()
    assert first == pytest.approx([below / 6, above / 12, above / 12])


def factors_beyond_float32():
    generator = torch.Generator().manual_seed(7)
    logps, ref_logps = -torch.rand(2, 2, 3, generator=generator)
    mask, advantages = torch.ones(2, 3), torch.tensor([1.0, -1.0])
    policy = {"ref_logps": ref_logps, "entropies": -logps}
    pairs = {"loss_scale": 1e300}
    rows = {"normalizer": tether.Normalizer(scale=1e300)}
    return {
        "beta": lambda x: tether.policy_loss(x, advantages, mask, beta=1e12, **policy).loss,
        "entropy_coef": lambda x: (
            tether.policy_loss(x, advantages, mask, entropy_coef=1e12, **policy).loss
        ),
        "loss_weight": lambda x: (
            tether.preference_loss(x, ref_logps, mask, loss_weight=1e12, **pairs).loss
        ),
        "nll_coef": lambda x: (
            tether.preference_loss(x, ref_logps, mask, nll_coef=1e12, **pairs).loss
        ),
        "scale": lambda x: tether.value_loss(x, ref_logps, mask, **rows).loss,
    }, logps


@pytest.mark.parametrize("name", factors_beyond_float32()[0])
def test_a_factor_beyond_the_type_is_finite(name, monkeypatch):
    losses, logps = factors_beyond_float32()

    def run():
        leaf = logps.clone().requires_grad_()
        loss = losses[name](leaf)
        loss.backward()
        return loss.detach(), leaf.grad

    first, second = on_both_paths(run, monkeypatch)
    for mine, other in zip(second, first, strict=True):
        assert mine.isfinite().all() and other.isfinite().all()
        assert torch.equal(mine.sign(), other.sign())


@pytest.mark.parametrize("of_p", [-1.5, -torch.inf])
@pytest.mark.parametrize("tail", ["k1", "k3"])
def test_a_sample_of_no_probability_that_the_head_has(tail, of_p, monkeypatch):
    """Of the tail it is none: the head counts it."""
    q = torch.randn(2, 6, generator=torch.Generator().manual_seed(8))
    q[:, 1] = -torch.inf
    ids, log_p = torch.tensor([[1, 3]] * 2), torch.tensor([[of_p, -1.5]] * 2)

    def run():
        leaf = q.clone().requires_grad_()
        kl = tether.top_k_kl(leaf, ids, log_p, torch.tensor([1, 1]), log_p[:, 0], tail=tail)
        kl.sum().backward()
        return kl.detach(), leaf.grad

    first, second = on_both_paths(run, monkeypatch)
    torch.testing.assert_close(second, first)
    assert second[1].isfinite().all()


@pytest.mark.parametrize("function", [name for name in CALLS if "offsets" in CALLS[name]])
@pytest.mark.parametrize("last", [5, 7, -1])
def test_offsets_that_end_elsewhere_have_one_sentence_on_every_path(function, last, monkeypatch):
    arguments = dict(CALLS[function])
    arguments["offsets"] = arguments["offsets"].clone()
    arguments["offsets"][-1] = last

    def run():
        with pytest.raises(ValueError) as caught:
            getattr(tether, function)(**arguments)
        return str(caught.value)

    first, second = on_both_paths(run, monkeypatch)
    assert first == second and first.startswith(f"{function}: offsets must run from 0 to 6, the ")


@pytest.mark.parametrize("name", ["rollout_logps", "token_weights", "advantages", "logps"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_metrics_of_broken_tokens_are_those_of_the_kernel(name, everywhere, monkeypatch):
    batch = {k: each for k, each in batch_of().items() if k not in ("offsets", "entropies")}
    batch = {k: each.view(2, -1).clone() for k, each in batch.items()}
    batch["advantages"] = batch["advantages"].expand(2, 3).clone()
    batch |= {"rollout_logps": batch["old_logps"] - 0.1, "token_weights": torch.ones(2, 3)}
    batch[name][slice(None) if everywhere else 0] = float("nan")

    def run():
        weights = {"truncated_importance": {}}
        found = tether.policy_loss(**batch, objective="ppo", weights=weights).metrics.to_dict()
        return [found[key] for key in ("policy_loss", "nonfinite", "weight_max", "ratio_max")]

    first, second = on_both_paths(run, monkeypatch)
    assert second == pytest.approx(first, nan_ok=True, rel=1e-6)
