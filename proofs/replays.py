"""Prints which architectures' graphs the gradients' replay computes as llama.cpp does: replays.py [NAME ...].

Each is a tiny random model of the architecture tests. Needs torch and the patched library.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "search")]

from support.arch_models import FIXTURES  # noqa: E402
from support.replayed import decoders, replayed  # noqa: E402


def main(names: list[str]) -> None:
    """Print a line for each architecture and how many are what."""
    equal = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                result = replayed(FIXTURES[name], Path(folder))
            except (OSError, AssertionError, ValueError) as error:
                print(f"| {name} | not run: {error} | |", flush=True)
                continue
            derivatives = "by factors" if result.by_factors else ""
            equal += [name] if result.verdict == "equal" else []
            print(f"| {name} | {result.verdict} | {derivatives} |", flush=True)
    print(f"\n{len(equal)} of {len(names)} equal")


if __name__ == "__main__":
    main(sys.argv[1:] or decoders())
