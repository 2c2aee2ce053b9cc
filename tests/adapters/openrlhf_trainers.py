"""OpenRLHF's trainers on a CPU, around tiny models of random weights, without Ray and DeepSpeed.

Everything but the set-up and the strategy is OpenRLHF's: how it pads and slices micro-batches,
counts the tokens of a step, computes log-probabilities and values, calls its losses and logs. The
strategy does what DeepSpeed does on one rank: it divides by the micro-batches of a step, clips and
steps.
"""

import contextlib
import functools
import pathlib
import sys
import types

import tiny_models  # its transformers asks for flash_attn and deepspeed, and is to find none
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "peers"))
import parts

ABSENT = ("aiohttp", "deepspeed", "flash_attn", "pylatexenc", "ray", "torchdata", "vllm")
sys.meta_path.insert(0, parts.Finder(ABSENT))
sys.modules["flash_attn.ops"] = None  # whose log-probabilities OpenRLHF then does without

from openrlhf.models import Actor, get_llm_for_sequence_regression  # noqa: E402
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer  # noqa: E402
from openrlhf.trainer.ray.ppo_critic import CriticPPOTrainer  # noqa: E402

MICRO_BATCHES = 2  # of a step
VOCABULARY = 31
PROMPTS, ANSWERS = [3, 2, 4, 3], [5, 7, 1, 4]


class Device(str):
    """ "cpu" to tensors; in the name of a CUDA device its number."""

    def __format__(self, _):
        return "0"


@contextlib.contextmanager
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with torch.compiler.set_stance("force_eager"):  # its entropy is compiled
            yield
    finally:
        torch.distributed.destroy_process_group()


class Strategy:
    ring_attn_group = None
    accumulated_gradient = MICRO_BATCHES

    def __init__(self, args):
        self.args, self.calls, self.norm = args, 0, 0.0

    def is_rank_0(self):
        return False  # no progress bars

    def all_reduce(self, numbers):
        return numbers

    def backward(self, loss, model, optimizer):
        (loss / MICRO_BATCHES).backward()

    def optimizer_step(self, optimizer, model, scheduler, name=""):
        self.calls += 1
        if self.calls % MICRO_BATCHES == 0:
            self.norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    def get_grad_norm(self, model):
        return self.norm


def arguments(**actor):
    """What OpenRLHF's command line would have made, as far as its trainers read it."""
    correction = {"level": "off", "mode": "mask", "gating": "ratio", "threshold": (0.5, 5.0)}
    advantage = {f"is_correction_{name}": value for name, value in correction.items()}
    advantage |= {name: actor.pop(name) for name in advantage if name in actor}
    defaults = {
        "eps_clip_low_high": (0.1, 0.12),
        "dual_clip": None,
        "entropy_coef": 0.01,
        "loss_agg_mode": "token-mean",
        "policy_loss_type": "ppo",
        "aux_loss_coef": 0.0,
    }
    groups = {
        "actor": defaults | actor,
        "train": {"max_epochs": 2, "dynamic_batch_enable": False, "colocate_all": False,
                  "async_enable": False, "batch_size": 4},
        "ds": {"packing_samples": False, "tensor_parallel_size": 1},
        "vllm": {},
        "model": {"label_smoothing": 0.0, "ipo_enable": False, "aux_loss_coef": 0.0,
                  "nll_loss_coef": 0.0},
        "logger": {"tensorboard_dir": None, "logging_steps": 1},
        "eval": {"steps": -1},
        "ckpt": {"save_steps": -1},
    }  # fmt: skip
    made = types.SimpleNamespace(**{k: types.SimpleNamespace(**v) for k, v in groups.items()})
    kl = {"use_loss": True, "init_coef": 0.1, "estimator": "k3", "unbiased_gradient": False}
    made.algo = types.SimpleNamespace(
        advantage=types.SimpleNamespace(**advantage), kl=types.SimpleNamespace(**kl)
    )
    made.logger.wandb = types.SimpleNamespace(key=None)
    return made


@functools.cache
def llama(seed):
    return tiny_models.llama(VOCABULARY, seed)


def actor(seed, folder):
    """As OpenRLHF loads one, then in float32."""
    llama(seed).save_pretrained(folder)
    return Actor(str(folder), attn_implementation="eager", temperature=0.9).float()


def critic(folder):
    llama(0).save_pretrained(folder)
    made = get_llm_for_sequence_regression(str(folder), "critic", attn_implementation="eager")
    torch.manual_seed(2)
    torch.nn.init.normal_(made.score.weight, std=0.1)
    return made.float()


def optimizer_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def experience():
    """Four answers of different lengths, padded on both sides as OpenRLHF's engine leaves them."""
    random = torch.Generator().manual_seed(0)
    left, right = max(PROMPTS), max(ANSWERS)
    places = torch.arange(left + right)
    begins = torch.tensor([left - each for each in PROMPTS])[:, None]
    ends = torch.tensor([left + each for each in ANSWERS])[:, None]
    mask = (places >= begins) & (places < ends)
    answers = (mask & (places >= left))[:, 1:]

    def normal(scale):
        return scale * torch.randn(answers.shape, generator=random)

    old = -3.4 + normal(0.2)
    values = normal(0.5)
    return Experience(
        sequences=torch.randint(VOCABULARY, mask.shape, generator=random) * mask,
        attention_mask=mask.long(),
        action_mask=answers,
        action_log_probs=old * answers,
        base_action_log_probs=(old + normal(0.2)) * answers,
        rollout_log_probs=(old + normal(0.2)) * answers,
        values=values * answers,
        returns=(values + normal(1.0)) * answers,
        advantages=normal(1.0) * answers,
        response_length=answers.sum(1).float(),
        total_length=mask.sum(1).float(),
        info={"reward": normal(1.0)[:, 0].clone()},
    )


def trained(trainer, strategy, model, steps, *arguments):
    """Parameters after so many epochs of OpenRLHF's loop, and what it logs."""
    torch.manual_seed(0)  # of its shuffling
    trainer.replay_buffer.append(experience())
    logs = [trainer.ppo_train(*arguments) for _ in range(steps)]
    assert strategy.calls == MICRO_BATCHES * steps * 2
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), logs


def ppo_actor(folder, steps, **settings):
    strategy, model = Strategy(arguments(**settings)), actor(0, folder)
    trainer = ActorPPOTrainer(
        strategy,
        model,
        None,
        *optimizer_of(model),
        micro_train_batch_size=2,
        dataloader_pin_memory=False,
    )
    return trained(trainer, strategy, model, steps, 0.1)


def ppo_critic(folder, steps):
    strategy, model = Strategy(arguments()), critic(folder)
    trainer = CriticPPOTrainer(
        strategy,
        model,
        *optimizer_of(model),
        micro_train_batch_size=2,
        dataloader_pin_memory=False,
    )
    return trained(trainer, strategy, model, steps)


def pairs():
    """Micro-batches of two pairs: ids and masks of both answers, lengths of the prompts."""
    random = torch.Generator().manual_seed(0)

    def answers(lengths):
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        return torch.randint(VOCABULARY, (2, 9), generator=random) * mask, mask

    return [
        (*answers([9, 6]), *answers([7, 8]), [3, 2]),
        (*answers([5, 9]), *answers([9, 4]), [2, 3]),
    ]


def dpo(folder, epochs, **settings):
    """Its logs are what it hands to its progress bar."""
    strategy, model, logs = Strategy(arguments()), actor(0, folder), []
    vars(strategy.args.model).update(settings)
    strategy.all_reduce = lambda numbers: logs.append(numbers) or numbers
    loader = torch.utils.data.DataLoader(pairs(), batch_size=None)
    optimizer, scheduler = optimizer_of(model)
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    reference = actor(1, folder)
    trainer = DPOTrainer(model, reference, strategy, tokenizer, optimizer, loader, None, scheduler,
                         beta=0.1, max_epochs=epochs)  # fmt: skip
    trainer.fit(strategy.args)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), logs
