"""NeMo-RL, prime-rl and slime from clones in build/peers/checkouts, on a CPU: what they import and
their losses do not call is absent (tests/peers/parts.py). Runs in verl's environment, which has the
transformers that NeMo-RL takes."""

import pathlib
import sys
import types

import pydantic
import tiny_models
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "peers"))
import parts

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "build/peers/checkouts"
SOURCES = ("NeMo-RL", "slime", "prime-rl/src", "prime-rl/packages/prime-rl-configs/src")
ABSENT = (
    *("decord", "loguru", "megatron", "mlflow", "nemo_automodel", "nvtx", "pynvml", "sglang"),
    *("prime_rl.utils.logger", "sglang_router", "swanlab", "torchdata", "vllm", "zmq"),
)
VOCABULARY = 31
STEPS = 10


def find():
    if str(FOLDER / SOURCES[0]) not in sys.path:
        sys.path[:0] = [str(FOLDER / each) for each in SOURCES]
        sys.meta_path.insert(0, parts.Finder(ABSENT))
        config = types.ModuleType("pydantic_config")
        config.BaseConfig, config.cli = pydantic.BaseModel, None
        sys.modules.setdefault("pydantic_config", config)


def steps_of(loss_and_metrics):
    """Parameters after steps of SGD, where they began, and the metrics of each."""
    live, logs = tiny_models.llama(VOCABULARY), []
    start = torch.nn.utils.parameters_to_vector(live.parameters()).detach().clone()
    optimizer = torch.optim.SGD(live.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logs.append(loss_and_metrics(live))
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(live.parameters()).detach(), start, logs


def normal(random, *shape):
    return torch.randn(shape, generator=random)
