"""Trains the embedded model: key-value retrieval in a context, from nothing, on a CPU.

    python models/train.py --output models/lrope-kv.gguf

writes the GGUF file and, beside it, the loss curve (``.csv``, and ``.png`` where matplotlib is installed).
A context starts with 4 pairs and grows by a third whenever nine of ten answers are right: without such a curriculum
nothing is learnt in this time.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from architecture import Llama
from export import write_gguf
from torch import Tensor
from vocabulary import BOS, CLOSE, EOS, KEYS, OPEN, VALUES

from lrope_search.tasks.vocabulary import KEY_WORDS, VALUE_WORDS

MAX_PAIRS = 48  # of the longest context
N_QUERIES = 32  # a context, at most
N_ANSWERS = 2  # of these are followed by their answer, to learn that nothing comes after it
N_TOKENS = 2048  # a batch
N_AROUND = 3  # tokens of a context that are no pairs
GROW_AT, COOL_AT = 0.9, 0.95  # recent accuracy
WARM_STEPS = 200
END_WEIGHT = 0.1  # of the loss at the answers


class Batch(NamedTuple):
    """Contexts, each followed by queries and the first queries' answers."""

    tokens: Tensor
    """Shape (contexts, n)."""
    gold: Tensor
    """The answers, shape (contexts, queries)."""


class Row(NamedTuple):
    """One line of the loss curve."""

    step: int
    seconds: float
    pairs: int
    loss: float
    accuracy: float


def layout(n_pairs: int, n_queries: int) -> tuple[Tensor, Tensor]:
    """Return the positions, shape (n,), and who sees whom, shape (n, n), of a batch's tokens.

    As in the evaluator, each query is a sequence of its own behind a shared prefix: all stand at the same position,
    and see the prefix and themselves.
    """
    n_prefix = 2 * n_pairs + N_AROUND
    n_answers = min(N_ANSWERS, n_queries)
    after = torch.tensor([n_prefix] * n_queries + [n_prefix + 1] * n_answers)
    positions = torch.cat([torch.arange(n_prefix), after])
    n = len(positions)
    mask = torch.eye(n, dtype=torch.bool)
    mask[:, :n_prefix] = torch.ones(n, n_prefix, dtype=torch.bool).tril()
    queries = torch.arange(n_prefix, n_prefix + n_answers)
    mask[queries + n_queries, queries] = True
    return positions, mask


def make_batch(n: int, n_pairs: int, n_queries: int, generator: torch.Generator) -> Batch:
    """Return ``n`` random contexts in the order of `layout`; no key stands twice in a context."""
    keys = KEYS + torch.rand(n, len(KEY_WORDS), generator=generator).argsort(1)[:, :n_pairs]
    values = VALUES + torch.randint(len(VALUE_WORDS), (n, n_pairs), generator=generator)
    asked = torch.rand(n, n_pairs, generator=generator).argsort(1)[:, :n_queries]
    gold = values.gather(1, asked)
    one = torch.ones(n, 1, dtype=torch.long)
    pairs = torch.stack([keys, values], 2).flatten(1)
    tokens = torch.cat([BOS * one, OPEN * one, pairs, CLOSE * one, keys.gather(1, asked), gold[:, :N_ANSWERS]], 1)
    return Batch(tokens, gold)


def train(args: argparse.Namespace) -> tuple[Llama, list[Row]]:
    """Train from ``args.seed``; the result does not depend on the time it takes."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Llama()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    start = time.monotonic()
    longest, recent, step, cooling = 4, 0.0, 0, None
    curve: list[Row] = []
    while cooling is None or step - cooling < args.cool_steps:
        shorter = step % 4 == 3 and longest > 4  # a quarter of the batches
        n_pairs = int(torch.randint(4, longest, (), generator=generator)) if shorter else longest
        n_queries = min(n_pairs, N_QUERIES)
        positions, mask = layout(n_pairs, n_queries)
        batch = make_batch(max(16, N_TOKENS // len(positions)), n_pairs, n_queries, generator)
        logits = model(batch.tokens, positions, mask, first=2 * n_pairs + N_AROUND)
        answers, ends = logits[:, :n_queries], logits[:, n_queries:]
        loss = F.cross_entropy(answers.flatten(0, 1), batch.gold.flatten())
        end_loss = -ends.log_softmax(-1)[..., EOS].mean()
        model.zero_grad(set_to_none=True)
        (loss + END_WEIGHT * end_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = args.rate * min(1.0, (step + 1) / WARM_STEPS)
        if cooling is not None:
            rate *= 1.0 - (step - cooling) / args.cool_steps
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if not shorter:
            recent += 0.2 * ((answers.argmax(-1) == batch.gold).float().mean().item() - recent)
            if cooling is None and longest == args.max_pairs and recent > COOL_AT:
                cooling = step
            if longest < args.max_pairs and recent > GROW_AT:
                longest, recent = min(args.max_pairs, longest + max(1, longest // 3)), 0.0
        if step % 10 == 0:
            curve.append(Row(step, time.monotonic() - start, n_pairs, loss.item(), recent))
        if step % 50 == 0:
            print("step {}, {:.0f} s: {} pairs, loss {:.4f}, recent accuracy {:.3f}".format(*curve[-1]), flush=True)
        step += 1
        if step >= args.max_steps:
            raise SystemExit(f"not learnt in {step} steps; try another --seed")
    print(f"{step} steps in {time.monotonic() - start:.0f} s")
    return model, curve


def save_curve(curve: list[Row], path: Path) -> None:
    """Write the loss curve to ``path`` (``.csv``), and a picture beside it if matplotlib is there."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([f"{value:.5g}" for value in row] for row in curve)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(6.0, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.semilogy([row.step for row in curve], [row.loss for row in curve], label="loss (nats)")
    axes.semilogy([row.step for row in curve], [row.pairs for row in curve], ".", markersize=2, label="pairs a context")
    axes.set_xlabel("step")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=100)


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description="train the embedded model")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data (%(default)s)")
    parser.add_argument("--max-pairs", type=int, default=MAX_PAIRS, help="pairs of the longest context (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of the blocks' matrices (%(default)s)")
    parser.add_argument("--cool-steps", type=int, default=400, help="steps of falling learning rate (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=5000, help="give up after so many (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, curve = train(args)
    write_gguf(model, args.output)
    save_curve(curve, args.output.with_suffix(".csv"))


if __name__ == "__main__":
    main()
