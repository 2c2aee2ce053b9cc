"""The native operators, and what torch has to know about them beyond their kernels."""

from __future__ import annotations

import math
import pathlib
import re

import torch

from tether._checks import is_differentiated_twice

_OLDEST = (2, 10)
_SECOND_DERIVATIVE = "backward must run once, got a second derivative. The loss has none"


def load(library: pathlib.Path, version: str) -> None:
    """Loads the operators, or raises ImportError with one sentence."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < _OLDEST:
        raise ImportError(f"tether: torch must be 2.10 or newer, got {version}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"tether: {library.name} must load with torch >= 2.10, got torch {version} and the "
            f"error: {error.__cause__ or error}"
        ) from error


load(pathlib.Path(__file__).with_name("libtether_ops.so"), torch.__version__)
ops = torch.ops.tether
# Types of devices. On CUDA see tether._cuda; elsewhere `tether.reference` is evaluated.
KERNELS = frozenset({"cpu"})


def has_kernel(tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Of the tensor's device. `others`: what else may be differentiated; torch.func differentiates
    torch's operations alone."""
    if tensor.device.type not in KERNELS:
        return False
    if torch.compiler.is_compiling():
        return True
    return not any(each is not None and is_tracked(each) for each in (tensor, *others))


def has_eager_kernel(tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """The same of walks over chunks, which torch.func cannot map."""
    return has_kernel(tensor, *others) and not torch._C._are_functorch_transforms_active()


def gives_numbers(tensor: torch.Tensor) -> bool:
    """Whether what its kernel finds can be numbers of Python."""
    return has_kernel(tensor) and is_eager()


def on_cuda(tensor: torch.Tensor) -> bool:
    """Then nothing waits for what it holds, and operators read float32."""
    return tensor.device.type == "cuda"


def is_tracked(tensor: torch.Tensor) -> bool:
    """Whether torch.func, at any of its levels, or autograd below them differentiates it."""
    functorch, wrapped = torch._C._functorch, False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor, wrapped = functorch.get_unwrapped(tensor), True
    return wrapped and tensor.requires_grad


def is_eager() -> bool:
    """Whether tensors are what they seem: nothing is traced, mapped or looked at on its way."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def below_autograd(operator, *arguments):
    """The operator, with nothing for autograd: torch.library's way to it takes as long as a few
    rows do."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


# ---- the gradient: found with the loss, scaled in backward ---------------------------------------


class _ScaledOnce(torch.autograd.Function):
    """stored * upstream, without a derivative: torch would take `stored` for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stored, upstream, tensor, function):
        return _product(stored, upstream).to(tensor.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[-1]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.function}: {_SECOND_DERIVATIVE}")


_graph_stays = torch._C._autograd._get_current_graph_task_keep_graph
_backward_id = torch._C._current_graph_task_id
_at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback


def _number(upstream: torch.Tensor) -> float:
    """Of a scalar; NaN for tensors that stand for others (tracing, vmap) or would be waited for."""
    if type(upstream) is not torch.Tensor or upstream.device.type != "cpu":
        return math.nan
    try:
        return upstream.item()
    except RuntimeError:
        return math.nan


def _product(stored: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """stored * upstream. What is exactly 0, masked or clipped, stays 0 whatever the upstream is."""
    product = stored * upstream
    if math.isfinite(_number(upstream)):
        return product
    return torch.where(stored == 0, stored, product)


def scaled(function, upstream, stored, tensor):
    """stored * upstream, in the dtype of the tensor whose gradient it is."""
    if torch.is_grad_enabled():
        return _ScaledOnce.apply(stored, upstream, tensor, function)
    if _number(upstream) == 1:
        if stored.dtype == tensor.dtype and not _graph_stays():
            return stored
        # Of a graph that stays, a copy: the caller may change what it gets.
        return stored.to(tensor.dtype, copy=_graph_stays())
    return _product(stored, upstream).to(tensor.dtype)


# ---- where torch differentiates: slopes that are constants have no second derivative -------------


class _Refused(torch.autograd.Function):
    """A gradient, which depends on the tensor that it is of as far as torch can tell."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, tensor, sentence):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.sentence = inputs[-1]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(ctx.sentence)


class _Once(torch.autograd.Function):
    """The tensor; its gradient has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, sentence, arriving):
        if arriving is None:
            return tensor.view_as(tensor)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return tensor.to(wide, copy=True)  # whose gradient is rounded when it is scaled

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensor, ctx.sentence, ctx.arriving = inputs
        ctx.dtype = tensor.dtype
        ctx.save_for_backward(tensor)  # a checkpoint lets go of it

    @staticmethod
    def backward(ctx, gradient):
        if ctx.arriving is not None:
            # As kernels have it, which may store a bfloat16.
            wide = gradient.dtype == torch.float64
            largest = 1e300 if wide else torch.finfo(torch.bfloat16).max
            gradient = _product(gradient.clamp(-largest, largest), ctx.arriving.upstream)
            gradient = gradient.to(ctx.dtype)
        if torch.is_grad_enabled():
            gradient = _Refused.apply(gradient, *ctx.saved_tensors, ctx.sentence)
        return gradient, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.view_as(tangent)


class Arriving:
    """What arrives at a loss. torch would multiply it with all slopes on its way, an infinite one
    with those that are 0; here it meets the gradients at the leaves, as in `scaled`.

    `others`: the loss has gradients that no leaf of ours sees, those of a formula's own parameters.
    They get what arrives, which is on its way unless it is known not to be finite.
    """

    def __init__(self, *, others: bool):
        self.others = others
        self._upstreams: dict[int, torch.Tensor] = {}  # of each backward: threads may run several

    @property
    def upstream(self) -> torch.Tensor:
        return self._upstreams[_backward_id()]

    def keep(self, upstream: torch.Tensor) -> None:
        """Until this backward ends."""
        backward = _backward_id()
        self._upstreams[backward] = upstream
        _at_end_of_backward(lambda: self._upstreams.pop(backward, None))

    def passes(self, upstream: torch.Tensor) -> bool:
        on_cpu = upstream.device.type == "cpu"
        return self.others and (not on_cpu or math.isfinite(_number(upstream)))

    def at(self, loss: torch.Tensor) -> torch.Tensor:
        return _AtLoss.apply(loss, self) if loss.requires_grad else loss


class _AtLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, arriving):
        ctx.arriving = arriving
        return loss.clone()  # the caller may change it in place

    @staticmethod
    def backward(ctx, upstream):
        one = torch.ones_like(upstream)
        passes = ctx.arriving.passes(upstream)
        ctx.arriving.keep(one if passes else upstream)
        return (upstream if passes else one), None


def once_differentiable(
    function: str,
    tensor: torch.Tensor | None,
    sentence: str | None = None,
    arriving: Arriving | None = None,
) -> torch.Tensor | None:
    """The tensor, for torch's own operations. `sentence`: what a second derivative raises."""
    if tensor is None or torch.compiler.is_compiling():
        return tensor
    sentence = sentence or f"{function}: {_SECOND_DERIVATIVE}"
    if is_differentiated_twice(tensor):  # forward mode has no backward to refuse in
        raise NotImplementedError(sentence)
    if not tensor.requires_grad:
        return tensor
    return _Once.apply(tensor, sentence, arriving)
