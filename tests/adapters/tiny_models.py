"""A model of random parameters, small enough for a step in milliseconds."""

import torch
import transformers


def llama(vocabulary, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)
