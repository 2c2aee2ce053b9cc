"""Records TRL's own DPO loss, value and gradient, on random ragged pairs.

    pip install -r tests/peers/requirements-trl.txt       in an environment of its own
    python tests/peers/record_trl_dpo.py                  writes tests/golden/peers/trl_dpo.json

`DPOTrainer._compute_loss` itself is called, on an object that has what it reads of a trainer; the
two models are functions that return the given per-token log-probabilities, 0 where the label says
that a token is not of an answer, as TRL's fused head does.

TRL has no cDPO: `aot` with label_smoothing is cDPO when there is one pair, since sorting one number
does nothing.
"""

import collections
import types

import recording
import torch
from recording import grid, normal, ragged_mask
from trl import DPOTrainer

DEFAULTS = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl"}  # fmt: skip

CASES = [
    ({}, {}),
    ({"beta": 0.5}, {"pairs": 5, "columns": 11}),
    ({"label_smoothing": 0.2}, {}),  # has no effect on sigmoid
    ({"loss_type": "sigmoid_norm", "beta": 2.0}, {}),
    ({"loss_type": "ipo"}, {}),
    ({"loss_type": "ipo", "beta": 0.75}, {"pairs": 5, "columns": 11}),
    ({"loss_type": "hinge", "beta": 0.5}, {}),
    ({"loss_type": "hinge", "beta": 1.5}, {"pairs": 5, "columns": 11}),
    ({"f_divergence_type": "forward_kl", "beta": 0.3}, {}),
    ({"f_divergence_type": "js_divergence", "beta": 0.3}, {}),
    ({"f_divergence_type": "js_divergence", "beta": 1.0, "loss_type": "hinge"}, {}),
    *[({"loss_type": "aot", "beta": 0.4, "label_smoothing": smoothing}, {"pairs": 1})
      for smoothing in (0.0, 0.1, 0.3, 0.45)],
    ({"loss_type": "robust", "beta": 0.4, "label_smoothing": 0.2}, {}),
    *[({"loss_type": loss, "beta": beta, "label_smoothing": 0.01}, {"pairs": 5, "columns": 11})
      for loss in ("exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
                   "discopop")
      for beta in (0.1, 1.5)],
    ({"f_divergence_type": "js_divergence", "loss_type": "robust", "label_smoothing": 0.1}, {}),
    ({"f_divergence_type": "forward_kl", "loss_type": "discopop"}, {}),
]  # fmt: skip


def random_pairs(seed, *, pairs=3, columns=7):
    """All chosen answers come first, then the rejected ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * pairs, columns)
    logps = -normal(generator, *shape).abs() - 0.25
    return {
        "logps": logps,
        "ref_logps": logps + grid(0.6 * normal(generator, *shape)),
        "response_mask": ragged_mask(generator, *shape, empty_row=False),
    }


def model(logps):
    def forward(labels, **_):
        of_answers = labels[:, 1:] != -100
        return types.SimpleNamespace(
            log_probs=torch.where(of_answers, logps, 0.0),
            entropy=torch.ones_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=of_answers,
        )

    return forward


def trainer(settings, ref_logps):
    """What _compute_loss reads of a DPOTrainer in training."""
    return types.SimpleNamespace(
        loss_types=[settings["loss_type"]],
        loss_weights=[1.0],
        beta=settings["beta"],
        label_smoothing=settings["label_smoothing"],
        f_divergence_type=settings["f_divergence_type"],
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        ref_model=model(ref_logps),
        model=types.SimpleNamespace(training=True, is_gradient_checkpointing=False, _modules={}),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        accelerator=types.SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda tensor: tensor,
            gather_for_metrics=lambda tensor: tensor,
        ),
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def compute(settings, batch):
    logps = batch["logps"].clone().requires_grad_()
    answers = batch["response_mask"]
    prompts = torch.zeros(len(answers), 1, dtype=torch.long)
    tokens = torch.cat([prompts, answers], 1)  # the first token of a text is not predicted
    inputs = {
        "input_ids": torch.zeros_like(tokens),
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": tokens,
    }
    this = trainer(settings, batch["ref_logps"])
    loss = DPOTrainer._compute_loss(this, model(logps), inputs, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, logps)
    metrics = {name: values[-1] for name, values in this._metrics["train"].items()}
    return loss, gradient, metrics


def recorded(seed, changes, shape):
    settings = DEFAULTS | changes
    batch = random_pairs(seed, **shape)
    loss, gradient, metrics = compute(settings, batch)
    case = {"name": recording.named(changes), "settings": settings} | batch
    rewards = {key: value for key, value in metrics.items() if key.startswith("rewards/")}
    return case | {"loss": loss, "dlogps": gradient, "metrics": rewards}


def main():
    cases = [recorded(seed, *each) for seed, each in enumerate(CASES)]
    recording.write("trl_dpo.json", "trl", [DPOTrainer._compute_loss], cases)


if __name__ == "__main__":
    main()
