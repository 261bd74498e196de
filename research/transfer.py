"""Does a curve hold where it was not searched, and does another seed find as good a one.

Searches on every setting, then asks every winner on every setting, in contexts that no search saw. A row is what was
searched, a column what was asked; gains over the base model with 95 % intervals. Settings differ in the length of the
contexts, the quantization of the model, or the task. Usage:

    python research/transfer.py lengths MODEL --lengths 72 98 147 [--search-seeds 0 1] [options as of search]
    python research/transfer.py quantizations MODEL --quantizations F16 Q8_0 Q4_0 [the same]
    python research/transfer.py tasks MODEL --tasks kv:keys=40 multikey vt:lines=60 mdqa:data=FILE [the same]

Quantizations are made of MODEL by our llama-quantize, in a temporary folder; COPY is MODEL as it is. With `--curves`
the rows are curves that there are already, and nothing is searched.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from options import (
    add_model_options,
    add_search_options,
    add_task_options,
    dispatch,
    gain_text,
    model_of,
    search_of,
    table,
    task_of,
    tasks_of,
)

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model
from lrope_gguf.native import tool_path
from lrope_search import Measurement, ModelConfig, TaskConfig, measure, search
from lrope_search.commands.curve_files import factors_of_curve
from lrope_search.machine import physical_cores
from lrope_search.results.comparison import Comparison, compare
from lrope_search.results.table import DepthTable
from lrope_search.scores import Factors

ASKED_SEED = 1000
"""Of the contexts that are asked, apart from those of all searches."""
_CONVERTED = re.compile(r"type = +(\w+),(?: converting to (\w+))?")
_REFUSED = re.compile(r"failed to quantize: (.*)|(invalid ftype .*)")


@dataclass(frozen=True)
class Setting:
    name: str
    model: ModelConfig
    task: TaskConfig

    def seeded(self, seed: int) -> TaskConfig:
        """Return the task with contexts of this seed; where a file has them, the seed decides who may see which."""
        return self.task if self.task.file else self.task.but(seed=seed)


def quantized(source: str, kind: str, folder: Path, n_threads: int = 1) -> tuple[Path, str]:
    """Make a model of another quantization with our llama-quantize.

    Args:
        source: The model's file.
        kind: What llama-quantize calls the type.
        folder: Where the file goes.
        n_threads: CPU threads.

    Returns:
        The file, and how many tensors of which type it has, in words.
    """
    path = folder / f"{kind}.gguf"
    tool, files = str(tool_path("llama-quantize")), [source, str(path), kind, str(n_threads)]
    done = subprocess.run([tool, *files], capture_output=True, text=True, errors="replace")
    again = "requantizing from type" in done.stdout + done.stderr
    if again:
        done = subprocess.run([tool, "--allow-requantize", *files], capture_output=True, text=True, errors="replace")
    said = done.stdout + done.stderr
    if done.returncode:
        refused = _REFUSED.search(said)
        why = next(filter(None, refused.groups())) if refused else f"exit status {done.returncode}"
        raise LropeError(f"{source}: llama-quantize makes no {kind} of it ({why})")
    types = Counter(new or old for old, new in _CONVERTED.findall(said))
    parts = ", ".join(f"{count} {name}" for name, count in types.most_common())
    return path, parts + (" (requantized: --allow-requantize)" if again else "")


def searched(settings: Sequence[Setting], args: argparse.Namespace) -> dict[tuple[str, int | None], Factors]:
    """Return what a search finds on each setting with each seed; with ``--curves``, these."""
    if args.curves:
        info = read_model(settings[0].model.path)
        return {(f"curve {name}", None): factors_of_curve(name, info) for name in args.curves}
    found: dict[tuple[str, int | None], Factors] = {}
    for setting in settings:
        for seed in args.search_seeds:
            with tempfile.TemporaryDirectory() as folder:
                study = Path(folder, "study")
                outcome = search(setting.model, setting.seeded(seed), search_of(args, seed), study)
            assert outcome.summary.factors is not None
            found[setting.name, seed] = outcome.summary.factors
    return found


def label(row: tuple[str, int | None]) -> str:
    name, seed = row
    return name if seed is None else f"{name}, seed {seed}"


def accuracy(comparison: Comparison) -> str:
    """A gain in points."""
    return gain_text(comparison.accuracy_gain, comparison.enough, 100.0, 1)


def log_probability(comparison: Comparison) -> str:
    """A gain in nats a token of the answer."""
    return gain_text(comparison.log_probability_gain, comparison.enough, 1.0, 4)


def named_rows(first: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    return table((first, *columns), ((name, *cells) for name, cells in rows.items()))


def tables(
    settings: Sequence[Setting], rows: Sequence[tuple[str, int | None]], found: Mapping[str, Measurement]
) -> Iterator[str]:
    """Yield all tables, each under what it shows.

    Args:
        settings: The columns.
        rows: What was searched; sides of the measurements by their `label`.
        found: Of each setting's name, the measurement.
    """
    asked = [found[setting.name] for setting in settings]
    columns = [f"asked {setting.name}" for setting in settings]
    kinds: list[tuple[str, Callable[[Comparison], str], str, list[DepthTable]]] = [
        ("Accuracy, gains in points", accuracy, "accuracy", [one.table for one in asked]),
        ("Log-probability, gains in nats a token", log_probability, "log_probability", [one.table for one in asked]),
    ]
    if written := [one.generated for one in asked if one.generated is not None]:
        kinds.append(("Answers that the model wrote, gains in points", accuracy, "accuracy", written))
    # the same contexts of another model pair with the first one's
    alone = len({setting.task for setting in settings}) == 1 < len(settings)
    for title, cell, measured, ours in kinds:
        base = [getattr(one.totals["base"], measured) for one in ours]
        cells = {"base": [f"{100 * v:.1f} %" if measured == "accuracy" else f"{v:.4f}" for v in base]}
        if alone and ours is not written:
            pairs = [cell(compare(asked[0].scores["base"], one.scores["base"])) for one in asked[1:]]
            cells[f"quantization alone, over {settings[0].name}"] = ["-", *pairs]
        cells |= {label(row): [cell(one.comparisons[label(row)]) for one in ours] for row in rows}
        yield f"{title}:\n\n{named_rows('searched on', columns, cells)}"
    if any(seed is not None for _, seed in rows):
        cells = {label(row): [beside(row, s.name, found[s.name]) for s in settings] for row in rows}
        title = "Accuracy, in points over what was searched there with the same seed"
        yield f"{title}:\n\n{named_rows('searched on', columns, cells)}"


def beside(row: tuple[str, int | None], asked: str, found: Measurement) -> str:
    """What was searched elsewhere against what was searched here with the same seed."""
    name, seed = row
    if name == asked:
        return "-"
    return accuracy(compare(found.scores[label((asked, seed))], found.scores[label(row)]))


def show(settings: Sequence[Setting], args: argparse.Namespace) -> None:
    """Search, ask and print."""
    for name, count in Counter(setting.name for setting in settings).items():
        if count > 1:
            raise LropeError(f"{name}: given twice; give each setting once")
    sides = searched(settings, args)
    named = {label(row): factors for row, factors in sides.items()}
    found = {}
    for setting in settings:
        one = measure(setting.model, setting.seeded(args.seed), named, contexts=args.test_contexts,
                      generate=args.generate)  # fmt: skip
        found[setting.name] = one
        each = args.test_contexts * len(one.sides)
        print(f"{setting.name}: {one.n_tokens / each:.0f} tokens and {one.seconds / each:.2f} s a context and side; "
              f"base {100 * one.table.totals['base'].accuracy:.1f} %, "
              + ", ".join(f"{name} {accuracy(one.table.comparisons[name])}" for name in named),
              file=sys.stderr, flush=True)  # fmt: skip
    for text in tables(settings, list(sides), found):
        print(f"\n{text}")
    print("\nFactors:\n")
    print(named_rows("searched on", ["factors"], {n: [", ".join(f"{s:.3g}" for s in f)] for n, f in named.items()}))


def lengths(args: argparse.Namespace) -> None:
    model, task = model_of(args), task_of(args)
    show([Setting(str(n), model, task.but(keys=n)) for n in args.lengths], args)


def quantizations(args: argparse.Namespace) -> None:
    model, task = model_of(args), task_of(args)
    with tempfile.TemporaryDirectory() as folder:
        settings = []
        for kind in args.quantizations:
            path, said = quantized(args.model, kind, Path(folder), args.threads or physical_cores())
            print(f"{kind}: {said}", flush=True)
            settings.append(Setting(kind, replace(model, path=str(path)), task))
        show(settings, args)


def tasks(args: argparse.Namespace) -> None:
    model = model_of(args)
    show([Setting(name, model, task) for name, task in tasks_of(args).items()], args)


COMMANDS = {"lengths": lengths, "quantizations": quantizations, "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("model", metavar="MODEL")
        if name == "lengths":
            command.add_argument("--lengths", metavar="N", type=int, nargs="+", required=True, help="--keys of each")
        if name == "quantizations":
            command.add_argument("--quantizations", metavar="TYPE", nargs="+", required=True,
                                 help="as llama-quantize names them, or COPY")  # fmt: skip
        command.add_argument("--search-seeds", metavar="N", type=int, nargs="+", default=[0, 1])
        command.add_argument("--curves", metavar="FILE", nargs="+", help="files or names, in place of searches")
        command.add_argument("--generate", action="store_true", help="also let the model write its answers")
        add_search_options(command)
        add_model_options(command)
        add_task_options(command, several=name == "tasks")
        command.set_defaults(seed=ASKED_SEED)
    dispatch(parser, COMMANDS)


if __name__ == "__main__":
    main()
