"""Which calls on CUDA tensors have a kernel, and what tracing knows of them, without a device."""

import host_operators
import pytest
import tether
import torch
from tether import _cuda
from tether._functions import FUNCTIONS
from torch._subclasses.fake_tensor import FakeTensorMode


def fake(*size, dtype=torch.float32, device="cuda"):
    return torch.empty(size or (4, 3), dtype=dtype, device=device)


def ids(*size):
    return fake(*size, dtype=torch.int64)


CALLS = {
    "value_loss": lambda x=fake: tether.value_loss(x(), x(), x()),
    "preference_loss": lambda x=fake: tether.preference_loss(x(), x(), x()),
    "kto": lambda x=fake: tether.preference_loss(
        x(), x(), x(), objective="kto", labels=fake(4), baselines=fake(4)
    ),
    "gae": lambda x=fake: tether.advantage("gae", x(), x(), values=x()),
    "vtrace": lambda x=fake: tether.advantage("vtrace", x(), x(), values=x(), log_ratios=x()),
    "returns": lambda x=fake: tether.discounted_returns(x(), x()),
    "rloo": lambda x=fake: tether.advantage("rloo", x(4), groups=ids(4)),
    "group_advantage": lambda x=fake: tether.group_advantage(x(4), 2),
    "whiten": lambda x=fake: tether.whiten(x(), x()),
    "whiten_step": lambda x=fake: tether.whiten(x(), x(), step=tether.Moments(4.0, 1.0, 2.0)),
    "categorical_kl": lambda x=fake: tether.categorical_kl(x(2, 3, 7), x(2, 3, 7)),
}
OPERATORS = {
    "kto": ["preference_loss"],
    "gae": ["advantage"],
    "vtrace": ["advantage"],
    "returns": ["advantage"],
    "rloo": ["group_advantage"],
    "whiten": ["whiten_by_moments"],
    "whiten_step": ["whiten"],
    "categorical_kl": ["categorical_kl_forward"],
}


def tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [each for part in out for each in tensors(part)]


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operators of ours a call comes to."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "tether":
            self.names.append(operator._schema.name.removeprefix("tether::"))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch):
    if not _cuda.KERNELS:
        host_operators.load()  # for the schemas
    monkeypatch.setattr(_cuda, "KERNELS", frozenset(_cuda._OPERATORS))
    monkeypatch.setattr(_cuda, "_BY_DEVICE", host_operators.functions_on_device())


@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_its_kernel_and_its_results_are_on_the_device(kernels, name):
    with FakeTensorMode(), Called() as called:
        out = CALLS[name]()
    assert called.names == OPERATORS.get(name, [name])
    assert {each.device.type for each in tensors(out)} == {"cuda"}
    assert {each.dtype for each in tensors(out)} <= {torch.float32, torch.float64}


def wide(*size):
    return fake(*size, dtype=torch.float64)


# The reason why each has no kernel.
WITHOUT = {
    "in float64": lambda: tether.value_loss(wide(), wide(), fake()),
    "an array in float64": lambda: tether.value_loss(fake(), wide(), fake()),
    "pairs in float64": lambda: tether.preference_loss(wide(), wide(), fake()),
    "baselines in float64": lambda: tether.preference_loss(
        fake(), fake(), fake(), baselines=wide(4)
    ),
    "tokens of the step, pairs of the batch": lambda: tether.preference_loss(
        fake(), fake(), fake(), tokens=9, nll_coef=0.5
    ),
    "a setting on the device": lambda: tether.value_loss(
        fake(), fake(), fake(), clip_range=fake(1)
    ),
    "rows in float64": lambda: tether.categorical_kl(wide(2, 7), wide(2, 7)),
}


class TakesTorch(Exception):
    """A torch without CUDA has not all operations on its tensors that hold nothing."""


@pytest.mark.parametrize("reason", WITHOUT)
def test_what_has_no_kernel_takes_torch(kernels, reason, monkeypatch):
    def reference(*_, **__):
        raise TakesTorch

    for name in ("value_loss", "preference_loss", "categorical_kl"):
        monkeypatch.setattr(tether.reference, name, reference)
    with FakeTensorMode(), pytest.raises(TakesTorch):
        WITHOUT[reason]()


def test_what_has_no_kernel_of_an_estimator_comes_to_the_cpu(kernels):
    with FakeTensorMode(), Called() as called:
        rows = {"rewards": fake(), "values": fake(), "response_mask": fake()}
        call = FUNCTIONS["advantage"].call(rows, {}).with_numbers({"gamma": 0.9})
        assert _cuda.call_on_cuda(call) is not None
        there = call.with_numbers({"gamma": torch.ones((), device="cuda")})
        assert _cuda.call_on_cuda(there) is None
        answers = FUNCTIONS["group_advantage"].call({"rewards": wide(4)}, {})
        assert _cuda.call_on_cuda(answers) is None
    assert called.names == []


def test_denominators_on_the_device_have_an_operator(kernels):
    with FakeTensorMode(), Called() as called:
        n = torch.ones((), device="cuda")
        step = tether.Normalizer(policy=n, sequences=3.0)
        losses = (
            tether.value_loss(fake(), fake(), fake(), normalizer=step),
            tether.preference_loss(fake(), fake(), fake(), pairs=n),
        )
    assert called.names == ["value_loss_by_counts", "preference_loss_by_counts"]
    assert {each.loss.device.type for each in losses} == {"cuda"}


@pytest.mark.parametrize("name", _cuda.ON_DEVICE)
def test_operators_of_numbers_on_the_device_have_the_arguments_of_their_function(kernels, name):
    """And one more."""
    operator, more = _cuda.ON_DEVICE[name][0], {"whiten": "step"}.get(name, "counts")
    own = str(FUNCTIONS[name].operator._schema).replace(f"tether::{name}(", f"tether::{operator}(")
    words = ", str[] option_names"
    other = host_operators.functions_on_device()[name].operator._schema
    assert str(other) == own.replace(words, f", Tensor? {more}{words}")


def test_every_operator_is_registered_for_cuda(kernels):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for each in _cuda._OPERATORS:
        assert registered(f"tether::{each}", "CUDA"), each


def compiled(run, *arguments):
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)


@pytest.mark.skipif(bool(_cuda.KERNELS), reason="the kernels for devices are installed")
def test_a_graph_has_the_kernels(kernels):
    generator = torch.Generator().manual_seed(2)
    x, y, z = (torch.randn(4, 3, generator=generator) for _ in range(3))
    mask = z > -0.5

    def run(x, y, mask):
        advantages, returns = tether.advantage("gae", y, mask, values=x.detach(), gamma=0.9)
        loss = tether.value_loss(x, tether.whiten(returns, mask), mask, old_values=y).loss
        pairs = tether.preference_loss(-x.abs(), -y.abs(), mask, nll_coef=0.5).loss
        return loss + 2 * pairs + tether.group_advantage(y[:, 0], 2).sum() + advantages.sum()

    leaf = x.clone().requires_grad_()
    want = run(leaf, y, mask)
    (slopes,) = torch.autograd.grad(want, leaf)
    with host_operators.kernels_of("cpu") as calls:
        got = compiled(run, leaf, y, mask)
        (gradient,) = torch.autograd.grad(got, leaf)
    assert sorted(calls) == [
        "advantage",
        "group_advantage",
        "preference_loss",
        "value_loss",
        "whiten_by_moments",
    ]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, slopes)


@pytest.mark.skipif(not _cuda.KERNELS, reason="needs ./dev wheel --cuda")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch without CUDA")
@pytest.mark.parametrize("name", CALLS)
def test_without_cuda_a_kernel_is_one_clear_error(name, monkeypatch):
    def here(*size, dtype=torch.float32):
        return torch.ones(size or (4, 3), dtype=dtype)

    monkeypatch.setitem(globals(), "fake", here)
    with host_operators.kernels_of("cpu"), pytest.raises(ValueError) as caught:
        CALLS[name](here)
    assert str(caught.value).endswith(": torch must be one with CUDA for a kernel on its devices")
