"""Options that the studies here share, as the settings that the package takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from tables import head as head
from tables import row as row
from tables import table as table

from lrope_gguf.errors import LropeError
from lrope_search import ModelConfig, SearchConfig, TaskConfig, optimizer_config, task_config
from lrope_search.optimizers.settings import UNIFORM_FACTORS
from lrope_search.results.intervals import Interval
from lrope_search.tasks.identifiers import IDENTIFIERS
from lrope_search.tasks.settings import POSITIONS, TASKS

_SIZES = ("keys", "documents", "lines", "words", "context_tokens")
_COUNTS = (*_SIZES, "probes")
_OWN = ("data", *_COUNTS, "identifiers", "positions", "prompt_template", "answer_prefix")


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (the physical cores)")
    parser.add_argument("--n-gpu-layers", metavar="N", type=int, help="layers to keep on the GPU (all that fit)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=512, help="tokens a batch (%(default)s)")
    parser.add_argument("--no-chat-template", action="store_true", help="give prompts as they are")
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's log")


def add_task_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Declare the task, or several; what is one's own stands behind its name then (`tasks_of`)."""
    if several:
        parser.add_argument("--tasks", metavar="TASK[:OPTION=VALUE,...]", nargs="+", default=["kv"],
                            help=f"of {', '.join(TASKS)}, such as vt:lines=60,probes=2 (%(default)s)")  # fmt: skip
    else:
        parser.add_argument("--task", choices=list(TASKS), default="kv")
    parser.add_argument("--identifiers", choices=list(IDENTIFIERS))
    for name in _COUNTS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", type=int)
    parser.add_argument("--positions", choices=POSITIONS)
    parser.add_argument("--data", metavar="FILE")
    parser.add_argument("--prompt-template", metavar="TEXT")
    parser.add_argument("--answer-prefix", metavar="TEXT", default="")
    parser.add_argument("--seed", metavar="N", type=int, default=0)


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_task_options(parser)
    parser.add_argument("--width", metavar="W", type=float, default=0.05, help="as of search (%(default)s)")
    parser.add_argument("--uniform-factors", metavar="F,...", default=UNIFORM_FACTORS,
                        type=lambda text: tuple(map(float, text.split(","))))  # fmt: skip
    parser.add_argument("--cache", metavar="FILE", help="results, kept and used again")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Declare a search on a model that is asked beyond what it was trained on."""
    counts = {"max-evaluations": 120, "search-contexts": 6, "validation-contexts": 8, "test-contexts": 30}
    for name, value in counts.items():
        parser.add_argument(f"--{name}", metavar="N", type=int, default=value)
    parser.add_argument("--width", metavar="W", type=float, default=0.3, help="as of search (%(default)s)")
    parser.add_argument("--uniform-factors", metavar="F,...", default=(0.8, 0.9, 1.1, 1.25, 1.6),
                        type=lambda text: tuple(map(float, text.split(","))))  # fmt: skip


def search_of(args: argparse.Namespace, seed: int) -> SearchConfig:
    """Return the settings of that search, with no bound on what ordinary text suffers."""
    names = ("max_evaluations", "search_contexts", "validation_contexts", "test_contexts", "uniform_factors")
    values = {name: getattr(args, name) for name in names}
    algorithm = optimizer_config("ga", width=args.width)
    return SearchConfig(
        method="genetic", seed=seed, racing_first=1, racing_fraction=0.5, max_kl=100.0, algorithm=algorithm, **values
    )


def scaled(model: ModelConfig, scaling: str, multiple: float, trained: int) -> ModelConfig:
    """Return the model in a context with this scaling; a static one with the factor that covers the length."""
    if scaling == "none":
        return replace(model, rope_scaling=scaling)
    static = max(1.0, multiple) if scaling in ("linear", "yarn") else None
    return replace(model, rope_scaling=scaling, rope_scale=static, yarn_orig_ctx=trained)


def gain_text(gain: Interval, enough: bool, scale: float, digits: int) -> str:
    """A gain with its interval if there are ``enough`` contexts for one, as the pages have it."""
    ends = f" [{scale * gain.low:.{digits}f}, {scale * gain.high:.{digits}f}]" if enough else ""
    return f"{scale * gain.mean:+.{digits}f}{ends}"


def dispatch(parser: argparse.ArgumentParser, functions: Mapping[str, Callable[[argparse.Namespace], None]]) -> None:
    """Parse the command line, and call the function of its command."""
    args = parser.parse_args()
    try:
        functions[args.command](args)
    except LropeError as error:
        parser.exit(1, f"{error}\n")


def model_of(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        args.model, n_threads=args.threads, n_gpu_layers=args.n_gpu_layers, batch_size=args.batch_size,
        chat_template=not args.no_chat_template, verbose=args.verbose,
    )  # fmt: skip


def task_of(args: argparse.Namespace) -> TaskConfig:
    return task_config(args.task, **{name: getattr(args, name) for name in (*_OWN, "seed")})


def tasks_of(args: argparse.Namespace) -> dict[str, TaskConfig]:
    """Return the settings of several tasks by their names as given, such as ``kv:keys=40``.

    Options of the command line are for all tasks that take them; one's own count more, and its own size replaces any.
    """
    own = {text: _own(text) for text in args.tasks}
    names = {text: text.partition(":")[0] for text in own}
    for field in _OWN:
        value = getattr(args, field)
        takers = [text for text, name in names.items() if field == "answer_prefix" or field in _fields(name)]
        for text in takers or own if value else ():  # a task that does not take it refuses it
            if not (field in _SIZES and own[text].keys() & set(_SIZES)):
                own[text].setdefault(field, value)
    return {text: task_config(names[text], seed=args.seed, **values) for text, values in own.items()}


def _fields(task: str) -> set[str]:
    return {one.name for one in TASKS[task].settings()} - {"answer_prefix"}


def _own(text: str) -> dict[str, Any]:
    name, _, given = text.partition(":")
    if name not in TASKS:
        raise LropeError(f"--tasks {text}: no such task; choose from {', '.join(TASKS)}")
    values: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        field = key.replace("-", "_")
        if field not in _OWN or not value:
            known = ", ".join(sorted(_fields(name))).replace("_", "-")
            raise LropeError(f"--tasks {text}: {part!r} is no option with a value; {name} has {known}")
        if field in _COUNTS and not value.isdecimal():
            raise LropeError(f"--tasks {text}: {value!r} is no whole number")
        values[field] = int(value) if field in _COUNTS else value
    return values
