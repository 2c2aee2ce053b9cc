"""tether.preference_loss: the operator against tether.reference and published formulas."""

import math

import pytest
import tether
import torch

OBJECTIVES = tuple(tether.objectives("preference"))


def padded_pairs(pairs=4, columns=9, seed=0, dtype=torch.float64, poison=math.nan):
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * pairs, columns)
    mask = torch.rand(shape, generator=generator) > 0.3

    def tokens(values):
        return torch.where(mask, values, poison).to(dtype)

    logps = -torch.rand(shape, generator=generator, dtype=torch.float64) - 0.1
    ref_logps = logps + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"logps": tokens(logps), "ref_logps": tokens(ref_logps), "response_mask": mask}


def packed(batch):
    mask = batch["response_mask"]
    read = mask | (batch["nll_mask"] > 0) if "nll_mask" in batch else mask
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), read.sum(1).cumsum(0)])
    tokens = {name: each[read] for name, each in batch.items() if each.shape == mask.shape}
    return batch | tokens | {"offsets": offsets}


def as_taken(batch, objective):
    """With labels for an objective of single answers."""
    if not tether.reference.PREFERENCES[objective].takes_labels:
        return batch
    rows = batch["offsets"].shape[0] - 1 if "offsets" in batch else batch["logps"].shape[0]
    return batch | {"labels": torch.arange(rows) % 3 == 0}


def evaluated(function, batch, upstream=1.0, **settings):
    logps = batch["logps"].detach().requires_grad_()
    out = function(**batch | {"logps": logps}, **settings)
    (upstream * out.loss).backward()
    sums = out.metrics.sums if hasattr(out, "metrics") else out.sums
    return out.loss.detach(), logps.grad, sums


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [dict, packed])
@pytest.mark.parametrize("link", tether.reference.LINKS)
@pytest.mark.parametrize("score", ["sum", "mean"])
def test_equals_reference_in_float64(objective, layout, link, score):
    batch = as_taken(layout(padded_pairs()), objective)
    settings = {"objective": objective, "link": link, "score": score, "beta": 0.3}
    settings["reference"] = str(link != "log_odds").lower()
    actual = evaluated(tether.preference_loss, batch, upstream=-1.7, **settings)
    expected = evaluated(tether.reference.preference_loss, batch, upstream=-1.7, **settings)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), rtol=1e-11, atol=1e-13)


PRODUCTS = {
    "LD": {"ld_alpha": 0.25},
    "LD of means": {"ld_alpha": torch.tensor(0.5), "score": "mean"},
    "NLL": {"nll_coef": 0.5, "loss_weight": 2.0},
    "NLL by sequence": {"nll_coef": torch.tensor(0.5), "nll_mean": "sequence_mean"},
    "LD + NLL summed": {"nll_coef": 0.5, "nll_mean": "sequence_sum", "ld_alpha": 0.0},
    "counts of the step": {"nll_coef": 0.5, "pairs": 9.3, "tokens": torch.tensor(70.0)},
    "factors": {"world_size": 1.1, "loss_scale": 0.7, "loss_weight": 1.3, "nll_coef": 0.3},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [dict, packed])
@pytest.mark.parametrize("own_mask", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_equals_reference_in_what_a_product_may_have(objective, layout, own_mask, name):
    batch = padded_pairs(poison=0.0)
    generator = torch.Generator().manual_seed(7)
    batch["baselines"] = torch.randn(8, generator=generator, dtype=torch.float64)
    batch["answer_weights"] = torch.arange(8)
    if own_mask:
        batch["nll_mask"] = torch.rand(batch["logps"].shape, generator=generator).round(decimals=1)
    batch = as_taken(layout(batch), objective)
    settings = dict(PRODUCTS[name])
    if "labels" in batch:
        settings.pop("ld_alpha", None)
    settings["objective"] = objective
    expected = evaluated(tether.reference.preference_loss, batch, upstream=-1.7, **settings)
    for function in (tether.preference_loss, on_tensors):
        actual = evaluated(function, batch, upstream=-1.7, **settings)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_ld_dpo_is_the_expression_of_the_paper():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    batch = padded_pairs(pairs=2, columns=4, poison=0.0) | {"response_mask": mask}
    # Answers of 4 and 2 tokens, and of 2 and 3: the tail weighs 1/4.
    weight = mask.double()
    weight[0, 2:], weight[3, 3] = 0.25, 0.25
    scores = (weight * (batch["logps"] - batch["ref_logps"])).sum(1)
    margin = 0.1 * (scores[:2] - scores[2:])
    loss = tether.dpo_loss(**batch, ld_alpha=0.25).loss
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


def test_kto_is_the_expression_of_the_paper():
    batch, labels = padded_pairs(poison=0.0), torch.tensor([1, 0, 0, 1, 1, 1, 0, 1])
    z = torch.tensor(0.3, dtype=torch.float64)
    gaps = torch.where(batch["response_mask"], batch["logps"] - batch["ref_logps"], 0.0).sum(1)
    good = 1.5 * (1 - torch.sigmoid(0.2 * (gaps - z)))
    bad = 1 - torch.sigmoid(0.2 * (z - gaps))
    loss = tether.preference_loss(
        **batch,
        labels=labels,
        baselines=z.expand(8),
        objective="kto",
        beta=0.2,
        desirable_weight=1.5,
    ).loss
    expected = torch.where(labels == 1, good, bad).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("weight", [1.3, 1e12])
def test_weights_of_classes_are_float64_on_every_path(weight):
    batch = as_taken(padded_pairs(poison=0.0), "kto")
    settings = {"objective": "kto", "desirable_weight": weight, "undesirable_weight": 0.7}
    actual = evaluated(on_tensors, batch, **settings)
    expected = evaluated(tether.preference_loss, batch, **settings)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


def test_huge_numbers_give_what_the_kernel_gives():
    batch = padded_pairs(pairs=2, poison=0.0)
    huge = torch.full((4,), 1e308, dtype=torch.float64)
    for change in (
        {"answer_weights": huge, "loss_weight": 1e12},
        {"baselines": torch.tensor([1.7, -1.7, -1.7, 1.7]).double() * 1e308},
        {"pairs": 2e-38},
        {"pairs": 2e-38, "world_size": 1e308},
        {"pairs": 10**19},
        {"loss_weight": 10**12},
        {"nll_coef": 1e12},
    ):
        actual = evaluated(on_tensors, batch, **change)
        expected = evaluated(tether.preference_loss, batch, **change)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


def test_log_odds_are_of_log_probabilities():
    logps, mask = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)
    with pytest.raises(ValueError) as error:
        tether.preference_loss(logps, response_mask=mask, objective="orpo")
    assert str(error.value) == (
        "preference_loss: logps must be log-probabilities with this link, at most 0, got a sum of "
        "1 at [0]"
    )
    loss, metrics = on_tensors(logps, response_mask=mask, objective="orpo")
    assert loss.isnan() and metrics.to_dict()["nonfinite"] == 1


def test_orpo_is_the_expression_of_the_paper():
    batch = padded_pairs(poison=0.0)
    mask, logps = batch["response_mask"], batch["logps"]
    mean = torch.where(mask, logps, 0.0).sum(1) / mask.sum(1)
    log_odds = mean - torch.log1p(-mean.exp())
    nll = -logps[:4][mask[:4]].mean()
    expected = nll - 0.1 * torch.nn.functional.logsigmoid(log_odds[:4] - log_odds[4:]).mean()
    loss, metrics = tether.preference_loss(logps, response_mask=mask, objective="orpo")
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    assert metrics.to_dict()["nll"] == pytest.approx(nll.item(), rel=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -1.0, torch.tensor(0.5)])
def test_alphapo_is_the_expression_of_the_paper(alpha):
    batch = padded_pairs()
    logps = batch["logps"].clone().requires_grad_()
    mask = batch["response_mask"]
    mean = torch.where(mask, logps, 0.0).sum(1) / mask.sum(1).clamp_min(1)
    reward = mean if alpha == 0 else (1 - mean.exp() ** -alpha) / alpha
    present = mask.sum(1).view(2, -1).sum(0) > 0
    losses = -torch.nn.functional.logsigmoid(2.5 * (reward[:4] - reward[4:]))
    expected = losses[present].mean()
    expected.backward()
    options = {"link": "alphapo", "link_alpha": alpha, "score": "mean", "reference": False}
    for function in (tether.preference_loss, on_tensors):
        loss, gradient, _ = evaluated(function, batch, beta=2.5, **options)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, logps.grad.nan_to_num(), rtol=1e-11, atol=1e-15)


def test_alphapo_keeps_its_slope_where_it_is_small():
    logps = torch.tensor([-1.0, -1.0]).double().requires_grad_()
    ref_logps = torch.tensor([-151.0, -1.0]).double()
    for function in (tether.preference_loss, on_tensors):
        loss = function(logps, ref_logps, link="alphapo", beta=1.0).loss
        gradient = torch.autograd.grad(loss, logps)[0]
        # The margin is 4; e^(-150 / 4) is the slope of the link.
        expected = -math.exp(-37.5) / (1 + math.exp(4))
        assert gradient[0].item() == pytest.approx(expected, rel=1e-12)


def on_tensors(*arguments, **options):
    """The path of devices without a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tether._ops, "KERNELS", frozenset())
        return tether.preference_loss(*arguments, **options)


def test_a_loss_beyond_float_is_its_largest_number():
    logps = torch.tensor([[1e30], [-1e30]])
    loss = tether.preference_loss(
        logps, response_mask=torch.ones(2, 1), objective="ipo", reference=False
    ).loss
    assert loss.item() == torch.finfo(torch.float32).max


def test_options_of_a_link_need_the_link():
    batch = padded_pairs()
    for function in (tether.preference_loss, on_tensors):
        with pytest.raises(ValueError) as error:
            function(**batch, link_alpha=0.5)
        assert str(error.value) == (
            "preference_loss: option must be one of label_smoothing, beta, loss_weight, nll_coef, "
            'ld_alpha, got "link_alpha"'
        )


def test_dpo_is_the_expression_of_the_paper():
    batch = padded_pairs()
    logps = batch["logps"].clone().requires_grad_()
    gaps = torch.where(batch["response_mask"], logps - batch["ref_logps"], 0.0).sum(1)
    expected = -torch.nn.functional.logsigmoid(0.2 * (gaps[:4] - gaps[4:])).mean()
    expected.backward()
    loss, gradient, _ = evaluated(tether.dpo_loss, batch, beta=0.2)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, logps.grad.nan_to_num(), rtol=1e-12, atol=1e-16)


def test_whole_answers_need_no_mask():
    batch = padded_pairs()
    sums = {
        name: torch.where(batch["response_mask"], batch[name], 0.0).sum(1)
        for name in ("logps", "ref_logps")
    }
    with pytest.raises(ValueError) as caught:
        tether.dpo_loss(**batch, objective="cdpo")
    assert str(caught.value) == (
        "dpo_loss: objective must not be given, got cdpo. Call preference_loss"
    )
    whole = evaluated(tether.dpo_loss, batch)
    answers = evaluated(tether.dpo_loss, sums)
    torch.testing.assert_close(answers[0], whole[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(answers[2], whole[2], rtol=1e-13, atol=0)
    assert answers[1].shape == sums["logps"].shape


def test_pairs_of_the_step_make_any_split_the_same():
    batch = padded_pairs(pairs=4)
    whole, gradient, _ = evaluated(tether.dpo_loss, batch)
    total = 0.0
    for i in range(4):
        part = {name: each[[i, i + 4]] for name, each in batch.items()}
        loss, part_gradient, _ = evaluated(tether.dpo_loss, part, pairs=4)
        total += loss
        torch.testing.assert_close(part_gradient, gradient[[i, i + 4]], rtol=1e-14, atol=0)
    torch.testing.assert_close(total, whole, rtol=1e-14, atol=0)


def test_metrics_by_name():
    batch = padded_pairs()
    metrics = tether.dpo_loss(**batch, beta=0.2).metrics.to_dict()
    gaps = torch.where(batch["response_mask"], batch["logps"] - batch["ref_logps"], 0.0).sum(1)
    assert metrics["reward_chosen"] == pytest.approx(0.2 * gaps[:4].mean().item(), rel=1e-13)
    assert metrics["accuracy"] == (gaps[:4] > gaps[4:]).double().mean().item()
    assert metrics["pairs"] == 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_the_derivative_of_the_value(objective):
    batch = as_taken(padded_pairs(pairs=2, columns=4, poison=0.0), objective)

    def loss(logps):
        return tether.preference_loss(**batch | {"logps": logps}, objective=objective).loss

    assert torch.autograd.gradcheck(loss, batch["logps"].requires_grad_(), raise_exception=True)


def test_second_derivatives_are_refused():
    batch = padded_pairs(poison=0.0)
    logps = batch["logps"].requires_grad_()
    loss = tether.dpo_loss(**batch).loss
    (gradient,) = torch.autograd.grad(loss, logps, create_graph=True)
    with pytest.raises(NotImplementedError) as caught:
        gradient.sum().backward()
    assert str(caught.value) == (
        "dpo_loss: backward must run once, got a second derivative. The loss has none"
    )


@pytest.mark.parametrize("layout, dtype", [(dict, torch.float32), (packed, torch.float16)])
def test_opcheck(layout, dtype):
    batch = layout(padded_pairs(poison=0.0, dtype=dtype))
    batch["logps"].requires_grad_()
    torch.library.opcheck(
        torch.ops.tether.preference_loss.default,
        (
            batch["logps"],
            batch["ref_logps"],
            batch["response_mask"],
            None,
            None,
            torch.linspace(-1, 1, 8),
            None,
            batch.get("offsets"),
            ["beta", "normalizer.pairs"],
            torch.tensor([0.5, 10.0], dtype=torch.float64),
            ["objective", "link"],
            ["cdpo", "js"],
            True,
        ),
    )


def test_compiles_into_one_graph():
    batch = padded_pairs(poison=0.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logps):
        return 3 * tether.dpo_loss(**batch | {"logps": 2 * logps}).loss

    logps = (batch["logps"] / 2).detach().requires_grad_()
    step(logps).backward()
    expected = evaluated(tether.dpo_loss, batch)
    torch.testing.assert_close(logps.grad / 6, expected[1], rtol=1e-13, atol=1e-16)


def test_the_catalogue_and_the_reference_have_the_same_rows():
    rows = tether.reference.PREFERENCES
    assert tuple(rows) == OBJECTIVES
    for name, objective in tether.objectives("preference").items():
        defaults = {each: option.default for each, option in objective.options.items()}
        of_links = {each for each in defaults if each.startswith("link_")}
        own = {each: value for each, value in defaults.items() if each not in of_links}
        defaults = tether.reference.preference.OPTIONS | rows[name].options
        assert own == defaults
        assert list(objective.choices["link"].legal) == list(tether.reference.LINKS)
        choices = {each: choice.default for each, choice in objective.choices.items()}
        assert choices == tether.reference.preference.CHOICES | rows[name].choices


ERRORS = {
    "logps must be given, got none": (ValueError, {"logps": None}),
    "response_mask must be given, got none": (ValueError, {"response_mask": None}),
    "ref_logps must be given, got none. Pass them or reference = false": (
        ValueError,
        {"ref_logps": None},
    ),
    "ref_logps must be [8, 9] like logps, got [8, 8]": (
        ValueError,
        {"ref_logps": torch.zeros(8, 8, dtype=torch.float64)},
    ),
    f'objective must be one of {", ".join(OBJECTIVES)}, got "dop"': (
        ValueError,
        {"objective": "dop"},
    ),
    "labels must be absent, got an array. The loss is one of pairs": (
        ValueError,
        {"labels": torch.ones(8)},
    ),
    "labels must be given, got none. The loss is one of single answers": (
        ValueError,
        {"objective": "kto"},
    ),
    "labels must be [8], got [4]": (ValueError, {"objective": "kto", "labels": torch.ones(4)}),
    "answer_weights must be at least 0 and finite, got -1 at [5]": (
        ValueError,
        {"answer_weights": 4 - torch.arange(8)},
    ),
    "nll_mask must be in [0, 1], got 2 at [0, 0]": (
        ValueError,
        {"nll_coef": 1.0, "nll_mask": torch.full((8, 9), 2)},
    ),
    "tokens must be greater than 0 and finite, got 0": (
        ValueError,
        {"nll_coef": 1.0, "tokens": 0},
    ),
    "option must be one of label_smoothing, beta, loss_weight, nll_coef, ld_alpha, link_alpha, "
    'got "tau"': (
        ValueError,
        {"tau": 0.2},
    ),
    f'link must be one of {", ".join(tether.reference.LINKS)}, got "kl"': (
        ValueError,
        {"link": "kl"},
    ),
    "beta must be in (0, 1e+12], got 0": (ValueError, {"beta": 0}),
    "beta must be a number, got str": (TypeError, {"beta": "0.1"}),
    "link must be a string, got int": (TypeError, {"link": 3}),
    "pairs must be greater than 0 and finite, got 0": (ValueError, {"pairs": 0}),
    "world_size must be greater than 0 and finite, got 0": (
        ValueError,
        {"world_size": torch.tensor(0.0)},
    ),
    "loss_scale must be greater than 0 and finite, got 0": (
        ValueError,
        {"loss_scale": torch.tensor(0.0)},
    ),
    "label_smoothing must not require grad, got a tensor that does. It is a constant of the loss: "
    "pass label_smoothing.detach()": (
        ValueError,
        {"label_smoothing": torch.tensor(0.1, requires_grad=True)},
    ),
}


@pytest.mark.parametrize("message, case", ERRORS.items())
def test_errors(message, case):
    error, changes = case
    with pytest.raises(error) as caught:
        tether.preference_loss(**padded_pairs(poison=0.0) | changes)
    assert caught.type is error
    assert str(caught.value) == f"preference_loss: {message}"


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("objective", sorted(tether.objectives("preference")))
def test_a_reference_of_answers_is_that_of_their_tokens(objective, fractional):
    generator = torch.Generator().manual_seed(3)

    def uniform(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    logps, ref_logps, mask = -uniform(6, 7), -uniform(6, 7), uniform(6, 7) > 0.3
    mask[0, 0] = mask[1, :2] = False
    weights = mask * (uniform(6, 7) if fractional else 1)
    row = tether.objectives("preference")[objective]
    labels = torch.tensor([True, False, True, True, False, True]) if objective == "kto" else None
    packed = [each[mask] for each in (logps, ref_logps, weights)]
    offsets = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).long()
    for score in (None, "sum", "mean"):
        options = {"objective": objective, "labels": labels}
        options |= {} if score is None else {"score": score}
        answers = (ref_logps * weights).sum(1)
        if (score or row.choices["score"].default) == "mean":
            answers = answers / weights.sum(1)
        for tokens, of_tokens, counted, where in (
            (logps, ref_logps, weights, {}),
            (*packed, {"offsets": offsets}),
        ):
            leaf = tokens.clone().requires_grad_()
            results = []
            for reference in (of_tokens, answers):
                out = tether.preference_loss(leaf, reference, counted, **options, **where)
                (gradient,) = torch.autograd.grad(out.loss, leaf)
                results.append((out.loss.detach(), gradient, out.metrics.sums))
            for actual, expected in zip(*results[::-1], strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_a_reference_of_answers_has_its_rules():
    logps, mask = -torch.ones(4, 3), torch.ones(4, 3)
    for reference, settings, message in (
        (
            torch.zeros(4),
            {"ld_alpha": 0.5},
            "must be of tokens where ld_alpha is not 1, got one of answers",
        ),
        (torch.zeros(3), {}, "must be [4, 3] like logps, got [3]"),
        (
            torch.zeros(4, dtype=torch.int64),
            {},
            "must be float32, float64, bfloat16 or float16, got int64",
        ),
        (torch.zeros(4, device="meta"), {}, "must be on cpu like logps, got meta"),
        (
            torch.zeros(4, requires_grad=True),
            {},
            "must not require grad, got a tensor that does. "
            "It is a constant of the loss: pass ref_logps.detach()",
        ),
    ):
        for function in ("preference_loss", "dpo_loss"):
            with pytest.raises((TypeError, ValueError)) as caught:
                getattr(tether, function)(logps, reference, mask, **settings)
            assert str(caught.value) == f"{function}: ref_logps {message}"


@pytest.mark.parametrize("kernel", [True, False])
def test_pairs_of_the_step_without_its_tokens_are_refused(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("tether._ops.KERNELS", frozenset())
    logps, mask = -torch.ones(4, 3), torch.ones(4, 3)
    for settings in ({"objective": "orpo"}, {"nll_coef": 0.5, "reference": False}):
        with pytest.raises(ValueError) as caught:
            tether.preference_loss(logps, None, mask, pairs=8, **settings)
        assert str(caught.value) == (
            "preference_loss: tokens must be given where pairs is, for a likelihood by tokens, "
            "got none"
        )
        whole = tether.preference_loss(logps, None, mask, pairs=8, tokens=24, **settings).loss
        assert whole == tether.preference_loss(logps, None, mask, **settings).loss / 4
    by_answer = {"nll_coef": 0.5, "nll_mean": "sequence_mean", "reference": False}
    assert tether.preference_loss(logps, None, mask, pairs=8, **by_answer).loss.isfinite()
