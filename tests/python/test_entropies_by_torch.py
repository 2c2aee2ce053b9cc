"""Entropies that are no term of the loss, on the path of other devices."""

import tether
import tether._ops
import torch


def test_entropies_that_are_a_metric_do_not_spoil_the_loss(monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    shape = (1, 2)
    loss, _ = tether.policy_loss(
        torch.full(shape, -1.0, requires_grad=True),
        torch.ones(1),
        torch.ones(shape),
        entropies=torch.full(shape, 3e38),
    )
    assert loss == -1
