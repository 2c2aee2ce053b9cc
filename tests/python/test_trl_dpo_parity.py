"""tether.preference_loss against TRL's own, as recorded by tests/peers/record_trl_dpo.py."""

import json
import pathlib

import pytest
import tether
import torch

RECORDING = json.loads(
    (pathlib.Path(__file__).parent.parent / "golden/peers/trl_dpo.json").read_text()
)
OBJECTIVES = {
    "sigmoid": {"objective": "dpo"},
    "sigmoid_norm": {"objective": "dpo", "score": "mean"},
    "ipo": {"objective": "ipo"},
    "hinge": {"objective": "hinge"},
    "aot": {"objective": "cdpo"},  # with one pair
    **{
        name: {"objective": name}
        for name in ("robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
                     "apo_down", "discopop")
    },
}  # fmt: skip
OF_FLOAT32 = {"exo_pair"}  # the logarithms of its label_smoothing
LINKS = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js"}


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def evaluated(case):
    """Loss, gradient, metrics of tether."""
    settings = case["settings"]
    options = dict(OBJECTIVES[settings["loss_type"]])
    if options["objective"] in (
        "cdpo",
        "robust",
        "exo_pair",
    ):  # TRL's sigmoid does not look at label_smoothing
        options["label_smoothing"] = settings["label_smoothing"]
    logps = tensor(case["logps"]).requires_grad_()
    loss, metrics = tether.preference_loss(
        logps,
        tensor(case["ref_logps"]),
        torch.tensor(case["response_mask"]),
        beta=settings["beta"],
        link=LINKS[settings["f_divergence_type"]],
        **options,
    )
    loss.backward()
    return loss.item(), logps.grad, metrics.to_dict()


COMPARED = [case for case in RECORDING["cases"] if case["settings"]["loss_type"] in OBJECTIVES]


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case["name"])
def test_value_and_gradient_equal_trl(case):
    loss, gradient, _ = evaluated(case)
    rough = case["settings"]["loss_type"] in OF_FLOAT32
    rtol, atol = (1e-6, 1e-8) if rough else (1e-12, 1e-15)
    assert loss == pytest.approx(case["loss"], rel=rtol, abs=10 * atol)
    torch.testing.assert_close(gradient, tensor(case["dlogps"]), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in COMPARED
        if case["settings"]["loss_type"] in ("sigmoid", "hinge", "aot")
        and case["settings"]["f_divergence_type"] == "reverse_kl"
    ],
    ids=lambda case: case["name"],
)
def test_rewards_equal_trl(case):
    _, _, metrics = evaluated(case)
    for name, peer in (("reward_chosen", "chosen"), ("reward_rejected", "rejected"),
                       ("margin", "margins")):  # fmt: skip
        assert metrics[name] == pytest.approx(case["metrics"][f"rewards/{peer}"], rel=1e-12)
    # TRL counts in float32.
    assert metrics["accuracy"] == pytest.approx(case["metrics"]["rewards/accuracies"], abs=1e-7)


def test_the_recording_covers_what_differs():
    cases = [case["settings"] for case in RECORDING["cases"]]
    assert RECORDING["trl"].startswith("1.16.")
    assert {each["loss_type"] for each in cases} == set(OBJECTIVES)
    assert {each["f_divergence_type"] for each in cases} == set(LINKS)
    aot = [case for case in RECORDING["cases"] if case["settings"]["loss_type"] == "aot"]
    assert all(len(case["logps"]) == 2 for case in aot)
    assert len({case["settings"]["label_smoothing"] for case in aot}) == 4
    lengths = [sum(row) for case in RECORDING["cases"] for row in case["response_mask"]]
    assert min(lengths) < max(lengths)
