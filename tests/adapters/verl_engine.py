"""verl's FSDP engine on a CPU, around a tiny model of random weights and without FSDP.

Everything but the set-up is verl's: how it slices micro-batches, computes log-probabilities and
entropies, calls ppo_loss and steps.
"""

import functools
import types

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.losses import ppo_loss

PROMPTS, ANSWERS = [3, 2, 4, 3], [5, 7, 1, 4]


class CpuEngine(transformer_impl.FSDPEngineWithLMHead):
    def __init__(self, module):
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.engine_config = types.SimpleNamespace(
            entropy_checkpointing=False,
            entropy_from_logits_with_chunking=False,
            use_no_sync_for_gradient_accumulation=True,
        )
        self.optimizer_config = types.SimpleNamespace(clip_grad=1.0)
        self.ulysses_device_mesh, self.ulysses_sequence_parallel_size = None, 1
        self.use_ulysses_sp = self._qat_enabled = self.pad_to_length = False
        self._autocast_dtype = torch.float32


def tiny_engine(monkeypatch):
    for name in ("get_device_id", "get_device_name"):
        monkeypatch.setattr(transformer_impl, name, lambda: "cpu")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return CpuEngine(Qwen2ForCausalLM(Qwen2Config(vocab_size=97, **shape, **heads)))


def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def engine_batch(weighted=False):
    """Four answers in two micro-batches."""
    generator = torch.Generator().manual_seed(0)

    def ids(lengths):
        return [torch.randint(97, (n,), generator=generator) for n in lengths]

    def near(level):
        return nested(level + 0.3 * torch.rand(n, generator=generator) for n in ANSWERS)

    prompts, answers = ids(PROMPTS), ids(ANSWERS)
    ones = nested(torch.ones(n, dtype=torch.int64) for n in ANSWERS)
    whole = [torch.cat(each) for each in zip(prompts, answers, strict=True)]
    advantages = torch.randn(4, generator=generator)
    tensors = {
        "prompts": nested(prompts),
        "responses": nested(answers),
        "input_ids": nested(whole),
        "position_ids": nested(torch.arange(len(each)) for each in whole),
        "response_mask": ones,
        "loss_mask": ones,
        "old_log_probs": near(-4.75),
        "ref_log_prob": near(-4.75),
        "advantages": nested(a.expand(n).clone() for a, n in zip(advantages, ANSWERS, strict=True)),
    }
    if weighted:
        tensors["rollout_is_weights"] = near(0.9)
    settings = {
        "use_remove_padding": False,
        "use_fused_kernels": False,
        "calculate_entropy": True,
        "temperature": 0.9,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "global_batch_size": len(ANSWERS),
    }
    return tensordict_utils.get_tensordict(tensors, settings)


def trained(monkeypatch, config, steps):
    """Parameters after steps of the engine, and each step's losses and metrics."""
    engine, data = tiny_engine(monkeypatch), engine_batch()
    loss = functools.partial(ppo_loss, config)
    outputs = [engine.train_batch(data, loss) for _ in range(steps)]
    return list(engine.module.parameters()), outputs
