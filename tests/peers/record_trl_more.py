"""Records more of TRL's own losses, of answers and of pairs, on random ragged batches.

    build/peers/trl/bin/python tests/peers/record_trl_more.py

writes tests/golden/peers/trl_answers.json and trl_pairs.json. The losses are called on trainers
that have only what they read, with the log-probabilities given instead of computed by a model.
ORPO's are of float32.
"""

import collections
import types

import recording
import torch
from recording import policy_batch, with_gradient
from trl import RLOOTrainer
from trl.experimental.a2po import A2POTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.experimental.orpo import ORPOTrainer

Namespace = types.SimpleNamespace


def trainer_of(logps, settings):
    """A trainer in training that has what its loss reads."""
    accelerator = Namespace(
        device="cpu",
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    return Namespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, logps.detach(), None),
        accelerator=accelerator,
        aux_loss_enabled=False,
        model=Namespace(training=True),
        current_gradient_accumulation_steps=settings.get("accumulation_steps", 1),
        top_entropy_quantile=1.0,
        _metrics={"train": collections.defaultdict(list)},
        **{
            name: settings[name]
            for name in ("epsilon_low", "epsilon_high", "beta")
            if name in settings
        },
    )


def inputs_of(batch):
    mask = batch["response_mask"]
    prompts = torch.zeros(len(mask), 1, dtype=torch.long)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logps"],
        "old_logps": (batch["old_logps"] * mask).sum(1),
        "ref_per_token_logps": batch["ref_logps"],
    }


def a2po(batch, settings):
    mask = batch["response_mask"]
    sums, ref_sums = ((batch[each] * mask).sum(1) for each in ("logps", "ref_logps"))
    trainer = trainer_of(batch["logps"], settings)
    trainer._get_sequence_logps = lambda *_: sums
    trainer.args = Namespace(beta2=settings["beta2"])
    inputs = {"input_ids": None, "attention_mask": None, "logits_to_keep": None}
    inputs |= {"ref_logps": ref_sums, "rewards": batch["advantages"] + 0.5, "v_star": 0.5}
    return A2POTrainer.compute_loss(trainer, None, inputs)


def of_answers(batch, settings):
    if settings["loss"] == "a2po":
        return a2po(batch, settings)
    loss = {"rloo": RLOOTrainer._compute_loss, "gmpo": GMPOTrainer._compute_loss}[settings["loss"]]
    return loss(trainer_of(batch["logps"], settings), None, inputs_of(batch))


CLIPS = {"epsilon_low": 0.2, "epsilon_high": 0.4}
ANSWERS = [
    {"loss": "rloo", **CLIPS},
    {"loss": "rloo", "epsilon_low": 0.9, "epsilon_high": 2.0},
    {"loss": "a2po", "beta2": 0.5},
    {"loss": "a2po", "beta2": 1e-3},
    {"loss": "gmpo", "beta": 0.0, **CLIPS},
    {"loss": "gmpo", "beta": 0.25, "accumulation_steps": 3, **CLIPS},
]


def answers_case(seed, settings):
    batch = policy_batch(seed)
    out = with_gradient(batch, "logps", lambda live: of_answers(live, settings))
    name = ", ".join(f"{key} {value}" for key, value in settings.items())
    return {"name": name, "settings": settings} | batch | out


# ---- pairs: all chosen answers first -------------------------------------------------------------

PAIRS = [
    {"loss_type": "sigmoid", "beta": 0.3},
    {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
    {"loss_type": "hinge", "beta": 0.5},
    {"loss_type": "ipo", "beta": 0.3},
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "alpha": 0.25},
    {"loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.25, "alpha": -0.5},
    {"loss_type": "orpo", "beta": 0.3},
]


def of_pairs(batch, settings):
    """Scores are sums, of SimPO and ORPO means."""
    sums = (batch["logps"] * batch["response_mask"]).sum(1)
    if settings["loss_type"] in ("simpo", "orpo"):
        sums = sums / batch["response_mask"].sum(1)
    trainer = Namespace(
        **{"alpha": 0.0, "simpo_gamma": 0.0, "label_smoothing": 0.0} | settings,
        accelerator=Namespace(device="cpu"),
    )
    if settings["loss_type"] == "orpo":
        return -ORPOTrainer.odds_ratio_loss(trainer, *sums.split(3))[
            0
        ].mean()  # added as - mean there
    return CPOTrainer.cpo_loss(trainer, *sums.split(3))[0].mean()


def pairs_case(seed, settings):
    batch = policy_batch(seed, rows=6)
    batch = {name: batch[name] for name in ("logps", "response_mask")}
    batch["response_mask"][:, 0] = 1  # no row without tokens
    out = with_gradient(batch, "logps", lambda live: of_pairs(live, settings))
    name = ", ".join(f"{key} {value}" for key, value in settings.items())
    return {"name": name, "settings": settings} | batch | out


def main():
    cases = [answers_case(seed, settings) for seed, settings in enumerate(ANSWERS)]
    functions = [RLOOTrainer._compute_loss, A2POTrainer.compute_loss, GMPOTrainer._compute_loss]
    recording.write("trl_answers.json", "trl", functions, cases)
    cases = [pairs_case(seed, settings) for seed, settings in enumerate(PAIRS)]
    recording.write(
        "trl_pairs.json", "trl", [CPOTrainer.cpo_loss, ORPOTrainer.odds_ratio_loss], cases
    )


if __name__ == "__main__":
    main()
