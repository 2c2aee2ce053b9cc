"""What tether.Surrogate refuses, and the losses of one, letter by letter."""

import math
import re

import pytest
import tether
import torch
from batches import OBJECTIVES, padded_batch

LOSSES = ("policy_loss", "policy_token_losses", "local_counts")


def clipped(token, epsilon=0.2):
    bounded = token.ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(token.ratio * token.advantage, bounded * token.advantage)


CLIPPED = tether.Surrogate(clipped)


@pytest.fixture(params=["cpu", "another device"])
def device(request, monkeypatch):
    if request.param != "cpu":
        monkeypatch.setattr("tether.policy.has_kernel", lambda tensor, *others: False)


def refused(error, sentence, call, *arguments, **settings):
    with pytest.raises(error) as caught:
        call(*arguments, **settings)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("function", LOSSES)
def test_options_are_checked(function, device):
    known = "epsilon, log_ratio_low, log_ratio_high, beta, kl_ratio_high, entropy_coef, constant"
    for error, sentence, settings in (
        (ValueError, f'option must be one of {known}, got "epsilom". Did you mean epsilon?',
         {"epsilom": 0.1}),
        (ValueError, f'option must be one of {known}, got "dual_clip"', {"dual_clip": 0.1}),
        (TypeError, "epsilon must be a number, got str", {"epsilon": "x"}),
        (ValueError, "epsilon must be a number, got nan", {"epsilon": math.nan}),
        (ValueError, "beta must be in [0, 1e+12], got -1", {"beta": -1}),
        (ValueError, "ref_logps must be [5, 9] like logps, got [2]", {"ref_logps": torch.ones(2)}),
    ):  # fmt: skip
        settings = padded_batch() | {"objective": CLIPPED} | settings
        refused(error, f"{function}: {sentence}", getattr(tether, function), **settings)


def test_values_of_arrays_are_checked_where_they_are_on_the_host():
    batch = padded_batch()
    needs = "ref_logps must be given when beta is greater than 0, got beta 0.1 and none"
    for change, sentence in (
        ({"response_mask": 2.0 * batch["response_mask"]},
         "response_mask must be in [0, 1], got 2 at [0, 0]"),
        ({"beta": 0.1, "ref_logps": None}, f"{needs}. Pass ref_logps or beta = 0"),
        ({"turn_ids": -batch["turn_ids"], "level": "turn_mean"},
         "turn_ids must not decrease along a row, got -1 after 0 at [0, 1]"),
    ):  # fmt: skip
        for objective in (CLIPPED, "ppo"):
            settings = batch | {"objective": objective} | change
            refused(ValueError, f"policy_loss: {sentence}", tether.policy_loss, **settings)


@pytest.mark.parametrize("function", LOSSES[:2])
def test_what_a_formula_returns_is_checked(function, device):
    batch = padded_batch(poison=-1.0) | {"ref_logps": None}
    for error, formula, sentence in (
        (TypeError, lambda token: 0.5, "the surrogate must return a tensor, got float"),
        (ValueError, lambda token: token.logp.mean(),
         "the surrogate must return [5, 9] on cpu like its tokens, got [] on cpu"),
        (ValueError, lambda token: token.ref_logp,
         "ref_logps must be given where the surrogate reads ref_logp, got none"),
    ):  # fmt: skip
        settings = batch | {"objective": tether.Surrogate(formula)}
        refused(error, f"{function}: {sentence}", getattr(tether, function), **settings)


def test_formulas_are_checked():
    def of_anything(token, *others):
        return token

    def of_words(token, mode="x"):
        return token

    def of_flags(token, flag=True):
        return token

    taken = "must have another name: policy_loss has one"
    rows = ", ".join(OBJECTIVES)
    for error, sentence, formula, settings in (
        (TypeError, "formula must be a function or a module, got int", 3, {}),
        (TypeError, "formula must be a function or a module, got the class ReLU", torch.nn.ReLU,
         {}),
        (ValueError, "formula must say what it takes, got exp without a signature. Wrap it in a "
         "function", torch.exp, {}),
        (ValueError, "option e must be a number, got nan", lambda token, e=math.nan: 0, {}),
        (ValueError, "truncation must be a number, got nan", clipped,
         {"truncation": (math.nan, 1)}),
        (ValueError, "formula must take a token first, got no parameter", lambda: 0, {}),
        (ValueError, "formula must take a token first, got **x", lambda **x: 0, {}),
        (ValueError, "formula must name its options, got *others", of_anything, {}),
        (ValueError, "option b must have a default, got none", lambda a, b: 0, {}),
        (TypeError, "option mode must be a number, got str", of_words, {}),
        (TypeError, "option flag must be a number, got bool", of_flags, {}),
        (ValueError, f"option beta {taken}", lambda token, beta=1: 0, {}),
        (ValueError, f"option offsets {taken}", lambda token, offsets=1: 0, {}),
        (ValueError, f"option vespo {taken}", lambda token, vespo=1: 0, {}),
        (TypeError, "like must be a string, got int", clipped, {"like": 3}),
        (ValueError, f'like must be one of {rows}, got "vanilla". Did you mean ppo_dual_clip?',
         clipped, {"like": "vanilla"}),
        (TypeError, "truncation must be (low, high), got float", clipped, {"truncation": 3.0}),
        (ValueError, 'truncation must be of epsilon, got "high"', clipped,
         {"truncation": (0, "high")}),
        (TypeError, "truncation must be a number, got NoneType", clipped,
         {"truncation": (0, None)}),
    ):  # fmt: skip
        refused(error, f"Surrogate: {sentence}", tether.Surrogate, formula, **settings)
    with pytest.raises(ValueError, match=re.escape("like must be one of trl.grpo, ")):
        tether.Surrogate(clipped, like="verl.nothing")


@pytest.mark.parametrize("function", ["preference_loss", "value_loss"])
def test_other_losses_take_no_surrogate(function):
    x = torch.zeros(2, 3)
    sentence = f"{function}: objective must be a string or one of tether.objective, got Surrogate"
    refused(TypeError, sentence, getattr(tether, function), x, x, x, objective=CLIPPED)


def test_options_are_none_of_the_head():
    x = torch.zeros(2, 3)
    for name in ("temperature", "chunk_bytes"):
        own = tether.Surrogate(eval(f"lambda token, {name}=1: token.logp"))
        refused(
            ValueError,
            f"linear_policy_loss: option {name} of the surrogate must have another name: "
            "linear_policy_loss has one",
            tether.linear_policy_loss, x, x, x, x, x, objective=own,
        )  # fmt: skip
