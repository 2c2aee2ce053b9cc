"""Losses, estimators and the KL of two rows on the way of CUDA tensors, beside those of the CPU."""

import host_operators
import pytest
import tether
import torch
from test_devices import CALLS, evaluated


@pytest.fixture(scope="module", autouse=True)
def host():
    host_operators.load()


def normal(*size, seed=3):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def on_both(run):
    """(by kernels for CUDA, by those of the CPU, the operators that the first called)"""
    want = run()
    with host_operators.kernels_of("cpu") as calls:
        return run(), want, calls


def assert_same(got, want, tolerance=2e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def tolerance_of(dtype):
    return 2e-5 if dtype == torch.float32 else 1e-2


def in_dtype(arguments, dtype, names):
    return {k: x.to(dtype) if k in names else x for k, x in arguments.items()}


# ---- losses -------------------------------------------------------------------------------------


def with_gradient(function, leaf, arguments):
    """Loss, metrics and the gradient, of an upstream one that is not 1."""
    x = arguments[leaf].detach().clone().requires_grad_()
    loss, metrics = getattr(tether, function)(**arguments | {leaf: x})
    (loss * 3).backward()
    assert not metrics.sums.requires_grad
    return [loss.detach(), *metrics, x.grad]


def values(packed=False):
    batch = {
        "values": normal(4, 9),
        "returns": normal(4, 9, seed=4),
        "old_values": normal(4, 9) + 0.4 * normal(4, 9, seed=5),
        "response_mask": normal(4, 9, seed=6) > -0.5,
    }
    batch["response_mask"][2] = False
    batch["values"][~batch["response_mask"]] = torch.nan
    if packed:
        batch = {k: x.flatten() for k, x in batch.items()}
        batch["offsets"] = torch.tensor([0, 5, 5, 20, 36], dtype=packed)
    return batch


AGGREGATIONS = {
    "token_mean": {},
    "token_sum": {},
    "sequence_mean_token_mean": {},
    "sequence_mean_token_sum": {},
    "sequence_sum_over_constant": {"constant": 30.0},
}


@pytest.mark.parametrize("objective", tether.objectives("value"))
@pytest.mark.parametrize("packed", [False, torch.int32, torch.int64])
def test_value_losses_are_those_of_the_cpu(objective, packed):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        batch = in_dtype(values(packed), dtype, ("values", "old_values"))
        for aggregation, options in AGGREGATIONS.items():
            arguments = {**batch, "objective": objective, "aggregation": aggregation, **options}
            got, want, calls = on_both(lambda x=arguments: with_gradient("value_loss", "values", x))
            assert calls == ["value_loss"]
            assert_same(got, want, tolerance_of(dtype))


def answers(objective="dpo", packed=False):
    batch = {
        "logps": -normal(6, 9).abs(),
        "ref_logps": -normal(6, 9, seed=4).abs(),
        "response_mask": normal(6, 9, seed=6) > -0.7,
        "baselines": 0.1 * normal(6, seed=7),
        "answer_weights": normal(6, seed=8).abs(),
    }
    batch["response_mask"][1] = batch["response_mask"][4] = False  # a pair of padding
    batch["logps"][~batch["response_mask"]] = torch.nan
    if objective in LABELLED:
        batch["labels"] = torch.tensor([True, False, True, True, False, False])
    if tether.objectives("preference")[objective].choices["reference"].default != "true":
        del batch["ref_logps"]
    if packed:
        rows = ("baselines", "answer_weights", "labels")
        batch = {k: x if k in rows else x.flatten() for k, x in batch.items()}
        batch["offsets"] = torch.arange(0, 55, 9, dtype=packed)
    return batch


LABELLED = ("kto",)


@pytest.mark.parametrize("objective", tether.objectives("preference"))
@pytest.mark.parametrize("packed", [False, torch.int32, torch.int64])
def test_preference_losses_are_those_of_the_cpu(objective, packed):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        batch = in_dtype(answers(objective, packed), dtype, ("logps", "ref_logps"))
        for options in ({}, {"nll_coef": 0.4}):
            arguments = {**batch, "objective": objective, "label_smoothing": 0.1, **options}
            if "label_smoothing" not in tether.objectives("preference")[objective].options:
                del arguments["label_smoothing"]
            got, want, calls = on_both(
                lambda x=arguments: with_gradient("preference_loss", "logps", x)
            )
            assert calls == ["preference_loss"]
            assert_same(got, want, tolerance_of(dtype))


def test_whole_answers_and_references_by_answer():
    batch = answers()
    of_answers = {k: x[:, 0].nan_to_num(-1) for k, x in batch.items() if k.endswith("logps")}
    by_answer = {k: x for k, x in batch.items() if k != "ref_logps"}
    by_answer["ref_logps"] = -normal(6, seed=4).abs()
    for arguments in (of_answers, by_answer):
        got, want, calls = on_both(lambda x=arguments: with_gradient("preference_loss", "logps", x))
        assert calls == ["preference_loss"]
        assert_same(got, want)


STEPS = [
    ("value_loss", {"normalizer": tether.Normalizer(policy=50, world_size=4, scale=0.5)}),
    (
        "value_loss",
        {
            "normalizer": tether.Normalizer(policy=50, sequences=7),
            "aggregation": "sequence_mean_token_sum",
        },
    ),
    ("preference_loss", {"pairs": 10, "world_size": 4, "loss_scale": 0.5}),
    ("preference_loss", {"pairs": 10, "tokens": 90, "nll_coef": 0.5}),
]


@pytest.mark.parametrize(("function", "step"), STEPS)
def test_denominators_of_the_step(function, step):
    batch, leaf = (values(), "values") if function == "value_loss" else (answers(), "logps")
    got, want, calls = on_both(lambda: with_gradient(function, leaf, batch | step))
    assert calls == [function]
    assert_same(got, want)


def in_tensors(step):
    def tensor(name, each):
        counts = ("policy", "sequences", "pairs", "tokens")
        return torch.tensor(float(each)) if name in counts and each is not None else each

    out = {k: tensor(k, x) for k, x in step.items()}
    if "normalizer" in step:
        given = vars(step["normalizer"]).items()
        out["normalizer"] = tether.Normalizer(**{k: tensor(k, x) for k, x in given})
    return out


@pytest.mark.parametrize(("function", "step"), STEPS)
def test_denominators_may_be_on_the_device(function, step, monkeypatch):
    batch, leaf = (values(), "values") if function == "value_loss" else (answers(), "logps")
    want = with_gradient(function, leaf, batch | step)
    monkeypatch.setattr(tether._cuda, "_is_on_device", lambda x: isinstance(x, torch.Tensor))
    with host_operators.kernels_of("cpu") as calls:
        got = with_gradient(function, leaf, batch | in_tensors(step))
    assert calls == [f"{function}_by_counts"]
    assert_same(got, want)


@pytest.mark.parametrize("count", [0.0, -1.0, torch.nan])
def test_counts_that_are_none_are_nan(count, monkeypatch):
    """Nobody looks at them there; the CPU refuses them."""
    monkeypatch.setattr(tether._cuda, "_is_on_device", lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr("tether._checks.number_of", lambda _: None)
    count = torch.tensor(count)
    of_values = {"normalizer": tether.Normalizer(policy=count)}
    with host_operators.kernels_of("cpu") as calls:
        for function, leaf, batch in (
            ("value_loss", "values", values() | of_values),
            ("preference_loss", "logps", answers() | {"pairs": count}),
        ):
            loss, *_, gradient = with_gradient(function, leaf, batch)
            assert loss.isnan()
            active = batch["response_mask"] != 0
            assert gradient[active].isnan().any() and (gradient[~active] == 0).all()
    assert calls == ["value_loss_by_counts", "preference_loss_by_counts"]


# ---- estimators ---------------------------------------------------------------------------------


def tokens(packed=False):
    batch = {
        "rewards": normal(4, 9),
        "values": normal(4, 9, seed=4),
        "response_mask": normal(4, 9, seed=6) > -0.5,
        "bootstrap": normal(4, seed=5),
        "done": normal(4, 9, seed=7) > 1.5,
        "truncated": normal(4, 9, seed=8) > 1.5,
        "truncation_values": normal(4, 9, seed=9),
        "lambdas": normal(4, seed=10).sigmoid(),
        "log_ratios": 0.3 * normal(4, 9, seed=11),
    }
    batch["rewards"][~batch["response_mask"]] = torch.nan
    if packed:
        rows = ("bootstrap", "lambdas")
        batch = {k: x if k in rows else x.flatten() for k, x in batch.items()}
        batch["offsets"] = torch.tensor([0, 5, 5, 20, 36], dtype=packed)
    return batch


RECURSIONS = [name for name, each in tether.advantages().items() if not each.of_groups]
RULES = [name for name, each in tether.advantages().items() if each.of_groups]


@pytest.mark.parametrize("estimator", RECURSIONS)
@pytest.mark.parametrize("packed", [False, torch.int32, torch.int64])
def test_recursions_are_those_of_the_cpu(estimator, packed):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        batch = in_dtype(tokens(packed), dtype, ("rewards", "values"))
        for gap in ("carry", "decay"):
            options = {"gamma": 0.9, "gap": gap}
            got, want, calls = on_both(
                lambda x=batch, o=options: tether.advantage(estimator, **x, **o)
            )
            assert calls == ["advantage"]
            assert_same(got, want, tolerance_of(dtype) if dtype != torch.float64 else 1e-12)


def test_recursions_by_name():
    batch = tokens()
    del batch["log_ratios"]
    returns = {k: batch[k] for k in ("rewards", "response_mask", "bootstrap")}

    def run():
        gae = tether.generalized_advantage_estimation(**batch, gamma=0.9, lambda_=0.8)
        return *gae, tether.discounted_returns(**returns, gamma=0.9)

    got, want, calls = on_both(run)
    assert calls == ["advantage"] * 2
    assert_same(got, want)


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_groups_are_those_of_the_cpu(rule):
    rewards, lengths = normal(12), torch.arange(1, 13)
    rewards[4:8] = 0.3  # equal: exactly 0
    ids = torch.tensor([5, 5, 9, 9] * 3, dtype=torch.int32)
    labels = ["a", "a", "b"] * 4
    needs = {"lengths": lengths} if rule == "opo" else {}
    for dtype in (torch.float32, torch.bfloat16):
        for groups in (4, ids, labels):
            got, want, calls = on_both(
                lambda d=dtype, g=groups: tether.advantage(rule, rewards.to(d), groups=g, **needs)
            )
            assert calls == ["group_advantage"]
            assert_same(got, want, tolerance_of(dtype))
            if isinstance(groups, int):
                assert got.advantages[4:8].abs().max() == 0


def test_group_advantage_by_name():
    for settings in ({}, {"scale": "batch_std"}, {"baseline": "leave_one_out", "scale": "none"}):
        got, want, calls = on_both(lambda s=settings: tether.group_advantage(normal(12), 3, **s))
        assert calls == ["group_advantage"]
        assert_same([got], [want])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_whitening_is_that_of_the_cpu(dtype):
    mask = normal(4, 9, seed=6) > -0.5
    x = (5 + normal(4, 9)).to(dtype)
    x[~mask] = torch.nan
    step = tether.Moments(100.0, 4.0, 250.0)
    tolerance = 1e-12 if dtype == torch.float64 else tolerance_of(dtype)
    for settings, operator in (
        ({}, "whiten_by_moments"),
        ({"shift_mean": False, "epsilon": 0.1}, "whiten_by_moments"),
        ({"step": step}, "whiten"),
    ):
        for shape in ((4, 9), (36,)):
            arguments = (x.reshape(shape), mask.reshape(shape))
            got, want, calls = on_both(lambda a=arguments, s=settings: tether.whiten(*a, **s))
            assert calls == [operator]
            assert_same([got], [want], tolerance)


def test_moments_are_those_of_the_cpu():
    mask = normal(4, 9, seed=6) > -0.5
    got, want, calls = on_both(lambda: tether.moments(1e4 + normal(4, 9), mask))
    assert calls == ["moments"]
    assert all(isinstance(each, torch.Tensor) for each in got)
    assert [float(each) for each in got] == pytest.approx(list(want), rel=1e-12)


# ---- the KL of two rows -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kl_of_two_rows_is_that_of_the_cpu(dtype, masked):
    memory = (2 * normal(2, 3, 40, seed=5)).to(dtype)
    q, p = memory[..., 1:32], (2 * normal(3, 2, 31)).to(dtype).transpose(0, 1)
    mask = torch.tensor([[True, False, True], [True] * 3]) if masked else None
    if masked:
        q = q.clone()
        q[0, 1] = torch.nan
    upstream = normal(3, 2, 3, seed=9)

    def run(which=(0, 1, 2)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, p)]
        out = tether.categorical_kl(*leaves, mask=mask, temperature=0.7)
        sum((out[i] * upstream[i]).sum() for i in which).backward()
        return *(each.detach() for each in out), *(each.grad for each in leaves)

    for which in ((0, 1, 2), (0,), (2,)):
        got, want, calls = on_both(lambda w=which: run(w))
        assert calls == ["categorical_kl_forward", "categorical_kl_backward"]
        assert_same(got, want, tolerance_of(dtype))


# ---- the doors ----------------------------------------------------------------------------------

BAD = [
    ("value_loss", {"clip_range": -1.0}),
    ("value_loss", {"aggregation": "sequence_sum_over_constant", "constant": -1.0}),
    ("value_loss", {"normalizer": tether.Normalizer(sequences=3)}),
    ("value_loss", {"returns": torch.zeros(5)}),
    ("preference_loss", {"ref_logps": None}),
    ("preference_loss", {"labels": None}),
    ("preference_loss", {"objective": "dpo"}),
    ("preference_loss", {"beta": -0.1}),
    ("preference_loss", {"pairs": 3, "nll_coef": 0.5}),
    ("preference_loss", {"label_smoothing": 2.0}),
    ("advantage", {"values": None}),
    ("advantage", {"truncation_values": None}),
    ("advantage", {"gamma": 2.0}),
    ("group_advantage", {"groups": 3}),
    ("group_advantage", {"epsilon": -1.0}),
    ("whiten", {"epsilon": -1.0}),
    ("whiten", {"response_mask": torch.ones(2, 2)}),
    ("categorical_kl", {"temperature": 0.0}),
    ("categorical_kl", {"p_logits": torch.zeros(2, 3, 9)}),
]


def sentence(function, arguments):
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(tether, function)(**arguments)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(("function", "wrong"), BAD)
def test_bad_input_gets_the_sentence_of_the_cpu(function, wrong):
    arguments = CALLS[function] | wrong
    got, want, _ = on_both(lambda: sentence(function, arguments))
    assert got == want


@pytest.mark.parametrize(
    "function",
    ["value_loss", "preference_loss", "dpo_loss", "advantage", "discounted_returns",
     "generalized_advantage_estimation", "group_advantage", "whiten", "categorical_kl"],
)  # fmt: skip
def test_every_array_of_a_function_goes_there(function):
    got, want, calls = on_both(lambda: evaluated(function, CALLS[function]))
    assert calls
    assert_same(got, want)
