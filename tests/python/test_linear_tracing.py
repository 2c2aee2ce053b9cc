"""torch.compile of the functions of hidden states and a head: one graph, the numbers of eager."""

import pytest
import tether
import torch
from torch.utils.checkpoint import checkpoint

H, V = 6, 40
OPS = torch.ops.tether


def normal(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def batch(rows, columns, dtype=torch.float64):
    """hidden, weight, bias as leaves; targets, mask and constants of a token each."""
    generator = torch.Generator().manual_seed(rows)
    leaves = normal(rows, columns, H, seed=1), normal(V, H, seed=2), normal(V, seed=3)
    constants = {
        "targets": torch.randint(V, (rows, columns), generator=generator),
        "response_mask": torch.rand(rows, columns, generator=generator) < 0.7,
        "advantages": normal(rows, seed=4).to(dtype),
        "ref_logps": -normal(rows, columns, seed=5).abs().to(dtype) - 3,
    }
    return tuple(each.to(dtype).requires_grad_() for each in leaves), constants


def logps_of(hidden, weight, bias, targets, response_mask, advantages, ref_logps, **options):
    known = targets.masked_fill(~response_mask, -100)
    out = tether.linear_token_logps(
        hidden, weight, known, bias, entropies=True, statistics=True, **options
    )
    return (out.logps * out.mean_logits + 2 * out.entropies).sum()


def policy_of(objective):
    def loss(hidden, weight, bias, targets, response_mask, advantages, ref_logps, **options):
        given = {"ref_logps": ref_logps, "beta": 0.1, "objective": objective, **options}
        row = (hidden, weight, targets, advantages, response_mask, bias)
        return tether.linear_policy_loss(*row, **given).loss

    return loss


def pairs_of(hidden, weight, bias, targets, response_mask, advantages, ref_logps, **options):
    row = (hidden, weight, targets, ref_logps, response_mask, bias)
    return tether.linear_preference_loss(*row, **options).loss


def buffered(hidden, weight, bias, targets, response_mask, advantages, ref_logps):
    logits = hidden @ weight.T + bias
    known = targets.masked_fill(~response_mask, -100)
    return tether.token_logps(logits, known, gradient_buffer=logits.detach()).logps.sum()


LOSSES = {
    "linear_token_logps": logps_of,
    "linear_policy_loss": policy_of("dapo"),
    "linear_policy_loss of sequences": policy_of("gspo"),
    "linear_preference_loss": pairs_of,
    "token_logps of a buffer": buffered,
}
EACH = pytest.mark.parametrize("name", LOSSES)
WALKS = pytest.mark.parametrize("name", ["linear_token_logps", "linear_policy_loss"])


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=True)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def results(function, leaves, constants):
    loss = 3 * function(*leaves, **constants)
    wanted = [each for each in leaves if each.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@EACH
def test_one_graph_for_all_sizes(name):
    step = compiled(LOSSES[name])
    for rows, columns in ((4, 9), (6, 12), (2, 7)):
        row = batch(rows, columns)
        assert_equal(results(step, *row), results(LOSSES[name], *row))
    assert graphs() == 1


@WALKS
@pytest.mark.parametrize("options", [{"chunk_bytes": 5 * V * 8}, {"rows_per_chunk": 4}])
def test_chunks_stay(name, options):
    def function(*row, **constants):
        return LOSSES[name](*row, **constants, **options)

    row = batch(4, 9)
    assert_equal(results(compiled(function), *row), results(function, *row))


@WALKS
def test_autocast(name):
    def function(*row, **constants):
        with torch.autocast("cpu", torch.bfloat16):
            return LOSSES[name](*row, **constants)

    row = batch(4, 9, torch.float32)
    for a, b in zip(results(compiled(function), *row), results(function, *row), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())


@WALKS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, reentrant):
    def function(*row, **constants):
        def segment(*leaves):
            return LOSSES[name](*leaves, **constants)

        return checkpoint(segment, *row, use_reentrant=reentrant)

    row = batch(4, 9)
    assert_equal(results(compiled(function), *row), results(LOSSES[name], *row))


@WALKS
def test_constants_may_come_from_inference_mode(name):
    leaves, constants = batch(4, 9)
    with torch.inference_mode():
        made = {key: each.clone() for key, each in constants.items()}
    assert_equal(
        results(compiled(LOSSES[name]), leaves, made), results(LOSSES[name], leaves, constants)
    )


def test_what_backward_reads_may_not_come_from_inference_mode():
    """torch's own sentence; eager calls copy it."""
    (hidden, weight, _), constants = batch(4, 9)
    with torch.inference_mode():
        frozen, targets = weight.detach().clone(), constants["targets"].clone()

    def step(hidden, weight, targets):
        return tether.linear_token_logps(hidden, weight, targets).logps.sum()

    for row in ((frozen, constants["targets"]), (weight, targets)):
        step(hidden, *row)
        with pytest.raises(RuntimeError, match=r"^Inference tensors cannot be saved for backward"):
            compiled(step)(hidden, *row)


def test_an_option_may_be_a_tensor():
    def step(hidden, weight, bias, entropy_coef, **constants):
        out = tether.linear_policy_loss(
            hidden, weight, bias=bias, entropy_coef=entropy_coef, beta=0.0, **constants
        )
        assert not out.entropies.requires_grad
        return out.loss - out.entropies.sum()

    leaves, constants = batch(4, 9)
    graph = compiled(step)
    for coef in (0.1, 0.2):
        row = (leaves, constants | {"entropy_coef": torch.tensor(coef)})
        assert_equal(results(graph, *row), results(step, *row))
    assert graphs() == 1


def test_errors_are_those_of_eager_calls():
    def policy(hidden, weight, bias, targets, response_mask, advantages, ref_logps):
        return tether.linear_policy_loss(hidden, weight, targets, advantages, response_mask).loss

    def logps(hidden, weight, bias, targets, **_):
        return tether.linear_token_logps(hidden, weight, targets).logps.sum()

    leaves, constants = batch(4, 9)
    constants["response_mask"][:] = True
    constants["targets"][1, 2] = V
    for function, name in ((policy, "linear_policy_loss"), (logps, "linear_token_logps")):
        for step in (function, compiled(function)):
            with pytest.raises(IndexError) as caught:
                step(*leaves, **constants)
            assert str(caught.value) == (
                f"{name}: targets must be in [0, {V}) or ignore_index -100, got {V} at [1, 2]"
            )


def test_large_kept_sets_are_one_graph():
    def step(hidden, weight, bias, targets, kept):
        out = tether.linear_token_logps(
            hidden, weight, targets, bias, support=kept, entropies=True, chunk_bytes=3 * V * 8
        )
        return (out.logps * 0.7 - out.entropies).sum()

    leaves, constants = batch(4, 9)
    targets = constants["targets"]
    kept = tether.support(targets, (targets[..., None] + torch.arange(3)) % V)
    outcomes = []
    for function in (compiled(step), step):
        outcomes.append(torch.autograd.grad(function(*leaves, targets, kept), leaves))
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-15)


def test_small_kept_sets_break_the_graph(monkeypatch):
    monkeypatch.setattr("tether._support._FASTER", 1)

    def step(hidden, weight, targets, kept):
        return tether.linear_token_logps(hidden, weight, targets, support=kept).logps.sum()

    (hidden, weight, _), constants = batch(4, 9)
    targets = constants["targets"]
    kept = tether.support(targets, (targets[..., None] + torch.arange(3)) % V)
    row = (hidden, weight, targets, kept)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(step)(*row)
    torch._dynamo.reset()
    loss = torch.compile(step, backend="aot_eager")(*row)
    torch.testing.assert_close(loss, step(*row), rtol=1e-14, atol=0)


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]])
def test_opcheck(wanted):
    leaves, constants = batch(2, 5)
    leaves = [each.detach().requires_grad_(need) for each, need in zip(leaves, wanted, strict=True)]
    targets, mask = constants["targets"], constants["response_mask"]
    rows = ([], torch.zeros(0, dtype=torch.float64), ["entropies"], ["true"])
    chunk, errors = (3, False), ("f", -100)
    kept = (targets[..., None] + torch.arange(3)) % V
    row = (*leaves, targets, kept, mask, *rows, True, *chunk, *errors)
    torch.library.opcheck(OPS.linear_token_logps, row)
    with torch.no_grad():
        statistics = OPS.linear_token_logps(*row)[2]
    upstream = normal(2, 5, seed=6)
    constant = [each.detach() for each in leaves]
    gradient = (*constant, targets, kept, statistics, mask, upstream, None, *rows, *chunk, wanted)
    torch.library.opcheck(OPS.linear_gradient, gradient)
    arrays = (constants["advantages"][:, None], mask, *[None] * 8)
    objective = (*rows[:2], ["objective"], ["ppo"])
    loss = (*leaves, targets, *arrays, *objective, *rows, True, *chunk, wanted, None, *errors)
    torch.library.opcheck(OPS.linear_policy_loss, loss)


def test_inductor():
    def step(hidden, weight, targets, mask, advantages):
        return tether.linear_policy_loss(hidden, weight, targets, advantages, mask).loss

    (*leaves, _), constants = batch(4, 9)
    arrays = [constants[name] for name in ("targets", "response_mask", "advantages")]
    outcomes = []
    for function in (compiled(step, backend="inductor"), step):
        outcomes.append(torch.autograd.grad(function(*leaves, *arrays), leaves))
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-15)
