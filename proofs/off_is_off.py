"""Proof that the series changes nothing where a model has no factors: logits and graphs, bit for bit.

Both libraries, each in a process of its own, decode the same tokens: a prompt in batches, single tokens, and tokens
after a context shift. Usage: python proofs/off_is_off.py [--stock LIBDIR] [--patched LIBDIR] [MODEL ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.commands import CommandError, script, table
from support.native_build import patched_library, stock_library
from support.off_is_off import CONTEXTS, N_SHIFT, N_SINGLE, Comparison, compare, tiny_models

HEADER = ["model", "context", "tokens", "graphs", "nodes, stock", "nodes, patched", "operations", "logits"]


def cells(c: Comparison) -> list[object]:
    nodes = [sum(step.nodes for step in steps) for steps in (c.stock, c.patched)]
    tokens = sum(step.tokens for step in c.stock)
    graphs, logits = ("equal" if same else "**DIFFER**" for same in (c.same_graphs, c.same_logits))
    return [c.model, c.n_ctx, tokens, len(c.stock), *nodes, graphs, logits]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="GGUF files (default: the tests' models)")
    parser.add_argument(
        "--stock", type=Path, metavar="LIBDIR", help="folder of the unpatched libllama (default: built)"
    )
    parser.add_argument("--patched", type=Path, metavar="LIBDIR", help="folder of the patched one (default: built)")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="N", help="default: 64 256")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if min(args.contexts) < N_SINGLE + 2 * N_SHIFT:
        raise CommandError(f"a context needs {N_SINGLE + 2 * N_SHIFT} tokens at least")
    stock, patched = args.stock or stock_library(), args.patched or patched_library()
    with tempfile.TemporaryDirectory() as temporary:
        models = args.models or tiny_models(Path(temporary))
        rows = compare(models, stock, patched, args.contexts, args.threads)
    print(table(HEADER, [cells(row) for row in rows]))
    return 0 if all(row.same_graphs and row.same_logits for row in rows) else 1


if __name__ == "__main__":
    script(main)
