"""Instructions of `llama_decode` in the patched library against the unpatched one, counted by Valgrind.

Seconds differ by percents from run to run on a shared machine; instructions do not. Every arm decodes the same tokens
on one thread; "twice" and "factors" in a second context as well, there with a different factor in every layer where
the library is the patched one. Prefill and single tokens are told apart by a run without the latter. Usage:

    python benchmarks/instruction_count.py --stock LIBDIR --patched LIBDIR --model MODEL [--prompt 64] [--decode 8]

Valgrind knows no AVX-512: build both libraries with `python proofs/native.py stock --option GGML_NATIVE=OFF`, likewise
`patched`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import command, head, row, script

from lrope_gguf import LropeError

FUNCTION = "llama_context::decode(llama_batch const&)"  # what `llama_decode` jumps to
ARMS = {
    "stock": ("stock", 0),
    "patched": ("patched", 0),
    "stock, twice": ("stock", 1),
    "patched, factors": ("patched", 1),
}


def work(args: argparse.Namespace) -> None:
    """The process that is counted: from the standard input, a number of tokens and whether with factors, a line each.

    More than one token begins anew. Weights are mapped, not repacked, so that all arms read the same memory.
    """
    from llama_cpp import llama_cpp as lib

    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, False
    model = lib.llama_model_load_from_file(str(args.model).encode(), params)
    params = lib.llama_context_default_params()
    params.n_ctx = args.prompt + args.decode
    params.n_batch = params.n_ubatch = args.prompt
    params.n_threads = params.n_threads_batch = 1
    # one for the prefill of both, one for the tokens after a prefill with factors
    contexts = [lib.llama_init_from_model(model, params) for _ in range(2)]
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(args.prompt, 0, 1)
    draw = random.Random(1)
    past = [0, 0]

    def set_factors(context: int, on: bool) -> None:
        n = lib._lib.llama_get_rope_layer_factors(ctypes.c_void_p(context), None, ctypes.c_size_t(0))
        factors = (ctypes.c_float * n)(*(1.05 + 0.95 * i / max(1, n - 1) for i in range(n)))
        if lib._lib.llama_set_rope_layer_factors(ctypes.c_void_p(context), factors if on else None, ctypes.c_size_t(n)):
            raise LropeError("the model refuses the factors")

    def decode(which: int, n_tokens: int, factors: bool) -> None:
        context = contexts[which]
        if n_tokens > 1:
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
            past[which] = 0
            if hasattr(lib._lib, "llama_set_rope_layer_factors"):
                set_factors(context, factors)
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = draw.randrange(n_vocab), past[which] + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == n_tokens - 1
        if lib.llama_decode(context, batch):
            raise LropeError("llama_decode failed")
        lib.llama_synchronize(context)
        past[which] += n_tokens

    for line in sys.stdin:
        n_tokens, factors = map(int, line.split())
        if n_tokens > 1 and factors:
            decode(1, n_tokens, True)
        decode(0 if n_tokens > 1 else factors, n_tokens, bool(factors))


def count(library: Path, args: argparse.Namespace, factors: int, n_decode: int) -> int:
    """Instructions inside `llama_decode` for a prefill and ``n_decode`` single tokens."""
    steps = "".join(f"{n} {factors}\n" for n in (args.prompt, *[1] * n_decode))
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        words = [
            *("valgrind", "--tool=callgrind", f"--toggle-collect={FUNCTION}", f"--callgrind-out-file={counts}"),
            *(sys.executable, __file__, "--work", "--model", str(args.model)),
            *("--prompt", str(args.prompt), "--decode", str(args.decode)),
        ]
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(library.resolve()), "OMP_NUM_THREADS": "1"}
        environment["PYTHONHASHSEED"] = "0"
        try:
            done = subprocess.run(words, input=steps, capture_output=True, text=True, env=environment)
        except OSError as error:
            raise LropeError(f"valgrind: {error.strerror}; install it") from None
        found = re.search(r"^(?:totals|summary): (\d+)", counts.read_text(), re.MULTILINE) if counts.exists() else None
        if done.returncode or found is None or found[1] == "0":
            raise LropeError(f"{shlex.join(words)} failed:\n{done.stderr.strip()[-2000:]}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock", type=Path, metavar="LIBDIR")
    parser.add_argument("--patched", type=Path, metavar="LIBDIR")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of prefill (default: 64)")
    parser.add_argument("--decode", type=int, default=8, metavar="N", help="single tokens after it (default: 8)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # the process that is counted
    args = parser.parse_args()
    if args.work:
        return work(args)
    if args.stock is None or args.patched is None:
        parser.error("give --stock and --patched")
    print(command())
    print(head("test", "arm", "instructions a token", "ratio to stock"))
    base: dict[tuple[str, int], int] = {}
    rows: list[tuple[str, str, int, int, int]] = []
    for arm, (tree, factors) in ARMS.items():
        prefill = count(getattr(args, tree), args, factors, 0)
        decode = count(getattr(args, tree), args, factors, args.decode) - prefill
        # with factors, the process fills two contexts
        rows += [
            ("prefill", arm, factors, prefill, args.prompt * (1 + factors)),
            ("decode", arm, factors, decode, args.decode),
        ]
        print(f"{arm}: {prefill} and {decode}", file=sys.stderr)
    for test, arm, factors, instructions, n_tokens in sorted(rows, key=lambda row: row[0] != "prefill"):
        first = base.setdefault((test, factors), instructions)
        print(row((test, arm, f"{instructions / n_tokens:,.0f}", f"{instructions / first:.6f}")))


if __name__ == "__main__":
    script(main)
