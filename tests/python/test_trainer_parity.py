"""tether against the losses of Trinity-RFT, AReaL, SkyRL and UniRL, as recorded by
tests/peers/record_trainers.py and record_unirl.py."""

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

TRINITY = recording("trinity_policy")
AREAL = recording("areal_policy")
M2PO = recording("areal_m2po")
SKYRL = recording("skyrl_policy")
UNIRL = recording("unirl_policy")
AGGREGATIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean_token_mean"}


# ---- Trinity-RFT ---------------------------------------------------------------------------------


def rec(options):
    """The mask by clip_mode. With importance sampling the surrogate is cispo's without bounds; the
    k2 of its penalty is without 1/2."""
    epsilons = {name: options[name] for name in ("epsilon_low", "epsilon_high")}
    mode = options["clip_mode"]
    far = {"far_low": options["epsilon_low_prime"], "far_high": options["epsilon_high_prime"]}
    masks = {
        "none": {},
        "one-side": {"clip_mask": epsilons},
        "two-side": {"ring_mask": epsilons | {"far_low": 1, "far_high": math.inf}},
        "ring": {"ring_mask": epsilons | far},
        "gspo-one-side": {"clip_mask": epsilons | {"level": "sequence_mean"}},
    }
    out = {"objective": "reinforce", "weights": masks[mode]}
    if options.get("weight") == "importance_sampling":
        out |= {"objective": "cispo", "ratio_low": 0, "ratio_high": math.inf}
    if mode == "gspo-one-side":
        out["aggregation"] = "sequence_mean_token_mean"
    if options.get("regularizer") == "k2":
        k2 = {"kl_estimator": "k2", "kl_gradient": "k2", "kl_reference": "old"}
        out |= {"beta": 2 * options["regularizer_coef"], **k2}
    return out


def trinity(case):
    loss, options = case["settings"]["loss"], case["settings"]["options"]
    if loss == "rec":
        return rec(options)
    if loss == "topr":
        return {"objective": "roll.topr"}
    if loss == "opmd":
        return {
            "objective": "reinforce",
            "advantages": tensor(case["advantages"]) / (1 + options["tau"]),
        }
    if loss == "phi":
        ones = torch.ones(len(case["logps"]), dtype=torch.float64)
        return {"objective": "reinforce", "weights": {"uncertainty": {}}, "advantages": ones}
    if loss == "cispo":
        bounds = (1 - options.get("clip_range_low", 1), 1 + options.get("clip_range_high", 0.28))
        out = {"objective": "cispo", "ratio_low": bounds[0], "ratio_high": bounds[1]}
        if options.get("enable_mask_clip"):
            low, high = (options[f"mask_clip_range_{side}"] for side in ("low", "high"))
            out["weights"] = {"clip_mask": {"epsilon_low": low, "epsilon_high": high}}
        return out
    low, high = (
        options.get(f"clip_range_{side}", options.get("clip_range")) for side in ("low", "high")
    )
    if loss == "gspo":
        return {"objective": "gspo_token", "epsilon_low": low, "epsilon_high": high}
    out = {"objective": "ppo_dual_clip", "epsilon_low": low, "epsilon_high": high}
    if options.get("enable_sequence_masking"):
        out["weights"] = {"opsm": {"high": options["delta_sequence_masking"]}}
    return out | {"dual_clip": options.get("clip_ratio_c", 3.0)}


@named(TRINITY["cases"])
def test_trinity(case):
    """Rows without tokens count as sequences."""
    changes = {"aggregation": "token_mean"}
    if case["settings"]["loss"] == "gspo":
        changes["aggregation"] = "sequence_mean_token_mean"
    mode = case["settings"]["options"].get("loss_agg_mode")
    changes |= trinity(case) | ({"aggregation": AGGREGATIONS[mode]} if mode else {})
    mask = torch.tensor(case["response_mask"])
    normalizer = tether.Normalizer(policy=int(mask.sum()), sequences=len(mask))
    assert_equal(case, *policy_loss(case, normalizer=normalizer, **changes))


PRESETS = {"rec_one_side": "one-side", "rec_two_side": "two-side", "rec_ring": "ring"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_are_trinitys_rec(name):
    (case,) = [
        each
        for each in TRINITY["cases"]
        if each["settings"]["options"].get("clip_mode") == PRESETS[name]
        and each["settings"]["options"].get("weight") == "none"
    ]
    weights = rec(case["settings"]["options"])["weights"]
    assert_equal(case, *policy_loss(case, objective=name, weights=weights))


# ---- AReaL ---------------------------------------------------------------------------------------


def areal(case):
    """old_logps are the proximal policy's, the engine the behaviour. What a gate of AReaL takes out
    is counted, and its importance weight stays with the others: at the level of sequences with
    ratios the geometric mean, else the token's."""
    options, gate = case["settings"]["options"], case["settings"].get("gate")
    of_answers = options.get("importance_sampling_level") == "sequence"
    out = {
        "objective": "ppo" if gate is None else "decoupled_ppo",
        "level": "sequence_mean" if of_answers else "token",
        "epsilon_low": options["eps_clip"],
        "epsilon_high": options["eps_clip_higher"],
        "dual_clip": options.get("c_clip") or math.inf,
        "normalizer": tether.Normalizer(
            policy=token_counts(torch.tensor(case["response_mask"]))["policy"]
        ),
    }
    return out if gate is None else out | {"weights": areal_weights(gate)}


def areal_weights(gate):
    low, high = gate["lower"] or 0, gate["upper"]
    sequence = gate["level"] == "sequence"
    if gate["metric"] == "ratio":
        importance = {"level": "sequence_mean" if sequence else "token"}
        if gate["action"] == "clamp":
            return {"truncated_importance": {"low": low, "high": high} | importance}
        level = f"sequence_{gate['agg']}" if sequence else "token"
        gates = {"ratio_gate": {"low": low, "high": high, "level": level}}
        return {"truncated_importance": {"high": math.inf} | importance} | gates
    level = f"sequence_{gate['agg']}" if sequence else "token"
    name = gate["metric"].replace("kl_", "") + "_gate"
    return {name: {"high": high, "level": level}, "truncated_importance": {"high": math.inf}}


def is_of_k3(case):
    return (case["settings"]["gate"] or {}).get("metric") == "kl_k3"


@named([case for case in AREAL["cases"] if not is_of_k3(case)])
def test_areal(case):
    exact = {} if case["settings"]["gate"] is None else FLOAT32
    assert_equal(case, *policy_loss(case, **areal(case)), **exact)


@named([case for case in AREAL["cases"] if is_of_k3(case)])
def test_areals_k3_is_of_the_inverse_ratio(case):
    """AReaL documents r - log r - 1 of r = proximal / behaviour, as k3_gate has it, and takes it of
    1 / r: other answers leave."""
    gate, batch = case["settings"]["gate"], batch_of(case)
    mask = batch["response_mask"]
    x = batch["old_logps"] - batch["rollout_logps"]

    def of_answers(k3):
        k3 = k3 * mask
        return k3.amax(1) if gate["agg"] == "max" else k3.sum(1) / mask.sum(1).clamp(min=1)

    documented, inverse = of_answers(x.exp() - 1 - x), of_answers((-x).exp() - 1 + x)
    assert ((documented <= gate["upper"]) != (inverse <= gate["upper"])).any()
    assert (documented > gate["upper"]).any() and (inverse > gate["upper"]).any()
    changes = areal(case)
    ungated = changes | {"weights": {"truncated_importance": {"high": math.inf}}}
    for statistic, actual in ((documented, changes), (inverse, None)):
        kept = mask * (statistic <= gate["upper"])[:, None]
        expected = policy_loss(case, **ungated | {"response_mask": kept})
        if actual is None:
            assert_equal(case, *expected, **FLOAT32)
        else:
            loss, gradient = policy_loss(case, **actual)
            torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(gradient, expected[1], rtol=1e-12, atol=0)


@named(M2PO["cases"])
def test_m2po_equals_areal(case):
    threshold, batch = case["settings"]["threshold"], batch_of(case)
    arrays = {
        name: batch[name] for name in ("logps", "response_mask", "old_logps", "rollout_logps")
    }
    mask = batch["response_mask"] * tether.batch_weights("m2po", **arrays, threshold=threshold)
    assert torch.equal(mask, tensor(case["kept"]))
    changes = areal(case) | {"response_mask": mask}
    changes["normalizer"] = None
    assert_equal(case, *policy_loss(case, **changes))


def test_m2po_leaves_all_some_and_one():
    counts = [(sum(map(sum, c["kept"])), sum(map(sum, c["response_mask"]))) for c in M2PO["cases"]]
    assert counts[-1][0] == counts[-1][1] and counts[-2][0] == 1
    assert sum(1 < kept < all_of_them for kept, all_of_them in counts) >= 2


# ---- SkyRL: sums, of ratios of float32 -----------------------------------------------------------


def skyrl_weights(correction):
    out = {}
    if correction.get("tis_ratio_type"):
        kind = correction["tis_ratio_type"]
        level = {"token": "token", "sequence": "sequence_sum"}[kind]
        out["truncated_importance"] = {
            "high": correction[f"{kind}_tis_ratio_clip_high"],
            "level": level,
        }
    gates = [
        ("outlier_token_is_threshold_low", None, "sequence_min"),
        (None, "outlier_token_is_threshold_high", "sequence_max"),
        ("token_mask_is_threshold_low", "token_mask_is_threshold_high", "token"),
        ("geo_mask_low", "geo_mask_high", "sequence_mean"),
        ("product_mask_low", "product_mask_high", "sequence_sum"),
    ]
    for low, high, level in gates:
        if (low or high) in correction:
            bounds = {"low": correction.get(low, 0), "high": correction.get(high, math.inf)}
            out["ratio_gate"] = bounds | {"level": level}
    return out


def skyrl(case):
    settings = case["settings"]
    loss, options = settings["loss"], settings["options"]
    epsilons = {f"epsilon_{side}": options[f"eps_clip_{side}"] for side in ("low", "high")}
    rollout = tensor(case["rollout_logps"])
    if loss == "dppo":
        given = options["dppo"]
        mask = {"low": given["delta_low"], "high": given["delta_high"]}
        weights = {{"binary_tv": "tv_mask", "binary_kl": "kl_mask"}[given["dppo_type"]]: mask}
        return {"objective": "linear", "weights": weights, "old_logps": rollout}
    if loss == "rollout_is":
        bounds = {"low": 1 - options["eps_clip_low"], "high": 1 + options["eps_clip_high"]}
        weights = {"masked_ratio": bounds}
        return {"objective": "skyrl.rollout_is", "weights": weights, "old_logps": rollout}
    if loss == "cispo":
        bounds = options["cispo"]
        low, high = 1 - bounds["cispo_eps_clip_low"], 1 + bounds["cispo_eps_clip_high"]
        return {"objective": "cispo", "ratio_low": low, "ratio_high": high}
    return {
        "regular": {"objective": "ppo"} | epsilons,
        "dual_clip": {"objective": "ppo", "dual_clip": options["clip_ratio_c"]} | epsilons,
        "sapo": {"objective": "sapo"} | options.get("sapo", {}),
        "gspo": {"objective": "gspo_token"} | epsilons,
        "importance_sampling": {"objective": "linear"},
        "cross_entropy": {
            "objective": "reinforce",
            "advantages": torch.ones(len(case["logps"]), dtype=torch.float64),
        },
    }[loss]


OF_FLOAT64 = ("sapo", "gspo", "importance_sampling", "cross_entropy")


@named(SKYRL["cases"])
def test_skyrl(case):
    changes = skyrl(case)
    weights = changes.pop("weights", {}) | skyrl_weights(case["settings"]["correction"])
    loss, gradient = policy_loss(case, aggregation="token_sum", weights=weights, **changes)
    exact = {} if case["settings"]["loss"] in OF_FLOAT64 else FLOAT32
    assert_equal(case, loss, gradient, **exact)


# ---- what is recorded ----------------------------------------------------------------------------


# ---- UniRL ---------------------------------------------------------------------------------------


def unirl(case):
    loss, epsilon = case["settings"]["loss"], case["settings"]["epsilon"]
    objective = {"drpo": "drpo", "spo": "cfpo"}[loss]
    return {"objective": objective, "epsilon": epsilon, "aggregation": "token_mean"}


@named(UNIRL["cases"])
def test_unirl(case):
    assert_equal(case, *policy_loss(case, **unirl(case)))


def test_the_recordings_cover_what_differs():
    assert (TRINITY["trinity-rft"], AREAL["areal"], SKYRL["skyrl"]) == ("0.6.0", "1.0.4", "0.3.0")
    assert M2PO["areal"] == "1.0.4"
    for cases in (TRINITY["cases"], AREAL["cases"], SKYRL["cases"], M2PO["cases"]):
        assert has_empty_rows(cases)
        assert cases is M2PO["cases"] or len(sides(cases, 0.8, 1.28)) == 6
    assert len({case["settings"]["loss"] for case in SKYRL["cases"]}) == 9
    assert len({case["settings"]["loss"] for case in TRINITY["cases"]}) == 7
