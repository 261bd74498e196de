"""Speed of the patched llama.cpp against the unpatched one: interleaved `llama-bench` runs.

Three arms take turns: stock, patched, and patched on a model with a different factor in every layer. The order is
reversed from round to round, so that a machine that slows down or speeds up favours no arm. Usage:

    python benchmarks/patch_speed.py --stock BIN --patched BIN --model MODEL [--pairs 5] [--threads N]

BIN is a folder with llama-bench, or its path (`python proofs/native.py stock --tools` builds one).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import head, row

from lrope_gguf import LropeError, read_model, write_factors

ARMS = ("stock", "patched", "factors")
TESTS = ("prefill", "decode")


def bench(command: list[str]) -> dict[str, float]:
    """Rates of one `llama-bench` run in tokens a second, by kind of test."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise LropeError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise LropeError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return rates(done.stdout)


def rates(output: str) -> dict[str, float]:
    """Rates in the JSON output of `llama-bench`: the median of its repetitions."""
    runs = json.loads(output)
    result = {TESTS[run["n_gen"] > 0]: statistics.median(run["samples_ts"]) for run in runs}
    if set(result) != set(TESTS) or len(runs) != len(TESTS):
        raise LropeError("llama-bench: expected one prefill and one decode result")
    return result


def spread(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def cpu_model() -> str:
    """Name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def executable(path: Path) -> str:
    """The llama-bench at or in ``path``."""
    path = path / "llama-bench" if path.is_dir() else path
    if not path.is_file():
        raise LropeError(f"{path}: no llama-bench there")
    return str(path.resolve())


def with_factors(model: Path, folder: Path) -> Path:
    """A copy of the model with a different factor in every layer."""
    n_layer = read_model(model).n_layer or 0
    target = folder / "factors.gguf"
    write_factors(model, [1.05 + 0.95 * i / max(1, n_layer - 1) for i in range(n_layer)], output=target)
    return target


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Rates and ratios as Markdown."""
    lines = [head("test", "arm", "tokens/s, median", "ratio to stock of the same round, median (range)")]
    for test in TESTS:
        column = {arm: [run[test] for run in results[arm]] for arm in ARMS}
        for arm in ARMS:
            ratio = [a / b for a, b in zip(column[arm], column["stock"], strict=True)]
            text = "" if arm == "stock" else spread(ratio)
            lines.append(row((test, arm, f"{statistics.median(column[arm]):.1f}", text)))
        noise = [b / a for a, b in zip(column["stock"], column["stock"][1:], strict=False)]
        lines.append(row((test, "stock against the stock run before it (noise)", "", spread(noise))))
    return "\n".join(lines)


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock", type=Path, required=True, metavar="BIN")
    parser.add_argument("--patched", type=Path, required=True, metavar="BIN")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--model-with-factors", type=Path, metavar="FILE", help="default: a temporary copy")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of prefill (default: 512)")
    parser.add_argument("--generate", type=int, default=64, metavar="N", help="tokens of decode (default: 64)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="inside each run (default: 3)")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), metavar="N")
    parser.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="default: 0")
    args = parser.parse_args()
    if args.pairs < 2 or args.prompt < 1 or args.generate < 1:
        parser.error("--pairs must be at least 2, --prompt and --generate at least 1")
    options = ["-p", args.prompt, "-n", args.generate, "-t", args.threads, "-r", args.repetitions]
    options += ["-ngl", args.gpu_layers, "-o", "json"]
    with tempfile.TemporaryDirectory() as temporary:
        changed = args.model_with_factors or with_factors(args.model, Path(temporary))
        stock, patched = executable(args.stock), executable(args.patched)
        arms = dict(zip(ARMS, ((stock, args.model), (patched, args.model), (patched, changed)), strict=True))
        commands = {arm: [tool, "-m", str(model), *map(str, options)] for arm, (tool, model) in arms.items()}
        bench(commands["stock"])  # warm: files in memory, clock settled
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for i in range(args.pairs):
            for arm in ARMS if i % 2 == 0 else reversed(ARMS):
                results[arm].append(bench(commands[arm]))
            print(f"round {i + 1} of {args.pairs}", file=sys.stderr)
    print(f"`{shlex.join(['python', 'benchmarks/patch_speed.py', *sys.argv[1:]])}`\n")
    print(f"{cpu_model()}, {os.cpu_count()} cores, {args.threads} threads; model {args.model.name}\n")
    print(table(results))


if __name__ == "__main__":
    try:
        main()
    except LropeError as error:
        sys.exit(f"error: {error}")
