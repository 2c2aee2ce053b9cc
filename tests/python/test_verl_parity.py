"""tether.policy_loss against verl's own losses, as recorded by tests/peers/record_verl.py.

The two differ on purpose beyond a log-ratio of +-20 (gspo: above 10): verl clamps it there, and its
gradient ends.
"""

import json
import pathlib

import pytest
import tether
import torch

RECORDING = json.loads(
    (pathlib.Path(__file__).parent.parent / "golden/peers/verl_policy.json").read_text()
)
WEIGHTED = json.loads(
    (pathlib.Path(__file__).parent.parent / "golden/peers/verl_weights.json").read_text()
)["cases"]
CASES = [case for case in RECORDING["cases"] if "beyond" not in case["name"]]
(BEYOND,) = [case for case in RECORDING["cases"] if "beyond" in case["name"]]


def objective(settings):
    clips = settings["clips"]
    low, high = clips.get("clip_ratio_low"), clips.get("clip_ratio_high")
    return {
        "vanilla": {"objective": "ppo_dual_clip", "epsilon_low": low, "epsilon_high": high,
                    "dual_clip": clips.get("clip_ratio_c")},
        "gspo": {"objective": "gspo_token", "epsilon_low": low, "epsilon_high": high},
        "cispo": {"objective": "cispo", "ratio_low": 1 - (low or 0), "ratio_high": 1 + (high or 0)},
        "reinforce": {"objective": "reinforce"},
        "dppo_tv": {"objective": "dppo_tv", "ratio_high": clips.get("clip_ratio_c"),
                    "weights": {"tv_mask": {"low": low, "high": high}}},
        "dppo_kl": {"objective": "dppo_kl", "ratio_high": clips.get("clip_ratio_c"),
                    "weights": {"kl_mask": {"low": low, "high": high}}},
        "sapo": {"objective": "sapo", "tau_pos": clips.get("tau_pos"),
                 "tau_neg": clips.get("tau_neg")},
        "gpg": {"objective": "gpg"},
        "dro": {"objective": "dro", "tau": clips.get("dro_beta")},
        "geo_mean": {"objective": "gmpo", "log_ratio_low": low, "log_ratio_high": high},
    }[settings["loss"]]  # fmt: skip


def aggregation(settings, mask):
    """verl's mode and its denominators, of the step or else of the batch; sapo has a mode of its
    own, geo_mean a mean over the rows of the batch, empty ones too."""
    if settings["loss"] == "geo_mean":
        return {"normalizer": tether.Normalizer(sequences=len(mask))}
    step, mode = settings["step"], settings["loss_agg_mode"]
    mode = "seq-mean-token-mean" if settings["loss"] == "sapo" else mode
    ranks = step.get("dp_size", 1)
    tokens = step.get("batch_num_tokens", int(mask.sum()))
    sequences = step.get("global_batch_size", int((mask.sum(1) > 0).sum()))
    normalizer = tether.Normalizer(policy=tokens, sequences=sequences, world_size=ranks)
    if mode == "token-mean":
        return {"aggregation": "token_mean", "normalizer": normalizer}
    if mode == "token-sum":  # a mean times its denominator
        total = tether.Normalizer(policy=tokens, world_size=ranks * tokens)
        return {"aggregation": "token_mean", "normalizer": total}
    if mode == "seq-mean-token-sum":
        return {"aggregation": "sequence_mean_token_sum", "normalizer": normalizer}
    if mode == "seq-mean-token-sum-norm":
        return {"aggregation": "sequence_sum_over_constant", "normalizer": normalizer,
                "constant": step.get("loss_scale_factor", mask.shape[1])}  # fmt: skip
    assert mode == "seq-mean-token-mean"
    return {"aggregation": "sequence_mean_token_mean", "normalizer": normalizer}


def weights(settings):
    """verl's threshold is a number, or bounds outside of which a weight is 0. Those of a rejection
    are of the inverse ratio, or of k2 and k3."""
    if "rollout_rs" in settings:
        level, _, statistic = settings["rollout_rs"].rpartition("_")
        level = {"token": "token"}.get(level, level.replace("seq", "sequence"))
        if statistic != "k1":
            gate = {"high": float(settings["threshold"]), "level": level}
            return {"weights": {f"{statistic}_gate": gate}}
        low, high = map(float, settings["threshold"].split("_"))
        return {"weights": {"ratio_gate": {"low": 1 / high, "high": 1 / low, "level": level}}}
    if "rollout_is" not in settings:
        return {}
    level = {"token": "token", "sequence": "sequence_sum"}[settings["rollout_is"]]
    if isinstance(settings["threshold"], float):
        bounds = {"high": settings["threshold"]}
        return {"weights": {"truncated_importance": bounds | {"level": level}}}
    low, high = map(float, settings["threshold"].split("_"))
    return {"weights": {"masked_importance": {"low": low, "high": high, "level": level}}}


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def evaluated(case):
    settings, mask = case["settings"], torch.tensor(case["response_mask"])
    kept = torch.tensor(case.get("kept", case["response_mask"]))
    log_prob = tensor(case["log_prob"]).requires_grad_()
    loss, _ = tether.policy_loss(
        log_prob,
        tensor(case["advantages"]),
        mask,
        old_logps=tensor(case["old_log_prob"]),
        rollout_logps=tensor(case["rollout_log_prob"]) if "rollout_log_prob" in case else None,
        **weights(settings),
        **objective(settings),
        **aggregation(settings, kept),
    )
    loss.backward()
    return loss.item(), log_prob.grad


@pytest.mark.parametrize("case", CASES + WEIGHTED, ids=lambda case: case["name"])
def test_value_and_gradient_equal_verl(case):
    loss, gradient = evaluated(case)
    assert loss == pytest.approx(case["loss"], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(gradient, tensor(case["dlog_prob"]), rtol=1e-12, atol=1e-15)


def test_beyond_a_log_ratio_of_20_only_tether_has_a_gradient():
    _, gradient = evaluated(BEYOND)
    log_ratio = tensor(BEYOND["log_prob"]) - tensor(BEYOND["old_log_prob"])
    beyond, peer = log_ratio.abs() > 20, tensor(BEYOND["dlog_prob"])
    assert beyond.sum() == 2
    torch.testing.assert_close(gradient[~beyond], peer[~beyond], rtol=1e-12, atol=0)
    assert (peer[beyond] == 0).all()
    expected = -log_ratio.exp() * tensor(BEYOND["advantages"])
    torch.testing.assert_close(gradient[beyond], expected[beyond], rtol=1e-12, atol=0)


def test_the_recording_covers_what_differs():
    settings = [case["settings"] for case in CASES]
    assert RECORDING["verl"] == "0.9.1"
    losses, modes = ({each[name] for each in settings} for name in ("loss", "loss_agg_mode"))
    of_one_mode = {"sapo", "gpg", "dro", "geo_mean"}
    assert losses == {"vanilla", "gspo", "cispo", "reinforce"} | of_one_mode
    assert len(modes) == 5
    # Of the batch, of a step.
    assert len(settings) == 4 * len(modes) * 2 + len(of_one_mode) * 2
    assert any(not any(row) for case in CASES for row in case["response_mask"])
    vanilla = [case for case in CASES if case["settings"]["loss"] == "vanilla"]
    ratios = [
        (tensor(case["log_prob"]) - tensor(case["old_log_prob"])).exp()[
            (torch.tensor(case["response_mask"]) > 0) & (tensor(case["advantages"]) < 0)
        ]
        for case in vanilla
    ]
    assert (torch.cat(ratios) > 1.5).any()  # the dual clip
