"""Bad input: whole messages, the ones of the C++ face."""

import math
import pathlib

import batches
import numpy
import pytest
import tether
import torch
from batches import LEVELS, packed, padded_batch

KNOWN = (
    "epsilon_low, epsilon_high, dual_clip, log_ratio_low, log_ratio_high, beta, "
    "kl_ratio_high, entropy_coef, constant"
)
OBJECTIVES = ", ".join(batches.OBJECTIVES)
PAIRS = ", ".join(tether.objectives("preference"))


def batch_with(**changes):
    return padded_batch(poison=0.0) | changes


def ones(*shape, dtype=torch.float64):
    return torch.ones(shape, dtype=dtype)


def weighted(row, column, value):
    mask = ones(5, 9)
    mask[row, column] = value
    return mask


def dense(**changes):
    return packed(padded_batch()) | changes


SHAPES = {
    "advantages must be [3, 1] where there are as many rows as tokens, got [3]. It may be read in "
    "two ways": {
        "logps": ones(3),
        "response_mask": ones(3),
        "old_logps": None,
        "ref_logps": None,
        "entropies": None,
        "advantages": ones(3),
        "offsets": torch.tensor([0, 1, 2, 3]),
        "beta": 0.0,
    },
    "logps must be [B, T], or [N] with offsets, got [45]": {"logps": ones(45)},
    "advantages must be [5] or [5, 9], got [4]": {"advantages": ones(4)},
    "advantages must be [5] or [5, 9], got [1, 9]": {"advantages": ones(1, 9)},
    "response_mask must be [5, 9] like logps, got [5, 8]": {"response_mask": ones(5, 8)},
    "old_logps must be [5, 9] like logps, got [5, 8]": {"old_logps": ones(5, 8)},
    "ref_logps must be [5, 9] like logps, got [9, 5]": {"ref_logps": ones(9, 5)},
    "logps must be given, got none": {"logps": None},
    "advantages must be given, got none": {"advantages": None},
    "response_mask must be given, got none": {"response_mask": None},
    "old_logps must be on cpu like logps, got meta": {"old_logps": ones(5, 9).to("meta")},
    "response_mask must be on cpu like logps, got meta": {"response_mask": ones(5, 9).to("meta")},
    "advantages must not require grad, got a tensor that does. It is a constant of the loss: "
    "pass advantages.detach()": {"advantages": ones(5).requires_grad_()},
    "old_logps must not require grad, got a tensor that does. It is a constant of the loss: "
    "pass old_logps.detach()": {"old_logps": ones(5, 9).requires_grad_()},
    "offsets must be [B + 1], got [0]": dense(offsets=torch.tensor([], dtype=torch.int64)),
    "offsets must be [B + 1], got [2, 1]": dense(offsets=torch.tensor([[0], [18]])),
    "logps must be [N] with offsets, got [5, 9]": {"offsets": torch.tensor([0, 45])},
}
NUMBERS = {
    "response_mask must be in [0, 1], got -1 at [2, 5]": {"response_mask": weighted(2, 5, -1)},
    "response_mask must be in [0, 1], got 1.5 at [0, 0]": {"response_mask": weighted(0, 0, 1.5)},
    "response_mask must be in [0, 1], got nan at [4, 8]": {
        "response_mask": weighted(4, 8, math.nan)
    },
    "response_mask must be 0 or at least 1.17549e-38, got 1e-40 at [1, 2]": {
        "response_mask": weighted(1, 2, 1e-40)
    },
    "offsets must run from 0 to 18, the size of logps, got 0 to 17": dense(
        offsets=torch.tensor([0, 5, 5, 6, 15, 17])
    ),
    "offsets must run from 0 to 18, the size of logps, got 1 to 18": dense(
        offsets=torch.tensor([1, 5, 5, 6, 15, 18], dtype=torch.int32)
    ),
    "offsets must not decrease, got 4 after 5 at [2]": dense(
        offsets=torch.tensor([0, 5, 4, 6, 15, 18])
    ),
    "epsilon_low must be in [0, 1], got 1.2": {"epsilon_low": 1.2},
    "epsilon_high must be at least 0, got -0.1": {"epsilon_high": -0.1},
    "dual_clip must be greater than 1, got 1": {"dual_clip": 1},
    "beta must be in [0, 1e+12], got nan": {"beta": math.nan},
    "constant must be in (0, 1e+12], got 0": {"constant": 0},
    f'option must be one of {KNOWN}, got "eps"': {"eps": 0.2},
    f'objective must be one of {OBJECTIVES}, got "gropo". Did you mean grpo?': {
        "objective": "gropo"
    },
    f'level must be one of {", ".join(LEVELS)}, got "turn"': {"level": "turn"},
    "ratio_low must be at most ratio_high 1, got 2": {
        "objective": "cispo",
        "ratio_low": 2,
        "ratio_high": 1,
    },
    "kl_gradient must be k2 or k3 or low_var_kl with kl_correction none, got k1, whose gradient is "
    "not that of a KL divergence. Choose another one or set allow_biased_gradient": {
        "kl_gradient": "k1",
        "beta": 0.04,
    },
    "aggregation must be one of token_mean, sequence_mean_token_mean, sequence_mean_token_sum, "
    'sequence_sum_over_constant, token_sum, got "mean"': {"aggregation": "mean"},
}
LOSS_ONLY = {
    "entropies must be given when entropy_coef is not 0, got entropy_coef 0.5 and none. "
    "Pass entropies or entropy_coef = 0": {"entropy_coef": 0.5},
    "ref_logps must be given when beta is greater than 0, got beta 0.04 and none. "
    "Pass ref_logps or beta = 0": {"ref_logps": None, "beta": 0.04},
    "normalizer.policy must be at least 0 and finite, got -1": {
        "normalizer": tether.Normalizer(policy=-1)
    },
    "normalizer.kl must be at least 0 and finite, got nan": {
        "normalizer": tether.Normalizer(kl=math.nan)
    },
    "normalizer.sequences must be greater than 0 and finite, got 0": {
        "normalizer": tether.Normalizer(sequences=0)
    },
    "normalizer.world_size must be greater than 0 and finite, got 0": {
        "normalizer": tether.Normalizer(world_size=0)
    },
    "normalizer.world_size must be greater than 0 and finite, got -1": {
        "normalizer": tether.Normalizer(world_size=torch.tensor(-1.0))
    },
    "normalizer.scale must be greater than 0 and finite, got 0": {
        "normalizer": tether.Normalizer(scale=torch.tensor(0.0))
    },
    "normalizer.policy must not require grad, got a tensor that does. It is a constant of the "
    "loss: pass normalizer.policy.detach()": {
        "normalizer": tether.Normalizer(policy=torch.tensor(3.0, requires_grad=True))
    },
    "beta must not require grad, got a tensor that does. It is a constant of the loss: pass "
    "beta.detach()": {"beta": torch.tensor(0.1, requires_grad=True)},
    "normalizer.policy must be one number, got [2]": {
        "normalizer": tether.Normalizer(policy=ones(2))
    },
    "beta must be one number, got [3]": {"beta": ones(3)},
}
TYPES = {
    "logps must be float32, float64, bfloat16 or float16, got int64": {
        "logps": ones(5, 9, dtype=torch.int64)
    },
    "logps must be float32, float64, bfloat16 or float16, got complex64": {
        "logps": ones(5, 9, dtype=torch.complex64)
    },
    "advantages must be float32, float64, bfloat16 or float16, got int32": {
        "advantages": ones(5, dtype=torch.int32)
    },
    "response_mask must be float32, float64, bfloat16 or float16, got complex128": {
        "response_mask": ones(5, 9, dtype=torch.complex128)
    },
    "old_logps must not be wider than logps, float32, got float64. "
    "Pass old_logps.to(torch.float32)": {
        "logps": ones(5, 9, dtype=torch.float32),
        "advantages": ones(5, dtype=torch.float32),
    },
    "advantages must not be wider than logps, bfloat16, got float64. "
    "Pass advantages.to(torch.float32)": {"logps": ones(5, 9, dtype=torch.bfloat16)},
    "offsets must be int32 or int64, got float64": dense(offsets=ones(6)),
    "logps must be a tensor, got list": {"logps": [1.0]},
    "objective must be a string, one of tether.objective or a Surrogate, got int": {"objective": 3},
    "objective must be a string, one of tether.objective or a Surrogate, got the class Dapo. Call "
    "it: Dapo()": {"objective": tether.objective.Dapo},
    "epsilon_low must be a number, got numpy.float32": {"epsilon_low": numpy.float32(0.2)},
    "weights must be a list of those of tether.weight, or a dict, got the class TvMask. Call it: "
    "TvMask()": {"weights": tether.weight.TvMask},
    "weights must be named, got int as a name": {"weights": {3: {}}},
    "logps must be a tensor, got the class Tensor": {"logps": torch.Tensor},
    "aggregation must be a string, got int": {"aggregation": 3},
    "beta must be a number, got str": {"beta": "0.1"},
}
TYPES_LOSS_ONLY = {
    "normalizer must be a tether.Normalizer, got dict": {"normalizer": {"policy": 3}},
    "normalizer must be a tether.Normalizer, got the class Normalizer": {
        "normalizer": tether.Normalizer
    },
    "normalizer.policy must be a number, got str": {"normalizer": tether.Normalizer(policy="3")},
}


def message_of(error, function, changes):
    with pytest.raises(error) as caught:
        function(**batch_with(**changes))
    assert caught.type is error
    return str(caught.value)


@pytest.mark.parametrize("message, changes", (SHAPES | NUMBERS | LOSS_ONLY).items())
def test_value_errors(message, changes):
    assert message_of(ValueError, tether.policy_loss, changes) == f"policy_loss: {message}"


@pytest.mark.parametrize("message, changes", (TYPES | TYPES_LOSS_ONLY).items())
def test_type_errors(message, changes):
    assert message_of(TypeError, tether.policy_loss, changes) == f"policy_loss: {message}"


WEIGHTS = {name: each for name, each in NUMBERS.items() if name.startswith("response_mask")}


@pytest.mark.parametrize("message, changes", WEIGHTS.items())
def test_weights_of_token_losses(message, changes):
    said = message_of(ValueError, tether.policy_token_losses, changes)
    assert said == f"policy_token_losses: {message}"


@pytest.mark.parametrize("message, changes", (SHAPES | NUMBERS).items())
def test_value_errors_of_local_counts(message, changes):
    assert message_of(ValueError, tether.local_counts, changes) == f"local_counts: {message}"


@pytest.mark.parametrize(
    "message, changes",
    [
        ("epsilon_low must be in [0, 1], got 1.2", {"epsilon_low": 1.2}),
        (
            "ref_logps must be given when beta is greater than 0, got beta 0.04 and none. "
            "Pass ref_logps or beta = 0",
            {"ref_logps": None, "beta": 0.04},
        ),
    ],
)
def test_options_are_checked_for_other_devices_too(message, changes):
    meta = {name: each.to("meta") for name, each in padded_batch().items()}
    with pytest.raises(ValueError) as caught:
        tether.policy_loss(**meta | changes)
    assert str(caught.value) == f"policy_loss: {message}"


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        ("policy_token_losses", {"epsilon_low": 1.2}, "epsilon_low must be in [0, 1], got 1.2"),
        ("local_counts", {"epsilon_low": 1.2}, "epsilon_low must be in [0, 1], got 1.2"),
        (
            "policy_token_losses",
            {"ref_logps": None, "beta": 0.04},
            "ref_logps must be given when beta is greater than 0, got beta 0.04 and none. "
            "Pass ref_logps or beta = 0",
        ),
        (
            "preference_loss",
            {"objective": "dop"},
            f'objective must be one of {PAIRS}, got "dop"',
        ),
        ("preference_loss", {"beta": 0}, "beta must be in (0, 1e+12], got 0"),
        ("preference_loss", {"pairs": -1}, "pairs must be at least 0 and finite, got -1"),
        ("value_loss", {"clip_range": -1}, "clip_range must be at least 0, got -1"),
        (
            "value_loss",
            {"normalizer": tether.Normalizer(policy=-1)},
            "normalizer.policy must be at least 0 and finite, got -1",
        ),
    ],
)
def test_every_function_checks_for_other_devices_in_its_own_name(function, arguments, message):
    batch = {name: each.to("meta") for name, each in padded_batch().items()}
    if function == "preference_loss":
        batch = {name: batch[name][:4] for name in ("logps", "ref_logps", "response_mask")}
    elif function == "value_loss":
        batch = {"values": batch["logps"], "returns": batch["logps"]} | {
            "response_mask": batch["response_mask"]
        }
    with pytest.raises(ValueError) as caught:
        getattr(tether, function)(**batch | arguments)
    assert str(caught.value) == f"{function}: {message}"


LOGITS, IDS, SCORES = torch.zeros(2, 4), torch.tensor([1, 3]), torch.zeros(2, 3)
ONES, HEAD_IDS, HEAD_LOGPS = torch.ones(2, 3), IDS[:, None], torch.full((2, 1), -2.0)
ROWS_OF_LOGITS = {
    "temperature must be a number, got str": {"temperature": "1"},
    "scale must be a number, got NoneType": {"scale": None},
    "softcap must be a number, got bool": {"softcap": True},
    "ignore_index must be an int, got float": {"ignore_index": 0.5},
}
FLAGS = {
    "entropies must be a bool, got Tensor": {"entropies": LOGITS},
    "statistics must be a bool, got int": {"statistics": 1},
}
CHUNKS = {
    "chunk_bytes must be an int, got float": {"chunk_bytes": 1e6},
    "rows_per_chunk must be an int, got NoneType": {"rows_per_chunk": None},
}
LINEAR = (LOGITS[:, None].clone(), torch.zeros(8, 4), IDS[:, None])
OPTIONALS = {
    "token_logps": ((LOGITS, IDS), ROWS_OF_LOGITS | FLAGS),
    "linear_token_logps": (LINEAR, ROWS_OF_LOGITS | FLAGS | CHUNKS),
    "linear_policy_loss": (
        (*LINEAR, torch.ones(2), torch.ones(2, 1)),
        ROWS_OF_LOGITS | CHUNKS | {"entropies must be a bool, got str": {"entropies": "yes"}},
    ),
    "linear_preference_loss": (
        (*LINEAR, torch.zeros(2, 1), torch.ones(2, 1)),
        ROWS_OF_LOGITS | CHUNKS | {"pairs must be a number, got str": {"pairs": "2"}},
    ),
    "categorical_kl": (
        (LOGITS, LOGITS),
        {
            "mask must be a tensor, got int": {"mask": 3},
            "temperature must be a number, got str": {"temperature": "1"},
        },
    ),
    "top_k_kl": (
        (LOGITS, HEAD_IDS, HEAD_LOGPS, IDS, HEAD_LOGPS[:, 0]),
        {
            "tail must be a string, got int": {"tail": 1},
            "temperature must be a number, got str": {"temperature": "1"},
            "precision must be a number, got NoneType": {"precision": None},
            "ignore_index must be an int, got NoneType": {"ignore_index": None},
        },
    ),
    "head_logps": (
        (LOGITS, HEAD_IDS),
        {"temperature must be a number, got str": {"temperature": "1"}},
    ),
    "value_loss": (
        (SCORES, SCORES, ONES),
        {
            "clip_range must be a number, got NoneType": {"clip_range": None},
            "constant must be a number, got str": {"constant": "1"},
            "aggregation must be a string, got NoneType": {"aggregation": None},
        },
    ),
    "generalized_advantage_estimation": (
        (SCORES, SCORES, ONES),
        {
            "gamma must be a number, got str": {"gamma": "1"},
            "lambda_ must be a number, got NoneType": {"lambda_": None},
        },
    ),
    "discounted_returns": ((SCORES, ONES), {"gamma must be a number, got str": {"gamma": "1"}}),
    "group_advantage": (
        (SCORES[0], 3),
        {"epsilon must be a number, got str": {"epsilon": "1"}},
    ),
    "whiten": (
        (SCORES, ONES),
        {
            "step must be Moments, got int": {"step": 3},
            "step.count must be a number, got str": {"step": tether.Moments("1", 0, 1)},
            "epsilon must be a number, got str": {"epsilon": "1"},
            "shift_mean must be a bool, got int": {"shift_mean": 0},
        },
    ),
    "kl_report": ((SCORES, ONES), {"lambda_ must be a number, got str": {"lambda_": "1"}}),
}


@pytest.mark.parametrize(
    "function, message",
    [(function, message) for function, (_, cases) in OPTIONALS.items() for message in cases],
)
def test_types_of_optional_arguments(function, message):
    arguments, cases = OPTIONALS[function]
    getattr(tether, function)(*arguments)
    with pytest.raises(TypeError) as caught:
        getattr(tether, function)(*arguments, **cases[message])
    assert str(caught.value) == f"{function}: {message}"


@pytest.mark.parametrize(
    "version, message",
    [
        ("2.9.1+cpu", "tether: torch must be 2.10 or newer, got 2.9.1+cpu"),
        ("1.13.0a0+git", "tether: torch must be 2.10 or newer, got 1.13.0a0+git"),
    ],
)
def test_an_older_torch_is_one_sentence(version, message):
    with pytest.raises(ImportError) as caught:
        tether._ops.load(pathlib.Path("libtether_ops.so"), version)
    assert str(caught.value) == message


def test_operators_that_do_not_load_are_one_sentence(tmp_path):
    broken = tmp_path / "libtether_ops.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError) as caught:
        tether._ops.load(broken, torch.__version__)
    assert str(caught.value) == (
        f"tether: libtether_ops.so must load with torch >= 2.10, got torch {torch.__version__} and "
        f"the error: {broken}: file too short"
    )


X, ADVANTAGES, ROWS = -torch.rand(2, 3), torch.randn(2), torch.ones(2, 3)
NUMBERS_IN_TENSORS = {
    "policy_token_losses: epsilon_low must be in [0, 1], got 5": lambda: tether.policy_token_losses(
        X, ADVANTAGES, ROWS, epsilon_low=torch.tensor(5.0)
    ),
    "policy_loss: beta must be a number, got a tensor of complex64": lambda: tether.policy_loss(
        X, ADVANTAGES, ROWS, beta=torch.tensor(1j)
    ),
    "policy_loss: beta must be a number, got a tensor of bool": lambda: tether.policy_loss(
        X, ADVANTAGES, ROWS, beta=torch.tensor(True)
    ),
    "kl_report: lambda_ must be at least 0 and finite, got -0.5": lambda: tether.kl_report(
        X, ROWS, estimator="k_lambda", lambda_=torch.tensor(-0.5)
    ),
    "generalized_advantage_estimation: lambda_ must be in [0, 1], got 2": lambda: (
        tether.generalized_advantage_estimation(X, X, ROWS, lambda_=torch.tensor(2.0))
    ),
    "whiten: step.count must be at least 0 and finite, got -1": lambda: tether.whiten(
        X, ROWS, step=tether.Moments(-1.0, 0.0, 1.0)
    ),
    "whiten: step.mean must be finite, got nan": lambda: tether.whiten(
        X, ROWS, step=tether.Moments(3, math.nan, 1.0)
    ),
    "whiten: step.squares must be at least 0 and finite, got inf": lambda: tether.whiten(
        X, ROWS, step=tether.Moments(3, 0.0, torch.tensor(math.inf))
    ),
    "batch_weights: low must be greater than -inf, got nan": lambda: tether.batch_weights(
        "clip_cov", X, ROWS, old_logps=X, advantages=X, low=math.nan
    ),
    "policy_loss: normalizer.scale must be a number, got NoneType": lambda: tether.policy_loss(
        X, ADVANTAGES, ROWS, normalizer=tether.Normalizer(scale=None)
    ),
    "preference_loss: world_size must be a number, got NoneType": lambda: tether.preference_loss(
        X, X, ROWS, world_size=None
    ),
    "policy_loss: option must be one of epsilon_low, epsilon_high, dual_clip, log_ratio_low, "
    "log_ratio_high, beta, kl_ratio_high, entropy_coef, "
    'constant, got "beta_". Did you mean beta?': lambda: tether.policy_loss(
        X, ADVANTAGES, ROWS, beta_=0.1
    ),
    "policy_loss: offsets must be a tensor, got str": lambda: tether.policy_loss(
        X, ADVANTAGES, ROWS, offsets="x"
    ),
    "linear_token_logps: weight must be a tensor, got UninitializedParameter": lambda: (
        tether.linear_token_logps(LINEAR[0], torch.nn.LazyLinear(4).weight, IDS)
    ),
    "moments: values must be a dense tensor, got a nested one": lambda: tether.moments(
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), ROWS
    ),
    "group_advantage: groups must be at most 9007199254740992, got 9223372036854775808": lambda: (
        tether.group_advantage(ADVANTAGES, 2**63)
    ),
    'top_k_kl: tail must be one of bucket, k1, k3, reverse_bucket, got "bogus"': lambda: (
        tether.top_k_kl(LOGITS, HEAD_IDS, HEAD_LOGPS, tail="bogus")
    ),
    "linear_token_logps: temperature must be in [1e-06, 1e+06], got nan": lambda: (
        tether.linear_token_logps(*LINEAR, temperature=torch.tensor(math.nan))
    ),
    "objectives: family must be a string, got list": lambda: tether.objectives([]),
    "token_logps: shards must be what was gathered, of 4 ids, got of 0": lambda: tether.token_logps(
        LOGITS, IDS, shard=tether.VocabularyShard(0, 4, lambda ours: torch.zeros_like(ours)[None])
    ),
}


@pytest.mark.parametrize("message", NUMBERS_IN_TENSORS)
def test_what_tensors_hold_and_odd_types(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        NUMBERS_IN_TENSORS[message]()
    assert str(caught.value) == message


def test_a_number_in_a_tensor_of_any_shape_gives_a_scalar_elsewhere(monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    step = tether.Normalizer(scale=torch.tensor([0.5]), sequences=torch.full((1, 1), 6.0))
    beta = torch.tensor([[0.5]])
    out = tether.policy_loss(X, ADVANTAGES, ROWS, ref_logps=X, normalizer=step, beta=beta)
    assert out.loss.shape == ()
    empty = tether.policy_loss(
        *(X[:, :0], ADVANTAGES, ROWS[:, :0]),
        ref_logps=X[:, :0],
        beta=0.1,
        level="sequence_mean",
        kl_correction="level_ratio",
    )
    assert empty.loss == 0


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        ({"aggregation": "token-mean"}, "token_mean"),
        ({"aggregation": "seq-mean-token-sum"}, "sequence_mean_token_sum"),
        ({"kl_estimator": "mse"}, "k2"),
        ({"level": "sequence"}, "sequence_mean"),
        ({"objective": "vanilla"}, "ppo_dual_clip"),
        ({"epsilon": 0.2}, "epsilon_low"),
        ({"loss_agg_mode": "token-mean"}, "aggregation"),
        ({"weights": {"truncated-importance": {}}}, "truncated_importance"),
        ({"weights": {"mis": {}}}, "masked_importance"),
        ({"objective": "dppo"}, "dppo_tv"),
        ({"objective": "pg"}, "reinforce"),
        ({"clip_ratio": 0.2}, "epsilon_low"),
        ({"eps_clip_high": 0.2}, "epsilon_high"),
        ({"kl_coef": 0.2}, "beta"),
        ({"loss_scale_factor": 2}, "constant"),
        ({"use_bias_correction_kl": True}, "kl_correction"),
    ],
)
def test_words_of_trainers_lead_to_ours(changes, meant):
    said = message_of(ValueError, tether.policy_loss, {"objective": "ppo"} | changes)
    assert said.endswith(f". Did you mean {meant}?")


def test_a_word_that_is_like_none_leads_nowhere():
    said = message_of(ValueError, tether.policy_loss, {"aggregation": "median"})
    assert said.endswith('got "median"')
    with pytest.raises(ValueError, match=r'got "sigmoid"\. Did you mean dpo\?$'):
        tether.preference_loss(torch.zeros(2), torch.zeros(2), objective="sigmoid")
