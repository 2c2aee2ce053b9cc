"""Ten steps of a small model in torchrl's wrapper, with torchrl's losses and with ours. Skipped
without torchrl and transformers."""

import copy

import pytest
import torch

pytest.importorskip("torchrl")
pytest.importorskip("transformers")

import tether.torchrl as adapter
import tokenizers
import transformers
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives import llm

WORDS = ["<pad>", "<unk>", "<eos>", *"abcdefgh"]
LENGTHS = [(3, 5), (4, 2), (2, 6), (3, 3)]  # of prompts and answers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def wrapped(model):
    ids = {word: each for each, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", **special
    )
    settings = {"input_mode": "tokens", "generate": False, "return_log_probs": True}
    return TransformersWrapper(model, tokenizer=tokenizer, pad_output=False, **settings)


def rows_of(model):
    """Rows of different lengths, as a replay buffer gives them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in LENGTHS:
        length = prompt + answer
        ids = torch.randint(3, len(WORDS), (length,), generator=generator)
        row = {
            ("tokens", "full"): ids,
            ("tokens", "prompt"): ids[:prompt],
            ("tokens", "response"): ids[prompt:],
            ("masks", "all_attention_mask"): torch.ones(length, dtype=torch.bool),
            ("masks", "all_assistant_mask"): torch.arange(length) >= prompt,
            "advantage": torch.randn(1, 1, generator=generator).expand(length, 1).clone(),
        }
        rows.append(TensorDict(row, []))
    with torch.no_grad():
        logps = wrapped(model)(lazy_stack(rows).copy()).get(("log_probs", "full"), as_list=True)
    for row, each in zip(rows, logps, strict=True):
        row["log_probs", "full"] = each + 0.3 * torch.randn(each.shape, generator=generator)
    return lazy_stack(rows)


@pytest.mark.parametrize("strategy", ["sft", "rlhf", "generic"])
@pytest.mark.parametrize("name", ["GRPOLoss", "DAPO", "CISPOLoss"])
def test_ten_steps(name, strategy, model):
    data, found = rows_of(model), []
    for module in (llm, adapter):
        live = copy.deepcopy(model)
        loss = getattr(module, name)(
            wrapped(live), masking_strategy=strategy, clip_epsilon=(0.2, 0.28)
        )
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
        losses = []
        for _ in range(10):
            out = loss(data)
            total = out.loss_objective + out.loss_entropy
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
        parameters = torch.cat([each.detach().flatten() for each in live.parameters()])
        found.append((torch.stack(losses), parameters))
    (own, own_parameters), (ours, parameters) = found
    assert own[0] != own[-1]
    torch.testing.assert_close(ours, own, rtol=0, atol=2e-6)
    torch.testing.assert_close(parameters, own_parameters, rtol=0, atol=2e-5)
