#!/usr/bin/env python3
"""A micro-batch of TRL's GRPOTrainer, loss and backward, with and without tether.trl.patch().

usage: trl_step.py [--rows 8] [--prompt 64] [--answer 192] [--hidden 512] [--layers 4]
                   [--vocabulary 32000] [--threads 1] [--repetitions 5]

Interleaved repetitions, medians of wall time. "body" is the transformer without its head, forward
and backward: what no loss can save. Run it in an environment of ./dev test --peers:
build/peers/trl/bin/python bench/trl_step.py
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

import tether.trl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests/adapters"))
import trl_runs


def parsed():
    parser = argparse.ArgumentParser(usage=__doc__)
    numbers = {"rows": 8, "prompt": 64, "answer": 192, "hidden": 512, "layers": 4,
               "vocabulary": 32000, "threads": 1, "repetitions": 5}  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def policy(sizes):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=3 * sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=8,
            max_position_embeddings=sizes.prompt + sizes.answer,
        )
    )


def batch(sizes):
    shapes = {"prompt": (sizes.rows, sizes.prompt), "completion": (sizes.rows, sizes.answer)}
    ids = {f"{k}_ids": torch.randint(sizes.vocabulary, shape) for k, shape in shapes.items()}
    masks = {f"{k}_mask": torch.ones(shape, dtype=torch.int64) for k, shape in shapes.items()}
    tokens = torch.tensor(sizes.rows * sizes.answer)
    return {**ids, **masks, "advantages": torch.randn(sizes.rows), "num_items_in_batch": tokens}


def seconds(work):
    begin = time.perf_counter()
    work().backward()
    return time.perf_counter() - begin


def main():
    sizes = parsed()
    torch.set_num_threads(sizes.threads)
    model, inputs = policy(sizes), batch(sizes)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    times = {"body": [], "TRL": [], "tether": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_runs.trainer("grpo", {"beta": 0.0}, folder, policy=model)
        trainer.current_gradient_accumulation_steps = 1
        for _ in range(sizes.repetitions + 1):
            times["body"].append(seconds(lambda: model.model(ids).last_hidden_state.sum()))
            times["TRL"].append(seconds(lambda: trainer._compute_loss(model, inputs)))
            tether.trl.patch()
            times["tether"].append(seconds(lambda: trainer._compute_loss(model, inputs)))
            tether.trl.unpatch()
    for name, values in times.items():
        print(f"{name:8} {statistics.median(values[1:]):.3f} s")


if __name__ == "__main__":
    main()
