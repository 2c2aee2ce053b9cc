"""Kept ids of a sampler for the tests of a support, and what they are to equal."""

import math

import tether
import torch

V, H, K = 40, 6, 5


def kept_sets(seed=0):
    """Targets [3, 4] and ids [3, 4, K]: one target ignored, one token without a set, sets of one
    to K ids, some without the target."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (3, 4), generator=generator)
    order = torch.rand(3, 4, V, generator=generator).argsort(-1)
    ids = order[..., :K].clone()
    ids[0, :, 0] = targets[0]
    ids[0] = torch.where(
        (ids[0] == targets[0][:, None]).cumsum(-1) > 1, order[0, :, K : 2 * K], ids[0]
    )
    ids[1, :, 2:] = -1
    ids[2, 0] = -1
    ids[2, 1, 1:] = -1
    targets[0, 1] = -100
    return targets, ids


def absent_columns(targets, ids):
    """[3, 4, V]: what is outside of the set of a token, to which its target belongs."""
    out = torch.ones(*targets.shape, V, dtype=torch.bool)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        kept = [each for each in ids[tuple(place)].tolist() if each >= 0]
        if kept and targets[tuple(place)] >= 0:
            kept.append(int(targets[tuple(place)]))
        out[(*place, kept or slice(None))] = False
    return out


def normal(*shape, seed, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(dtype)


def upstream():
    return normal(3, 4, seed=8), normal(3, 4, seed=9)


def gradients(out, leaves):
    weights = upstream()
    total = (weights[0] * out.logps).sum() + (weights[1] * out.entropies).sum()
    return torch.autograd.grad(total, leaves)


OPTIONS = {"temperature": 0.7, "softcap": 6.0, "entropies": True}


def by_columns_that_are_not_there(logits, targets, ids):
    """The whole rows with -inf outside of the set: what a support is to equal."""
    absent = absent_columns(targets, ids)
    return tether.reference.token_logps(
        logits.masked_fill(absent, -math.inf), targets, temperature=0.7, softcap=6.0
    )
