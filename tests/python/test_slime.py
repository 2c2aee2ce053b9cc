"""tether.slime against slime's policy loss, its metrics and its advantages, as recorded by
tests/peers/record_slime.py.

slime is a stand-in here, which hands out log-probabilities and takes means as slime does.
"""

import functools
import importlib
import math
import re
import sys
import types

import pytest
import tether
import tether.slime as adapter
import torch
from recordings import FLOAT32, blocks_of_page, named, recording, tensor
from tether import _trainers

LOSS, ADVANTAGES = (recording(f"slime_{name}") for name in ("loss", "advantages"))
COMMIT = recording("slime_policy")["slime"]
RAGGED = ("advantages", "rollout_log_probs", "ref_log_probs", "log_probs", "opd_reverse_kl")


def mean_over(total_lengths, lengths, masks, counts, by_token):
    def mean(x):
        sums = [(each * mask).sum() for each, mask in zip(x.split(lengths), masks, strict=True)]
        if by_token:
            return sum(sums)
        return sum(each / count.clamp_min(1) for each, count in zip(sums, counts, strict=True))

    return mean


def rejection(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **_):
    ratios = [(a - b).exp() for a, b in zip(train_log_probs, rollout_log_probs, strict=True)]
    masks = [m * (r <= args.tis_clip) for m, r in zip(loss_masks, ratios, strict=True)]
    return 2 * pg_loss, masks, {"far": torch.cat(ratios) / 2}


def constant(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    mask = torch.cat(loss_masks)
    return lambda x: (x * mask).sum() / (100 + sum(total_lengths))


@pytest.fixture
def slime(monkeypatch):
    names = ("slime", "slime.backends", "slime.backends.megatron_utils")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType(f"{names[-1]}.loss")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.ranks, module.captured = 1, []
    module.mpu = types.SimpleNamespace(get_context_parallel_world_size=lambda: module.ranks)
    module.get_rollout_top_p_logprob_kwargs = lambda args, batch: {"top_p_token_ids": None}
    module.get_sum_of_sample_mean = mean_over
    module.load_function = {"rejection": rejection, "constant": constant}.__getitem__
    module._maybe_capture_log_probs = lambda batch, rows: module.captured.append(len(rows))
    module.get_log_probs_and_entropy = functools.partial(model, module)
    monkeypatch.setattr(_trainers, "version_of", lambda _: "0.3.1")
    return module


def model(module, logits, *, args, unconcat_tokens, total_lengths, response_lengths,
          with_entropy, top_p_token_ids):  # fmt: skip
    """As slime's: the rows of logits, which are given here."""
    assert with_entropy and len(total_lengths) == len(response_lengths)
    logps, entropies = logits.unbind(-1)
    rows = {"log_probs": logps, "entropy": entropies}
    return None, {name: list(each.split(response_lengths)) for name, each in rows.items()}


def batch_of(case, dtype=torch.float64, holes=None):
    """slime's batch and the rows of its model; masked slots hold `holes`."""
    batch = dict(case["batch"])
    masks = [torch.tensor(row, dtype=torch.int32) for row in batch["loss_masks"]]

    def rows_of(rows):
        out = [tensor(row).to(dtype) for row in rows]
        if holes is None:
            return out
        return [torch.where(mask > 0, row, holes) for mask, row in zip(masks, out, strict=True)]

    batch |= {name: rows_of(batch[name]) for name in RAGGED if name in batch}
    batch["loss_masks"] = masks
    batch["rollout_mask_sums"] = torch.tensor(batch["rollout_mask_sums"])
    model = [torch.cat(rows_of(case["rows"][name])) for name in ("logps", "entropies")]
    return batch, torch.stack(model, -1).requires_grad_()


def run(case, function=adapter.policy_loss, dtype=torch.float64, holes=None, **changes):
    """Loss, its gradient and metrics."""
    args = types.SimpleNamespace(**case["settings"] | changes)
    batch, logits = batch_of(case, dtype, holes)
    names = ("total_lengths", "response_lengths", "loss_masks", "rollout_mask_sums")
    mean = mean_over(*(batch[name] for name in names), args.calculate_per_token_loss)
    loss, metrics = function(args, batch, logits, mean)
    assert not any(each.requires_grad for each in metrics.values())
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss, gradient, {name: each.item() for name, each in metrics.items()}


def assert_same(case, loss, gradient, metrics, rtol=1e-12, atol=1e-14):
    expected = torch.stack([tensor(case["dlogps"]), tensor(case["dentropies"])], -1)
    assert loss.item() == pytest.approx(case["loss"], rel=rtol, abs=10 * atol)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol, check_dtype=False)
    assert metrics == pytest.approx(case["metrics"], rel=max(rtol, 2e-6), abs=1e-6)


@named(LOSS["cases"])
def test_losses_equal_slime(case, slime):
    """slime's penalty is computed in float32."""
    assert_same(case, *run(case), **(FLOAT32 if case["settings"]["use_kl_loss"] else {}))
    assert slime.captured == [len(case["batch"]["response_lengths"])]


@named(LOSS["cases"])
def test_masked_slots_may_hold_anything(case, slime):
    if case["settings"]["custom_tis_function_path"]:
        pytest.skip("the user's own function looks at them")
    expected = run(case)
    expected[2].pop("opsm_clipfrac", None)  # which counts advantages of masked slots, as in slime
    for holes in (math.nan, math.inf):
        loss, gradient, metrics = run(case, holes=holes)
        metrics.pop("opsm_clipfrac", None)
        torch.testing.assert_close(loss, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, expected[1], rtol=0, atol=0)
        assert metrics == expected[2]


def test_in_float32(slime):
    for case in LOSS["cases"]:
        assert_same(case, *run(case, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_as_many_answers_as_tokens(slime):
    """Of one token each, one of them masked."""
    case = LOSS["cases"][4]
    batch, logits = batch_of(case)
    firsts = torch.tensor([0, *torch.tensor(case["batch"]["response_lengths"]).cumsum(0)[:-1]])
    count = len(firsts)
    of_one = {name: [row[:1] for row in batch[name]] for name in (*RAGGED, "loss_masks")
              if name in batch}  # fmt: skip
    of_one |= {"response_lengths": [1] * count, "total_lengths": [3] * count}
    batch |= of_one | {"rollout_mask_sums": torch.ones(count)}
    names = ("total_lengths", "response_lengths", "loss_masks", "rollout_mask_sums")
    mean = mean_over(*(batch[name] for name in names), False)
    args = types.SimpleNamespace(**case["settings"])
    loss, _ = adapter.policy_loss(args, batch, logits[firsts], mean)
    old, advantages, mask = (
        torch.cat(batch[name]) for name in ("log_probs", "advantages", "loss_masks")
    )
    expected = tether.policy_loss(
        logits[firsts, :1],
        advantages,
        mask[:, None],
        objective="slime.cispo",
        old_logps=old[:, None],
        ratio_low=0.8,
        ratio_high=1.28,
        normalizer=tether.Normalizer(sequences=1),
    ).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_lines_of_the_page_name_functions():
    paths = re.findall(r"--custom-\S+-path (\S+)", "".join(blocks_of_page("slime")))
    assert len(paths) == 4
    for path in paths:  # as slime loads a function
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_objectives_by_name(slime):
    case = LOSS["cases"][9]
    assert case["settings"]["use_rollout_logprobs"]
    for name in ("ppo", "dapo", "topr", "rollout_is", "ppo_dual_clip"):
        changes = {"eps_clip_c": 1.5} if name == "ppo_dual_clip" else {}
        loss, gradient, metrics = run(case, getattr(adapter, name), **changes)
        batch, logits = batch_of(case)
        clips = {"epsilon_low": 0.2, "epsilon_high": 0.28}
        expected = tether.policy_token_losses(
            logits[..., 0],
            torch.cat(batch["advantages"]),
            torch.cat(batch["loss_masks"]),
            objective=name,
            old_logps=torch.cat(batch["rollout_log_probs"]),
            rollout_logps=torch.cat(batch["rollout_log_probs"]),
            offsets=torch.tensor([0, *batch["response_lengths"]]).cumsum(0),
            **(clips if name in ("ppo", "dapo", "ppo_dual_clip") else {}),
            **({"dual_clip": 1.5} if changes else {}),
        )
        names = ("total_lengths", "response_lengths", "loss_masks", "rollout_mask_sums")
        mean = mean_over(*(batch[each] for each in names), False)(expected)
        torch.testing.assert_close(loss, mean, rtol=0, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(mean, logits)[0], rtol=0, atol=0)
        assert metrics["pg_loss"] == mean.item()
    with pytest.raises(AttributeError, match=r"^module 'tether.slime' has no attribute 'dappo'$"):
        adapter.dappo  # noqa: B018


def test_pieces_of_answers(slime):
    """Where ranks hold pieces, slime's mean knows their masks; what looks at answers is refused."""
    slime.ranks = 2
    for case in LOSS["cases"][:3]:
        assert_same(case, *run(case))
    for function, changes, what in (
        (adapter.policy_loss, {"advantage_estimator": "gspo"}, "slime.gspo"),
        (adapter.policy_loss, {"use_opsm": True}, "use_opsm"),
        (adapter.topr, {}, "topr"),
        (adapter.vespo, {}, "vespo"),
    ):
        with pytest.raises(ValueError) as caught:
            run(case, function, **changes)
        assert str(caught.value) == (
            f"tether.slime: context_parallel_size must be 1 for {what}, which looks at whole "
            "answers, got 2"
        )


def test_a_rank_without_tokens(slime):
    """Backward runs, though nothing comes from the model."""
    case = LOSS["cases"][0]
    args = types.SimpleNamespace(**case["settings"])
    empty = [torch.zeros(0, dtype=torch.float64)] * 2
    batch = {"advantages": empty, "log_probs": empty}
    batch |= {"loss_masks": [torch.zeros(0)] * 2, "response_lengths": [0, 0]}
    batch |= {"total_lengths": [3, 3], "unconcat_tokens": None}
    found = {"log_probs": empty, "entropy": empty}
    slime.get_log_probs_and_entropy = lambda *_, **__: (None, found)
    logits = torch.ones(1, 4, 2, requires_grad=True)
    loss, _ = adapter.policy_loss(args, batch, logits, torch.sum)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@named(ADVANTAGES["cases"])
def test_advantages_equal_slime(case, slime):
    args = types.SimpleNamespace(**case["settings"])
    data = {name: [tensor(row).float() for row in each] if isinstance(each[0], list) else each
            for name, each in case["data"].items()}  # fmt: skip
    expected = [data.pop(name) for name in ("advantages", "returns")]
    adapter.compute_advantages(args, data)
    for name, rows in zip(("advantages", "returns"), expected, strict=True):
        assert len(data[name]) == len(rows)
        for found, row in zip(data[name], rows, strict=True):
            torch.testing.assert_close(found, row, rtol=2e-6, atol=1e-6)


def test_advantages_of_pieces_and_of_unknown_estimators(slime):
    slime.ranks = 2
    for case in ADVANTAGES["cases"]:
        args = types.SimpleNamespace(**case["settings"])
        data = {"kl": [torch.zeros(2)], "rewards": [1.0]}
        kind = args.advantage_estimator
        if kind in ("ppo", "reinforce_plus_plus"):
            with pytest.raises(ValueError) as caught:
                adapter.compute_advantages(args, data)
            assert str(caught.value) == (
                f"tether.slime: context_parallel_size must be 1 for {kind}, whose advantages look "
                "at whole answers, got 2"
            )
        else:
            adapter.compute_advantages(args, data)
    args.advantage_estimator = "gae"
    with pytest.raises(ValueError) as caught:
        adapter.compute_advantages(args, data)
    assert str(caught.value) == (
        "tether.slime: advantage_estimator must be cispo, grpo, gspo, ppo, reinforce_plus_plus or "
        'reinforce_plus_plus_baseline, got "gae"'
    )


def samples_of(groups, rewards):
    return [
        types.SimpleNamespace(
            group_index=group,
            response_length=2 + row,
            get_reward_value=lambda args, reward=reward: reward,
        )
        for row, (group, reward) in enumerate(zip(groups, rewards, strict=True))
    ]


def test_rewards_of_groups(slime):
    raw = [1.0, 0.0, 0.5, 2.0, -1.0]
    samples = samples_of([7, 3, 7, 3, 7], raw)
    for rule in ("grpo", "dr_grpo", "rloo", "opo"):
        lengths = torch.tensor([2, 3, 4, 5, 6]) if rule == "opo" else None
        groups = torch.tensor([7, 3, 7, 3, 7])
        expected = tether.advantage(rule, tensor(raw), groups=groups, lengths=lengths).advantages
        found = getattr(adapter, f"{rule}_rewards")(None, samples)
        assert found == (raw, expected.tolist())
    assert adapter.rloo_rewards(None, samples)[1][1] == -2.0
    with pytest.raises(ValueError) as caught:
        adapter.opo_rewards(None, samples_of([0, None], [1.0, 0.0]))
    assert str(caught.value) == (
        "tether.slime: group_index must be given for opo_rewards, got none"
    )


def test_another_version_is_refused(slime, monkeypatch):
    monkeypatch.setattr(_trainers, "version_of", lambda _: "0.4.0")
    calls = (
        lambda: run(LOSS["cases"][0]),
        lambda: adapter.compute_advantages(None, {}),
        lambda: adapter.rloo_rewards(None, []),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"^tether.slime: slime must be 0.3.1, got 0.4.0$"):
            call()


def test_the_recording_is_of_the_source_that_the_dialects_are_of():
    assert LOSS["slime"] == ADVANTAGES["slime"] == COMMIT
