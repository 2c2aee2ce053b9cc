"""KL of two rows of logits on the GPU: errors against float64, bits of two runs, times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from library import DEVICE, DTYPES, largest, stream_of
from timing import of_logits

# Of values relative to 1 + |x|; of gradients to the largest of their row, but for rounding.
BOUNDS = {"values": 2e-5, "gradients": 2e-5}
# Of a number itself, and of the smallest ones.
ROUNDING = {torch.float32: (0, 0), torch.bfloat16: (2**-8, 0), torch.float16: (2**-10, 2**-24)}


def logits_kl(doors, q, p, temperature, upstream=None, out=None):
    """[3, rows]: both directions and the entropy of q; with `out`, dq and dp, their gradients."""
    values = torch.empty(3, q.shape[0], device=q.device)
    dq, dp = out or (None, None)
    doors.call("logits_kl", q, p, DTYPES[q.dtype], *q.shape, temperature, upstream, values, dq, dp,
               stream_of(q))  # fmt: skip
    return values


def exact(q, p, temperature, upstream):
    x, y = (each.double().requires_grad_() for each in (q, p))
    log_q, log_p = F.log_softmax(x / temperature, -1), F.log_softmax(y / temperature, -1)
    values = torch.stack(
        [
            (log_q.exp() * (log_q - log_p)).sum(-1),
            (log_p.exp() * (log_p - log_q)).sum(-1),
            -(log_q.exp() * log_q).sum(-1),
        ]
    )
    return values.detach(), *torch.autograd.grad((values * upstream).sum(), (x, y))


def pair_of(rows, vocabulary, dtype):
    q = 3 * torch.randn(rows, vocabulary, device=DEVICE)
    p = q + 0.5 * torch.randn(rows, vocabulary, device=DEVICE)
    q[0, 5] = p[0, 5] = 30.0  # a confident row
    return q.to(dtype), p.to(dtype), torch.randn(3, rows, device=DEVICE)


def check_pair(doors, shape, dtype, temperature=0.7):
    q, p, upstream = pair_of(*shape, dtype)
    want, dq, dp = exact(q, p, temperature, upstream)
    out = torch.empty_like(q), torch.empty_like(p)
    alone = logits_kl(doors, q, p, temperature)
    values = logits_kl(doors, q, p, temperature, upstream, out)
    first = [each.clone() for each in (values, *out)]
    again = logits_kl(doors, q, p, temperature, upstream, out)
    same = all(torch.equal(a, b) for a, b in zip(first, (again, *out), strict=True))
    in_place = q.clone(), p.clone()
    logits_kl(doors, *in_place, temperature, upstream, in_place)
    same &= all(torch.equal(a, b) for a, b in zip(out, in_place, strict=True))

    def error(got, exact_one):
        size = exact_one.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        relative, absolute = ROUNDING[dtype]
        rounding = relative * exact_one.abs() + absolute
        return float((((got - exact_one).abs() - rounding) / size).max())

    errors = {
        "values": largest(((v - want).abs() / (1 + want)).max() for v in (alone, values)),
        "gradients": largest((error(out[0], dq), error(out[1], dp))),
    }
    passed = same and all(errors[name] <= BOUNDS[name] for name in errors)
    return {"dtype": str(dtype), "shape": shape, "same_bits": same, "passed": passed, **errors}


def measure(doors, repetitions, rows=2048, vocabulary=151936, dtype=torch.bfloat16):
    """Beside a copy of one row's logits: 2 units of them; values read 2, gradients move 4."""
    q, p, upstream = pair_of(rows, vocabulary, dtype)
    out = torch.empty_like(q), torch.empty_like(p)
    methods = {
        "copy": (lambda: out[0].copy_(q), 2),
        "values": (lambda: logits_kl(doors, q, p, 1.0), 2),
        "gradients": (lambda: logits_kl(doors, q, p, 1.0, upstream, out), 4),
    }
    return of_logits(q, methods, repetitions)


def quick_parts(doors):
    return {"pairs": lambda: [check_pair(doors, (3, 1003), dtype) for dtype in DTYPES]}


def parts(doors, repetitions):
    shapes = ((3, 7), (16, 32003), (8, 151936), (2, 300001))
    return {
        "pairs": lambda: [check_pair(doors, shape, dtype) for dtype in DTYPES for shape in shapes],
        "pair_times": lambda: measure(doors, repetitions),
    }
