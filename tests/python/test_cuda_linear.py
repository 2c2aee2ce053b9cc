"""The functions of hidden states and a head on CUDA tensors, without a device: their walks over
chunks, with kernels by teams of host threads (test_cuda.py)."""

import collections
import functools
import math

import elsewhere
import pytest
import tether
import torch
from test_cuda import CUDA, assert_same, numbers
from test_cuda import host as host  # a fixture
from tether import _cuda, _linear_logps
from tether._linear_inputs import Linear
from tether._linear_ops import Gradients
from torch.utils._python_dispatch import TorchDispatchMode


class OnHost:
    """The operators by their kernels for CUDA, and how often each one ran."""

    def __init__(self):
        self.calls = collections.Counter()

    def __getattr__(self, name):
        operator = getattr(torch.ops.tether, name).default

        def run(*arguments):
            self.calls[name] += 1
            return operator.redispatch(CUDA, *arguments)

        return run


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        name = operator._schema.name.removeprefix("aten::")
        assert name not in elsewhere.WAITS, f"waits for the device: {name}"
        return operator(*arguments, **(named or {}))


@pytest.fixture
def linear_on_cuda(host, monkeypatch):
    """What a call gives by the way of CUDA tensors, on those of the host; which operators ran."""

    def run(call):
        ops = OnHost()
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "has_kernel", lambda *_: True)
            patch.setattr("tether._ops.on_cuda", lambda _: True)
            patch.setattr("tether._ops._number", lambda _: math.nan)
            for module in ("linear", "_linear_logps"):
                patch.setattr(f"tether.{module}.has_eager_kernel", lambda *_: False)
            for module in ("_linear_ops", "_cuda_linear"):
                patch.setattr(f"tether.{module}.ops", ops)
            return call(), ops.calls

    return run


def linear_batch(packed=False):
    batch = {
        "hidden": numbers(4, 6, 8, seed=11),
        "weight": numbers(31, 8, seed=12),
        "bias": numbers(31, seed=13),
        "targets": torch.randint(31, (4, 6), generator=torch.Generator().manual_seed(1)),
        "advantages": numbers(4, 6),
        "response_mask": numbers(4, 6) > -0.5,
        "old_logps": -4 + 0.1 * numbers(4, 6, seed=4),
        "ref_logps": -4 + 0.1 * numbers(4, 6, seed=5),
        "rollout_logps": -4 + 0.1 * numbers(4, 6, seed=6),
    }
    batch["hidden"][~batch["response_mask"]] = torch.nan  # is not looked at
    if packed:
        linear = ("weight", "bias")
        batch = {k: x if k in linear else x.flatten(0, 1) for k, x in batch.items()}
        batch["offsets"] = torch.tensor([0, 5, 5, 20, 24])
    return batch


def leaves_of(batch):
    return {k: batch[k].detach().clone().requires_grad_() for k in ("hidden", "weight", "bias")}


def linear_results(batch, *, function=tether.linear_policy_loss, **settings):
    leaves = leaves_of(batch)
    out = function(**batch | leaves, **settings)
    (out.loss * 3).backward()
    found = [out.loss, out.logps, *out.metrics, *(each.grad for each in leaves.values())]
    return [each.detach() for each in found + ([] if out.entropies is None else [out.entropies])]


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "grpo", "beta": 0.1, "entropy_coef": 0.2, "temperature": 0.7},
        {"objective": "ppo", "entropies": True, "chunk_bytes": 31 * 4 * 5},
        {"objective": "dapo", "normalizer": tether.Normalizer(policy=50, world_size=4)},
        {"objective": "dr_grpo", "chunk_bytes": 31 * 4 * 7},
        {"objective": "ppo", "rows_per_chunk": 5},
        {"objective": "ppo", "weights": {"truncated_importance": {"high": 1.01}}},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_linear_policy_loss_is_that_of_the_cpu(linear_on_cuda, settings, packed):
    batch = linear_batch(packed)
    want = linear_results(batch, **settings)
    with NoWait():
        got, calls = linear_on_cuda(lambda: linear_results(batch, **settings))
    assert calls["policy_gradient_of_logits"] >= 1
    assert_same(got, want)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "gspo"},
        {"objective": "dppo_tv", "chunk_bytes": 31 * 4 * 5},
        {"objective": "ppo", "weights": {"truncated_importance": {"level": "sequence_sum"}}},
        {"objective": "grpo", "weights": {"ratio_gate": {"high": 1.05}}},
    ],
)
def test_losses_that_need_all_log_probabilities_have_them_by_chunks(linear_on_cuda, settings):
    batch = linear_batch()
    want = linear_results(batch, **settings)
    with NoWait():
        got, calls = linear_on_cuda(lambda: linear_results(batch, **settings))
    assert calls["token_logps_forward"] >= 1
    assert calls["token_logps_backward"] >= 1
    assert_same(got, want)


def logps_and_gradients(batch, **settings):
    targets = batch["targets"].masked_fill(~batch["response_mask"], -100)
    leaves = leaves_of(batch)
    out = tether.linear_token_logps(**leaves, targets=targets, entropies=True, **settings)
    upstream = numbers(2, *targets.shape, seed=9)
    upstream[:, 0] = 0  # of a row
    ((out.logps * upstream[0]).sum() + (out.entropies * upstream[1]).sum()).backward()
    return [out.logps.detach(), out.entropies.detach(), *(each.grad for each in leaves.values())]


@pytest.mark.parametrize(
    ("settings", "chunks"),
    [
        ({}, 1),
        ({"temperature": 0.7}, 1),
        ({"chunk_bytes": 31 * 4 * 5}, 5),
        ({"rows_per_chunk": 7}, 4),
    ],
)
def test_linear_token_logps_are_those_of_the_cpu(linear_on_cuda, settings, chunks):
    batch = linear_batch()
    want = logps_and_gradients(batch, **settings)
    with NoWait():
        got, calls = linear_on_cuda(lambda: logps_and_gradients(batch, **settings))
    chunks = {31 * 4 * 5: 5}.get(
        settings.get("chunk_bytes"), 4 if "rows_per_chunk" in settings else 1
    )
    assert calls == {"token_logps_forward": chunks, "token_logps_backward": chunks}
    assert_same(got, want)


def test_linear_preference_loss_is_that_of_the_cpu(linear_on_cuda):
    batch = {k: linear_batch()[k] for k in ("hidden", "targets", "response_mask", "weight", "bias")}
    batch["ref_logps"] = -4 + 0.1 * numbers(4, 6, seed=5)

    def results():
        leaves = leaves_of(batch)
        out = tether.linear_preference_loss(**batch | leaves, chunk_bytes=31 * 4 * 5)
        (out.loss * 3).backward()
        return [out.loss.detach(), *(each.grad for each in leaves.values())]

    want = results()
    got, calls = linear_on_cuda(results)
    assert calls["token_logps_backward"] == 5
    assert_same(got, want)


def test_chunks_are_larger_than_on_the_cpu(linear_on_cuda):
    linear = Linear(numbers(1, 8), torch.empty(1 << 16, 8), None)
    walk = functools.partial(_linear_logps.walk_of, "f", linear, None, 0, None)
    assert walk().chunk.rows == (256 << 20) / (4 << 16)
    assert linear_on_cuda(walk)[0].chunk.rows == (1 << 30) / (4 << 16)


@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_linear_policy_loss_is_one_graph(linear_on_cuda, objective):
    batch = linear_batch()
    want = linear_results(batch, objective=objective, beta=0.1)
    compiled = torch.compile(tether.linear_policy_loss, fullgraph=True, backend="aot_eager")
    got, calls = linear_on_cuda(
        lambda: linear_results(batch, function=compiled, objective=objective, beta=0.1)
    )
    one_walk = objective == "ppo"
    assert calls["policy_gradient_of_logits" if one_walk else "token_logps_backward"] == 1
    assert_same(got, want)


@pytest.fixture
def products(host):
    """Those of halves with sums in float32, which torch has on CUDA alone."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a, b, dtype):
        return a.to(dtype) @ b.to(dtype)

    def addmm(sum_so_far, a, b, dtype, *, beta=1, alpha=1, out):
        return out.copy_(sum_so_far + mm(a, b, dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield
    library._destroy()


def test_gradients_of_a_half_weight_are_added_up_in_float32(linear_on_cuda, products):
    halves = [each.bfloat16() for each in (numbers(6, 8), numbers(5, 8), numbers(6, 5, seed=4))]
    hidden, weight, dlogits = halves

    def sums(pieces):
        gradients = Gradients(hidden, weight, [True, True, True], alone=len(pieces) == 1)
        for rows in pieces:
            gradients.add(rows, dlogits[rows], hidden)
        return gradients

    exact = dlogits.double().t() @ hidden.double()
    several, _ = linear_on_cuda(lambda: sums([slice(0, 3), slice(3, 4), slice(4, 6)]))
    torch.testing.assert_close(several.dweight, exact.float(), rtol=1e-5, atol=1e-5)
    alone, _ = linear_on_cuda(lambda: sums([slice(0, 6)]))
    assert alone.dweight.dtype == torch.bfloat16
    for each in (several, alone):
        torch.testing.assert_close(each.taken(hidden)[1], exact.bfloat16())


@pytest.mark.parametrize("bad", [31, -1, 1 << 40])
def test_an_id_out_of_range_is_nan_for_its_row_and_counted(linear_on_cuda, bad):
    batch = linear_batch()
    tokens = batch["response_mask"].nonzero()[2].tolist()
    batch["targets"][tuple(tokens)] = bad
    leaves = leaves_of(batch)
    for objective in ("ppo", "gspo"):
        with NoWait():
            out, _ = linear_on_cuda(
                lambda o=objective: tether.linear_policy_loss(**batch | leaves, objective=o)
            )
        assert out.loss.isnan()
        assert out.logps.isnan().nonzero().tolist() == [tokens]
        assert out.metrics.to_dict()["nonfinite"] >= 1
    targets = batch["targets"].masked_fill(~batch["response_mask"], -100)
    out, _ = linear_on_cuda(lambda: tether.linear_token_logps(**leaves, targets=targets))
    assert out.logps.isnan().nonzero().tolist() == [tokens]
