"""Tokens per second of the evaluator against `llama-bench` prefill, side by side on one model and length.

The floor of an evaluation is its tokens over the prefill rate. Usage:

    python benchmarks/evaluator_rate.py MODEL [--keys 40] [--pairs 5] [--threads N] [--answer-prefix TEXT]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess

from lrope_gguf.native import tool_path
from lrope_search.evaluator import TeacherForcedEvaluator
from lrope_search.model import Model, physical_cores
from lrope_search.tasks import IDENTIFIERS, KeyValueTask


def bench(model: str, n_tokens: int, n_threads: int) -> float:
    """Prefill rate of one `llama-bench` run, tokens a second."""
    command = [tool_path("llama-bench"), "-m", model, "-p", n_tokens, "-n", 0, "-t", n_threads, "-r", 1, "-o", "json"]
    output = subprocess.run([*map(str, command), "-fa", "1"], check=True, capture_output=True, text=True).stdout
    return float(json.loads(output)[0]["avg_ts"])


def main() -> None:
    """Run pairs in turn and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument("--identifiers", choices=IDENTIFIERS, default="uuid")
    parser.add_argument("--answer-prefix", default="")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each")
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    task = KeyValueTask(args.keys, identifiers=args.identifiers)
    with Model(args.model, n_threads=args.threads) as model:
        evaluator = TeacherForcedEvaluator(model, task, answer_prefix=args.answer_prefix)
        base = (1.0,) * evaluator.n_layer
        n_tokens = evaluator.evaluate(base, "search", 0).n_tokens  # warm
        rows = []
        for _ in range(args.pairs):
            score = evaluator.evaluate(base, "search", 0)
            rows.append((score.n_tokens / score.seconds, bench(args.model, n_tokens, args.threads)))
    ours, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b in rows)
    print(f"{platform.machine()}, {args.threads} threads, {args.pairs} pairs, medians; {args.model}")
    print(f"evaluator   {ours:7.0f} tokens/s  ({n_tokens} tokens: {args.keys} pairs, 11 questions with their answers)")
    print(f"llama-bench {theirs:7.0f} tokens/s  (-p {n_tokens} -n 0 -fa 1)")
    print(f"ratio       {ratio:7.2f}")


if __name__ == "__main__":
    main()
