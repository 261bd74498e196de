"""Stock and patched llama.cpp for the proofs: fetch the source, apply the series, build it.

`python proofs/native.py stock --output DIR` builds the unpatched library of the pinned source and prints its folder as
the last line; `patched` does the same with the series applied, and `--tools` adds llama-bench and the other tools.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.commands import script
from support.native_build import LIBRARY, TOOLS, WORK, patched_library, stock_library


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("stock", "patched"))
    parser.add_argument("--output", type=Path, default=WORK, help="work folder (default: build/proofs)")
    parser.add_argument("--tools", action="store_true", help="build the tools too: " + ", ".join(TOOLS))
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="for CMake, repeatable")
    args = parser.parse_args()
    make = stock_library if args.kind == "stock" else patched_library
    print(make(args.output, LIBRARY + TOOLS * args.tools, args.option))


if __name__ == "__main__":
    script(main)
