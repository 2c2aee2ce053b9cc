"""Records OpenRLHF's own losses, KL estimates and advantages on random ragged batches.

    build/peers/parts/bin/python tests/peers/record_openrlhf.py

writes tests/golden/peers/openrlhf_{policy,kl,value,preference,advantages}.json. Its modules are
loaded alone (parts.py). The estimates of KL are float32 there, and the moments that it whitens by.
"""

import types

import parts
import recording
import torch
from recording import grid, normal, policy_batch, ragged_mask, with_gradient

losses = parts.load("openrlhf.models.loss", absent=("deepspeed",))
utils = parts.load("openrlhf.models.utils")
experiences = parts.load(
    "openrlhf.trainer.ppo_utils.experience_maker",
    absent=("ray", "openrlhf.trainer.ray", "openrlhf.utils"),
)

CLIPS = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
SAMPLES = {"token_level_loss": False}
STEP = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 8.0}


def correction(level, mode="mask", gating="ratio", threshold=(0.75, 1.25)):
    return {
        "is_correction_level": level,
        "is_correction_mode": mode,
        "is_correction_gating": gating,
        "is_correction_threshold": threshold,
    }


CORRECTIONS = {
    "icepop": correction("token"),
    "tis": correction("token", "clip"),
    "mask of sequences": correction("seq", threshold=(0.9, 1.1)),
    "binary KL of tokens": correction("token", "mask", "binary_kl", (0, 0.02)),
    "binary KL of sequences": correction("seq", "mask", "binary_kl", (0, 0.03)),
    "tv of tokens": correction("token", "mask", "tv", (0, 0.08)),
    "tv of sequences": correction("seq", "mask", "tv", (0, 0.09)),
}


# ---- the policy's loss ---------------------------------------------------------------------------


def policy_loss(batch, options, step):
    advantages = batch["advantages"]
    loss, *_ = losses.PolicyLoss(**options)(
        batch["logps"],
        batch["old_logps"],
        advantages if advantages.dim() == 2 else advantages[:, None].expand_as(batch["logps"]),
        batch["response_mask"],
        batch["rollout_logps"],
        **step,
    )
    return loss


def policy_case(seed, name, options, step, per_token=False):
    batch = policy_batch(seed, per_token=per_token)
    out = with_gradient(batch, "logps", lambda live: policy_loss(live, options, step))
    words = [name, *(["of a step"] if step else []), *(["per token"] if per_token else [])]
    settings = {"options": options, "step": step}
    return {"name": ", ".join(words), "settings": settings} | batch | out


def beyond_the_clamp():
    """Log-ratios on both sides of +-20, where the gradient ends; good ones down, bad ones up, so
    that no clip ends it."""
    log_ratio = torch.tensor([[-24.0, -19.5, 0.0, 19.5, 24.0]], dtype=torch.float64)
    batch = {
        "logps": log_ratio - 30,
        "advantages": torch.tensor([[1.5, 1.5, 0.5, -0.75, -0.75]], dtype=torch.float64),
        **{f"{name}_logps": torch.full_like(log_ratio, -30) for name in ("old", "rollout", "ref")},
        "response_mask": torch.ones_like(log_ratio).long(),
    }
    out = with_gradient(batch, "logps", lambda live: policy_loss(live, CLIPS, {}))
    return {"name": "beyond the clamp", "settings": {"options": CLIPS, "step": {}}} | batch | out


def policy_cases():
    gspo = CLIPS | {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.1}
    plans = [
        ("ppo", CLIPS, {}, False),
        ("ppo", CLIPS, STEP, True),
        ("ppo of samples", CLIPS | SAMPLES, {}, True),
        ("ppo of samples", CLIPS | SAMPLES, STEP, False),
        ("dual clip", CLIPS | {"dual_clip": 1.5}, {}, True),
        ("dual clip of samples", CLIPS | SAMPLES | {"dual_clip": 1.5}, STEP, False),
        ("gspo", gspo, {}),
        ("gspo", gspo, STEP),
        ("gspo, dual clip", gspo | {"dual_clip": 1.25}, {}),
        ("gspo, corrected", gspo | CORRECTIONS["icepop"], {}),
        *((name, CLIPS | each, STEP, True) for name, each in CORRECTIONS.items()),
        *((f"{name} of samples", CLIPS | SAMPLES | each, {}) for name, each in CORRECTIONS.items()),
        ("tis, dual clip", CLIPS | {"dual_clip": 1.5} | CORRECTIONS["tis"], {}),
    ]
    return [*(policy_case(seed, *plan) for seed, plan in enumerate(plans)), beyond_the_clamp()]


# ---- estimates of a KL divergence ----------------------------------------------------------------


def kl_loss(batch, estimator, unbiased, old):
    kl = utils.compute_approx_kl(
        batch["logps"],
        batch["ref_logps"],
        log_probs_old=batch["old_logps"] if old else None,
        kl_estimator=estimator,
        unbiased_gradient=unbiased,
    )
    return losses.aggregate_loss(kl, batch["response_mask"])


def kl_case(seed, estimator, unbiased, old, spread=0.5):
    batch = policy_batch(seed, spread=spread)
    out = with_gradient(batch, "logps", lambda live: kl_loss(live, estimator, unbiased, old))
    words = [estimator, *(["unbiased"] if unbiased else []), *(["old"] if old else [])]
    words += [f"spread {spread:g}"] if spread != 0.5 else []
    settings = {"kl_estimator": estimator, "unbiased_gradient": unbiased, "old": old}
    return {"name": ", ".join(words), "settings": settings} | batch | out


def kl_cases():
    plans = [
        (estimator, *which)
        for estimator in ("k1", "k2", "k3")
        for which in ((False, False), (True, False), (True, True))
    ]
    cases = [kl_case(seed, *plan) for seed, plan in enumerate(plans)]
    return [*cases, kl_case(20, "k2", True, True, 2.0)]  # beyond a weight of 10


# ---- the value head, and pairs -------------------------------------------------------------------


def value_case(seed, name, options, step):
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 6)
    batch = {each: normal(generator, *shape) for each in ("values", "old_values", "returns")}
    batch["response_mask"] = ragged_mask(generator, *shape, empty_row=True)
    loss = losses.ValueLoss(**options)
    out = with_gradient(batch, "values", lambda live: loss(*live.values(), **step))
    return {"name": name, "settings": {"options": options, "step": step}} | batch | out


def value_cases():
    plans = [
        ("clipped", {"clip_eps": 0.5}, {}),
        ("clipped, of samples", {"clip_eps": 0.2, **SAMPLES}, {}),
        ("not clipped", {}, {}),
        ("clipped, of a step", {"clip_eps": 0.5}, STEP),
        ("not clipped, of samples of a step", SAMPLES, STEP),
    ]
    return [value_case(seed, *plan) for seed, plan in enumerate(plans)]


def pairs_of(seed):
    """Log-probabilities of whole answers, all chosen ones first."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * normal(generator, 10).abs() - 0.25
    ref_logps = logps + grid(0.6 * normal(generator, 10))
    return {"logps": logps, "ref_logps": ref_logps, "margins": normal(generator, 5)}


def dpo_case(seed, options):
    batch = pairs_of(seed)

    def evaluate(live):
        return losses.DPOLoss(**options)(*live["logps"].split(5), *live["ref_logps"].split(5))[0]

    settings = {"loss": "DPOLoss", "options": options}
    return (
        {"name": f"DPO {options}", "settings": settings}
        | batch
        | with_gradient(batch, "logps", evaluate)
    )


def reward_case(seed, loss, margin):
    batch = pairs_of(seed)

    def evaluate(live):
        return getattr(losses, loss)()(*live["logps"].split(5), live["margins"] if margin else None)

    settings = {"loss": loss, "options": {"margin": margin}}
    return (
        {"name": f"{loss}, margin {margin}", "settings": settings}
        | batch
        | with_gradient(batch, "logps", evaluate)
    )


def preference_cases():
    dpo = [{"beta": 0.1}, {"beta": 0.5, "label_smoothing": 0.2}, {"beta": 0.3, "ipo": True}]
    reward = [("PairWiseLoss", False), ("PairWiseLoss", True), ("LogExpLoss", False)]
    cases = [dpo_case(seed, options) for seed, options in enumerate(dpo)]
    return cases + [reward_case(10 + seed, *plan) for seed, plan in enumerate(reward)]


# ---- advantages ----------------------------------------------------------------------------------

ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo",
              "flash_reinforce")  # fmt: skip
Namespace = types.SimpleNamespace


def advantage_case(seed, estimator):
    """Four groups of three answers, which come in two lots of any order. A masked slot between
    tokens is a step there, of value 0: GAE has none here."""
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask(generator, 12, 6, empty_row=False)
    if estimator == "gae":
        mask = (torch.arange(6) < mask.sum(1, keepdim=True)).long()
    rewards, kl = normal(generator, 12), 0.25 * normal(generator, 12, 6)
    values = normal(generator, 12, 6)
    order = torch.randperm(12, generator=generator)
    lots = [
        Namespace(index=lot.tolist(), rewards=rewards[lot], kl=kl[lot] * mask[lot],
                  values=values[lot], action_mask=mask[lot], info={})
        for lot in order.split(7)
    ]  # fmt: skip
    options = {"gamma": 0.9 if estimator == "reinforce" else 1.0, "lambd": 0.95}
    maker = experiences.RemoteExperienceMaker.__new__(experiences.RemoteExperienceMaker)
    maker.advantage_estimator, maker.kl_ctl = estimator, Namespace(value=0.5)
    algo = Namespace(advantage=Namespace(estimator=estimator, no_std_norm=False, **options))
    args = Namespace(
        algo=algo, rollout=Namespace(n_samples_per_prompt=3), reward=Namespace(clip_range=None)
    )
    maker.strategy = Namespace(args=args)
    maker.compute_advantages_and_returns(lots)
    out = torch.empty(12, 6, dtype=torch.float64)
    out[order] = torch.cat([lot.advantages for lot in lots]).double()
    case = {"name": estimator, "settings": options | {"kl_coef": 0.5}, "rewards": rewards}
    return case | {"kl": kl, "values": values, "response_mask": mask, "advantages": out}


def main():
    def write(name, functions, cases):
        recording.write(f"openrlhf_{name}.json", "openrlhf", functions, cases)

    write("policy", [losses.PolicyLoss.forward], policy_cases())
    write("kl", [utils.compute_approx_kl, losses.aggregate_loss], kl_cases())
    write("value", [losses.ValueLoss.forward], value_cases())
    pairs = [losses.DPOLoss, losses.PairWiseLoss, losses.LogExpLoss]
    write("preference", [each.forward for each in pairs], preference_cases())
    maker = experiences.RemoteExperienceMaker.compute_advantages_and_returns
    cases = [advantage_case(seed, each) for seed, each in enumerate(ESTIMATORS)]
    write("advantages", [maker, utils.compute_reward], cases)


if __name__ == "__main__":
    main()
