"""Random ragged batches, and a loss with its gradient and metrics as numbers."""

import math
from typing import NamedTuple

import tether
import torch


def words(numbers=None, **choices):
    """Options and choices as the operators take them."""
    numbers = numbers or {}
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    return list(numbers), values, list(choices), [str(each).lower() for each in choices.values()]


LENGTHS = (5, 0, 1, 9, 3)
OBJECTIVES = tuple(tether.objectives())
LEVELS = tether.objectives()["ppo"].choices["level"].legal


class Result(NamedTuple):
    loss: torch.Tensor
    dlogps: torch.Tensor
    sums: torch.Tensor
    maxima: torch.Tensor


def padded_batch(
    seed=0, dtype=torch.float64, lengths=LENGTHS, columns=9, spread=0.5, poison=math.nan
):
    """A batch of policy_loss's arguments; masked slots hold poison."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), columns)
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]

    def tokens(values):
        return torch.where(mask, values, poison).to(dtype)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    logps = -normal(*shape).abs() - 0.1
    steps = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return {
        "logps": tokens(logps),
        "advantages": normal(len(lengths)).to(dtype),
        "response_mask": mask,
        "old_logps": tokens(logps - spread * normal(*shape)),
        "ref_logps": tokens(logps + spread * normal(*shape)),
        "rollout_logps": tokens(logps + spread * normal(*shape)),
        "turn_ids": torch.where(mask, steps.cumsum(1), -7),
    }


def packed(batch):
    """The same batch, rows end to end without padding."""
    mask = batch["response_mask"]
    lengths = mask.sum(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    out = {name: each[mask] if each.shape == mask.shape else each for name, each in batch.items()}
    return out | {"response_mask": mask[mask], "offsets": offsets}


def evaluated(batch, upstream=1.0, **settings):
    """tether.policy_loss of a batch, backwards from upstream * loss."""
    logps = batch["logps"].detach().requires_grad_()
    loss, metrics = tether.policy_loss(**batch | {"logps": logps}, **settings)
    (upstream * loss).backward()
    return Result(loss.detach(), logps.grad, metrics.sums, metrics.maxima)


def referenced(batch, upstream=1.0, **settings):
    """The same by tether.reference."""
    logps = batch["logps"].detach().requires_grad_()
    out = tether.reference.policy_loss(**batch | {"logps": logps}, **settings)
    (upstream * out.loss).backward()
    return Result(out.loss.detach(), logps.grad, out.sums, out.maxima)


def assert_close(actual, expected, tolerance):
    """Within tolerance of the largest number of each tensor."""
    for name, a, b in zip(Result._fields, actual, expected, strict=True):
        scale = max(1.0, b.abs().nan_to_num(posinf=0).max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a,
            b,
            rtol=0,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_bits(actual, expected):
    for name, a, b in zip(Result._fields, actual, expected, strict=True):
        assert torch.equal(a, b), name
