"""Does a curve hold where it was not searched: at other lengths, and does another seed find as good a one.

Searches on contexts of each length, then asks every winner on contexts of every length that no search saw. A row is
what was searched, a column what was asked; gains in accuracy over the base model with 95 % intervals. Usage:

    python benchmarks/transfer.py MODEL --lengths 72 98 147 [--search-seeds 0 1] [task and model options as of search]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from options import add_model_options, add_search_options, add_task_options, model_of, search_of, task_of

from lrope_gguf.errors import LropeError
from lrope_search import measure, search


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--lengths", metavar="N", type=int, nargs="+", required=True, help="--keys of each")
    parser.add_argument("--search-seeds", metavar="N", type=int, nargs="+", default=[0, 1])
    add_search_options(parser)
    add_model_options(parser)
    add_task_options(parser)
    args = parser.parse_args()
    model, task = model_of(args), task_of(args)
    try:
        sides = {}
        for n in args.lengths:
            for seed in args.search_seeds:
                settings = search_of(args, seed)
                with tempfile.TemporaryDirectory() as folder:
                    outcome = search(model, replace(task, keys=n, seed=seed), settings, Path(folder, "study"))
                assert outcome.summary.factors is not None
                sides[f"{n}, seed {seed}"] = outcome.summary.factors
        rows = {name: [name] for name in ("base", *sides)}
        for n in args.lengths:
            table = measure(model, replace(task, keys=n, seed=1000), sides, contexts=args.test_contexts).table
            rows["base"].append(f"{100 * table.totals['base'].accuracy:.1f} %")
            for name in sides:
                gain = table.comparisons[name].accuracy_gain
                rows[name].append(f"{100 * gain.mean:+.1f} [{100 * gain.low:.1f}, {100 * gain.high:.1f}]")
    except LropeError as error:
        parser.exit(1, f"{error}\n")
    print(f"| searched on | {' | '.join(f'asked {n}' for n in args.lengths)} |")
    print(f"|---|{'---|' * len(args.lengths)}")
    for cells in rows.values():
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
