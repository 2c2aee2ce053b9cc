"""An option in a tensor of one number is that number, whatever the shape and the device."""

import pytest
import tether
import torch

torch.manual_seed(0)
LOGPS = -torch.rand(4, 3, dtype=torch.float64)
OLD = LOGPS - 0.3
MASK = (torch.rand(4, 3) > 0.3).double()
LOGITS = torch.randn(4, 3, 7, dtype=torch.float64)
TARGETS = torch.randint(7, (4, 3))
HEAD_IDS = TARGETS[..., None]
GROUPS = torch.tensor([0, 0, 1, 1])

CALLS = {
    "whiten": (lambda x: tether.whiten(LOGPS, MASK, epsilon=x), 0.5),
    "step": (lambda x: tether.whiten(LOGPS, MASK, step=tether.Moments(x, x, x)), 3.0),
    "kl_report": (
        lambda x: tether.kl_report(LOGPS - OLD, MASK, estimator="k_lambda", lambda_=x).mean,
        0.5,
    ),
    "gae": (
        lambda x: tether.generalized_advantage_estimation(LOGPS, OLD, MASK, gamma=x, lambda_=x),
        0.5,
    ),
    "vtrace": (
        lambda x: tether.advantage(
            "vtrace", LOGPS, MASK, values=OLD, log_ratios=LOGPS - OLD, rho_bar=x
        ),
        2**70,
    ),
    "groups": (lambda x: tether.group_advantage(LOGPS[:, 0], GROUPS, epsilon=x), 0.5),
    "token_logps": (
        lambda x: tether.token_logps(LOGITS, TARGETS, temperature=x, scale=x, softcap=x).logps,
        0.5,
    ),
    "categorical_kl": (lambda x: tether.categorical_kl(LOGITS, -LOGITS, temperature=x), 0.5),
    "top_k_kl": (
        lambda x: tether.top_k_kl(
            LOGITS, HEAD_IDS, OLD[..., None], tail="bucket", temperature=x, precision=1e-6
        ),
        0.5,
    ),
    "head_logps": (lambda x: tether.head_logps(LOGITS, HEAD_IDS, temperature=x), 0.5),
    "batch_weights": (
        lambda x: tether.batch_weights(
            "kl_cov", LOGPS, MASK, advantages=LOGPS[:, 0].contiguous(), share=x
        ),
        0.5,
    ),
}


@pytest.mark.parametrize("kernels", [frozenset({"cpu"}), frozenset()], ids=["cpu", "others"])
@pytest.mark.parametrize("name", CALLS)
def test_an_option_in_a_tensor_is_its_number(name, kernels, monkeypatch):
    run, number = CALLS[name]
    monkeypatch.setattr(tether._ops, "KERNELS", kernels)
    expected = run(number)
    for shape in ((), (1,), (1, 1, 1, 1, 1)):
        option = torch.full(shape, float(number), dtype=torch.float64)
        torch.testing.assert_close(run(option), expected, rtol=0, atol=0)


def test_an_estimator_that_is_no_name_is_refused():
    with pytest.raises(TypeError) as error:
        tether.kl_report(LOGPS, MASK, estimator=torch.ones(2), lambda_=0.5)
    assert str(error.value) == "kl_report: estimator must be a string, got Tensor"
