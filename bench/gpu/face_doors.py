"""Losses, estimators and the KL of two rows in Python on a GPU, for face.py: errors against
float64, bits of two runs and of a captured graph, waits, times."""

from __future__ import annotations

import contextlib

import torch

B, T, V = 64, 500, 5000
GRADIENTS = ("logps", "values", "logits", "q_logits", "p_logits")


def normal(*size, device):
    return torch.randn(*size, device=device)


def tokens(device):
    return normal(B, T, device=device), normal(B, T, device=device) > -0.5


def value_loss(device):
    x, mask = tokens(device)
    returns = x + 0.5 * normal(B, T, device=device)
    old = x + 0.4 * normal(B, T, device=device)
    return {"values": x, "returns": returns, "response_mask": mask, "old_values": old}


def preference_loss(device):
    x, mask = tokens(device)
    return {
        "logps": -x.abs(),
        "ref_logps": -(x + 0.1 * normal(B, T, device=device)).abs(),
        "response_mask": mask,
        "nll_coef": 0.1,
    }


def kto(device):
    labels = torch.arange(B, device=device) % 3 == 0
    return preference_loss(device) | {"objective": "kto", "labels": labels, "nll_coef": 0.0}


def rows(device):
    x, mask = tokens(device)
    return {
        "rewards": x,
        "values": normal(B, T, device=device),
        "response_mask": mask,
        "bootstrap": normal(B, device=device),
        "gamma": 0.99,
    }


def vtrace(device):
    return rows(device) | {"log_ratios": 0.1 * normal(B, T, device=device)}


def returns(device):
    return {k: x for k, x in rows(device).items() if k != "values"}


def group_advantage(device):
    return {"rewards": normal(B, device=device), "groups": torch.arange(B, device=device) // 8}


def whiten(device):
    x, mask = tokens(device)
    return {"values": 5 + x, "response_mask": mask}


def categorical_kl(device):
    mask = torch.arange(B, device=device) % 5 > 0
    q, p = (2 * normal(B, V, device=device) for _ in range(2))
    return {"q_logits": q, "p_logits": p, "mask": mask, "temperature": 0.7}


def token_logps(device):
    targets = torch.randint(V, (B,), device=device)
    return {"logits": 2 * normal(B, V, device=device), "targets": targets, "temperature": 0.7}


def kept(device, targets):
    """Sets of up to 40 ids, and tokens that have the whole vocabulary."""
    import tether

    order = torch.rand(B, V, device=device).argsort(-1)[:, :40]
    sizes = torch.arange(B, device=device) % 41
    absent = torch.arange(40, device=device) >= sizes[:, None]
    return tether.support(targets, order.masked_fill(absent, -1))


def kept_logps(device):
    rows = token_logps(device)
    return rows | {"support": kept(device, rows["targets"])}


def kept_kl(device):
    rows = categorical_kl(device)
    return rows | {"support": kept(device, torch.randint(V, (B,), device=device))}


# Name: the function, settings of its call, inputs.
DOORS = {
    "value_loss": ("value_loss", {}, value_loss),
    "huber": ("value_loss", {"objective": "huber"}, value_loss),
    "dpo": ("preference_loss", {}, preference_loss),
    "ipo": ("preference_loss", {"objective": "ipo"}, preference_loss),
    "kto": ("preference_loss", {}, kto),
    "gae": ("advantage", {"estimator": "gae", "lambda_": 0.95}, rows),
    "vtrace": ("advantage", {"estimator": "vtrace"}, vtrace),
    "returns": ("discounted_returns", {}, returns),
    "groups by id": ("group_advantage", {}, group_advantage),
    "whiten": ("whiten", {}, whiten),
    "categorical_kl": ("categorical_kl", {}, categorical_kl),
    "kl of kept ids": ("categorical_kl", {}, kept_kl),
    "statistics": ("token_logps", {"statistics": True}, token_logps),
    "kept ids": ("token_logps", {"entropies": True}, kept_logps),
}


def tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [each for part in out if part is not None for each in tensors(part)]


def evaluated(tether, function, arguments):
    """Results and gradients, of upstream ones that differ."""
    leaves = {k: x.detach().requires_grad_() for k, x in arguments.items() if k in GRADIENTS}
    if function in ("advantage", "whiten"):
        leaves = {}
    out = tensors(getattr(tether, function)(**arguments | leaves))
    if leaves:
        parts = [(i + 2) * each.sum() for i, each in enumerate(out) if each.requires_grad]
        sum(parts).backward()
    return [each.detach() for each in out] + [x.grad for x in leaves.values()]


def rounded(arguments, dtype):
    def cast(each):
        floating = isinstance(each, torch.Tensor) and each.is_floating_point()
        return each.to(dtype) if floating else each

    return {k: cast(x) for k, x in arguments.items()}


@contextlib.contextmanager
def no_waiting(device):
    """Whatever waits for the device is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def of_graph(tether, function, arguments, device):
    """The results of a captured graph, without gradients."""
    if device != "cuda":
        return tensors(getattr(tether, function)(**arguments))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call sets up
        getattr(tether, function)(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tensors(getattr(tether, function)(**arguments))
    graph.replay()
    return out


def same_bits(a, b):
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=False))


def check_door(tether, without_kernels, device, name, dtype, bound, gap):
    function, settings, inputs = DOORS[name]
    arguments = rounded(inputs(device), dtype) | settings
    evaluated(tether, function, arguments)  # torch's memory of the device grows once
    with no_waiting(device):
        found = evaluated(tether, function, arguments)
    again = evaluated(tether, function, arguments)
    graph = of_graph(tether, function, arguments, device)
    with without_kernels():
        wanted = evaluated(tether, function, rounded(arguments, torch.float64))
    error = gap(found, wanted)
    return {
        "door": name,
        "dtype": str(dtype),
        "error": error,
        "same bits": same_bits(found, again),
        "graph": same_bits(graph, found),
        "passed": error < bound and same_bits(found, again) and same_bits(graph, found),
    }


def check(tether, without_kernels, device, bounds, gap):
    return [
        check_door(tether, without_kernels, device, name, dtype, bound, gap)
        for name in DOORS
        for dtype, bound in bounds.items()
    ]


def measure(tether, without_kernels, device, milliseconds):
    """[of kernels, of torch's operations or of the CPU]"""
    out = {}
    for name, (function, settings, inputs) in DOORS.items():
        arguments = inputs(device) | settings

        def call(function=function, arguments=arguments):
            return evaluated(tether, function, arguments)

        kernels = milliseconds(call, device)
        with without_kernels():
            out[name] = {"kernels": kernels, "torch": milliseconds(call, device)}
    return out
