"""Speed of the patched library against the unpatched one, free of drift: processes take turns token by token.

`patch_speed.py` compares whole `llama-bench` runs, whose noise on a shared machine is several percent. Here each step
of each arm is timed right beside the same step of the others: stock, patched, patched with a different factor in every
layer, and stock once more, whose ratio shows the noise that is left. Weights are mapped, not repacked, so that all arms
read the same memory. Usage:

    python benchmarks/lockstep_speed.py --stock LIBDIR --patched LIBDIR --model MODEL [--rounds 5] [--threads N]

LIBDIR is a folder with libllama (`python proofs/native.py stock` builds one).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from lrope_gguf import LropeError

ARMS = {"stock": "stock", "patched": "patched", "patched, factors": "patched", "stock again (noise)": "stock"}
TESTS = ("prefill", "decode")


class Arm:
    """A process with one library, one model and one context; runs one step when it is told to."""

    def __init__(self, library: Path, args: argparse.Namespace, factors: bool) -> None:
        """Start the process and wait until its model is loaded."""
        options = ["--model", args.model, "--prompt", args.prompt, "--decode", args.decode, "--threads", args.threads]
        command = [sys.executable, __file__, "--work", *map(str, options), *(["--factors"] if factors else [])]
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(library.resolve())}
        # a file: llama.cpp logs more than a pipe holds
        self._log: IO[str] = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._answer()

    def step(self, n_tokens: int) -> float:
        """Decode tokens; seconds. More than one token begins anew."""
        print(n_tokens, file=self._stream(self._process.stdin), flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> str:
        line = self._stream(self._process.stdout).readline()
        if not line:
            self._log.seek(0)
            raise LropeError(f"a process ended early:\n{self._log.read().strip()[-2000:]}")
        return line

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def work(args: argparse.Namespace) -> None:
    """The process of one arm: a number of tokens in, seconds out."""
    from llama_cpp import llama_cpp as lib

    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, False
    model = lib.llama_model_load_from_file(str(args.model).encode(), params)
    params = lib.llama_context_default_params()
    params.n_ctx = args.prompt + args.decode
    params.n_batch = params.n_ubatch = args.prompt
    params.n_threads = params.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, params)
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    if args.factors:
        n = lib._lib.llama_get_rope_layer_factors(ctypes.c_void_p(context), None, ctypes.c_size_t(0))
        factors = (ctypes.c_float * n)(*(1.05 + 0.95 * i / max(1, n - 1) for i in range(n)))
        if lib._lib.llama_set_rope_layer_factors(ctypes.c_void_p(context), factors, ctypes.c_size_t(n)):
            raise LropeError("the model refuses the factors")
    batch = lib.llama_batch_init(args.prompt, 0, 1)
    draw, n_past = random.Random(1), 0
    print("ready", flush=True)
    for line in sys.stdin:
        n_tokens = int(line)
        if n_tokens > 1:
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
            n_past = 0
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = draw.randrange(n_vocab), n_past + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == n_tokens - 1
        start = time.perf_counter()
        if lib.llama_decode(context, batch):
            raise LropeError("llama_decode failed")
        lib.llama_synchronize(context)
        seconds = time.perf_counter() - start
        n_past += n_tokens
        print(seconds, flush=True)


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, by test and arm; each round has new processes, so that no placement in memory lasts."""
    times: dict[str, dict[str, list[float]]] = {test: {arm: [] for arm in ARMS} for test in TESTS}
    for number in range(args.rounds):
        arms: dict[str, Arm] = {}
        try:
            for name, tree in ARMS.items():
                arms[name] = Arm(getattr(args, tree), args, "factors" in name)
            for arm in arms.values():
                arm.step(args.prompt)  # warm: weights in memory, graph allocated
            for repetition in range(args.repetitions):
                for i in range(args.decode + 1):
                    order = list(arms.items())
                    random.Random(f"{number} {repetition} {i}").shuffle(order)
                    for name, arm in order:
                        times["decode" if i else "prefill"][name].append(arm.step(1 if i else args.prompt))
        finally:
            for arm in arms.values():
                arm.close()
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return times


def table(times: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> str:
    """Rates and ratios as Markdown."""
    lines = [
        "| test | arm | tokens/s, median | speed, stock = 1: median of steps (median of each round) |",
        "|---|---|---|---|",
    ]
    for test in TESTS:
        tokens = args.prompt if test == "prefill" else 1
        stock = times[test]["stock"]
        for arm, seconds in times[test].items():
            ratios = [a / b for a, b in zip(stock, seconds, strict=True)]
            size = len(ratios) // args.rounds
            rounds = [f"{statistics.median(ratios[i : i + size]):.3f}" for i in range(0, len(ratios), size)]
            text = "" if arm == "stock" else f"{statistics.median(ratios):.4f} ({' '.join(rounds)})"
            lines.append(f"| {test} | {arm} | {tokens / statistics.median(seconds):.1f} | {text} |")
    return "\n".join(lines)


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock", type=Path, metavar="LIBDIR")
    parser.add_argument("--patched", type=Path, metavar="LIBDIR")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="new processes (default: 5)")
    parser.add_argument("--repetitions", type=int, default=4, metavar="N", help="inside each round (default: 4)")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens of prefill (default: 256)")
    parser.add_argument("--decode", type=int, default=24, metavar="N", help="single tokens after it (default: 24)")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), metavar="N")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # the process of one arm
    parser.add_argument("--factors", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    if not args.stock or not args.patched or min(args.rounds, args.repetitions, args.decode) < 1 or args.prompt < 2:
        parser.error("--stock and --patched are needed, numbers must be positive, --prompt at least 2")
    for path in (args.stock, args.patched):
        if not list(path.glob("libllama.*")):
            raise LropeError(f"{path}: no libllama there")
    times = measure(args)
    print(f"`{shlex.join(['python', 'benchmarks/lockstep_speed.py', *sys.argv[1:]])}`\n")
    print(f"{os.cpu_count()} cores, {args.threads} threads; model {args.model.name}\n")
    print(table(times, args))


if __name__ == "__main__":
    try:
        main()
    except LropeError as error:
        sys.exit(f"error: {error}")
