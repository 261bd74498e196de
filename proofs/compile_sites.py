"""Proof that no RoPE call of llama.cpp's graphs can miss the layer's factor.

tests/support/call_sites.py tells how; this runs it on all of the source. Usage: python proofs/compile_sites.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import native_build
from support.call_sites import prove, report
from support.commands import script


def main() -> int:
    """Print the report; exit status 1 if there are differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="unpatched llama.cpp (default: the pinned release's, fetched)")
    parser.add_argument("--files", nargs="+", default=[], metavar="NAME", help="only these files, such as llama.cpp")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: all cores)")
    args = parser.parse_args()
    result = prove(args.source or native_build.fetch_source(), args.files, args.jobs)
    print(report(result))
    print(f"\n{result.seconds:.0f} s")
    return 1 if result.differences else 0


if __name__ == "__main__":
    script(main)
