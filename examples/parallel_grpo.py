"""The same loss with parameters, vocabulary or sequence split over ranks.

    torchrun --nproc-per-node 2 examples/parallel_grpo.py

Each function below splits one thing and returns the largest difference of a gradient to that of
one process with everything; the program prints them.
"""

import copy
import sys

import tether
import torch
import torch.distributed as dist
from ddp_grpo import (
    COLUMNS,
    LOSS,
    VOCABULARY,
    Policy,
    answers,
    largest,
    on_ranks,
    rows_of_rank,
    step_normalizer,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor


def gradients_alone(policy):
    """By name, of one process with all rows."""
    tokens, batch = answers(0)
    policy = copy.deepcopy(policy)
    policy(tokens, batch, None).loss.backward()
    return {name: each.grad for name, each in policy.named_parameters()}


def gathered(tensor):
    """[world, ...] of all ranks, in their order; no gradient."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.stack(parts)


def summed(tensor):
    out = tensor.detach().clone()
    dist.all_reduce(out)
    return out


def ranks():
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


# ---- parameters in shards: FSDP ------------------------------------------------------------------


def fsdp(policy):
    """Rows over ranks as by DDP, and parameters in shards. Gradients are averaged."""
    ours, (tokens, batch) = copy.deepcopy(policy), answers(0)
    mine = rows_of_rank(0, dist.get_rank(), dist.get_world_size())
    own = {name: each[mine] for name, each in batch.items()}
    fully_shard(ours, mesh=ranks())
    ours(tokens[mine], own, step_normalizer(own)).loss.backward()
    expected = gradients_alone(policy)
    found = {name: each.grad.full_tensor() for name, each in ours.named_parameters()}
    return largest([found[name] for name in expected], expected.values())


# ---- vocabulary in shards: tensor parallel -------------------------------------------------------


class _ToShards(torch.autograd.Function):
    """Hidden states, the same on all ranks, into a product with each rank's part of the head: their
    gradient is the sum of what the parts give."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return summed(gradient)


def shard_of(weight):
    """The head as torch's tensor parallel splits it, a DTensor, and where this rank's rows are. The
    last ranks may have fewer than the first."""
    head = distribute_tensor(weight.detach(), ranks(), [Shard(0)]).requires_grad_()
    first = min(dist.get_rank() * -(-VOCABULARY // dist.get_world_size()), VOCABULARY)
    return head, tether.VocabularyShard(first, VOCABULARY, gathered)


def logps_of_shard(hidden, weight, targets, shard):
    logits = _ToShards.apply(hidden) @ weight.T
    return tether.token_logps(logits, targets, shard=shard).logps


def logps_of_hidden(hidden, weight, targets, shard):
    """The same, with the logits of few tokens at a time: backward makes them again."""
    shard = shard._replace(reduce=summed)
    return tether.linear_token_logps(hidden, weight, targets, shard=shard, chunk_bytes=1000).logps


def vocabulary(policy, logps_of):
    """Every rank has all rows and makes the same loss."""
    ours, (tokens, batch) = copy.deepcopy(policy), answers(0)
    head, shard = shard_of(ours.head.weight)
    targets = tokens[:, 1:].masked_fill(~batch["response_mask"], -100)
    logps = logps_of(ours.hidden(tokens[:, :-1]), head.to_local(), targets, shard)
    tether.policy_loss(logps, **batch, **LOSS).loss.backward()
    expected = gradients_alone(policy)
    found = {name: each.grad for name, each in ours.named_parameters()}
    found["head.weight"] = head.grad.full_tensor()
    return largest([found[name] for name in expected], expected.values())


# ---- answers in pieces: context parallel ---------------------------------------------------------


def pieces(policy):
    """This rank's columns of the batch, and the policy's log-probabilities of them as a leaf."""
    tokens, batch = answers(0)
    columns = torch.arange(COLUMNS).tensor_split(dist.get_world_size())[dist.get_rank()]
    with torch.no_grad():
        hidden = policy.hidden(tokens[:, :-1])
        whole = tether.linear_token_logps(hidden, policy.head.weight, tokens[:, 1:]).logps
    own = {name: each[:, columns] if each.dim() == 2 else each for name, each in batch.items()}
    return whole, batch, columns, whole[:, columns].clone().requires_grad_(), own


def gradient_of(whole, batch, **settings):
    logps = whole.clone().requires_grad_()
    tether.policy_loss(logps, **batch, **settings).loss.backward()
    return logps.grad


def pieces_by_token(policy):
    """Ratios of tokens: the length of a row and the sequences of the step are those of whole rows.
    Gradients of parameters are the sum over ranks: where they are averaged, give world_size."""
    whole, batch, columns, logps, own = pieces(policy)
    row_tokens = summed(own["response_mask"].sum(1).double())
    counts = row_tokens.sum()
    step = tether.Normalizer(counts, counts, (row_tokens > 0).sum())
    tether.policy_loss(logps, **own, **LOSS, row_tokens=row_tokens, normalizer=step).loss.backward()
    return largest([logps.grad], [gradient_of(whole, batch, **LOSS)[:, columns]])


def pieces_by_sequence(policy):
    """Ratios of sequences: log-probabilities, a number a token, come from all ranks, and each makes
    the loss of whole rows. Its gradient is that of its own piece. Pieces are of one size."""
    whole, batch, columns, logps, _ = pieces(policy)
    parts = list(gathered(logps))
    parts[dist.get_rank()] = logps
    gspo = {"objective": "gspo"}
    tether.policy_loss(torch.cat(parts, 1), **batch, **gspo).loss.backward()
    return largest([logps.grad], [gradient_of(whole, batch, **gspo)[:, columns]])


def compare():
    policy = Policy().double()
    return {
        "FSDP": [fsdp(policy)],
        "vocabulary in shards": [vocabulary(policy, logps_of_shard)],
        "the same from hidden states": [vocabulary(policy, logps_of_hidden)],
        "pieces of rows, ratios of tokens": [pieces_by_token(policy)],
        "pieces of rows, ratios of sequences": [pieces_by_sequence(policy)],
    }


if __name__ == "__main__":
    sys.exit(on_ranks(compare))
