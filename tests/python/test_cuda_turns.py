"""Levels and weights of turns on the way of CUDA tensors, beside those of the CPU."""

import host_operators
import pytest
import tether
import torch
from test_cuda_doors import assert_same, normal, on_both, tolerance_of, with_gradient


@pytest.fixture(scope="module", autouse=True)
def host():
    host_operators.load()


def turns(dtype, packed=False):
    logps = -normal(4, 9).abs()
    batch = {
        "logps": logps.to(dtype),
        "old_logps": logps + 0.2 * normal(4, 9, seed=4),
        "ref_logps": logps + 0.2 * normal(4, 9, seed=5),
        "rollout_logps": logps + 0.2 * normal(4, 9, seed=6),
        "advantages": normal(4, 1),
        "response_mask": normal(4, 9, seed=7) > -0.5,
        "turn_ids": (torch.arange(36) // 4 * 3).reshape(4, 9),
    }
    batch["response_mask"][2] = False
    batch["logps"][~batch["response_mask"]] = torch.nan
    if packed:
        batch = {k: x if k == "advantages" else x.flatten() for k, x in batch.items()}
        batch["offsets"] = torch.tensor([0, 5, 5, 20, 36], dtype=packed)
    return batch


GATE = {"ratio_gate": {"high": 1.2, "level": "turn_max"}}
TURNS = {
    "turn_mean": {"beta": 0.1, "weights": GATE | {"vespo": {"level": "turn_sum"}}},
    "turn_token": {"beta": 0.1, "kl_correction": "detached_level_ratio", "weights": GATE},
    "turn_sum": {"log_ratio_low": 0.1, "log_ratio_high": 0.05, "aggregation": "token_mean"},
    "token": {"weights": GATE | {"truncated_importance": {"high": 1.01, "level": "turn_min"}}},
}


@pytest.mark.parametrize("level", TURNS)
@pytest.mark.parametrize("packed", [False, torch.int32, torch.int64])
def test_losses_of_turns_are_those_of_the_cpu(level, packed):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ids in (None, torch.int32, torch.int64):
            batch = turns(dtype, packed)
            batch["turn_ids"] = None if ids is None else batch["turn_ids"].to(ids)
            arguments = {**batch, "objective": "grpo", "level": level, **TURNS[level]}
            got, want, calls = on_both(lambda x=arguments: with_gradient("policy_loss", "logps", x))
            assert calls == ["policy_loss"]
            assert_same(got, want, tolerance_of(dtype))


def test_counts_of_gates_of_turns_are_those_of_the_cpu():
    batch = turns(torch.float32)
    got, want, calls = on_both(lambda: tether.local_counts(**batch, weights=GATE))
    assert calls == ["local_counts"]
    assert got == want


def test_losses_of_hidden_states_and_turns_are_those_of_the_cpu():
    batch = {k: x for k, x in turns(torch.float32).items() if k != "logps"}
    batch |= {"hidden": normal(4, 9, 8), "targets": normal(4, 9, seed=8).abs().long()}
    weight = normal(11, 8, seed=9)

    def run():
        leaf = weight.clone().requires_grad_()
        out = tether.linear_policy_loss(**batch, weight=leaf, level="turn_mean", weights=GATE)
        (out.loss * 3).backward()
        return [out.loss.detach(), *out.metrics, leaf.grad]

    got, want, calls = on_both(run)
    assert calls == ["token_logps_forward", "policy_loss", "token_logps_backward"]
    assert_same(got, want)
