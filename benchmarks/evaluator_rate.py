"""Tokens per second of the evaluator against `llama-bench` prefill, side by side: same model, length, batch, threads.

Runs of the two take turns, each round in the other order, so that a busy machine slows both. `llama-bench` projects
one row to the vocabulary; an evaluation needs a row for every token of a value. What these cost is measured apart: the
floor is the ratio that an evaluator would reach that added nothing else to the prefill. Usage:

    python benchmarks/evaluator_rate.py MODEL... [--keys 40 100] [--probes 20 60] [--pairs 5] [--threads N] [--cpu-time]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tables import command, cpu_model, script, spread, table

from lrope_gguf.native import tool_path
from lrope_search.evaluation.evaluator import SCORINGS, TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.machine import physical_cores
from lrope_search.tasks import IDENTIFIERS, KeyValueTask

_ROWS = 128  # of logits, to measure what one costs


def bench(path: str, n_tokens: int, n_threads: int, n_batch: int) -> float:
    """Seconds of one `llama-bench` prefill of ``n_tokens``."""
    words = [tool_path("llama-bench"), "-m", path, "-p", n_tokens, "-n", 0, "-t", n_threads, "-r", 1, "-o", "json"]
    options = ["-fa", 1, "-b", n_batch, "-ub", n_batch]
    done = subprocess.run([str(word) for word in (*words, *options)], check=True, capture_output=True, text=True)
    return n_tokens / float(json.loads(done.stdout)[0]["avg_ts"])


def seconds_of(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def prefill(model: Model, n_tokens: int, n_rows: int = 0) -> None:
    """Compute so many tokens and the logits of the last ``n_rows``."""
    model.clear()
    tokens = np.arange(n_tokens, dtype=np.int32) % 1000 + 100
    wanted = np.arange(n_tokens) >= n_tokens - n_rows
    for _ in model.decode(tokens, np.arange(n_tokens), np.zeros(n_tokens, np.int64), wanted):
        pass
    model.synchronize()


def measure(path: str, n_keys: int, n_probes: int, args: argparse.Namespace) -> list[dict[str, str]]:
    clock = time.process_time if args.cpu_time else time.perf_counter
    task = KeyValueTask(n_keys, probes=n_probes, identifiers=args.identifiers)
    with Model(path, n_threads=args.threads, n_batch=args.batch_size) as model:
        evaluator = TeacherForcedEvaluator(model, task, answer_prefix=args.answer_prefix)
        base = (1.0,) * evaluator.n_layer
        for scoring in args.scoring:  # warm
            evaluator.scoring = scoring
            evaluator.evaluate(base, "search", 0)
        encoding = evaluator.encoding("search", 0)
        n_tokens, n_rows = encoding.n_tokens, len(encoding.gold)
        n_alone = n_tokens + (n_probes - 1) * len(encoding.prefix)  # with a whole prompt for each probe
        ours: dict[str, list[float]] = {scoring: [] for scoring in args.scoring}
        theirs, rows = [], []

        def own(scoring: str) -> None:
            evaluator.scoring = scoring
            ours[scoring].append(seconds_of(partial(evaluator.evaluate, base, "search", 0), clock))

        def their() -> None:
            if args.cpu_time:
                theirs.append(seconds_of(partial(prefill, model, n_tokens), clock))
            else:
                theirs.append(bench(path, n_tokens, args.threads, args.batch_size))

        sides: list[Callable[[], None]] = [*(partial(own, scoring) for scoring in args.scoring), their]
        for i in range(args.pairs):
            for side in sides if i % 2 == 0 else reversed(sides):
                side()
            with_rows, without = (seconds_of(partial(prefill, model, 256, n), clock) for n in (_ROWS, 0))
            rows.append((with_rows - without) / _ROWS)
        changes = []
        for i in range(101):
            model.clear()
            factors = tuple(1.0 + 0.01 * ((i + layer) % 7) for layer in range(evaluator.n_layer))
            changes.append(seconds_of(partial(model.set_factors, factors), time.perf_counter))
    row = statistics.median(rows)
    floor = statistics.median(b / (b + n_rows * row) for b in theirs)
    return [
        {
            "model": Path(path).name, "keys": str(n_keys), "probes": str(n_probes), "tokens": str(n_tokens),
            "scored by": scoring, "evaluator, tokens/s": f"{n_tokens / statistics.median(seconds):.0f}",
            "prefill, tokens/s": f"{n_tokens / statistics.median(theirs):.0f}",
            "ratio (range)": spread([b / a for a, b in zip(seconds, theirs, strict=True)]),
            "rows of logits": f"{n_rows} of {1e3 * row:.1f} ms", "floor": f"{floor:.3f}",
            "one prompt a probe": f"{n_alone} tokens, {n_alone / n_tokens:.1f} times",
            "factor change": f"{1e3 * statistics.median(changes):.3f} ms",
        }
        for scoring, seconds in ours.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--keys", type=int, nargs="+", default=[40], metavar="N", help="pairs a context (40)")
    parser.add_argument("--probes", type=int, nargs="+", default=[11], metavar="N", help="questions a context (11)")
    parser.add_argument("--scoring", choices=SCORINGS, nargs="+", default=["host"], help="who scores (host)")
    parser.add_argument("--identifiers", choices=IDENTIFIERS, default="uuid")
    parser.add_argument("--answer-prefix", default="")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--cpu-time", action="store_true", help="processor time against a prefill in this process: "
                        "on a busy machine, with --threads 1, since waiting threads spin")  # fmt: skip
    args = parser.parse_args()
    cases = itertools.product(args.models, args.keys, args.probes)
    rows = [found for path, n_keys, n in cases if n <= n_keys for found in measure(path, n_keys, n, args)]
    print(command())
    what = "processor time, against prefill in this process" if args.cpu_time else "against llama-bench -fa 1"
    print(f"{cpu_model()}, {os.cpu_count()} cores, {args.threads} threads, batch {args.batch_size}; {what}\n")
    print(table(rows[0], (found.values() for found in rows)))


if __name__ == "__main__":
    script(main)
