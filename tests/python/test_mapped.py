"""torch.vmap over arrays and over options: the same as one call for each place of a batch."""

import pytest
import tether
import torch

torch.manual_seed(0)
LOGPS = -torch.rand(2, 4, 3, dtype=torch.float64)
OLD = LOGPS[0] - 0.3
MASKS = (torch.rand(2, 4, 3) > 0.3).double()
ADVANTAGES = torch.randn(4, dtype=torch.float64)
HIDDEN, HEAD = torch.randn(2, 4, 3, 5).double(), torch.randn(7, 5).double()
TARGETS = torch.randint(7, (4, 3))

OF_MASKS = {
    "policy_loss": lambda x, m: tether.policy_loss(x, ADVANTAGES, m, old_logps=OLD).loss,
    "policy_token_losses": lambda x, m: tether.policy_token_losses(x, ADVANTAGES, m),
    "local_counts": lambda x, m: tether.local_counts(x, ADVANTAGES, m).policy,
    "aggregate": tether.aggregate,
    "kl_terms": lambda x, m: tether.kl_terms(x, OLD, m),
    "preference_loss": lambda x, m: tether.preference_loss(x, OLD, m).loss,
    "value_loss": lambda x, m: tether.value_loss(x, OLD, m).loss,
    "gae": lambda x, m: tether.generalized_advantage_estimation(x, OLD, m).returns,
    "batch_weights": lambda x, m: tether.batch_weights("kl_cov", x, m, advantages=ADVANTAGES),
    "whiten": tether.whiten,
    "moments": lambda x, m: tether.moments(x, m).squares,
    "kl_report": lambda x, m: tether.kl_report(x - OLD, m).standard_error,
    "mismatch_report": lambda x, m: tether.mismatch_report(x, OLD, m).token.ess,
}


@pytest.mark.parametrize("name", OF_MASKS)
def test_arrays_are_mapped(name):
    run = OF_MASKS[name]
    apart = [torch.as_tensor(run(*each)).double() for each in zip(LOGPS, MASKS, strict=True)]
    torch.testing.assert_close(torch.vmap(run)(LOGPS, MASKS), torch.stack(apart))
    masks_alone = torch.vmap(lambda mask: run(LOGPS[0], mask))(MASKS)
    torch.testing.assert_close(masks_alone[0], apart[0])


@pytest.mark.parametrize("name", ["whiten", "moments", "kl_report", "mismatch_report"])
def test_estimators_compile_into_one_graph(name):
    run = OF_MASKS[name]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.as_tensor(run(LOGPS[0], MASKS[0])).double()
    torch.testing.assert_close(compiled(LOGPS[0], MASKS[0]), expected)


def test_targets_of_responses_are_mapped_and_compiled():
    ids = torch.arange(24).view(2, 2, 6)
    lengths, attended = torch.tensor([[2, 3], [1, 6]]), torch.rand(2, 2, 6) > 0.2
    apart = [tether.response_targets(*each) for each in zip(ids, lengths, attended, strict=True)]
    mapped = torch.vmap(tether.response_targets)(ids, lengths, attended)
    compiled = torch.compile(tether.response_targets, fullgraph=True, backend="aot_eager")
    for i, expected in enumerate(apart):
        for name in expected._fields:
            assert torch.equal(getattr(mapped, name)[i], getattr(expected, name))
    assert torch.equal(compiled(ids[0], lengths[0], attended[0])[1], apart[0].response_mask)


def test_hidden_states_are_mapped():
    def logps(hidden):
        return tether.linear_token_logps(hidden, HEAD, TARGETS).logps

    def loss(hidden):
        return tether.linear_policy_loss(hidden, HEAD, TARGETS, ADVANTAGES, MASKS[0]).loss

    for run in (logps, loss):
        apart = torch.stack([run(each) for each in HIDDEN])
        torch.testing.assert_close(torch.vmap(run)(HIDDEN), apart)


def test_options_are_mapped():
    def policy(beta):
        return tether.policy_loss(
            LOGPS[0], ADVANTAGES, MASKS[0], old_logps=OLD, ref_logps=OLD, beta=beta
        ).loss

    def preference(beta):
        return tether.preference_loss(LOGPS[0], OLD, MASKS[0], beta=beta).loss

    def gae(gamma):
        return tether.advantage("gae", LOGPS[0], MASKS[0], values=OLD, gamma=gamma).returns

    values = torch.tensor([0.1, 0.7])
    for run in (policy, preference, gae):
        apart = torch.stack([run(each) for each in values.tolist()])
        torch.testing.assert_close(torch.vmap(run)(values), apart, atol=1e-7, rtol=1e-7)


def test_traced_functions_look_at_no_number():
    """make_fx asks no tensor what it holds."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(logps):
        return tether.policy_token_losses(logps, ADVANTAGES, MASKS[0], old_logps=OLD)

    torch.testing.assert_close(make_fx(run)(LOGPS[0])(LOGPS[0]), run(LOGPS[0]))


def test_weights_on_the_host_are_looked_at_under_torch_func():
    losses = {
        "policy_loss": lambda x, m: tether.policy_loss(x, ADVANTAGES, m).loss,
        "value_loss": lambda x, m: tether.value_loss(x, OLD, m).loss,
        "preference_loss": lambda x, m: tether.preference_loss(x, OLD, m).loss,
        "aggregate": tether.aggregate,
    }
    for name, run in losses.items():
        with pytest.raises(ValueError) as error:
            torch.func.grad(run)(LOGPS[0], torch.full((4, 3), 2.0))
        expected = f"{name}: response_mask must be in [0, 1], got 2 at [0, 0]"
        assert str(error.value) == expected
