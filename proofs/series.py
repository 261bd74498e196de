"""Proof that the series can be bisected: each patch compiles without those after it.

tests/support/bisect_series.py tells how. Usage: python proofs/series.py [--source LLAMA_CPP]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import native_build
from support.bisect_series import bisect
from support.commands import script, table


def main() -> int:
    """Print a row for each patch; exit status 1 if one does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="unpatched llama.cpp (default: the pinned release's, fetched)")
    args = parser.parse_args()
    steps = bisect(args.source or native_build.fetch_source())
    rows = [(step.patch, len(step.files), len(step.errors), f"{step.seconds:.0f}") for step in steps]
    print(table(["patch, on those before it", "files compiled", "errors", "seconds"], rows))
    for step in steps:
        print(*step.errors, sep="\n", end="\n" * bool(step.errors))
    return 1 if any(step.errors for step in steps) else 0


if __name__ == "__main__":
    script(main)
