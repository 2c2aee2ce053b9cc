"""tether.testing on the losses of TRL's GRPOTrainer and DPOTrainer: what it finds. Skipped without
TRL."""

import tempfile
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import trl_runs
from tether import Normalizer
from tether.testing import Traits, check_loss


@pytest.fixture(scope="module")
def trainers():
    """By their loss_type."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}

        def trainer(loss_type):
            if loss_type not in made:
                settings = {"loss_type": loss_type, "beta": 0.0, "steps_per_generation": 1}
                made[loss_type] = trl_runs.trainer("grpo", settings, folder)
                made[loss_type].current_gradient_accumulation_steps = 1
            return made[loss_type]

        yield trainer


def loss_of(trainer):
    """_compute_loss from log-probabilities on, in a step of one micro-batch.

    num_items_in_batch are the tokens of the step. TRL divides them by the number of processes, of
    which there is one here: the others are multiplied by.
    """

    def loss(logps, advantages, response_mask, old_logps, normalizer):
        ids = torch.zeros(logps.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": response_mask,
            "advantages": advantages,
            "old_per_token_logps": old_logps,
            "num_items_in_batch": torch.tensor(normalizer.policy),
        }
        entropies = torch.zeros_like(logps.detach())
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
        return trainer._compute_loss(trainer.model, inputs) * normalizer.world_size

    return loss


def without_counts(loss):
    """Of loss_types that divide by what they see."""
    some = Normalizer(policy=1.0)
    return lambda logps, advantages, response_mask, old_logps: loss(
        logps, advantages, response_mask, old_logps, some
    )


EVERYWHERE = {"finite", "poison", "half_precision"}
MASKED_ROWS = {"reference_value", "reference_gradient", "padding_rows", "empty"}
FOUND = {
    "dapo": ("token_mean", EVERYWHERE),
    "bnpo": ("token_mean", EVERYWHERE | {"split"}),
    "grpo": ("sequence_mean_token_mean", EVERYWHERE | MASKED_ROWS),
    "dr_grpo": ("sequence_sum_over_constant", EVERYWHERE | MASKED_ROWS),
}


@pytest.mark.parametrize("loss_type", FOUND)
def test_what_is_found(loss_type, trainers):
    aggregation, found = FOUND[loss_type]
    settings = {"aggregation": aggregation}
    if loss_type == "dr_grpo":
        settings["constant"] = trainers(loss_type).max_completion_length
    loss = loss_of(trainers(loss_type))
    loss = loss if loss_type == "dapo" else without_counts(loss)
    report = check_loss(loss, "ppo", batches=2, skip=["threads"], **settings)
    assert set(report.failed) == found, report
    poison = report["poison"].detail
    assert "[1, 2], masked slots of logps hold nan: loss nan, not -" in poison, poison
    assert report["finite"].detail == "float32, [B, T] = [1, 1], loss inf"
    if loss_type == "bnpo":
        assert "micro-batches of 1 + 1 rows averaged" in report["split"].detail


# ---- pairs ---------------------------------------------------------------------------------------


def pairs_of(trainer):
    """_compute_loss from log-probabilities on; TRL's head gives 0 where there is no label."""

    def answering(logps, mask):
        absent = torch.zeros_like(logps.detach())
        logps = torch.where(mask != 0, logps, 0)
        shown = {"entropy": absent, "mean_logits": absent, "is_top1": absent != 0}
        return lambda **_: SimpleNamespace(log_probs=logps, **shown)

    def loss(logps, ref_logps, response_mask):
        mask = torch.nn.functional.pad(response_mask, (1, 0))
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": mask}
        trainer.ref_model = answering(ref_logps, response_mask)
        return trainer._compute_loss(answering(logps, response_mask), inputs, False)

    return loss


# By loss_type the objective here. Pairs that only fill the batch up count, as rows do.
PAIRS = {"sigmoid": "dpo", "ipo": "ipo", "apo_zero": "apo_zero"}


@pytest.mark.parametrize("loss_type", PAIRS)
def test_what_is_found_in_pairs(loss_type):
    settings = {"batches": 2, "skip": ["threads"], "traits": Traits(takes_fractional_mask=False)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_runs.trainer("dpo", {"loss_type": loss_type}, folder)
        report = check_loss(pairs_of(trainer), PAIRS[loss_type], **settings)
    assert set(report.failed) == {"padding_rows", "empty", "half_precision"}, report
    asked = ("reference_value", "reference_gradient", "split", "poison")
    assert all(report[each].outcome == "holds" for each in asked)
