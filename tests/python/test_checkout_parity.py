"""tether against the losses of slime, ROLL, NeMo-RL, prime-rl and open-instruct, as recorded by
tests/peers/record_checkouts.py.

ROLL's mean of tokens is over the sum of all slots, padding too; the test of it has both numbers.
"""

import math

import pytest
import tether
import torch
from recordings import (
    FLOAT32,
    assert_equal,
    batch_of,
    has_empty_rows,
    named,
    policy_loss,
    recording,
    sides,
    tensor,
    token_counts,
)

SLIME = recording("slime_policy")["cases"]
ROLL = recording("roll_policy")["cases"]
NEMO = recording("nemo_rl_policy")["cases"]
PRIME = recording("prime_rl_policy")["cases"]
OPEN = recording("open_instruct_policy")["cases"]
UNBOUNDED = {"truncated_importance": {"high": math.inf}}


# ---- slime ---------------------------------------------------------------------------------------


def slime_weights(settings):
    low, high = settings["tis_clip_low"], settings["tis_clip"]
    out = {"opsm": {"high": settings["opsm_delta"]}} if settings["use_opsm"] else {}
    if settings["use_tis"]:
        kind = "masked" if settings["custom_tis_function_path"] else "truncated"
        out[f"{kind}_importance"] = {"low": low, "high": high}
    return out


def slime(case):
    """The sum of the rows' means, or over their rollouts' tokens; or the sum of tokens."""
    settings, mask = case["settings"], torch.tensor(case["response_mask"])
    estimator = settings["advantage_estimator"]
    by_token = settings["calculate_per_token_loss"]
    out = {
        "objective": f"slime.{estimator}",
        "aggregation": "token_sum" if by_token else "sequence_mean_token_mean",
        "normalizer": tether.Normalizer(sequences=1),
        "weights": slime_weights(settings),
    }
    if estimator == "cispo":
        bounds = {
            "ratio_low": 1 - settings["eps_clip"],
            "ratio_high": 1 + settings["eps_clip_high"],
        }
        return out | bounds
    out |= {"epsilon_low": settings["eps_clip"], "epsilon_high": settings["eps_clip_high"]}
    out["dual_clip"] = settings["eps_clip_c"] or math.inf
    if settings["use_rollout_logprobs"]:
        out["old_logps"] = tensor(case["rollout_logps"])
    if settings["rollouts"]:
        rollouts, tokens = torch.tensor(settings["rollouts"]), mask.sum(1)
        of_rollout = [int(tokens[rollouts == each].sum()) for each in rollouts]
        out["row_tokens"] = tensor(of_rollout)
    if settings["use_kl_loss"]:
        kind = settings["kl_loss_type"].replace("low_var_kl", "k3")
        out |= {"kl_estimator": kind, "kl_gradient": kind, "beta": settings["kl_loss_coef"]}
        out |= {"kl_correction": "ratio" if settings["use_unbiased_kl"] else "none"}
        out |= {"allow_biased_gradient": True}
    return out


@named(SLIME)
def test_slime(case):
    exact = FLOAT32 if case["settings"]["use_kl_loss"] else {}
    assert_equal(case, *policy_loss(case, **slime(case)), **exact)


# ---- ROLL ----------------------------------------------------------------------------------------

ROLL_LEVELS = {
    "token": "token",
    "geometric": "sequence_mean",
    "sequence": "sequence_sum",
    "segment": "turn_mean",
}
(PADDED,) = [case for case in ROLL if case["settings"]["loss_agg_mode"] == "token-mean"]
(FLIPPED,) = [case for case in ROLL if case["settings"]["score_sign"] == -1]


def roll_weights(settings):
    out = {}
    if settings["is_weight"]:
        kind, high = settings["is_weight"]
        out["truncated_importance"] = {"high": high, "level": ROLL_LEVELS[kind]}
    gate = settings["filter"]
    if gate and gate.get("diff_enabled"):
        assert gate["diff_low"] == -gate["diff_high"]
        out["tv_gate"] = {"high": gate["diff_high"]}
    elif gate:
        bounds = {"low": gate["ratio_low"], "high": gate["ratio_high"]}
        out["ratio_gate"] = bounds | {"level": ROLL_LEVELS[gate["agg_type"]]}
    return out


def roll_surrogate(settings):
    options, variant = settings["options"], settings["variant"]
    if variant == "ppo":
        dual_clip = 1 + 2 * settings["pg_clip"] if settings["dual_clip_loss"] else math.inf
        low, high = settings["pg_clip_low"], settings["pg_clip_high"]
        out = {"objective": "ppo", "epsilon_low": low, "epsilon_high": high, "dual_clip": dual_clip}
        return out | {"level": "turn_mean" if settings["turns"] else "token"}
    if variant == "topr":
        weights = {
            f"weight_{x[:3]}": options.get(f"topr_{x}_weight", 1) for x in ("positive", "negative")
        }
        return {"objective": "roll.topr"} | weights
    level = {"level": "turn_token" if settings["turns"] else "token"}
    if variant == "tis":
        return {"objective": "roll.tis"} | level
    if variant == "cispo":
        low, high = (options.get(f"cispo_epsilon_{side}", 0.1) for side in ("low", "high"))
        return {"objective": "cispo", "ratio_low": 1 - low, "ratio_high": 1 + high} | level
    if variant == "kimi15":
        return {"objective": "dro", "tau": options.get("kimi15_tau", 0.1)}
    return {"objective": "reinforce"}


def roll(case):
    """ROLL counts what its filters take out, in rows; 1e-8 is added to these."""
    settings = case["settings"]
    rows = token_counts(torch.tensor(case["response_mask"]))["sequences"] + 1e-8
    weights, surrogate = roll_weights(settings), roll_surrogate(settings)
    if settings["options"].get("cispo_use_unified_mask"):
        epsilons = {"epsilon_low": 0.1, "epsilon_high": settings["options"]["cispo_epsilon_high"]}
        weights["clip_mask"] = epsilons
    mode = settings["loss_agg_mode"]
    out = {
        "seq-mean-token-sum": {"aggregation": "sequence_mean_token_sum"},
        "seq-mean-token-mean": {"aggregation": "sequence_mean_token_mean"},
        "seq-mean-token-sum-norm": {
            "aggregation": "sequence_sum_over_constant",
            "constant": len(case["logps"][0]),
        },
        "token-mean": {"aggregation": "token_mean"},
    }[mode]
    sequences = 1 if mode == "seq-mean-token-sum-norm" else rows
    if mode != "token-mean":
        out["normalizer"] = tether.Normalizer(sequences=sequences)
    penalty = {"beta": settings["kl_loss_coef"], "kl_estimator": "k3", "kl_gradient": "k3"}
    return out | surrogate | penalty | {"weights": weights}


@named([case for case in ROLL if case not in (PADDED, FLIPPED)])
def test_roll(case):
    assert_equal(case, *policy_loss(case, **roll(case)))


def test_padding_enters_rolls_mean_of_tokens_and_not_tethers():
    """The pull of Kimi's square, which no advantage of 0 silences."""
    batch, tau = batch_of(PADDED), PADDED["settings"]["options"].get("kimi15_tau", 0.1)
    mask = batch["response_mask"]
    pull = tau / 2 * (batch["logps"] - batch["old_logps"]).square()
    loss, gradient = policy_loss(PADDED, **roll(PADDED))
    expected = loss + pull[mask == 0].sum() / mask.sum()
    assert PADDED["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert abs(loss.item() / PADDED["loss"] - 1) > 1e-2
    active, peer = mask > 0, tensor(PADDED["dlogps"])
    torch.testing.assert_close(gradient[active], peer[active], rtol=1e-12, atol=1e-15)
    assert (gradient[~active] == 0).all() and (peer[~active] != 0).any()


def test_roll_tells_good_from_bad_by_the_score():
    """tether by the sign of the advantage. Of other scores ROLL's loss is REINFORCE of the good
    rows and CISPO up to 1 of the others."""
    good = tensor(FLIPPED["advantages"]) < 0
    mask, settings = torch.tensor(FLIPPED["response_mask"]), roll(FLIPPED)
    shared = {name: settings[name] for name in ("aggregation", "normalizer")}
    parts = [
        policy_loss(FLIPPED, objective=name, response_mask=mask * rows[:, None], **shared)
        for name, rows in (("reinforce", good), ("roll.tis", ~good))
    ]
    loss, gradient = (sum(each) for each in zip(*parts, strict=True))
    assert_equal(FLIPPED, loss, gradient)
    assert abs(policy_loss(FLIPPED, **settings)[0] / loss - 1) > 1e-2


# ---- NeMo-RL -------------------------------------------------------------------------------------


def nemo_weights(options):
    """seq-mask-tis weighs by the tokens' ratios what it keeps by the answer's geometric mean."""
    if not options["use_importance_sampling_correction"]:
        return {}
    kind = options["truncated_importance_sampling_type"]
    low = options["truncated_importance_sampling_ratio_min"] or 0
    high = options["truncated_importance_sampling_ratio"] or math.inf
    if kind == "icepop":
        return {"masked_importance": {"low": low, "high": high}}
    if kind == "seq-mask-tis":
        gate = {"low": low, "high": high, "level": "sequence_mean"}
        return UNBOUNDED | {"ratio_gate": gate}
    sequence = options["sequence_level_importance_ratios"]
    level = "sequence_sum" if sequence else "token"
    return {"truncated_importance": {"low": low, "high": high, "level": level}}


def nemo_name(options):
    if options["use_cispo"] or options["disable_ppo_ratio"]:
        return "cispo" if options["use_cispo"] else "reinforce"
    return "gspo" if options["sequence_level_importance_ratios"] else "grpo"


def nemo_surrogate(case):
    options = case["settings"]["options"]
    low, high = options["ratio_clip_min"], options["ratio_clip_max"]
    name = nemo_name(options)
    out = {"objective": f"nemo_rl.{name}"}
    if name == "reinforce":
        return out
    if name == "cispo":
        return out | {"ratio_low": 1 - low, "ratio_high": 1 + high}
    out |= {"epsilon_low": low, "epsilon_high": high}
    if options["force_on_policy_ratio"]:
        out["old_logps"] = None
    return out | {"dual_clip": options["ratio_clip_c"] or math.inf}


def nemo(case, *, penalty):
    """The surrogate with its weights, or the penalty alone, which no weight of NeMo-RL's sees."""
    options, step = case["settings"]["options"], case["settings"]["step"]
    by_token = options["token_level_loss"]
    shared = {
        "aggregation": "token_mean" if by_token else "sequence_mean_token_mean",
        "normalizer": tether.Normalizer(
            policy=step["global_valid_toks"], sequences=step["global_valid_seqs"]
        ),
    }
    if not penalty:
        return shared | nemo_surrogate(case) | {"weights": nemo_weights(options), "beta": 0}
    kind = options["reference_policy_kl_type"]
    engine = options["use_on_policy_kl_approximation"]
    return shared | {
        "objective": "nemo_rl.grpo",
        "advantages": torch.zeros(len(case["logps"]), dtype=torch.float64),
        "beta": options["reference_policy_kl_penalty"],
        "kl_estimator": kind,
        "kl_gradient": kind,
        "kl_correction": "rollout_ratio" if engine else "on_policy",
        "allow_biased_gradient": True,
    }


def likelihood(case):
    """VAPO's term of the good answers."""
    options, mask = case["settings"]["options"], torch.tensor(case["response_mask"])
    good = mask * (tensor(case["advantages"]) > 0)[:, None]
    ones = torch.ones(len(mask), dtype=torch.float64)
    loss, gradient = policy_loss(case, objective="reinforce", response_mask=good, advantages=ones)
    weight = options["positive_example_nll_weight"]
    return weight * loss, weight * gradient


@named(NEMO)
def test_nemo_rl(case):
    terms = [policy_loss(case, **nemo(case, penalty=False))]
    terms.append(policy_loss(case, **nemo(case, penalty=True)))
    if case["settings"]["options"]["positive_example_nll_weight"]:
        terms.append(likelihood(case))
    loss, gradient = (sum(each) for each in zip(*terms, strict=True))
    assert_equal(case, loss, gradient)


def test_the_dialects_defaults_are_nemo_rls():
    case = NEMO[0]
    assert case["name"] == "defaults"
    step = case["settings"]["step"]["global_valid_toks"]
    normalizer = tether.Normalizer(policy=step)
    assert_equal(case, *policy_loss(case, objective="nemo_rl.grpo", normalizer=normalizer))


# ---- prime-rl ------------------------------------------------------------------------------------


def prime(case):
    """Against the engine; its square of the log-ratio is twice k2."""
    loss, options = case["settings"]["loss"], case["settings"]["options"]
    out = {
        "objective": f"prime_rl.{loss}",
        "old_logps": tensor(case["rollout_logps"]),
        "advantages": options["adv_tau"] * tensor(case["advantages"]),
        "beta": 2 * options["kl_tau"],
    }
    if loss == "ipo":
        return out | {"weights": {"tv_band": {"high": options["ipo_threshold"]}}}
    bounds = {side: options[f"dppo_mask_{side}"] for side in ("low", "high")}
    return out | {"weights": {"tv_mask": bounds}}


@named(PRIME)
def test_prime_rl(case):
    assert_equal(case, *policy_loss(case, **prime(case)))


@pytest.mark.parametrize("loss", ["default", "ipo"])
def test_the_dialects_defaults_are_prime_rls(loss):
    case = next(each for each in PRIME if each["settings"]["loss"] == loss)
    rollout = tensor(case["rollout_logps"])
    assert_equal(case, *policy_loss(case, objective=f"prime_rl.{loss}", old_logps=rollout))


# ---- open-instruct -------------------------------------------------------------------------------


def open_surrogate(settings):
    low, high = settings["clip_lower"], settings["clip_higher"]
    if settings["loss_fn"] == "cispo":
        return {"objective": "cispo", "ratio_high": 1 + high, "aggregation": "token_mean"}
    return {"objective": "dapo", "epsilon_low": low, "epsilon_high": high}


def open_instruct(case):
    """What the mask takes out is counted, and the others have truncated weights; of answers both
    are of the geometric mean."""
    settings = case["settings"]
    tokens = token_counts(torch.tensor(case["response_mask"]))["policy"]
    out = open_surrogate(settings) | {"normalizer": tether.Normalizer(policy=tokens)}
    if not settings["use_rho_correction"]:
        return out
    level = {"level": "sequence_mean" if settings["rho_mask_sequence_level"] else "token"}
    low, high = (settings[f"rho_clamp_{side}_bound"] for side in ("lower", "upper"))
    weights = {"truncated_importance": {"low": low, "high": high} | level}
    low, high = (settings[f"rho_mask_{side}_bound"] for side in ("lower", "upper"))
    if settings["rho_mask_tv_divergence"]:
        weights["ratio_tv_gate"] = {"high": high}
    elif high:
        weights["ratio_gate"] = {"low": low, "high": high} | level
    return out | {"weights": weights}


def is_of_tv(case):
    return case["settings"]["rho_mask_tv_divergence"]


@named([case for case in OPEN if not is_of_tv(case)])
def test_open_instruct(case):
    assert_equal(case, *policy_loss(case, **open_instruct(case)))


@named([case for case in OPEN if is_of_tv(case)])
def test_open_instructs_gate_by_total_variation_takes_tokens(case):
    """Those that widen the gap, of an answer that is beyond the bound. ratio_tv_gate takes the
    answer, and counts a ratio above 2 as 2."""
    batch, high = batch_of(case), case["settings"]["rho_mask_upper_bound"]
    mask = batch["response_mask"]
    x = (batch["old_logps"] - batch["rollout_logps"]) * mask
    tokens = mask.sum(1).clamp(min=1)
    beyond = ((x.exp() - 1).abs().sum(1) / tokens > high)[:, None]
    widens = x * batch["advantages"][:, None] > 0
    assert (beyond & widens & (mask > 0)).any() and (beyond & ~widens & (mask > 0)).any()
    changes = open_instruct(case)
    gated = policy_loss(case, **changes)
    del changes["weights"]["ratio_tv_gate"]
    kept = (~(beyond & widens)).double()
    assert_equal(case, *policy_loss(case, **changes, token_weights=kept))
    left = ((x.exp().clamp(max=2) - 1).abs().sum(1) / tokens > high)[:, None]
    answers = (~left).double().expand(mask.shape)
    ungated = policy_loss(case, **changes, token_weights=answers)
    for actual, expected in zip(gated, ungated, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


# ---- what is recorded ----------------------------------------------------------------------------


def test_the_recordings_cover_what_differs():
    for name in ("slime", "roll", "nemo_rl", "prime_rl", "open_instruct"):
        head = recording(f"{name}_policy")
        assert len(head[name]) == 40  # of a commit
        assert has_empty_rows(head["cases"])
        assert name == "prime_rl" or len(sides(head["cases"], 0.8, 1.28)) == 6
    assert {case["settings"]["variant"] for case in ROLL} == {
        "vanilla", "ppo", "tis", "topr", "cispo", "kimi15"
    }  # fmt: skip
    assert {case["settings"]["advantage_estimator"] for case in SLIME} == {"grpo", "gspo", "cispo"}
