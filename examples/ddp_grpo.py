"""GRPO by DDP where ranks hold different numbers of answers, one of them none in a step.

    torchrun --nproc-per-node 2 examples/ddp_grpo.py

Each rank trains a copy of the model on all rows as well, without DDP. The program prints the
largest difference between the two, of gradients, parameters and metrics, over ranks and steps.
"""

import copy
import gc
import sys

import tether
import torch
import torch.distributed as dist
from torch import nn

ROWS, COLUMNS, VOCABULARY, WIDTH = 6, 12, 32, 16
STEPS = 4
LOSS = {"objective": "grpo", "beta": 0.05}
BOUND = 1e-12  # of float64


class Policy(nn.Module):
    """A language model that sees the mean of what came before; its forward is the loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, tokens):
        seen = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        return self.body(self.embedding(tokens).cumsum(1) / seen).tanh()

    def forward(self, tokens, batch, normalizer):
        hidden = self.hidden(tokens[:, :-1])
        return tether.linear_policy_loss(
            hidden, self.head.weight, tokens[:, 1:], **batch, **LOSS, normalizer=normalizer
        )


def answers(step):
    """tokens [ROWS, COLUMNS + 1] and what policy_loss takes beside them, of all ranks."""
    generator = torch.Generator().manual_seed(step)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tokens = torch.randint(VOCABULARY, (ROWS, COLUMNS + 1), generator=generator)
    lengths = torch.randint(1, COLUMNS + 1, (ROWS, 1), generator=generator)
    old_logps = 0.3 * normal(ROWS, COLUMNS) - torch.tensor(float(VOCABULARY)).log()
    return tokens, {
        "advantages": normal(ROWS),
        "response_mask": torch.arange(COLUMNS) < lengths,
        "old_logps": old_logps,
        "ref_logps": old_logps + 0.1 * normal(ROWS, COLUMNS),
    }


def rows_of_rank(step, rank, world):
    """Ever more for the first rank: in the last step all, and none for the last one."""
    owner = (torch.arange(ROWS) // (1 + 2 * step)).clamp_max(world - 1)
    return owner == rank


def step_normalizer(batch):
    """The counts of this rank's rows, added up over ranks. DDP averages: the loss is multiplied."""
    local = tether.local_counts(batch["old_logps"], **batch, **LOSS)
    counts = torch.stack([local.policy, local.kl, local.sequences])
    dist.all_reduce(counts)
    return tether.Normalizer(*counts, world_size=dist.get_world_size())


def train_step(model, optimizer, tokens, batch, normalizer):
    optimizer.zero_grad()
    out = model(tokens, batch, normalizer)
    out.loss.backward()
    gradients = [each.grad.clone() for each in model.parameters()]
    optimizer.step()
    return gradients, out.metrics


def largest(ours, theirs):
    """Difference over all tensors and ranks; NaN is the largest."""
    gaps = [(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]
    of_ranks = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, torch.stack(gaps).max().detach())
    return torch.stack(of_ranks).max().item()


def verdict(gaps):
    """Prints the largest of each list of differences; the exit status."""
    worst = {name: torch.tensor(each).max().item() for name, each in gaps.items()}
    if dist.get_rank() == 0:
        for name, gap in worst.items():
            print(f"{name}: {gap:.1e}")
    return 0 if all(gap < BOUND for gap in worst.values()) else 1


def on_ranks(compare):
    """Runs it in a process group; the exit status."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    status = verdict(compare())
    gc.collect()  # DDP is a cycle and holds threads, which must end before Python does
    dist.destroy_process_group()
    return status


def compare():
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = Policy().double()
    ours = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (ours, alone)]
    gaps = {"gradients": [], "parameters": [], "metrics": []}
    for step in range(STEPS):
        tokens, batch = answers(step)
        mine = rows_of_rank(step, rank, world)
        own = {name: each[mine] for name, each in batch.items()}
        gradients, metrics = train_step(
            ours, optimizers[0], tokens[mine], own, step_normalizer(own)
        )
        dist.all_reduce(metrics.sums)
        dist.all_reduce(metrics.maxima, dist.ReduceOp.MAX)
        expected, whole = train_step(alone, optimizers[1], tokens, batch, None)
        gaps["gradients"].append(largest(gradients, expected))
        gaps["parameters"].append(largest(ours.parameters(), alone.parameters()))
        gaps["metrics"].append(largest(metrics, whole))
    return gaps


if __name__ == "__main__":
    sys.exit(on_ranks(compare))
