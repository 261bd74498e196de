"""Instructions of `llama_decode` in the patched library against the unpatched one, counted by Valgrind.

Seconds differ by percents from run to run on a shared machine; instructions do not. The arms are those of
`lockstep_speed.py`: the same tokens, one thread, a different factor in every layer where the library is the patched
one. Prefill and single tokens are told apart by a run without the latter. Usage:

    python benchmarks/instruction_count.py --stock LIBDIR --patched LIBDIR --model MODEL [--prompt 64] [--decode 8]

Valgrind knows no AVX-512: build both libraries with `python proofs/native.py stock --option GGML_NATIVE=OFF`, likewise
`patched`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import head, row

from lrope_gguf import LropeError

FUNCTION = "llama_context::decode(llama_batch const&)"  # what `llama_decode` jumps to
WORK = Path(__file__).with_name("lockstep_speed.py")
ARMS = {
    "stock": ("stock", 0),
    "patched": ("patched", 0),
    "stock, twice": ("stock", 1),
    "patched, factors": ("patched", 1),
}


def count(library: Path, args: argparse.Namespace, factors: int, n_decode: int) -> int:
    """Instructions inside `llama_decode` for a prefill and ``n_decode`` single tokens."""
    steps = "".join(f"{n} {factors}\n" for n in (args.prompt, *[1] * n_decode))
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        command = [
            *("valgrind", "--tool=callgrind", f"--toggle-collect={FUNCTION}", f"--callgrind-out-file={counts}"),
            *(sys.executable, str(WORK), "--work", "--model", str(args.model), "--threads", "1"),
            *("--prompt", str(args.prompt), "--decode", str(args.decode)),
        ]
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(library.resolve()), "OMP_NUM_THREADS": "1"}
        environment["PYTHONHASHSEED"] = "0"
        try:
            done = subprocess.run(command, input=steps, capture_output=True, text=True, env=environment)
        except OSError as error:
            raise LropeError(f"valgrind: {error.strerror}; install it") from None
        found = re.search(r"^(?:totals|summary): (\d+)", counts.read_text(), re.MULTILINE) if counts.exists() else None
        if done.returncode or found is None or found[1] == "0":
            raise LropeError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return int(found[1])


def main() -> None:
    """Count all arms and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock", type=Path, required=True, metavar="LIBDIR")
    parser.add_argument("--patched", type=Path, required=True, metavar="LIBDIR")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of prefill (default: 64)")
    parser.add_argument("--decode", type=int, default=8, metavar="N", help="single tokens after it (default: 8)")
    args = parser.parse_args()
    print(f"`{shlex.join(['python', 'benchmarks/instruction_count.py', *sys.argv[1:]])}`\n")
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
    try:
        main()
    except LropeError as error:
        sys.exit(f"error: {error}")
