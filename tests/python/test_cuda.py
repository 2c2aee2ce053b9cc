"""What stands between CUDA tensors and their kernels, without a device: which calls have one, and
python/cuda_*ops.cc on tensors of the host, its kernels by teams of host threads
(tests/cuda/host_kernels.cc, built by ./dev test)."""

import pathlib
import warnings

import host_operators
import pytest
import tether
import torch
from tether import _cuda
from tether._functions import FUNCTIONS
from tether._lists import Settings
from tether._objectives import objective_call
from torch._subclasses.fake_tensor import FakeTensorMode

INSTALLED = pathlib.Path(tether.__file__).with_name("libtether_cuda.so")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


# ---- which calls have a kernel ------------------------------------------------------------------


def test_there_are_kernels_only_with_the_library():
    assert bool(_cuda.KERNELS) == INSTALLED.exists()
    assert _cuda.load(pathlib.Path("nowhere/libtether_cuda.so")) == _cuda.KERNELS


def test_a_library_that_does_not_load_is_a_warning(tmp_path):
    library = tmp_path / "libtether_cuda.so"
    library.write_bytes(b"no library")
    with pytest.warns(RuntimeWarning) as caught:
        assert _cuda.load(library) == _cuda.KERNELS
    sentence = str(caught[0].message)
    assert sentence.startswith("tether: libtether_cuda.so must load, got the error: ")
    assert sentence.endswith(". CUDA tensors take torch's operations")


TOKENS = ("logps", "advantages", "response_mask")


def fake(dtype=torch.float32, device="cuda"):
    return torch.empty(2, 3, device=device, dtype=dtype)


def test_a_call_has_a_kernel_by_its_operator_device_and_type(monkeypatch):
    monkeypatch.setattr(_cuda, "KERNELS", frozenset({"policy_loss"}))
    with FakeTensorMode():
        assert not _cuda.has_kernel("value_loss", [fake()])
        assert _cuda.has_kernel("policy_loss", [fake(), None])
        assert _cuda.has_kernel("policy_loss", [fake(torch.bfloat16)])
        assert not _cuda.has_kernel("policy_loss", [fake(torch.float64)])
        assert not _cuda.has_kernel("policy_loss", [fake(device="cpu")])
        assert not _cuda.has_kernel("local_counts", [fake()])


def test_a_policy_loss_has_a_kernel_by_its_settings(monkeypatch):
    monkeypatch.setattr(_cuda, "KERNELS", frozenset({"policy_loss"}))
    with FakeTensorMode():
        call = objective_call("policy_loss", dict.fromkeys(TOKENS, fake()), "ppo", {}, {})

        def has(numbers, choices, **changes):
            settings = Settings(numbers, choices)
            return _cuda.call_on_cuda(call._replace(settings=settings, **changes)) is not None

        assert has({"beta": 0.1}, {"level": "sequence_mean"})
        assert has({"beta": torch.ones((), device="cpu")}, {})
        assert not has({"beta": fake()}, {})
        assert not has({"normalizer.scale": fake()}, {})
        assert has({}, {"level": "turn_mean", "tv_mask.level": "turn_max"})
        assert not has({}, {"kl_correction": "level_ratio"})
        assert not has({}, {}, own={"surrogate": None})


def test_no_objective_needs_what_has_no_kernel():
    for name, row in tether.objectives("policy").items():
        for choice in row.choices.values():
            assert choice.default != "level_ratio", name


def test_results_are_on_the_device(monkeypatch):
    monkeypatch.setattr(_cuda, "KERNELS", frozenset(_cuda._OPERATORS))
    with FakeTensorMode():
        loss, metrics = tether.policy_loss(fake(), fake(), fake(), old_logps=fake())
        assert {each.device.type for each in (loss, *metrics)} == {"cuda"}
        assert (loss.dtype, metrics.sums.shape) == (torch.float32, (14, 2))
        counts = tether.local_counts(fake(), fake(), fake())
        assert counts.policy.device.type == "cuda"
        logits, targets = torch.empty(2, 3, 7, device="cuda"), fake(torch.int64)
        logps = tether.token_logps(logits, targets, entropies=True)
        assert (logps.logps.device.type, logps.entropies.shape) == ("cuda", (2, 3))


# ---- the operators on tensors of the host --------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    host_operators.load()


def numbers(*size, seed=3):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def batch_of(dtype=torch.float32, packed=None):
    logps = -numbers(4, 6).abs()
    batch = {
        "logps": logps.to(dtype),
        "advantages": numbers(4),
        "response_mask": numbers(4, 6) > -0.5,
        "old_logps": logps + 0.1 * numbers(4, 6, seed=4),
        "ref_logps": (logps + 0.1 * numbers(4, 6, seed=5)).to(dtype),
        "rollout_logps": logps.t().contiguous().t(),
        "entropies": numbers(4, 6).abs(),
    }
    if packed is not None:
        batch = {name: each.flatten() for name, each in batch.items()}
        batch["offsets"] = torch.tensor([0, 5, 5, 20, 24], dtype=packed)
    return batch


def of_key(key, function, batch, *, normalizer=None, objective="grpo", weights=None, **options):
    """The operator's results by the kernels of a dispatch key."""
    counts = tether.policy.denominators(function, normalizer)
    call = objective_call(function, batch, objective, options, counts, weights=weights)
    wanted = (True,) if FUNCTIONS[function].gradient else ()
    operator = FUNCTIONS[function].operator
    return operator.redispatch(key, *call.tensors.values(), *call.settings.words(), *wanted)


def assert_same(actual, expected, tolerance=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


CASES = {
    "grpo": {"beta": 0.1, "entropy_coef": 0.2},
    "ppo": {"normalizer": tether.Normalizer(policy=50, kl=40, world_size=4, scale=0.5)},
    "gspo": {"weights": {"truncated_importance": {"high": 1.01}}},
    "dr_grpo": {"normalizer": tether.Normalizer(policy=9, sequences=7), "constant": 30.0},
    "gmpo": {"level": "turn_mean", "log_ratio_high": 0.05, "beta": 0.1},
    "cispo": {
        "level": "turn_token",
        "weights": {
            "ratio_gate": {"high": 1.05, "level": "turn_max"},
            "truncated_importance": {"high": 1.01, "level": "turn_mean"},
        },
    },
}


@pytest.mark.parametrize("objective", CASES)
@pytest.mark.parametrize("packed", [None, torch.int32, torch.int64])
def test_policy_losses_are_those_of_the_cpu(host, objective, packed):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = {"objective": objective, **CASES[objective]}
        results = [
            of_key(key, "policy_loss", batch_of(dtype, packed), **arguments) for key in (CUDA, CPU)
        ]
        assert_same(*results, 2e-5 if dtype == torch.float32 else 2e-3)


def test_denominators_may_be_on_the_device(host, monkeypatch):
    """Those of the host count as on a device here."""
    monkeypatch.setattr(_cuda, "_is_on_device", lambda each: isinstance(each, torch.Tensor))
    monkeypatch.setattr(_cuda, "has_kernel", lambda *_: True)
    monkeypatch.setitem(_cuda._BY_DEVICE, "policy_loss", _cuda.function_on_device("policy_loss"))
    for settings, counts in (
        ({"objective": "ppo"}, {"policy": 50, "kl": 40, "world_size": 4}),
        ({"objective": "grpo", "beta": 0.1}, {"policy": 50, "sequences": 7}),
    ):
        normalizer = tether.Normalizer(**counts)
        want = of_key(CPU, "policy_loss", batch_of(), normalizer=normalizer, **settings)
        counts["policy"] = torch.tensor(counts["policy"])
        words = tether.policy.denominators("policy_loss", tether.Normalizer(**counts))
        objective = settings.pop("objective")
        call = objective_call("policy_loss", batch_of(), objective, settings, words)
        on_device = _cuda.call_on_cuda(call)
        assert on_device.function.operator is torch.ops.tether.policy_loss_by_counts.default
        assert on_device.more[0].tolist() == [50, counts.get("kl", 50), counts.get("sequences", 0)]
        assert_same(
            on_device.function.operator.redispatch(CUDA, *on_device.arguments(), True), want
        )


def test_counts_are_those_of_the_cpu(host):
    gates = [{"ratio_gate": {"high": 1.05, "level": level}} for level in ("token", "turn_mean")]
    for arguments in ({}, *({"weights": each} for each in gates)):
        batch = batch_of(packed=torch.int64)
        got, want = (of_key(key, "local_counts", batch, **arguments) for key in (CUDA, CPU))
        assert torch.equal(got, want)


def test_rules_of_the_cpu_are_asked(host):
    with pytest.raises(ValueError) as caught:
        of_key(CUDA, "policy_loss", batch_of(), normalizer=tether.Normalizer(sequences=3),
               objective="ppo")  # fmt: skip
    assert "normalizer.policy must be given where other counts are" in str(caught.value)


def words_of(**settings):
    call = FUNCTIONS["token_logps"].call(
        {"logits": torch.ones(1, 2), "targets": torch.zeros(1, dtype=torch.int64)}, settings
    )
    return call.settings.words()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_logits_are_those_of_the_cpu(host, dtype):
    memory = 3 * numbers(3, 4, 40)
    logits = memory.to(dtype)[:, 1:, :31]  # rows that are not side by side
    targets = torch.randint(31, (3, 3), generator=torch.Generator().manual_seed(1))
    targets[1, 1] = -100
    words = words_of(temperature=0.7, entropies=True)
    forward = torch.ops.tether.token_logps_forward.default
    backward = torch.ops.tether.token_logps_backward.default
    upstream, results = numbers(2, 9, seed=8), []
    for key, exact in ((CUDA, torch.float32), (CPU, torch.float64)):
        *found, statistics = forward.redispatch(key, logits, targets, None, *words)
        gradient = torch.empty(3, 3, 31, dtype=dtype)
        of_logps, of_entropies = upstream.to(exact)
        backward.redispatch(
            key, logits, targets, None, statistics, of_logps, of_entropies, *words, gradient
        )
        results.append((*found, gradient))
    assert_same(*results, 1e-5 if dtype == torch.float32 else 1e-2)
    without = forward.redispatch(CUDA, logits, targets, None, *words_of())
    assert without[1].shape == (0,)
    assert torch.isfinite(without[0]).all()


def test_upstream_gradients_of_another_type_are_refused(host):
    forward = torch.ops.tether.token_logps_forward.default
    logits, targets = numbers(2, 7), torch.tensor([1, 2])
    *_, statistics = forward.redispatch(CUDA, logits, targets, None, *words_of())
    with pytest.raises(ValueError) as caught:
        torch.ops.tether.token_logps_backward.default.redispatch(
            CUDA,
            logits,
            targets,
            None,
            statistics,
            torch.ones(2).double(),
            None,
            *words_of(),
            logits,
        )
    assert str(caught.value) == "token_logps: dlogps must be 2 float32 numbers side by side"


# ---- the installed library ----------------------------------------------------------------------


@pytest.mark.skipif(not INSTALLED.exists(), reason="needs ./dev wheel --cuda")
def test_the_library_loads_without_a_driver_and_says_what_is_missing():
    assert frozenset(_cuda._OPERATORS) == _cuda.KERNELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda.load(INSTALLED) == _cuda.KERNELS
    for options, rule in (
        (
            {"level": "turn_mean", "kl_correction": "level_ratio", "beta": 0.1},
            "kl_correction must not be level_ratio where tokens share their ratio on a CUDA device",
        ),
        ({"dtype": torch.float64}, "logps must be float32, bfloat16 or float16 on a CUDA device"),
    ):
        batch = batch_of(options.pop("dtype", torch.float32))
        with pytest.raises(ValueError) as caught:
            of_key(CUDA, "policy_loss", batch, **options)
        assert str(caught.value).startswith(f"policy_loss: {rule}, got ")
    if not torch.version.cuda:
        with pytest.raises(ValueError) as caught:
            of_key(CUDA, "policy_loss", batch_of())
        assert str(caught.value) == (
            "policy_loss: torch must be one with CUDA for a kernel on its devices"
        )
