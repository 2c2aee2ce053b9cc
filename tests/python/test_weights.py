"""Weights of tokens: W S in place of the surrogate."""

import math

import pytest
import tether
import torch
from batches import assert_close, assert_same_bits, evaluated, packed, padded_batch, referenced

WEIGHTS = {
    "importance of tokens": {"truncated_importance": {"high": 1.3}},
    "importance of sequences": {"truncated_importance": {"low": 0.5, "level": "sequence_sum"}},
    "geometric mean": {"truncated_importance": {"level": "sequence_mean"}},
    "smallest": {"truncated_importance": {"level": "sequence_min"}},
    "largest": {"truncated_importance": {"level": "sequence_max", "high": 3}},
    "of turns": {"truncated_importance": {"level": "turn_mean"}},
    "sums of turns": {"masked_importance": {"level": "turn_sum", "low": 0.8}},
    "extremes of turns": {
        "truncated_importance": {"level": "turn_max"},
        "masked_importance": {"level": "turn_min"},
    },
    "gate of turns": {"ratio_gate": {"low": 0.8, "high": 1.5, "level": "turn_mean"}, "tv_mask": {}},
    "masked": {"masked_importance": {"low": 0.8, "high": 1.4}},
    "masked answers": {"masked_importance": {"level": "sequence_sum"}},
    "tv mask": {"tv_mask": {"low": 0.05, "high": 0.1}},
    "gate": {"ratio_gate": {"low": 0.7, "high": 1.6}},
    "gate of answers": {"ratio_gate": {"low": 0.9, "high": 1.2, "level": "sequence_mean"}},
    "veto": {"ratio_gate": {"low": 0.4, "high": 1e6, "level": "sequence_min"}},
    "gate and importance": {
        "ratio_gate": {"low": 0.7},
        "truncated_importance": {"level": "sequence_mean"},
    },
    "both": {"truncated_importance": {"level": "sequence_sum"}, "tv_mask": {"high": 0.1}},
    "kl mask": {"kl_mask": {"low": 0.01, "high": 0.02}},
    "tv band": {"tv_band": {"high": 0.05}},
    "clip mask": {"clip_mask": {"epsilon_high": 0.1}},
    "ring mask": {"ring_mask": {"far_low": 0.25, "far_high": 0.3}},
    "masked ratio": {"masked_ratio": {"low": 0.8, "high": 1.2}},
    "vespo": {"vespo": {"k_pos": 1.5}},
    "opsm": {"opsm": {"high": 0.01}},
    "uncertainty": {"uncertainty": {}},
    "self-distillation": {"self_distillation": {"mix": 0.25}},
    "k2 gate": {"k2_gate": {"high": 0.1}},
    "k3 gate of answers": {"k3_gate": {"high": 0.05, "level": "sequence_mean"}},
    "tv gate": {"tv_gate": {"high": 0.05}},
    "binary kl gate": {"binary_kl_gate": {"high": 0.01}},
    "ratio tv gate": {"ratio_tv_gate": {"high": 0.25}},
}
IMPORTANCE = WEIGHTS["importance of tokens"]


def on_wire(weights):
    """As tether.reference takes them."""
    out = {}
    for name, options in weights.items():
        out[name] = options.get("level", tether.weights()[name].level)
        out |= {f"{name}.{k}": value for k, value in options.items() if k != "level"}
    return out


def batches():
    batch = padded_batch()
    fractional = batch | {"response_mask": batch["response_mask"] * 0.5}
    return {"padded": batch, "packed": packed(batch), "fractional": fractional}


@pytest.mark.parametrize("batch", batches())
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("objective", ["ppo", "gspo", "gmpo", "cispo", "kimi", "topr", "dppo_tv"])
def test_equal_the_reference(objective, weights, batch):
    batch, weights = batches()[batch], WEIGHTS[weights]
    settings = {"objective": objective, "beta": 0.1}
    actual = evaluated(batch, 1.7, weights=weights, **settings)
    expected = referenced(batch, 1.7, **on_wire(weights), **settings)
    assert_close(actual, expected, 1e-12)


# Those that move with the policy otherwise than by steps.
MOVING = {"masked ratio", "vespo", "uncertainty", "self-distillation"}


@pytest.mark.parametrize("weights", sorted(set(WEIGHTS) - MOVING))
def test_gradient_is_that_of_the_value_with_the_weights_held(weights):
    batch = padded_batch(poison=0.0)
    settings = {"objective": "gspo", "beta": 0.1, "epsilon_low": 0.3, "epsilon_high": 0.3}
    slopes = evaluated(batch, weights=WEIGHTS[weights], **settings).dlogps
    # Beside those of the loss, logps moves W alone, and masks by steps.
    for place in batch["response_mask"].nonzero().tolist()[::5]:
        ends = []
        for step in (1e-6, -1e-6):
            logps = batch["logps"].clone()
            logps[tuple(place)] += step
            moved = batch | {"logps": logps}
            ends.append(tether.policy_loss(**moved, weights=WEIGHTS[weights], **settings).loss)
        slope = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(slope, slopes[tuple(place)], rtol=0, atol=1e-8)


def test_packed_rows_and_any_threads_have_the_same_bits():
    batch = padded_batch(dtype=torch.float32, lengths=(700, 3, 0, 1500, 64), columns=1500)
    threads = torch.get_num_threads()
    for weights in WEIGHTS.values():
        expected = evaluated(batch, weights=weights)
        out = evaluated(packed(batch), weights=weights)
        padded_gradient = torch.zeros_like(batch["logps"])
        padded_gradient[batch["response_mask"]] = out.dlogps
        assert_same_bits(out._replace(dlogps=padded_gradient), expected)
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_same_bits(evaluated(batch, weights=weights), expected)
        torch.set_num_threads(threads)


def test_weights_of_a_token_that_is_not_finite_spoil_it():
    for evaluate, weights in ((evaluated, {"weights": IMPORTANCE}), (referenced, IMPORTANCE)):
        settings = on_wire(IMPORTANCE) if evaluate is referenced else weights
        for broken in (math.nan, math.inf, -math.inf):
            batch = padded_batch()
            plain = evaluate(batch, **settings)
            place = tuple(batch["response_mask"].nonzero()[3].tolist())
            batch["rollout_logps"][place] = broken
            out = evaluate(batch, **settings)
            assert out.loss.isnan()
            assert out.dlogps[place].isnan()
            assert tether.PolicyMetrics(out.sums, out.maxima).to_dict()["nonfinite"] == 1
            same = torch.ones_like(out.dlogps, dtype=torch.bool)
            same[place] = False
            torch.testing.assert_close(out.dlogps[same], plain.dlogps[same], rtol=0, atol=0)


@pytest.mark.parametrize("weights", ["importance of tokens", "importance of sequences"])
@pytest.mark.parametrize("objective", ["ppo", "gspo", "rloo", "gspo_token"])
def test_a_clip_does_not_hide_what_is_broken(objective, weights):
    batch = padded_batch(lengths=(2, 2), columns=2)
    batch["advantages"] = torch.ones(2, dtype=torch.float64)
    batch["old_logps"] = batch["logps"] - 3  # beyond the clip
    batch["rollout_logps"][0, 1] = math.nan
    weights = WEIGHTS[weights]
    out = evaluated(batch, objective=objective, weights=weights)
    expected = referenced(batch, objective=objective, **on_wire(weights))
    assert out.loss.isnan() and expected.loss.isnan()
    assert torch.equal(out.dlogps.isnan(), expected.dlogps.isnan())
    assert out.dlogps[0, 1].isnan() and not out.dlogps[1].isnan().any()


def test_the_reference_refuses_what_it_does_not_know():
    with pytest.raises(ValueError) as caught:
        tether.reference.policy_loss(**padded_batch(), truncated_importance="sequence")
    assert str(caught.value) == (
        "policy_loss: truncated_importance must be one of none, token, sequence_mean, "
        "sequence_sum, sequence_min, sequence_max, turn_mean, turn_sum, turn_min, turn_max, "
        'got "sequence"'
    )
    with pytest.raises(TypeError, match=r"truncated_importance\.high"):
        tether.reference.policy_loss(**padded_batch(), **{"truncated_importance.high": 1.5})


def test_penalty_entropies_and_denominators_do_not_see_them():
    batch = padded_batch(poison=0.0)
    entropies = torch.rand_like(batch["logps"])
    settings = {"beta": 0.3, "entropy_coef": 0.2, "entropies": entropies}
    none = {"tv_mask": {"low": 0, "high": 0}}
    moved = batch | {"old_logps": batch["logps"] - 1, "advantages": torch.ones(5).double()}
    loss, metrics = tether.policy_loss(**moved, weights=none, **settings)
    plain = tether.policy_loss(**moved, **settings).metrics.to_dict()
    after = metrics.to_dict()
    assert after["weight_zero_fraction"] == 1
    assert after["policy_loss"] == after["weight_mean"] == after["weight_ess"] == 0
    weight_names = ("policy_loss", *(name for name in after if name.startswith("weight")))
    for name in after.keys() - set(weight_names):
        assert after[name] == plain[name], name
    kept = tether.policy_loss(**moved | {"advantages": torch.zeros(5).double()}, **settings).loss
    torch.testing.assert_close(loss, kept, rtol=1e-15, atol=0)
    counts = tether.local_counts(**moved, weights=none)
    assert counts == tether.local_counts(**moved)


def test_what_leaves_is_out_of_the_mask():
    """Each gate gives what the mask without its tokens gives, in every part, bit by bit."""
    batch = padded_batch(lengths=(9, 4, 0, 7, 8))
    settings = {"beta": 0.3, "entropy_coef": 0.2}
    settings["entropies"] = torch.rand_like(batch["logps"])
    x = batch["old_logps"] - batch["rollout_logps"]
    tokens = batch["response_mask"] & (x.exp() >= 0.7) & (x.exp() <= 1.6)
    means = torch.where(batch["response_mask"], x, 0).sum(1) / batch["response_mask"].sum(1)
    rows = batch["response_mask"] & ((means.exp() >= 0.9) & (means.exp() <= 1.2))[:, None]
    for gate, left in (("gate", tokens), ("gate of answers", rows)):
        assert 0 < left.sum() < batch["response_mask"].sum()
        for objective in tether.objectives():
            by_hand = evaluated(batch | {"response_mask": left}, objective=objective, **settings)
            gated = evaluated(batch, objective=objective, weights=WEIGHTS[gate], **settings)
            assert_same_bits(gated, by_hand)
        counts = tether.local_counts(**batch, weights=WEIGHTS[gate])
        assert counts.policy == counts.kl == left.sum()
        assert counts.sequences == left.any(1).sum()


@pytest.mark.parametrize("kernel", [True, False])
def test_what_leaves_may_not_be_nan_and_compares_constants(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    for function in ("policy_loss", "policy_token_losses", "local_counts"):
        with pytest.raises(ValueError) as caught:
            call = padded_batch() | {"old_logps": None}
            getattr(tether, function)(**call, weights=WEIGHTS["gate"])
        assert str(caught.value) == (
            f"{function}: old_logps must be given for the weight ratio_gate, got none"
        )
    batch = padded_batch()
    place = tuple(batch["response_mask"].nonzero()[3].tolist())
    batch["rollout_logps"][place] = -math.inf
    for gate in ("gate", "gate of answers"):
        if not kernel:
            assert tether.policy_loss(**batch, weights=WEIGHTS[gate]).loss.isnan()
            continue
        first = list(place) if gate == "gate" else [place[0], 0]
        for function in ("policy_loss", "policy_token_losses", "local_counts"):
            with pytest.raises(ValueError) as caught:
                getattr(tether, function)(**batch, weights=WEIGHTS[gate])
            assert str(caught.value) == (
                f"{function}: weights that take tokens out, ratio_gate, must be numbers, got nan "
                f"at {first}"
            )


@pytest.mark.parametrize("gate", ["sequence_mean", "turn_mean"])
@pytest.mark.parametrize("level", ["token", "sequence_sum", "turn_mean"])
def test_the_head_takes_them(level, gate):
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden, weight, targets = normal(5, 9, 4), normal(13, 4), torch.arange(45).view(5, 9) % 13
    batch = padded_batch()
    del batch["logps"]
    weights = {"truncated_importance": {"level": level}, "tv_mask": {"high": 0.05}}
    weights["ratio_gate"] = {"low": 0.8, "level": gate}
    leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
    out = tether.linear_policy_loss(*leaves, targets, **batch, weights=weights, chunk_bytes=700)
    out.loss.backward()
    whole = [each.clone().requires_grad_() for each in (hidden, weight)]
    logps = tether.token_logps(whole[0] @ whole[1].T, targets).logps
    want = tether.policy_loss(logps, **batch, weights=weights)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.metrics.sums, want.metrics.sums, rtol=1e-10, atol=1e-10)
    for a, b in zip(leaves, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_losses_of_tokens_have_them():
    batch = padded_batch()
    settings = {"weights": WEIGHTS["both"], "aggregation": "token_sum", "beta": 0.1}
    each = tether.policy_token_losses(**batch, **settings)
    torch.testing.assert_close(each.sum(), tether.policy_loss(**batch, **settings).loss)


def test_are_listed():
    row = tether.weights()["truncated_importance"]
    assert row.options["high"].default == 2
    of = ("mean", "sum", "min", "max")
    levels = ("token", *(f"{segment}_{each}" for segment in ("sequence", "turn") for each in of))
    assert row.levels == levels == tuple(tether.reference.weights.WEIGHT_LEVELS)
    assert set(tether.reference.WEIGHTS) == set(tether.weights())
    assert "tv_mask" not in tether.objectives()["grpo"].choices


WRONG = {
    f'weights must be of {", ".join(tether.weights())}, got "tis". Did you mean '
    "truncated_importance?": {"tis": {}},
    "weights of tv_mask must be a dict of its options, got float": {"tv_mask": 0.2},
    "truncated_importance.high must be greater than 0, got 0": {
        "truncated_importance": {"high": 0}
    },
    'tv_mask.level must be one of token, sequence_mean, sequence_sum, sequence_min, sequence_max, turn_mean, turn_sum, turn_min, turn_max, got "row"': {  # noqa: E501
        "tv_mask": {"level": "row"}
    },
    'weights of tv_mask must be of low, high, level, got "hi"': {"tv_mask": {"hi": 0.1}},
    'weights of tv_mask must be of low, high, level, got "mode"': {"tv_mask": {"mode": "x"}},
    "truncated_importance.low must be in [0, 1e+12], got inf": {
        "truncated_importance": {"low": math.inf, "high": math.inf}
    },
    "truncated_importance.low must be at most truncated_importance.high 2, got 3": {
        "truncated_importance": {"low": 3}
    },
}


@pytest.mark.parametrize("function", ["policy_loss", "policy_token_losses", "local_counts"])
@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("kernel", [True, False])
def test_wrong_ones_are_refused(function, message, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(tether, function)(**padded_batch(), weights=WRONG[message])
    assert str(caught.value) == f"{function}: {message}"


@pytest.mark.parametrize("kernel", [True, False])
def test_their_arrays_must_be_there(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)
    batch = padded_batch() | {"rollout_logps": None}
    for function in ("policy_loss", "policy_token_losses"):
        with pytest.raises(ValueError) as caught:
            getattr(tether, function)(**batch, weights=IMPORTANCE)
        assert str(caught.value) == (
            f"{function}: rollout_logps must be given for the weight truncated_importance, got none"
        )
    with pytest.raises(TypeError) as caught:
        tether.policy_loss(**batch, weights=["tv_mask"])
    assert str(caught.value) == (
        "policy_loss: weights must be a list of those of tether.weight, or a dict, got str in it"
    )
