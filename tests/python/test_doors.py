"""Every public function refuses what its lists say, on every path in the same sentence.

Each call is right but for one argument. The paths: kernels; the path of devices without them,
forced on the CPU; tensors of "meta", where nobody can read a number.
"""

import inspect
import math
import re

import pytest
import tether
import torch
from test_devices import CALLS

TENSORS = {
    function: [name for name, each in arguments.items() if isinstance(each, torch.Tensor)]
    for function, arguments in CALLS.items()
}
# Rules of their own on other devices, where there is no such thing.
OF_KERNELS = {"gradient_buffer"}
# What a fault is not: masks, labels and weights may have any type of numbers; masks, labels, flags
# may be bools, groups a size; of offsets, and of what they divide alone, the size is a matter of
# their numbers.
LEGAL = {
    ("response_mask", "another dtype"),
    ("nll_mask", "another dtype"),
    ("labels", "another dtype"),
    ("answer_weights", "another dtype"),
    ("attention_mask", "another dtype"),
    *((mask, "bools") for mask in ("response_mask", "nll_mask", "labels", "mask")),
    *((flag, "bools") for flag in ("done", "truncated", "attention_mask")),
    ("groups", "a number"),
    ("head_ids", "another size"),
    ("offsets", "another size"),
    ("token_ids", "another size"),
}
PATHS = ("kernels", "other", "meta")
ELSEWHERE = "on another device than the rest"


def is_dense(each):
    return isinstance(each, torch.Tensor) and not each.is_nested


def on_meta(arguments, but):
    """All tensors on meta, but those of `but`, which are where they are meant to be."""
    return {
        name: each.to("meta") if is_dense(each) and name not in but else each
        for name, each in arguments.items()
    }


def wrong_tensors(tensor):
    """By name of the fault; what replaces a right tensor."""
    floating = tensor.is_floating_point()
    other = torch.zeros(tensor.shape, dtype=torch.complex64, device=tensor.device)
    small = torch.zeros(tensor.shape, dtype=torch.float16, device=tensor.device)
    return {
        "a list": [1.0],
        "a number": 3.5,
        "a string": "x",
        "an array of complex numbers": other,
        "another dtype": small.to(torch.int64) if floating else small,
        "bools": small.bool(),
        "a dimension more": tensor[None].expand(2, *tensor.shape),
        "a dimension less": tensor.flatten()[:1].reshape(()),
        "another size": torch.cat([tensor.flatten(), tensor.flatten(), tensor.flatten()[:1]]),
        "nested": torch.nested.nested_tensor([tensor, tensor]),
        "sparse": torch.zeros(tensor.shape, device=tensor.device).to_sparse(),
        "elsewhere": ELSEWHERE,
    }


def wrong_settings(function):
    """(name, value) of what no function takes."""
    rows = {"policy_loss", "policy_token_losses", "local_counts", "linear_policy_loss"}
    pairs = {"preference_loss", "dpo_loss", "linear_preference_loss"}
    family = "policy" if function in rows else "preference" if function in pairs else None
    out = []
    if family is not None:
        row = tether.objectives(family)["grpo" if family == "policy" else "dpo"]
        for name, option in row.options.items():
            out += [(name, value) for value in beyond(option)]
            out += [(name, value) for value in ("0.1", None, True, [1.0], torch.ones(2))]
        for name in row.choices:
            out += [(name, value) for value in ("nothing", 3, None)]
        out += [("nothing", 1.0), ("nothing", "x"), ("objective", "nothing"), ("objective", 3)]
    name = {"dpo_loss": "preference_loss"}.get(function, function)
    declared = tether._functions.FUNCTIONS.get(name)
    if declared is not None and family is None:
        signature = inspect.signature(getattr(tether, function)).parameters
        for option in declared.options:
            python = option if option in signature else option + "_"
            if python in signature:
                legal = declared.options[option]
                out += [(python, value) for value in beyond(legal)]
                out += [(python, value) for value in ("0.1", [1.0])]
        for choice in declared.choices:
            if choice in signature:
                out += [(choice, value) for value in ("nothing", 3, None)]
    return out


def beyond(option):
    """Numbers outside the range of an option."""
    out = [math.nan]
    if option.low > -math.inf:
        out.append(option.low if option.above else option.low - 1)
    if option.high < math.inf:
        out.append(math.inf if option.high > 1e300 else option.high * 2)
    return out


def described(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor of {list(value.shape)}"
    return repr(value)


def constants_of(function):
    """Floating-point arguments that no gradient flows into."""
    callee = {
        "dpo_loss": "preference_loss",
        "policy_token_losses": "policy_loss",
        "linear_policy_loss": "policy_loss",
        "linear_preference_loss": "preference_loss",
    }.get(function, function)
    declared = tether._functions.FUNCTIONS.get(callee)
    lists = declared.arguments if declared is not None else ()
    names = {each.name for each in lists if not each.differentiable}
    return {n for n in names if n in CALLS[function] and CALLS[function][n].is_floating_point()}


def wrong_calls(function):
    """(what, changes) for one argument after another."""
    arguments = CALLS[function]
    constants = constants_of(function)
    for name in TENSORS[function]:
        if name in constants:
            yield f"{name} asks for a gradient", {name: arguments[name].clone().requires_grad_()}
        for fault, value in wrong_tensors(arguments[name]).items():
            if (name, fault) not in LEGAL:
                yield f"{name} is {value if value is ELSEWHERE else fault}", {name: value}
        if name in inspect.signature(getattr(tether, function)).parameters:
            parameter = inspect.signature(getattr(tether, function)).parameters[name]
            if parameter.default is inspect.Parameter.empty:
                yield f"{name} is None", {name: None}
    for name, value in wrong_settings(function):
        yield f"{name} is {described(value)}", {name: value}


def refusal(function, arguments):
    """The sentence, or what happened instead."""
    try:
        out = getattr(tether, function)(**arguments)
    except (ValueError, TypeError, IndexError) as error:
        return str(error)
    return f"taken: {type(out).__name__}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", CALLS)
def test_every_wrong_call_is_refused_in_one_sentence(function, monkeypatch):
    calls = list(wrong_calls(function))
    assert len(calls) >= 12
    bad = []
    for what, changes in calls:
        said = {}
        for path in PATHS[: 1 if OF_KERNELS & set(changes) else 3]:
            arguments = CALLS[function] | changes
            with monkeypatch.context() as patch:
                if path == "other":
                    patch.setattr(tether._ops, "KERNELS", frozenset())
                for name in [name for name, each in changes.items() if each is ELSEWHERE]:
                    right = CALLS[function][name]
                    arguments[name] = right if path == "meta" else right.to("meta")
                if path == "meta":
                    arguments = on_meta(arguments, but=changes if ELSEWHERE in what else ())
                said[path] = refusal(function, arguments)
        sentence = said["kernels"]
        if not re.match(rf"{function}: [\w.]+ must (not )?\w+.*, got ", sentence):
            bad.append(f"{what}: {sentence}")
        elif len({re.sub("cpu|meta", "DEVICE", each) for each in said.values()}) > 1:
            bad.append(f"{what}: {said}")
    assert not bad, "\n" + "\n".join(bad)


@pytest.mark.parametrize("function", CALLS)
def test_what_is_left_out_is_not_missed_under_another_name(function):
    signature = inspect.signature(getattr(tether, function)).parameters
    for name in TENSORS[function]:
        sentence = refusal(function, CALLS[function] | {name: None})
        if not sentence.startswith("taken: "):
            said = re.match(rf"{function}: (\w+)", sentence)
            assert said and said.group(1) in {*signature, *CALLS[function]}, sentence


# What the lists call otherwise than the signatures, or signatures do not show.
OTHERWISE = {"group_ids": "groups", "group_size": "groups"}
NOT_SHOWN = {"first_id", "ids"}  # of a shard
IN_STEP = {"step.count", "step.mean", "step.squares"}


def parameters_of(name):
    """Of a typed function; groups have an estimator and lengths in `advantage`, whose options are
    those of its estimator, as those of a value loss are its objective's."""
    names = ("advantage", name) if name == "group_advantage" else (name,)
    shown = {
        k: v
        for each in names
        for k, v in inspect.signature(getattr(tether, each)).parameters.items()
    }
    rows = {"advantage": tether.advantages()["gae"]}
    rows["value_loss"] = tether.objectives("value")["clipped_squared"]
    rows["batch_weights"] = tether.batch_weight_rules()["clip_cov"]
    if name in rows:
        shown |= dict.fromkeys((*rows[name].options, *rows[name].choices))
    return shown


@pytest.mark.parametrize("name", tether._functions.FUNCTIONS)
def test_signatures_show_what_the_lists_say(name):
    declared = tether._functions.FUNCTIONS[name]
    shown = {each.removesuffix("_") for each in parameters_of(name)}
    lists = [each.name for each in declared.arguments] + ["offsets"] * declared.packed
    lists += [*declared.options, *declared.choices]
    missing = {OTHERWISE.get(each, each) for each in lists} - shown - NOT_SHOWN - IN_STEP
    assert not missing


@pytest.mark.parametrize("name", tether._functions.FUNCTIONS)
def test_defaults_of_signatures_are_those_of_the_lists(name):
    declared = tether._functions.FUNCTIONS[name]
    signature = parameters_of(name)
    for option, known in {**declared.options, **declared.choices}.items():
        parameter = signature.get(option, signature.get(option + "_"))
        if parameter is None or (name, option) == ("kl_report", "lambda"):  # None: fitted, -1
            continue
        if option in ("estimator", "rule"):
            continue
        default = parameter.default
        assert known.default in (default, str(default).lower()), option
