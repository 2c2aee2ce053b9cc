"""torch.compile and torch.library.opcheck."""

import pytest
import tether
import torch
from batches import evaluated, packed, padded_batch
from test_devices import CALLS, numbers

OPS = torch.ops.tether


def forward_arguments(batch, with_gradient=True):
    numbers = {
        "beta": 0.5,
        "epsilon_low": 0.1,
        "normalizer.policy": 20.0,
        "normalizer.kl": 20.0,
        "normalizer.sequences": 5.0,
    }
    names = ("logps", "advantages", "response_mask", "old_logps", "ref_logps", "entropies")
    return (
        *(
            batch.get(name)
            for name in (
                *(*names, "rollout_logps", "turn_ids", "token_weights", "kl_weights"),
                *("entropy_weights", "row_tokens", "offsets"),
            )
        ),
        list(numbers),
        torch.tensor(list(numbers.values()), dtype=torch.float64),
        ["objective", "aggregation"],
        ["grpo", "token_mean"],
        with_gradient,
    )


def transposed(batch):
    return {
        name: each.t().contiguous().t() if each.dim() == 2 else each for name, each in batch.items()
    }


@pytest.mark.parametrize(
    "layout, dtype", [(dict, torch.float32), (packed, torch.float64), (transposed, torch.bfloat16)]
)
def test_opcheck_of_the_forward_operator(layout, dtype):
    batch = layout(padded_batch(poison=0.0, dtype=dtype))
    plain = {name: each for name, each in batch.items() if name != "old_logps"}
    torch.library.opcheck(OPS.policy_loss.default, forward_arguments(plain, with_gradient=False))
    batch["logps"].requires_grad_()
    torch.library.opcheck(OPS.policy_loss.default, forward_arguments(batch))


def test_opcheck_of_the_counts():
    batch = padded_batch(poison=0.0)
    torch.library.opcheck(OPS.local_counts.default, forward_arguments(batch)[:-1])


class Compiled:
    """A training step in one graph."""

    def __init__(self, **settings):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.settings = settings
        self.step = torch.compile(self._step, fullgraph=True, backend="aot_eager", dynamic=True)

    @property
    def graphs(self):
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def _step(self, logits, batch, normalizer, beta):
        logps = 2 * logits
        out = tether.policy_loss(
            **batch | {"logps": logps}, normalizer=normalizer, beta=beta, **self.settings
        )
        return 3 * out.loss, out.metrics

    def __call__(self, batch, normalizer=None, beta=0.1):
        logits = (batch["logps"] / 2).detach().requires_grad_()
        loss, metrics = self.step(logits, batch, normalizer, beta)
        loss.backward()
        return loss.detach() / 3, logits.grad / 6, metrics


def assert_equals_eager(out, batch, **settings):
    loss, dlogps, metrics = out
    expected = evaluated(batch, **settings)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(dlogps, expected.dlogps, rtol=1e-14, atol=0)
    assert torch.equal(metrics.sums, expected.sums)
    assert torch.equal(metrics.maxima, expected.maxima)


@pytest.mark.parametrize("layout", [dict, packed])
def test_one_graph_for_all_shapes_and_counts(layout):
    compiled = Compiled(objective="grpo")
    for rows, columns in ((4, 9), (6, 12), (3, 7)):
        batch = layout(padded_batch(lengths=[columns - i for i in range(rows)], columns=columns))
        step = tether.local_counts(**batch) + tether.local_counts(**batch)
        beta = torch.tensor(1.0 / rows)
        out = compiled(batch, step, beta)
        assert_equals_eager(out, batch, objective="grpo", normalizer=step, beta=beta)
    assert compiled.graphs == 1


def test_inductor():
    batch = padded_batch(poison=0.0)

    @torch.compile(fullgraph=True)
    def step(logits):
        logps = -torch.nn.functional.softplus(logits)
        return tether.policy_loss(**batch | {"logps": logps}, objective="dapo").loss

    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    step(logits).backward()
    eager = logits.detach().clone().requires_grad_()
    logps = -torch.nn.functional.softplus(eager)
    tether.policy_loss(**batch | {"logps": logps}, objective="dapo").loss.backward()
    torch.testing.assert_close(logits.grad, eager.grad, rtol=1e-12, atol=1e-15)


def test_errors_of_compiled_code_are_the_same():
    compiled = Compiled(objective="ppo")
    batch = padded_batch()
    batch["response_mask"] = batch["response_mask"] * 2.0
    with pytest.raises(ValueError) as caught:
        compiled(batch)
    assert str(caught.value) == "policy_loss: response_mask must be in [0, 1], got 2 at [0, 0]"


# By torch's operations, which do not look while they are traced.
UNSEEN = (
    "kl_report",
    "kl_terms",
    "mismatch_report",
    "moments",
    "policy_token_losses",
    "whiten",
)
MASKED = [name for name, each in CALLS.items() if "response_mask" in each and name not in UNSEEN]


@pytest.mark.parametrize("function", [*MASKED, "linear_policy_loss of rows"])
def test_a_bad_mask_is_refused_in_the_name_of_the_function_in_compiled_code_too(function):
    name, _, level = function.partition(" of ")
    arguments = CALLS[name] | ({"objective": "gspo"} if level else {})
    arguments["response_mask"] = 2.0 * arguments["response_mask"]

    def said(call):
        with pytest.raises(ValueError) as caught:
            call(**arguments)
        return str(caught.value)

    torch._dynamo.reset()
    call = getattr(tether, name)
    sentence = said(torch.compile(call, backend="aot_eager"))
    assert sentence == said(call)
    assert sentence.startswith(f"{name}: response_mask must be in [0, 1], got 2 at [")


@pytest.mark.parametrize("layout", [dict, packed])
def test_the_path_of_other_devices_compiles_into_one_graph(layout):
    batch = layout(padded_batch())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logps):
        return tether.reference.policy_loss(**batch | {"logps": logps}, objective="grpo").loss

    expected = evaluated(batch, objective="grpo").loss
    torch.testing.assert_close(loss(batch["logps"]), expected, rtol=1e-12, atol=0)


def test_a_surrogate_compiles_into_one_graph():
    own = tether.Surrogate(lambda token: token.log_ratio**2 - token.ratio * token.advantage)
    batch = padded_batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logps):
        return tether.policy_loss(**batch | {"logps": logps}, objective=own, level="turn_mean")

    expected = evaluated(batch, objective=own, level="turn_mean")
    x = batch["logps"].clone().requires_grad_()
    loss, metrics = compiled(x)
    loss.backward()
    for actual, eager in zip((loss, x.grad, *metrics), expected, strict=True):
        torch.testing.assert_close(actual, eager)


def test_meta_tensors_have_the_shapes_of_the_results():
    meta = {name: each.to("meta") for name, each in padded_batch(dtype=torch.bfloat16).items()}
    loss, metrics = tether.policy_loss(**meta)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    assert (metrics.sums.shape, metrics.maxima.shape) == ((14, 2), (3,))


# What they take is looked at.
ON_THE_HOST = {"response_targets", "support"}


@pytest.mark.parametrize("function", [name for name in CALLS if name not in ON_THE_HOST])
def test_every_function_of_other_devices_compiles_into_one_graph(function, monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    torch.compiler.reset()
    call, arguments = getattr(tether, function), dict(CALLS[function])
    arguments.pop("gradient_buffer", None)  # of kernels

    @torch.compile(fullgraph=True, backend="eager")
    def compiled():
        return call(**arguments)

    expected = numbers(call(**arguments))
    torch.testing.assert_close(numbers(compiled()), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
