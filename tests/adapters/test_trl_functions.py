"""tether.trl: TRL's functions of logits and hidden states, patch() and unpatch()."""

import pathlib
import re
import subprocess
import sys

import pytest
import tether.trl
import torch

pytest.importorskip("trl")
import trl_runs
from trl.trainer import utils as trl_utils

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs/trl.md"
BOUND = 2e-6


FUNCTIONS = {
    "selective_log_softmax": lambda f, x, index, mask: [f(x, index)],
    "with temperature and mask": lambda f, x, index, mask: [f(x, index, 0.7, mask)],
    "of several ids": lambda f, x, index, mask: [f(x, torch.stack([index, 1 + index], -1), 0.7)],
    "entropy_from_logits": lambda f, x, index, mask: [f(x)],
    "selective_log_softmax_and_entropy": lambda f, x, index, mask: list(
        f(x, index, temperature=0.7, row_mask=mask)
    ),
    "without the gradient of entropies": lambda f, x, index, mask: list(f(x, index, False)),
}
IS_CALLED = {
    "with temperature and mask": "selective_log_softmax",
    "of several ids": "selective_log_softmax",
    "without the gradient of entropies": "selective_log_softmax_and_entropy",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_logits_are_the_same(name, dtype):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, 40, generator=random, dtype=dtype)
    index = torch.randint(39, (3, 5), generator=random)
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]

    def evaluated():
        function = getattr(trl_utils, IS_CALLED.get(name, name))
        x = logits.clone().requires_grad_()
        out = FUNCTIONS[name](function, x, index, mask)
        sum(
            (each * torch.arange(1, 6.0).view(5, *[1] * (each.dim() - 2))).sum() for each in out
        ).backward()
        return [*(each.detach() for each in out), x.grad]

    theirs = evaluated()
    with trl_runs.counted(patched=True):
        ours = evaluated()
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=BOUND, atol=BOUND)


HEADS = {
    "float32": {},
    "with a bias": {"bias": True},
    "as Gemma's": {"softcap": 5.0},
    "as Cohere's": {"scale": 0.3},
    "in bfloat16": {"dtype": torch.bfloat16},
    "in bfloat16, weights in float32": {"dtype": torch.bfloat16, "wide": True},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_same(name):
    """Values and gradients; in bfloat16 as near to float32 as TRL's, by the gradients' rounding."""
    settings = {"dtype": torch.float32, "softcap": None, "scale": 1.0} | HEADS[name]
    random = torch.Generator().manual_seed(0)
    dtype = settings["dtype"]
    of_weights = torch.float32 if "wide" in settings else dtype
    hidden = torch.randn(7, 16, generator=random).to(dtype)
    weight = (0.5 * torch.randn(40, 16, generator=random)).to(of_weights)
    bias = torch.randn(40, generator=random).to(of_weights) if "bias" in settings else None
    targets = torch.randint(40, (7,), generator=random)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def evaluated():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        given = leaves if bias is not None else [*leaves, None]
        out = trl_utils._ChunkedLogProbFunction.apply(
            *given, targets, 0.7, 32, settings["softcap"], settings["scale"], outputs
        )
        (out[0] * torch.arange(7.0) + 0.3 * out[1]).sum().backward()
        return [each.detach() for each in out], [leaf.grad for leaf in leaves]

    theirs, their_gradients = evaluated()
    with trl_runs.counted(patched=True) as calls:
        ours, our_gradients = evaluated()
    assert calls["linear_token_logps"] == 1
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=5e-6, atol=5e-6)
    bound = 5e-6 if dtype == torch.float32 else 1e-2
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert our.dtype == their.dtype
        assert (our - their).abs().max() <= bound * their.abs().max()


@pytest.mark.parametrize("answers", [3, 0])
def test_the_head_is_given_only_positions_with_a_label(answers, monkeypatch):
    model = trl_runs.model()
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 9 - answers, -100)
    given = []

    def recorded(hidden, *arguments, **named):
        given.append(hidden.shape[0])
        return tether.linear_token_logps(hidden, *arguments, **named)

    def evaluated():
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + out.entropy.sum()).backward()
        gradient = model.lm_head.weight.grad
        model.zero_grad()
        return out.log_probs, out.entropy, gradient

    theirs = evaluated()
    with trl_runs.counted(patched=True):
        monkeypatch.setattr("tether._trl_heads.linear_token_logps", recorded)
        ours = evaluated()
    assert given == [2 * answers]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=5e-6, atol=5e-6)


# ---- patch and unpatch ---------------------------------------------------------------------------


def replaceable():
    places = [place.partition(":") for place in tether.trl._REPLACEMENTS]
    owners = [tether.trl._find(sys.modules[module], path) for module, _, path in places]
    return [vars(owner)[name] for owner, name in owners]


def test_patch_twice_and_unpatch_leave_trl_as_it_was():
    import trl.experimental.tpo.tpo_trainer as tpo  # has imported one by name

    owned = replaceable()
    assert tpo.selective_log_softmax_and_entropy in owned
    tether.trl.patch()
    tether.trl.patch()
    ours = replaceable()
    assert not set(map(id, ours)) & set(map(id, owned))
    assert tpo.selective_log_softmax_and_entropy in ours
    tether.trl.unpatch()
    assert replaceable() == owned and tpo.selective_log_softmax_and_entropy in owned
    tether.trl.unpatch()
    assert replaceable() == owned


def test_an_unknown_version_is_refused(monkeypatch):
    owned = replaceable()
    monkeypatch.setattr("tether._trainers.version_of", lambda name: "1.17.0")
    with pytest.raises(RuntimeError, match=r"^tether.trl: trl must be 1.16.0, got 1.17.0$"):
        tether.trl.patch()
    assert replaceable() == owned


def test_import_does_not_import_trl():
    code = "import sys, tether.trl; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_block_of_the_page_patches():
    code = re.search(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    owned = replaceable()
    try:
        exec(code, {})
        assert replaceable() != owned
    finally:
        tether.trl.unpatch()
