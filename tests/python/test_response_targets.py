"""tether.response_targets: the cases of tests/libtorch/response_targets_test.cc."""

import pytest
import tether
import torch


def rows(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def mask(*values):
    return rows(*values).bool()


def assert_equal(got, want):
    assert got.dtype == want.dtype and torch.equal(got, want), got


# The pictures of the docstring: a prompt of 2 (rows 0 and 2) or 3 tokens, a response of 3.
def test_right_padded():
    out = tether.response_targets(
        rows([10, 11, 20, 21, 22, 0], [10, 11, 12, 20, 21, 22]),
        rows(2, 3),
        rows([1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]),
    )
    assert_equal(out.targets, rows([11, 20, 21, 22, 0], [11, 12, 20, 21, 22]))
    assert_equal(out.response_mask, mask([0, 1, 1, 1, 0], [0, 0, 1, 1, 1]))


def test_left_padded():
    out = tether.response_targets(
        rows([0, 10, 11, 20, 21, 22], [0, 0, 0, 10, 20, 0]),
        rows(2, 1),
        mask([0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]),
    )
    assert_equal(out.targets, rows([10, 11, 20, 21, 22], [0, 0, 10, 20, 0]))
    assert_equal(out.response_mask, mask([0, 0, 1, 1, 1], [0, 0, 0, 1, 0]))


def test_without_attention_mask_all_after_the_prompt_is_response():
    ids = rows([5, 6, 7, 8], dtype=torch.int32).expand(3, 4)
    out = tether.response_targets(ids, rows(1, 3, 4, dtype=torch.int32))
    assert_equal(out.targets, rows(*[[6, 7, 8]] * 3))
    assert_equal(out.response_mask, mask([1, 1, 1], [0, 0, 1], [0, 0, 0]))
    assert all(each.is_contiguous() for each in out)


def test_edges_of_the_shape():
    one = torch.ones(2, dtype=torch.int64)
    assert tether.response_targets(rows([5], [6]), one).targets.shape == (2, 0)
    none = tether.response_targets(torch.zeros(0, 4, dtype=torch.int64), one[:0])
    assert none.response_mask.shape == (0, 3)
    empty = tether.response_targets(rows([0, 0, 0]), one[:1], mask([0, 0, 0]))
    assert_equal(empty.response_mask, mask([0, 0]))


def test_any_mask_but_0_is_attended():
    ids, lengths = rows([0, 4, 5, 6]), rows(1)
    for attended in (rows([0, 2, 1, 7], dtype=torch.uint8), rows([0, -1, 3, -128])):
        out = tether.response_targets(ids, lengths, attended)
        assert_equal(out.response_mask, mask([0, 1, 1]))


def test_the_number_of_response_tokens_is_kept():
    length = 9
    ids = torch.randint(100, (1, length), generator=torch.Generator().manual_seed(1))
    for left in range(3):
        for prompt in range(1, 4):
            for response in range(length - left - prompt + 1):
                end = left + prompt + response
                attended = torch.zeros(1, length, dtype=torch.int64)
                attended[:, left:end] = 1
                out = tether.response_targets(ids, rows(prompt), attended)
                assert_equal(out.targets[out.response_mask], ids[0, left + prompt : end])


# What the two functions are for: logps of the response, whatever stands elsewhere.
def test_feeds_token_logps():
    generator = torch.Generator().manual_seed(2)
    ids, lengths = torch.randint(20, (2, 7), generator=generator), rows(2, 4)
    targets, response_mask = tether.response_targets(ids, lengths)
    logits = torch.randn(2, 7, 20, generator=generator)
    logps = tether.token_logps(logits[:, :-1], targets.masked_fill(~response_mask, -100)).logps
    log_p = torch.log_softmax(logits.double(), -1)
    for row in range(2):
        for t in range(6):
            in_response = t + 1 >= lengths[row]
            want = log_p[row, t, ids[row, t + 1]].item() if in_response else 0
            assert logps[row, t].item() == pytest.approx(want, abs=1e-6)


# ---- errors --------------------------------------------------------------------------------------

IDS, LENGTHS = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, LENGTHS), ValueError, "input_ids must be given, got none"),
        ((IDS, None), ValueError, "prompt_lengths must be given, got none"),
        ((IDS.tolist(), LENGTHS), TypeError, "input_ids must be a tensor, got list"),
        ((IDS.float(), LENGTHS), TypeError, "input_ids must be int32 or int64, got float32"),
        ((IDS, LENGTHS.double()), TypeError, "prompt_lengths must be int32 or int64, got float64"),
        (
            (IDS, LENGTHS, IDS.float()),
            TypeError,
            "attention_mask must be bool or integer, got float32",
        ),
        (
            (IDS, LENGTHS, IDS.to(torch.complex64)),
            TypeError,
            "attention_mask must be bool or integer, got complex64",
        ),
        ((IDS[0], LENGTHS), ValueError, "input_ids must be [B, L] with L at least 1, got [5]"),
        (
            (IDS[:, :0], LENGTHS),
            ValueError,
            "input_ids must be [B, L] with L at least 1, got [2, 0]",
        ),
        (
            (IDS, torch.ones(3, dtype=torch.int64)),
            ValueError,
            "prompt_lengths must be [2] like input_ids [2, 5], got [3]",
        ),
        (
            (IDS, LENGTHS, IDS[:, 1:]),
            ValueError,
            "attention_mask must be [2, 5] like input_ids [2, 5], got [2, 4]",
        ),
        (
            (IDS, LENGTHS.to("meta")),
            ValueError,
            "prompt_lengths must be on cpu like input_ids, got meta",
        ),
        (
            (IDS, LENGTHS, IDS.to("meta")),
            ValueError,
            "attention_mask must be on cpu like input_ids, got meta",
        ),
        ((IDS, rows(1, 6)), ValueError, "prompt_lengths must be in [1, 5], got 6 at [1]"),
        ((IDS, rows(0, 1)), ValueError, "prompt_lengths must be in [1, 5], got 0 at [0]"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        tether.response_targets(*arguments)
    assert str(raised.value) == f"response_targets: {message}"
