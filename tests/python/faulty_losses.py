"""PPO in plain torch for test_testing.py: right, and with one fault each."""

import dataclasses

import tether
import torch
from tether.testing import ClipRange, Traits

LOW, HIGH, BETA = 0.2, 0.3, 0.1  # unequal: a swap must be seen
CLIP = Traits(clip=ClipRange(LOW, HIGH))


# ---- PPO in plain torch, in parts that a fault can replace ---------------------------------------


def selected(mask, *arrays):
    """What masked slots hold is not looked at."""
    return [torch.where(mask != 0, each, 0.0).to(widened(each)) for each in arrays]


def widened(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def saturated_exp(x, bound=60.0):
    """Bounded in value; its slope does not vanish."""
    value = x.detach().clamp(-bound, bound).exp()
    return value + value * (x - x.detach())


def surrogate(ratios, advantages, low=LOW, high=HIGH):
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def ppo_terms(logps, old_logps, advantages):
    return surrogate(saturated_exp(logps - old_logps), advantages)


def k3(logps, ref_logps):
    gap = ref_logps - logps
    return saturated_exp(gap) - 1 - gap


def token_mean(terms, mask, normalizer):
    mask = mask.to(terms.dtype)
    tokens = mask.sum() if normalizer is None else normalizer.policy
    factor = 1 if normalizer is None else normalizer.factor
    return (terms * mask).sum() / max(float(tokens), 1e-9) * factor


def right(logps, advantages, response_mask, old_logps, normalizer=None):
    arrays = selected(response_mask, logps, old_logps, advantages)
    return token_mean(ppo_terms(*arrays), response_mask, normalizer)


def averaged(terms):
    """The loss of other terms of the tokens."""

    def loss(logps, advantages, response_mask, old_logps, normalizer=None):
        arrays = selected(response_mask, logps, old_logps, advantages)
        return token_mean(terms(*arrays), response_mask, normalizer)

    return loss


def with_penalty(penalty):
    def loss(logps, advantages, response_mask, old_logps, ref_logps, normalizer=None):
        logps, old_logps, advantages, ref_logps = selected(
            response_mask, logps, old_logps, advantages, ref_logps
        )
        terms = ppo_terms(logps, old_logps, advantages) + BETA * penalty(logps, ref_logps)
        return token_mean(terms, response_mask, normalizer)

    return loss


def takes_packed_rows(logps, advantages, response_mask, old_logps, offsets=None):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    settings = {"aggregation": "sequence_mean_token_mean", "offsets": offsets}
    return tether.aggregate(terms, response_mask, **settings)


def mean_of_rows(logps, advantages, response_mask, old_logps, normalizer=None):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    settings = {"aggregation": "sequence_mean_token_mean", "normalizer": normalizer}
    return tether.aggregate(terms, response_mask, **settings)


# ---- faults --------------------------------------------------------------------------------------


def masks_by_multiplication(logps, advantages, response_mask, old_logps, normalizer=None):
    return token_mean(ppo_terms(logps, old_logps, advantages), response_mask, normalizer)


def leaks_gradient(logps, advantages, response_mask, old_logps, normalizer=None):
    leak = 1e-3 * logps.sum()
    return right(logps, advantages, response_mask, old_logps, normalizer) + leak - leak.detach()


def divides_by_slots(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / max(terms.numel(), 1)


def divides_by_columns(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    rows = (response_mask != 0).any(-1).sum().clamp(min=1)
    return (terms * response_mask).sum() / max(terms.shape[-1], 1) / rows


def divides_by_rows(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / max(terms.shape[0], 1)


def skips_the_first_column(logps, advantages, response_mask, old_logps):
    shifted = response_mask.clone()
    shifted[:, :1] = 0
    return right(logps, advantages, shifted, old_logps)


def weighs_rows_by_place(logps, advantages, response_mask, old_logps, normalizer=None):
    places = 1 + torch.arange(logps.shape[0])[:, None]
    return right(logps, advantages * places, response_mask, old_logps, normalizer)


def means_of_its_own(logps, advantages, response_mask, old_logps, normalizer=None):
    return right(logps, advantages, response_mask, old_logps)


def means_of_micro_batches(logps, advantages, response_mask, old_logps):
    return right(logps, advantages, response_mask, old_logps)


def forgets_world_size(logps, advantages, response_mask, old_logps, normalizer=None):
    if normalizer is not None:
        normalizer = dataclasses.replace(normalizer, world_size=1)
    return right(logps, advantages, response_mask, old_logps, normalizer)


def takes_packed_rows_for_one(logps, advantages, response_mask, old_logps, offsets=None):
    arrays = [torch.atleast_2d(each) for each in (logps, advantages, response_mask, old_logps)]
    return takes_packed_rows(*arrays)


def divides_by_no_token(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / response_mask.sum()


def counts_weights_as_ones(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / (response_mask != 0).sum().clamp(min=1)


def asks_for_a_float_mask(logps, advantages, response_mask, old_logps, normalizer=None):
    return right(logps, advantages, 1 - (1 - response_mask), old_logps, normalizer)


def ignores_strides(logps, advantages, response_mask, old_logps, normalizer=None):
    strides = torch.empty(advantages.shape).stride()
    read = torch.as_strided(advantages, advantages.shape, strides) if advantages.numel() else None
    return right(logps, advantages if read is None else read, response_mask, old_logps, normalizer)


def counts_threads(logps, advantages, response_mask, old_logps, normalizer=None):
    scale = torch.get_num_threads() if logps.numel() > 1000 else 1
    return scale * right(logps, advantages, response_mask, old_logps, normalizer)


def writes_into_logps(logps, advantages, response_mask, old_logps, normalizer=None):
    loss = right(logps, advantages, response_mask, old_logps, normalizer)
    logps.data.sub_(old_logps.detach())
    return loss


def narrow_terms(logps, advantages, response_mask, old_logps, normalizer=None):
    ratio = (logps - old_logps).exp()
    return right(ratio.log(), advantages, response_mask, 0 * old_logps, normalizer)


def zero_without_grad(logps, advantages, response_mask, old_logps, normalizer=None):
    loss = right(logps, advantages, response_mask, old_logps, normalizer)
    return loss if loss.requires_grad else 0 * loss


class _Stored(torch.autograd.Function):
    """A fused loss that hands out its gradient: whatever comes from above, or once only."""

    @staticmethod
    def forward(ctx, logps, arrays, is_spent):
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            loss = right(leaf, *arrays)
            ctx.gradient = torch.autograd.grad(loss, leaf)[0]
        ctx.is_spent = is_spent
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        if not ctx.is_spent:
            return ctx.gradient, None, None
        out = ctx.gradient * upstream
        ctx.gradient = ctx.gradient * 2
        return out, None, None


def ignores_upstream(logps, advantages, response_mask, old_logps, normalizer=None):
    return _Stored.apply(logps, (advantages, response_mask, old_logps, normalizer), False)


def scales_its_gradient_in_place(logps, advantages, response_mask, old_logps, normalizer=None):
    return _Stored.apply(logps, (advantages, response_mask, old_logps, normalizer), True)


def straight_through(logps, old_logps, advantages):
    terms = ppo_terms(logps, old_logps, advantages)
    return terms + 0.1 * (advantages * logps - (advantages * logps).detach())


def kills_the_gradient(logps, old_logps, advantages):
    return surrogate((logps - old_logps).clamp(-20, 20).exp(), advantages)


def overflows(logps, old_logps, advantages):
    return surrogate((logps - old_logps).exp(), advantages)


def does_not_clip(logps, old_logps, advantages):
    return -saturated_exp(logps - old_logps) * advantages


def swaps_epsilons(logps, old_logps, advantages):
    return surrogate(saturated_exp(logps - old_logps), advantages, HIGH, LOW)


def inverts_the_ratio(logps, old_logps, advantages):
    return surrogate(saturated_exp(old_logps - logps), advantages)


def clips_advantages(logps, old_logps, advantages):
    return ppo_terms(logps, old_logps, advantages.clamp(-1, 1))


def adds_likelihood(logps, old_logps, advantages):
    return ppo_terms(logps, old_logps, advantages) - 0.01 * advantages * logps


FAULTS = {
    "poison": [masks_by_multiplication, leaks_gradient],
    "padding_right": [divides_by_slots, divides_by_columns],
    "padding_left": [divides_by_slots, skips_the_first_column],
    "padding_rows": [divides_by_rows],
    "row_permutation": [weighs_rows_by_place],
    "packed": [takes_packed_rows_for_one],
    "split": [means_of_its_own, means_of_micro_batches],
    "ranks": [forgets_world_size],
    "empty": [divides_by_no_token],
    "fractional_mask": [counts_weights_as_ones],
    "mask_dtypes": [asks_for_a_float_mask],
    "strides": [ignores_strides],
    "threads": [counts_threads],
    "inputs_unchanged": [writes_into_logps],
    "backward_twice": [scales_its_gradient_in_place],
    "no_grad": [zero_without_grad],
    "half_precision": [narrow_terms],
    "upstream": [ignores_upstream],
    "finite_difference": [averaged(straight_through)],
    "finite": [averaged(overflows)],
    "pull_back": [averaged(kills_the_gradient)],
    "clip": [averaged(does_not_clip), averaged(swaps_epsilons)],
    "on_policy": [averaged(inverts_the_ratio)],
    "advantage_scale": [averaged(clips_advantages)],
    "shift": [averaged(adds_likelihood)],
    "kl_pull": [
        with_penalty(lambda logps, ref_logps: k3(logps, ref_logps).clamp(-10, 10)),
        with_penalty(lambda logps, ref_logps: -k3(logps, ref_logps)),
    ],
    "reference_value": [averaged(swaps_epsilons)],
    "reference_gradient": [averaged(straight_through)],
}
