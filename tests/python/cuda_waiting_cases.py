"""The way of CUDA tensors on a device where waiting is an error; run by test_waiting.py."""

import elsewhere
import host_operators
import pytest
import tether
import torch
from test_cuda_doors import STEPS, answers, assert_same, in_tensors, values
from test_devices import CALLS, evaluated
from waiting_cases import evaluated as evaluated_there


@pytest.fixture(autouse=True)
def device():
    elsewhere.install()
    host_operators.load()


def here(function, arguments):
    return [each for each in evaluated(function, arguments) if each is not None]


def by_kernels(function, arguments):
    with host_operators.kernels_of(elsewhere.NAME) as calls:
        return evaluated_there(function, arguments), calls


@pytest.mark.parametrize(
    ("function", "operators"),
    [
        ("policy_loss", ["policy_loss"]),
        ("local_counts", ["local_counts"]),
        ("preference_loss", ["preference_loss"]),
        ("dpo_loss", ["preference_loss"]),
        ("value_loss", ["value_loss"]),
        ("advantage", ["advantage"]),
        ("generalized_advantage_estimation", ["advantage"]),
        ("discounted_returns", ["advantage"]),
        ("group_advantage", ["group_advantage"]),
        ("whiten", ["whiten_by_moments"]),
        ("categorical_kl", ["categorical_kl_forward", "categorical_kl_backward"]),
    ],
)
def test_no_kernel_is_waited_for(function, operators):
    want = here(function, CALLS[function])
    got, calls = by_kernels(function, CALLS[function])
    assert calls == operators
    assert_same(got, want)


@pytest.mark.parametrize(("function", "step"), STEPS)
def test_denominators_on_the_device_are_not_waited_for(function, step):
    batch = values() if function == "value_loss" else answers()
    want = here(function, batch | step)
    there = elsewhere.moved(in_tensors(step))
    if "normalizer" in there:
        there["normalizer"] = tether.Normalizer(**elsewhere.moved(vars(there["normalizer"])))
    got, calls = by_kernels(function, batch | there)
    assert calls == [f"{function}_by_counts"]
    assert_same(got, want)


def test_moments_of_the_step_are_not_waited_for():
    batch = CALLS["whiten"]
    step = tether.Moments(100.0, 0.4, 250.0)
    there = tether.Moments(*(torch.tensor(x).to(elsewhere.NAME) for x in step))
    want = tether.whiten(**batch, step=step)
    for given, operator in ((step, "whiten"), (there, "whiten_by_moments")):
        got, calls = by_kernels("whiten", batch | {"step": given})
        assert calls == [operator]
        assert_same(got, [want])
