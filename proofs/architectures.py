"""Audit of the graphs of every architecture that llama.cpp has: each rotation against what its layer's factor demands.

python proofs/architectures.py                      the table, with the library that is installed
python proofs/architectures.py --library DIR        with a library that was built elsewhere
python proofs/architectures.py llama gemma4         these fixtures only
python proofs/architectures.py --csv docs/architectures.csv    the appendix of docs/patch.md

A tiny model of each architecture, and of the branches that its metadata choose, is made from metadata alone. All its
graphs (prompt, one token, images, encoder, draft, context shift) are computed with and without distinct factors, with
and without YaRN, with and without optional tensors, with factors set at run time and in the metadata, and all ROPE and
ROPE_BACK nodes are compared. The exit status is 1 if one is wrong or if an architecture is missing.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.arch_models import FIXTURES, UNUSABLE, Audit, audit, names_in_source
from support.commands import CommandError, script, table
from support.native_build import fetch_source


def _audit(name: str) -> Audit:
    with tempfile.TemporaryDirectory() as folder:
        return audit(FIXTURES[name], Path(folder))


def audits(fixtures: Sequence[str]) -> Iterator[tuple[str, Audit | str]]:
    """The result of each fixture, or why there is none; in a process of its own, since an assertion aborts it."""
    pending = list(fixtures)
    while pending:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            for name in list(pending):
                pending.remove(name)
                try:
                    yield name, pool.submit(_audit, name).result()
                except BrokenProcessPool:
                    yield name, "aborted"
                    break
                except (OSError, AssertionError, ValueError) as error:
                    yield name, f"failed: {str(error).strip().splitlines()[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fixtures", nargs="*", help="only these (default: all)")
    parser.add_argument("--library", type=Path, help="folder of a patched library (default: the installed one)")
    parser.add_argument("--source", type=Path, help="llama.cpp source with the names (default: the pinned release's)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    if args.library:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(args.library.resolve())
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")

    unknown = [name for name in args.fixtures if name not in FIXTURES]
    if unknown:
        raise CommandError(f"no fixture {', '.join(unknown)}; there are {', '.join(FIXTURES)}")
    rows: list[tuple[object, ...]] = []
    wrong: list[str] = []
    for name, result in audits(args.fixtures or list(FIXTURES)):
        n_layer = FIXTURES[name].n_layer
        if isinstance(result, str):
            rows.append((name, n_layer, "", "", "", result))
            wrong.append(f"{name}: {result}")
            continue
        computed = max(sum(not node.shift for node in nodes) for nodes in result.ropes.values())
        shifted = sum(node.shift for node in result.ropes.get("shift", ()))
        rows.append((name, n_layer, computed, shifted, len(result.layers), result.verdict))
        wrong += [f"{name}: {problem}" for problem in result.problems]
        if not result.layers and not result.refusal:
            wrong.append(f"{name}: {result.verdict}")
    if not args.fixtures:
        rows += [(name, "", "", "", "", f"cannot be loaded: {reason}") for name, reason in UNUSABLE.items()]
        audited = {fixture.arch for fixture in FIXTURES.values()} | UNUSABLE.keys()
        wrong += [f"{name}: no fixture" for name in sorted(names_in_source(args.source or fetch_source()) - audited)]
    header = ("model", "layers", "rotations", "of a context shift", "layers that rotate", "verdict")
    rows.sort(key=str)
    print(table(header, rows))
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print("\n".join(["", f"{len(rows)} models, {len(wrong)} problems", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    script(main)
