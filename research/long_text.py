"""Ordinary text beyond the trained length: loss by position under each RoPE scaling.

One pass over a long text a scaling, which shows all lengths at once: the loss of tokens at some place of it depends on
what went before alone. Of every thousand tokens some are scored. Usage:

    python research/long_text.py MODEL TEXT... --trained N [--multiple 2] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from options import head, row, scaled

from lrope_gguf.errors import LropeError
from lrope_gguf.rope_scaling import KINDS
from lrope_search import ModelConfig
from lrope_search.evaluation.logits import RowWorkers, gold_scores
from lrope_search.evaluation.make import open_model
from lrope_search.machine import physical_cores

STEP = 8  # every eighth token is scored


def losses(config: ModelConfig, text: str, n_tokens: int) -> NDArray[np.float64]:
    """Negative log-probability of every `STEP`-th token, in nats."""
    with open_model(config) as model:
        tokens = np.array([*model.text_start(), *model.tokenize(text)], np.int32)
        if len(tokens) <= n_tokens:
            raise LropeError(f"the text has {len(tokens)} tokens; give more than {n_tokens}")
        model.reserve(n_tokens, 1)
        order = np.arange(n_tokens)
        wanted = order % STEP == STEP - 1
        gold = tokens[1 : n_tokens + 1][wanted]
        found = np.empty(len(gold))
        workers = RowWorkers(1)
        for rows, logits in model.decode(tokens[:n_tokens], order, order * 0, wanted):
            found[rows] = -gold_scores(logits, gold[rows], workers)[0]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT", nargs="+", type=Path, help="files, one after the other")
    parser.add_argument("--trained", metavar="N", type=int, required=True, help="tokens that it was trained on")
    parser.add_argument("--multiple", metavar="M", type=float, default=2.0, help="how far to go (%(default)s)")
    parser.add_argument("--bins", metavar="N", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, default=physical_cores())
    args = parser.parse_args()
    text = "\n".join(path.read_text() for path in args.text)
    n_tokens = round(args.multiple * args.trained)
    edges = [round(i * n_tokens / args.bins) for i in range(args.bins + 1)]
    print(head("scaling", *(f"to {100 * edge / args.trained:.0f} %" for edge in edges[1:])))
    for scaling in KINDS:
        config = scaled(ModelConfig(args.model, n_threads=args.threads), scaling, args.multiple, args.trained)
        try:
            found = losses(config, text, n_tokens)
        except LropeError as error:
            sys.exit(str(error))
        bins = np.array_split(found, args.bins)
        print(row((scaling, *(f"{part.mean():.3f}" for part in bins))), flush=True)


if __name__ == "__main__":
    main()
