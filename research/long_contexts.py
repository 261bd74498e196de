"""Contexts beyond the trained length: every RoPE scaling, each with and without layer factors searched under it.

For each multiple of the trained length and each scaling, a search runs on contexts of that many tokens, and its test
tells three things on contexts that it never saw: what the model answers with this scaling alone, what the best uniform
factor adds and what searched layer factors add. A static scaling gets the factor that just covers the length, which is
its best case; what it costs on short text is in the last column, the divergence from the model without scaling. With
`--short-only`, that column alone, for factors instead of lengths: it needs no search and is quick on any model. Usage:

    python research/long_contexts.py MODEL --trained N [--multiples 1 2 4] [--task-options as of search]
    python research/long_contexts.py MODEL --trained N --short-only [--multiples 2 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from options import (
    add_model_options,
    add_search_options,
    add_task_options,
    gain_text,
    head,
    model_of,
    row,
    scaled,
    search_of,
    task_of,
)

from lrope_gguf.errors import LropeError
from lrope_gguf.rope_scaling import KINDS
from lrope_search import ModelConfig, TaskConfig, search
from lrope_search.evaluation.logits import RowWorkers, kl_divergences
from lrope_search.evaluation.make import open_model
from lrope_search.machine import physical_cores
from lrope_search.results.comparison import Comparison

README = Path(__file__).parent.parent / "README.md"
HEADER = head(
    "length", "share of trained", "scaling", "accuracy", "gain of best uniform factor", "gain of layer factors",
    "over uniform", "KL on short text",
)  # fmt: skip


def short_divergence(plain: ModelConfig, other: ModelConfig, text: str, n_tokens: int) -> float:
    """Mean KL of the scaled model from the plain one on the beginning of a text, nats a token."""
    rows = []
    for config in (plain, other):
        with open_model(config) as model:
            tokens = np.array([*model.text_start(), *model.tokenize(text)], np.int32)[:n_tokens]
            model.reserve(len(tokens))
            own, wanted = np.zeros(len(tokens), np.int64), np.ones(len(tokens), np.bool_)
            parts = model.decode(tokens, np.arange(len(tokens)), own, wanted)
            rows.append(np.concatenate([logits.copy() for _, logits in parts]))
    return float(kl_divergences(rows[0], rows[1], RowWorkers(1)).mean())


def points(gain: Comparison | None) -> str:
    """A gain in accuracy, in points, with its interval."""
    return "-" if gain is None else gain_text(gain.accuracy_gain, True, 100.0, 1)


def searched(args: argparse.Namespace, model: ModelConfig, task: TaskConfig, scaling: str, multiple: float) -> str:
    config = scaled(model, scaling, multiple, args.trained)
    with tempfile.TemporaryDirectory() as folder:
        found = search(config, task, search_of(args, args.search_seed), Path(folder, "study")).summary.findings
    assert found is not None  # the search has ended
    plain = replace(model, rope_scaling="none")
    kl = short_divergence(plain, config, args.text.read_text(), min(args.short, args.trained))
    uniform = "-" if found.uniform is None else f"{found.uniform.factor:g}: {points(found.uniform_gain)}"
    cells = (
        f"{multiple:g}x, {round(multiple * args.trained)} tokens", f"{100 * multiple:.0f} %", scaling,
        f"{100 * found.base_accuracy:.1f} %", uniform, f"**{points(found.gain)}**", points(found.over_uniform),
        f"{kl:.4f}",
    )  # fmt: skip
    return row(cells)


def short_only(args: argparse.Namespace, model: ModelConfig) -> None:
    plain, text = replace(model, rope_scaling="none"), args.text.read_text()
    print(head("model", "scaling", *(f"factor {m:g}" for m in args.multiples)))
    for scaling in args.scalings[1:]:
        cells = []
        for multiple in args.multiples:
            config = scaled(model, scaling, multiple, args.trained)
            cells.append(f"{short_divergence(plain, config, text, args.short):.4f}")
        print(row((Path(args.model).stem, scaling, *cells)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--trained", metavar="N", type=int, required=True, help="tokens that it was trained on")
    parser.add_argument("--multiples", metavar="M", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0, 8.0])
    parser.add_argument("--scalings", metavar="S", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--short", metavar="N", type=int, default=512, help="tokens of short text (%(default)s)")
    parser.add_argument("--short-only", action="store_true", help="no searches")
    parser.add_argument("--text", metavar="FILE", type=Path, default=README, help="short text (README.md)")
    parser.add_argument("--search-seed", metavar="N", type=int, default=0)
    add_search_options(parser)
    add_model_options(parser)
    add_task_options(parser)
    args = parser.parse_args()
    model, task = model_of(args), task_of(args)
    model = replace(model, n_threads=model.n_threads or physical_cores())
    if args.short_only:
        short_only(args, model)
        return
    print(HEADER)
    for multiple in args.multiples:
        for scaling in args.scalings:
            if multiple <= 1.0 and scaling != "none":
                continue  # none of them scales there
            begin = time.perf_counter()
            try:
                found = searched(
                    args, model, task.but(context_tokens=round(multiple * args.trained)), scaling, multiple
                )
            except LropeError as error:
                found = row((f"{multiple:g}x", "", scaling, error, *[""] * 4))
            print(found, flush=True)
            print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
