"""Speed of the patched library against the unpatched one, free of drift: processes take turns step by step.

`patch_speed.py` compares whole `llama-bench` runs, whose noise on a shared machine is several percent. Here each step
of each arm is timed right beside the same step of the others: stock, patched, stock once more (whose ratio shows the
noise that is left: where a process happens to lie in memory), and in a second context of each process the same again,
with a different factor in every layer where the library is the patched one.
Weights are mapped, not repacked, so that all arms read the same memory. Usage:

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
from typing import IO, Any

from tables import head, row

from lrope_gguf import LropeError

PROCESSES = {"stock": "stock", "patched": "patched", "stock again (noise)": "stock"}
# every process does the same work, also what only the patched one does with factors: a busier one would be faster
ARMS = {
    "stock": ("stock", 0),
    "patched": ("patched", 0),
    "stock again (noise)": ("stock again (noise)", 0),
    "stock, second context": ("stock", 1),
    "patched, factors": ("patched", 1),
    "stock again, second context (noise)": ("stock again (noise)", 1),
}
TESTS = ("prefill", "decode")


class Arm:
    """A process with one library, one model and one context; runs one step when it is told to."""

    def __init__(self, library: Path, args: argparse.Namespace) -> None:
        """Start the process and wait until its model is loaded."""
        options = ["--model", args.model, "--prompt", args.prompt, "--decode", args.decode, "--threads", args.threads]
        command = [sys.executable, __file__, "--work", *map(str, options)]
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(library.resolve())}
        # a file: llama.cpp logs more than a pipe holds
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._answer()

    def step(self, n_tokens: int, factors: bool = False) -> float:
        """Decode tokens; seconds. More than one token begins anew."""
        print(n_tokens, int(factors), file=self._stream(self._process.stdin), flush=True)
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
    # one for the prefill of both, one for the tokens after a prefill with factors
    contexts = [lib.llama_init_from_model(model, params) for _ in range(2)]
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(args.prompt, 0, 1)
    draw = random.Random(1)
    past = [0, 0]

    def decode(which: int, n_tokens: int, factors: bool) -> float:
        context = contexts[which]
        if n_tokens > 1:
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
            past[which] = 0
            if hasattr(lib._lib, "llama_set_rope_layer_factors"):
                set_factors(lib, context, factors)
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = draw.randrange(n_vocab), past[which] + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == n_tokens - 1
        start = time.perf_counter()
        if lib.llama_decode(context, batch):
            raise LropeError("llama_decode failed")
        lib.llama_synchronize(context)
        past[which] += n_tokens
        return time.perf_counter() - start

    print("ready", flush=True)
    for line in sys.stdin:
        n_tokens, factors = map(int, line.split())
        if n_tokens > 1 and factors:
            decode(1, n_tokens, True)
        print(decode(0 if n_tokens > 1 else factors, n_tokens, bool(factors)), flush=True)


def set_factors(lib: Any, context: int, on: bool) -> None:
    """A different factor in every layer, or none."""
    n = lib._lib.llama_get_rope_layer_factors(ctypes.c_void_p(context), None, ctypes.c_size_t(0))
    factors = (ctypes.c_float * n)(*(1.05 + 0.95 * i / max(1, n - 1) for i in range(n)))
    if lib._lib.llama_set_rope_layer_factors(ctypes.c_void_p(context), factors if on else None, ctypes.c_size_t(n)):
        raise LropeError("the model refuses the factors")


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, by test and arm; each round has new processes, so that no placement in memory lasts."""
    times: dict[str, dict[str, list[float]]] = {test: {arm: [] for arm in ARMS} for test in TESTS}
    for number in range(args.rounds):
        processes: dict[str, Arm] = {}
        try:
            for name, tree in PROCESSES.items():
                processes[name] = Arm(getattr(args, tree), args)
            arms = {name: (processes[process], bool(second)) for name, (process, second) in ARMS.items()}
            for arm, factors in arms.values():
                arm.step(args.prompt, factors)  # warm: weights in memory, graph allocated
            for repetition in range(args.repetitions):
                for i in range(args.decode + 1):
                    order = list(arms.items())
                    random.Random(f"{number} {repetition} {i}").shuffle(order)
                    for name, (arm, factors) in order:
                        seconds = arm.step(1 if i else args.prompt, factors)
                        times["decode" if i else "prefill"][name].append(seconds)
                    for arm in processes.values() if not i else ():
                        arm.step(args.prompt)  # the tokens that follow continue one without factors
        finally:
            for arm in processes.values():
                arm.close()
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return times


def table(times: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> str:
    """Rates and ratios as Markdown."""
    speed = "speed, stock = 1: median of steps (median of each round)"
    lines = [head("test", "arm", "tokens/s, median", speed)]
    for test in TESTS:
        tokens = args.prompt if test == "prefill" else 1
        for arm, seconds in times[test].items():
            base = "stock, second context" if ARMS[arm][1] else "stock"
            ratios = [a / b for a, b in zip(times[test][base], seconds, strict=True)]
            size = len(ratios) // args.rounds
            rounds = [f"{statistics.median(ratios[i : i + size]):.3f}" for i in range(0, len(ratios), size)]
            text = "" if arm == base else f"{statistics.median(ratios):.4f} ({' '.join(rounds)})"
            lines.append(row((test, arm, f"{tokens / statistics.median(seconds):.1f}", text)))
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
