"""Ten steps of TRL's trainers on a model of 20 thousand numbers, for test_trl.py."""

import contextlib
import tempfile
from typing import NamedTuple

import peft
import tether.trl
import torch
from datasets import Dataset
from tether import _trl_heads, _trl_losses
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

WORDS = [f"w{i}" for i in range(13)]
STEPS = 10
TRAINERS = {
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "sft": (SFTTrainer, SFTConfig),
}
# SGD: Adam makes steps of full size from gradients that are only rounding.
COMMON = {
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 8,
}
ONLINE = {"num_generations": 4, "max_completion_length": 12, "temperature": 0.9}


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def model(seed=0, experts=0, dropout=0.0):
    """A Llama, or a Mixtral of so many experts."""
    set_seed(seed)
    sizes = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": dropout,
    }
    if experts:
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=experts))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def sentence(random, low, high):
    length = int(torch.randint(low, high, (1,), generator=random))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=random))


def dataset(kind, rows=64):
    random = torch.Generator().manual_seed(1)
    columns = {
        "grpo": ("prompt",),
        "rloo": ("prompt",),
        "dpo": ("prompt", "chosen", "rejected"),
        "kto": ("prompt", "completion"),
        "sft": ("text",),
    }[kind]
    # A space, so that no word of an answer grows together with the prompt's last one.
    out = [{name: " " + sentence(random, 2, 9) for name in columns} for _ in range(rows)]
    if kind == "kto":
        out = [{**row, "label": i % 3 > 0} for i, row in enumerate(out)]
    return Dataset.from_list(out)


def reward(completions, **_):
    """Even words are good, and so is an end."""
    scores = []
    for text in completions:
        numbers = [int(word[1:]) for word in text.split() if word.startswith("w")]
        even = sum(each % 2 == 0 for each in numbers)
        scores.append(even / max(len(numbers), 1) - 0.05 * len(numbers))
    return scores


def logits_of(evaluated):
    return {"logits": float(abs(evaluated.predictions).mean())}


def trainer(kind, settings, folder, trainer_class=None, policy=None):
    known, config = TRAINERS[kind]
    settings = dict(settings)
    experts, adapters = settings.pop("experts", 0), settings.pop("adapters", False)
    dropout = settings.pop("dropout", 0.0)
    online = ONLINE if kind in ("grpo", "rloo") else {}
    others = {"reward_funcs": reward} if online else {}
    if kind in ("dpo", "kto"):
        others["compute_metrics"] = logits_of
        others["ref_model"] = None if adapters else model(1, experts)
    if adapters:
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        others["peft_config"] = lora
    policy = policy or model(0, experts, dropout)
    if online:  # TRL loads the reference from where the policy came
        model(1, experts).save_pretrained(f"{folder}/reference")
        policy.config._name_or_path = f"{folder}/reference"
    return (trainer_class or known)(
        model=policy,
        args=config(output_dir=folder, **COMMON | online | settings),
        train_dataset=dataset(kind),
        eval_dataset=dataset(kind, rows=2),  # one batch
        processing_class=tokenizer(),
        **others,
    )


class Run(NamedTuple):
    logs: list[dict[str, float]]  # of each step, and of an evaluation
    parameters: torch.Tensor
    moved: float  # the largest change of a parameter
    calls: dict[str, int]  # of this library's functions


@contextlib.contextmanager
def counted(patched):
    """tether.trl.patch(), and how often each function of this library is called."""
    calls = dict.fromkeys(("policy_loss", "preference_loss", "linear_token_logps"), 0)
    places = {name: _trl_heads if "logps" in name else _trl_losses for name in calls}
    owned = {name: getattr(module, name) for name, module in places.items()}

    def counting(name):
        def call(*arguments, **named):
            calls[name] += 1
            return owned[name](*arguments, **named)

        return call

    try:
        for name, module in places.items():
            setattr(module, name, counting(name))
        if patched:
            tether.trl.patch()
        yield calls
    finally:
        tether.trl.unpatch()
        for name, module in places.items():
            setattr(module, name, owned[name])


def run(kind, settings, patched, trainer_class=None):
    with tempfile.TemporaryDirectory() as folder, counted(patched) as calls:
        made = trainer(kind, settings, folder, trainer_class)
        before = torch.nn.utils.parameters_to_vector(made.model.parameters()).detach().clone()
        made.train()
        made.evaluate()
        after = torch.nn.utils.parameters_to_vector(made.model.parameters()).detach()
    moved = (after - before).abs().max().item()
    logs = [each for each in made.state.log_history if "loss" in each or "eval_loss" in each]
    return Run(logs, after, moved, dict(calls))
