"""Steps of a small model through the training code of NeMo-RL, prime-rl and slime, with their
losses and with tether's. Skipped without their clones: tests/peers/DEVELOPERS.md."""

import importlib
import math
import pickle
import re
import types

import checkouts
import pytest
import tomllib
import torch
import yaml
from checkouts import STEPS, VOCABULARY, normal
from tether import _objectives, _trainers

PROMPTS, ANSWERS = [3, 2, 4, 3], [5, 7, 1, 4]
VERSIONS = {"nemo_rl": "0.6.0", "prime_rl": "0.8.0", "slime": "0.3.1"}
Namespace = types.SimpleNamespace
if missing := [each for each in checkouts.SOURCES if not (checkouts.FOLDER / each).is_dir()]:
    pytest.skip(f"{checkouts.FOLDER} must hold {', '.join(missing)}", allow_module_level=True)
checkouts.find()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """A group of one rank; what goes to a GPU stays. Clones are not installed: their versions."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    monkeypatch.setattr(_trainers, "version_of", VERSIONS.__getitem__)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.distributed.destroy_process_group()


def assert_same(theirs, ours, but=()):
    (parameters, start, logs), (found, _, our_logs) = theirs, ours
    assert (parameters - start).abs().max() > 1e-3
    torch.testing.assert_close(found, parameters, rtol=0, atol=2e-6)
    assert len(logs) == len(our_logs) == STEPS
    for mine, own in zip(our_logs, logs, strict=True):
        assert mine.keys() == own.keys()
        for name in own.keys() - set(but):
            assert mine[name] == pytest.approx(own[name], rel=5e-6, abs=5e-6), name


def answers(seed=0):
    """Four answers behind prompts, padded on the right: ids, mask of answers, random numbers."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(PROMPTS) + torch.tensor(ANSWERS)
    places = torch.arange(lengths.max())
    mask = (places >= torch.tensor(PROMPTS)[:, None]) & (places < lengths[:, None])
    ids = torch.randint(VOCABULARY, mask.shape, generator=random)
    return ids, lengths, mask, random


# ---- NeMo-RL: the functions that its automodel worker trains with --------------------------------

NEMO = {
    "defaults": {},
    "answers": {
        "sequence_level_importance_ratios": True,
        "token_level_loss": False,
        "ratio_clip_min": 0.02,
        "ratio_clip_max": 0.03,
    },
    "cispo": {"use_cispo": True, "ratio_clip_max": 0.1},
    "on policy": {"force_on_policy_ratio": True},
    "truncated": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.1,
        "ratio_clip_c": 3.0,
    },
    "rows, masked": {
        "token_level_loss": False,
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio": 1.2,
        "truncated_importance_sampling_ratio_min": 0.9,
    },
}
CONFIG = {
    "sequence_packing": {"enabled": False},
    "dynamic_batching": {"enabled": False},
    "dtensor_cfg": {"sequence_parallel": False},
}


def nemo_data():
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    ids, lengths, mask, random = answers()
    old = -3.4 + 0.2 * normal(random, *ids.shape)
    return BatchedDataDict(
        input_ids=ids,
        input_lengths=lengths,
        token_mask=mask.float(),
        sample_mask=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        advantages=normal(random, 4, 1).expand(mask.shape).clone(),
        prev_logprobs=old,
        generation_logprobs=old + 0.2 * normal(random, *ids.shape),
        reference_policy_logprobs=old + 0.2 * normal(random, *ids.shape),
    )


def nemo_steps(loss):
    train, data = (
        importlib.import_module(f"nemo_rl.models.automodel.{n}") for n in ("train", "data")
    )
    loss = pickle.loads(pickle.dumps(loss))  # to a worker
    group = torch.distributed.group.WORLD

    def step(live):
        whole = data.process_global_batch(nemo_data(), loss, group, batch_idx=0, batch_size=4)
        made = whole["batch"], whole["global_valid_seqs"], whole["global_valid_toks"]
        batches, count = data.get_microbatch_iterator(made[0], CONFIG, 2, None, None)
        assert count == 2
        after = train.LossPostProcessor(loss, CONFIG, None, None, None, 1, 1)
        out = train.automodel_forward_backward(
            live, batches, after, global_valid_seqs=made[1], global_valid_toks=made[2]
        )
        return {name: [each[1][name] for each in out] for name in out[0][1]}

    return checkouts.steps_of(step)


@pytest.mark.parametrize("name", NEMO)
def test_steps_of_nemo_rl(name):
    losses = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    adapter = importlib.import_module("tether.nemo_rl")
    config = losses.ClippedPGLossConfig(**NEMO[name])
    theirs = nemo_steps(losses.ClippedPGLossFn(config))
    adapter.patch()
    try:
        loss = losses.ClippedPGLossFn(config)
    finally:
        adapter.unpatch()
    assert isinstance(loss, adapter.ClippedPGLossFn)
    both = theirs, nemo_steps(loss)
    assert_same(*both, but={"sampling_importance_ratio"} if name == "answers" else ())
    ratios = [each for step in both[0][2] for each in step["probs_ratio_max"]]
    clip = 1 + config.ratio_clip_max
    assert name == "on policy" or any(each > clip for each in ratios if math.isfinite(each))


# ---- prime-rl: its loss of packed sequences, by its config ---------------------------------------

PRIME = {
    "default": ({}, {}),
    "other bounds": ({"dppo_mask_high": 0.02, "dppo_mask_low": 0.03, "kl_tau": 0.1}, {}),
    "weights of tokens": ({"adv_tau": 0.5}, {"rl_weights": True}),
    "ipo": ({"ipo_threshold": 0.03}, {}),
}


def prime_steps(config, rl_weights=False):
    prime = importlib.import_module("prime_rl.trainer.rl.loss")
    loss = prime.setup_rl_loss_fn(config)
    ids, lengths, mask, random = answers()
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    masks = [row[:length] for row, length in zip(mask, lengths, strict=True)]
    rollout = [-3.4 + 0.3 * normal(random, length) for length in lengths]
    signs = [normal(random, 1).expand(length).clone() for length in lengths]
    weights = [(normal(random, length) > 0) * 1.5 for length in lengths] if rl_weights else None
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(each) for each in lengths])[None]

    def step(live):
        logits = live(input_ids=packed, position_ids=positions).logits.float()
        logps = prime.selective_log_softmax(logits, prime.shift_tensor_left(packed))
        logps = prime.shift_tensor_right(logps, pad_value=-math.log(VOCABULARY))[0]
        out, metrics = prime.compute_loss(
            logps.split(lengths.tolist()), rollout, None, signs, masks, weights, None, None, loss,
            int(sum(each.sum() for each in masks)), 1, 1,
        )  # fmt: skip
        out.backward()
        return {name: each.tolist() for name, each in metrics.items()}

    return checkouts.steps_of(step)


@pytest.mark.parametrize("name", PRIME)
def test_steps_of_prime_rl(name):
    configs = importlib.import_module("prime_rl.configs.trainer")
    options, streams = PRIME[name]
    kind, own = ("ipo", configs.IPOLossConfig) if name == "ipo" else ("default", None)
    own = (own or configs.DefaultLossConfig)(**options)
    path = f"tether.prime_rl.{kind}_loss"
    ours = configs.CustomLossConfig(import_path=path, kwargs=options)
    both = [prime_steps(config, **streams) for config in (own, ours)]
    assert_same(*both)
    assert any(each for step in both[0][2] for each in step["is_masked"])


# ---- slime: its loss function of Megatron's logits, by its arguments -----------------------------

SLIME = {
    "grpo": {},
    "tokens, entropy": {"calculate_per_token_loss": True, "entropy_coef": 0.1},
    "dual clip": {"eps_clip_c": 1.5},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.02, "eps_clip_high": 0.03},
    "cispo": {"advantage_estimator": "cispo", "eps_clip_high": 0.1},
    "truncated": {"use_tis": True, "tis_clip": 1.1},
    "opsm": {"use_opsm": True, "opsm_delta": 0.0},
    "penalty": {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 0.1},
}
SLIME_DEFAULTS = {
    "advantage_estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None,
    "calculate_per_token_loss": False, "use_opsm": False, "opsm_delta": 0.05, "use_tis": False,
    "tis_clip_low": 0.8, "tis_clip": 1.2, "custom_tis_function_path": None,
    "custom_pg_loss_reducer_function_path": None, "get_mismatch_metrics": False,
    "use_rollout_logprobs": False, "entropy_coef": 0.0, "use_kl_loss": False, "kl_loss_type": "k1",
    "kl_loss_coef": 0.25, "use_unbiased_kl": False, "rollout_temperature": 0.9,
    "log_probs_chunk_size": -1, "allgather_cp": False, "recompute_loss_function": False,
    "loss_type": "policy_loss", "rollout_top_p": 1.0, "use_rollout_top_p_replay": False,
}  # fmt: skip


def slime_module():
    slime = importlib.import_module("slime.backends.megatron_utils.loss")
    group, one = torch.distributed.group.WORLD, lambda **_: 1
    mpu = Namespace(
        get_context_parallel_world_size=one,
        get_context_parallel_rank=lambda: 0,
        get_context_parallel_group=lambda: None,
        get_tensor_model_parallel_group=lambda: group,
        get_data_parallel_world_size=one,
    )
    names = ("slime.backends.megatron_utils.cp_utils", "megatron.core")
    for each in (slime, *map(importlib.import_module, names)):
        each.mpu = mpu
    return slime


def slime_steps(**settings):
    slime, args = slime_module(), Namespace(**SLIME_DEFAULTS | settings)
    ids, lengths, _, random = answers()
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    old = [-3.4 + 0.2 * normal(random, each) for each in ANSWERS]
    masks = [torch.ones(each) for each in ANSWERS]
    masks[1][2:4] = 0
    batch = {
        "unconcat_tokens": rows,
        "total_lengths": lengths.tolist(),
        "response_lengths": ANSWERS,
        "loss_masks": masks,
        "rollout_mask_sums": [each.sum() for each in masks],
        "advantages": [normal(random, 1).expand(each).clone() for each in ANSWERS],
        "log_probs": old,
        "rollout_log_probs": [row + 0.2 * normal(random, len(row)) for row in old],
        "ref_log_probs": [row + 0.2 * normal(random, len(row)) for row in old],
    }
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(each) for each in lengths])[None]

    def step(live):
        logits = live(input_ids=packed, position_ids=positions).logits.float()
        loss, _, logged = slime.loss_function(args, batch, 1, 4, logits)
        loss.backward()
        return dict(zip(["count", *logged["keys"]], logged["values"].tolist(), strict=True))

    return checkouts.steps_of(step)


@pytest.mark.parametrize("name", SLIME)
def test_steps_of_slime(name):
    path = {"loss_type": "custom_loss", "custom_loss_function_path": "tether.slime.policy_loss"}
    both = slime_steps(**SLIME[name]), slime_steps(**SLIME[name] | path)
    assert_same(*both)
    assert any(each["pg_clipfrac"] > 0 for each in both[0][2])


# ---- other objectives, by the lines of the pages -------------------------------------------------


def blocks_of(page):
    text = (checkouts.FOLDER.parents[2] / f"docs/{page}.md").read_text()
    return re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def nemo_by_page():
    losses = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    adapter = importlib.import_module("tether.nemo_rl")
    config = yaml.safe_load(blocks_of("nemo_rl")[-1])["loss_fn"]
    return nemo_steps(adapter.ClippedPGLossFn(losses.ClippedPGLossConfig(**config)))


def prime_by_page():
    configs = importlib.import_module("prime_rl.configs.trainer")
    config = tomllib.loads(blocks_of("prime_rl")[-1])["trainer"]["loss"]
    return prime_steps(configs.CustomLossConfig(**config))


def slime_by_page():
    words = next(each for each in blocks_of("slime") if "topr" in each).split()
    names = (word.removeprefix("--").replace("-", "_") for word in words[::2])
    return slime_steps(**dict(zip(names, words[1::2], strict=True)))


@pytest.mark.parametrize("run", [nemo_by_page, prime_by_page, slime_by_page])
def test_steps_by_the_lines_of_the_page(run, monkeypatch):
    seen = []
    find = _objectives.named
    monkeypatch.setattr(_objectives, "named", lambda o, p: seen.append(o) or find(o, p))
    parameters, start, logs = run()
    assert parameters.isfinite().all() and (parameters - start).abs().max() > 1e-3
    assert len(logs) == STEPS and {"topr", "ppo"} & {each for each in seen if isinstance(each, str)}
