"""tether in the classes of torchrl 0.14.1, beside its own. Skipped without torchrl.

The actor is a table of logits with torchrl's own distribution over tokens.
"""

import itertools
import pathlib
import re

import pytest
import torch

pytest.importorskip("torchrl")

import tether
import tether.torchrl as adapter
from tensordict import TensorDict, lazy_stack
from torchrl.modules.distributions import LLMMaskedCategorical
from torchrl.objectives import llm

NAMES = ("GRPOLoss", "DAPO", "CISPOLoss")
TOLERANCES = {torch.float64: (1e-12, 1e-15), torch.float32: (3e-6, 1e-7)}
ROWS, TOKENS, WORDS = 6, 9, 5


class Actor(torch.nn.Module):
    def __init__(self, logits, mask):
        super().__init__()
        self.logits, self.mask = torch.nn.Parameter(logits), mask

    def get_dist(self, tensordict, logits_key=None):
        return LLMMaskedCategorical(logits=self.logits, mask=self.mask)


def batch_of(seed, dtype=torch.float64, *, spread=0.4):
    """Six answers of up to nine tokens, one of them empty; masked slots hold what may be there."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    signs = torch.tensor([1, -1, 1, -1, 1, -1], dtype=dtype)[:, None, None]
    mask = torch.arange(TOKENS) < torch.tensor([9, 4, 0, 7, 1, 6])[:, None]
    mask[0, 3] = False
    actor = Actor(normal(ROWS, TOKENS, WORDS), mask)
    ids = torch.randint(0, WORDS, (ROWS, TOKENS), generator=generator)
    logps = actor.logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = logps - spread * normal(ROWS, TOKENS)
    old[0, 3] = old[5, 0] = torch.nan  # which torchrl takes out
    batch = {
        "advantage": (normal(ROWS, 1, 1).abs() * signs).expand(ROWS, TOKENS, 1).clone(),
        ("tokens", "full"): ids,
        ("log_probs", "full"): old,
        ("next", "ref_log_probs", "full"): logps - 0.3 * normal(ROWS, TOKENS),
    }
    return actor, TensorDict(batch, [ROWS])


def outcomes(name, actor, batch, upstream=None, **settings):
    """Results and gradient, of all losses together, of torchrl's class and of ours."""
    found = []
    for module in (llm, adapter):
        loss = getattr(module, name)(actor, **settings)
        out = loss(batch)
        terms = {key: out.get(key) for key in loss.out_keys if out.get(key, None) is not None}
        total = sum((each * (1 if upstream is None else upstream)).sum()
                    for key, each in terms.items() if key.startswith("loss_"))  # fmt: skip
        terms["gradient"] = torch.autograd.grad(total, actor.logits)[0]
        found.append((type(out), terms))
    return found


def assert_same(own, ours, dtype):
    (own_type, own), (our_type, ours) = own, ours
    rtol, atol = TOLERANCES[dtype]
    assert own_type is our_type and own.keys() == ours.keys()
    for key in own:
        torch.testing.assert_close(ours[key], own[key], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_torchrl(name, aggregation, dtype):
    for seed, bounds in enumerate((0.2, (0.15, 0.28))):
        actor, batch = batch_of(seed, dtype)
        settings = {"aggregation": aggregation, "clip_epsilon": bounds}
        assert_same(*outcomes(name, actor, batch, **settings), dtype)


def test_on_other_devices(monkeypatch):
    """The path of tensors elsewhere, on the CPU."""
    monkeypatch.setattr("tether.policy.has_kernel", lambda *_: False)
    actor, batch = batch_of(1)
    for name, aggregation in itertools.product(NAMES, ("token_mean", "prompt_mean", "none")):
        assert_same(*outcomes(name, actor, batch, aggregation=aggregation), torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_with_its_other_settings(name):
    actor, batch = batch_of(2)
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)[:, None]
    assert_same(
        *outcomes(name, actor, batch, upstream, aggregation="none", entropy_bonus=False),
        torch.float64,
    )
    for settings in (
        {"kl_mask_threshold": 0.02},
        {"kl_to_ref_coeff": 0.3, "kl_to_inference_coeff": 0.2},
        {"entropy_bonus": False, "reduction": "sum"},
        {"reduction": "none"},
        {"masking_strategy": "rlhf", "entropy_coeff": 0.1},
    ):
        assert_same(*outcomes(name, actor, batch, **settings), torch.float64)


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean", "none"])
def test_other_shapes(aggregation):
    """One answer without rows; of [2, 3, T] torchrl's prompt_mean is one number a column."""
    actor, batch = batch_of(3)
    settings = {"aggregation": aggregation, "entropy_bonus": False}
    one = Actor(actor.logits.detach()[0], actor.mask[0])
    assert_same(*outcomes("GRPOLoss", one, batch[0], **settings), torch.float64)
    many = Actor(actor.logits.detach().unflatten(0, (2, 3)), actor.mask.unflatten(0, (2, 3)))
    if aggregation == "prompt_mean":
        with pytest.raises(ValueError) as caught:
            adapter.GRPOLoss(many, **settings)(batch.reshape(2, 3))
        assert str(caught.value) == (
            "tether.torchrl: tokens must be [T] or [B, T] for prompt_mean, got [2, 3, 9]"
        )
    else:
        assert_same(*outcomes("GRPOLoss", many, batch.reshape(2, 3), **settings), torch.float64)


def test_rows_of_different_lengths():
    """As torchrl's replay buffers hold them: padded in front when the loss asks for them."""
    actor, batch = batch_of(8)
    lengths = [9, 4, 2, 7, 1, 6]
    rows = []
    for row, length in zip(batch.unbind(0), lengths, strict=True):
        rows.append(TensorDict({key: row[key][-length:] for key in row.keys(True, True)}, []))
    ragged = lazy_stack(rows)
    actor.mask[:] = torch.arange(TOKENS) >= TOKENS - torch.tensor(lengths)[:, None]
    for name, aggregation in itertools.product(NAMES, ("token_mean", "prompt_mean", "none")):
        found = outcomes(name, actor, ragged, aggregation=aggregation)
        assert_same(*found, torch.float64)
    losses = [
        adapter.GRPOLoss(actor, objective=each, entropy_bonus=False)(ragged).loss_objective
        for each in (None, "ppo")
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_masks_of_the_batch_and_batches_without_tokens():
    actor, batch = batch_of(4)
    kept = torch.rand(ROWS, TOKENS, 1, generator=torch.Generator().manual_seed(0)) < 0.6
    batch["collector", "mask"] = kept
    batch["shifted_valid"] = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    batch["shifted_valid"][:, 1] = False
    for name in NAMES:
        assert_same(*outcomes(name, actor, batch, entropy_bonus=False), torch.float64)
    expected = outcomes("GRPOLoss", actor, batch, entropy_bonus=False)[1][1]
    batch["advantage"][~kept] = torch.nan  # where torchrl's gradient is NaN
    found = outcomes("GRPOLoss", actor, batch, entropy_bonus=False)[1][1]
    for name in ("loss_objective", "gradient"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    actor.mask[:] = False
    for aggregation in ("token_mean", "none"):
        found = outcomes("GRPOLoss", actor, batch, aggregation=aggregation, entropy_bonus=False)
        for _, terms in found:
            assert (terms["loss_objective"] == 0).all() and (terms["gradient"] == 0).all()


def test_clips_that_a_schedule_moves():
    actor, batch = batch_of(5)
    found = []
    for module in (llm, adapter):
        loss = module.GRPOLoss(actor, entropy_bonus=False)
        loss.clip_epsilon_low.fill_(0.05)
        loss.clip_epsilon_high.fill_(0.4)
        found.append(loss(batch).loss_objective)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean", "none"])
def test_any_objective(aggregation):
    actor, batch = batch_of(7)
    ids, old = batch["tokens", "full"], batch["log_probs", "full"]
    mask = actor.mask & old.isfinite()
    logps = actor.get_dist(batch).log_prob(ids)
    clips = {"epsilon_low": 0.15, "epsilon_high": 0.28}
    for objective, options in (
        ("dapo", clips),
        ("reinforce", {}),
        ("verl.gspo", clips),
        ("dppo_tv", {"tv_mask.high": 0.1}),
        ("decoupled_ppo", clips),
        ("topr", {"weights": {"opsm": {"high": 0.1}}}),
    ):
        given = {} if options is clips else options
        loss = adapter.CISPOLoss(
            actor,
            objective=objective,
            options=given,
            clip_epsilon=(0.15, 0.28),
            aggregation=aggregation,
            entropy_bonus=False,
        )
        arrays = {"old_logps": old, "rollout_logps": old, "objective": objective}
        tokens = (logps, batch["advantage"][..., 0], mask)
        if aggregation == "none":
            expected = tether.policy_token_losses(*tokens, **arrays, **options)[..., None]
        else:
            rows = aggregation == "prompt_mean"
            expected = tether.policy_loss(
                *tokens,
                aggregation="sequence_mean_token_mean" if rows else "token_mean",
                normalizer=tether.Normalizer(sequences=ROWS) if rows else None,
                **arrays,
                **options,
            ).loss
        out = loss(batch).loss_objective
        out = out[0] if aggregation == "prompt_mean" else out
        torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-9)
        slopes = [
            torch.autograd.grad(each.sum(), actor.logits, retain_graph=True)[0]
            for each in (out, expected)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-9)


def test_typed_objectives():
    actor, batch = batch_of(9)
    losses = [
        adapter.GRPOLoss(actor, entropy_bonus=False, **choice)(batch).loss_objective
        for choice in (
            {"objective": "topr", "options": {"ratio_high": 0.5}},
            {"objective": tether.objective.Topr(ratio_high=0.5)},
            {"objective": "topr"},
        )
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"options": {}}, ValueError, "objective must be given with options, got none"),
        ({"objective": "ppo", "options": {"constant": 2}}, ValueError,
         "constant must not be given, got it. It is torchrl's"),
        ({"objective": "ppo", "options": {"epsilon_low": -1}}, ValueError,
         "epsilon_low must be in [0, 1], got -1"),
    ],
)  # fmt: skip
def test_choices_are_checked_at_once(settings, error, message):
    with pytest.raises(error) as caught:
        adapter.GRPOLoss(None, **settings)
    assert str(caught.value) == f"tether.torchrl: {message}"


def test_it_is_tethers_loss_that_runs(monkeypatch):
    seen = []

    def counted(**settings):
        seen.append(settings["objective"])
        return tether.policy_loss(**settings)

    monkeypatch.setattr(adapter, "policy_loss", counted)
    actor, batch = batch_of(6)
    for name in NAMES:
        outcomes(name, actor, batch)
    assert seen == ["torchrl.grpo", "torchrl.grpo", "torchrl.cispo"]


def test_bounds_tell_and_classes_are_torchrls(monkeypatch):
    """Every side of the clip is in the batches: else a swap of the bounds would not be seen."""
    actor, batch = batch_of(1)
    logps = actor.get_dist(batch).log_prob(batch["tokens", "full"])
    ratio = (logps - batch["log_probs", "full"]).exp()[actor.mask]
    advantages = batch["advantage"][..., 0][actor.mask]
    where = (ratio > 0.85).int() + (ratio > 1.28).int()
    sides = set(zip((advantages > 0).tolist(), where.tolist(), strict=True))
    assert sides == set(itertools.product((False, True), (0, 1, 2)))
    for name in NAMES:
        assert issubclass(getattr(adapter, name), getattr(llm, name))
    monkeypatch.setattr("tether._trainers.version_of", lambda name: "0.15.0")
    with pytest.raises(RuntimeError) as caught:
        adapter.GRPOLoss(actor)
    assert str(caught.value) == "tether.torchrl: torchrl must be 0.14.1, got 0.15.0"


def test_the_blocks_of_the_page_run():
    page = (pathlib.Path(__file__).parent.parent.parent / "docs/torchrl.md").read_text()
    actor, batch = batch_of(4)
    namespace, blocks = {"actor": actor}, re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(code, namespace)
    chosen = eval(blocks[1], namespace)
    losses = (namespace["loss"], llm.GRPOLoss(actor, clip_epsilon=(0.2, 0.28)), chosen)
    ours, own, other = (each(batch.clone()).get("loss_objective") for each in losses)
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-15)
    assert other.isfinite() and other != ours
