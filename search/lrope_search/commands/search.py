"""`lrope-gguf search`: find the layer factors with which a model answers best from a long context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lrope_gguf.commands.options import FILE, Command, model_argument
from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.files import check_output
from lrope_gguf.stores import keeper, reference
from lrope_gguf.text import command_line, say

from ..config import ALGORITHM_FIELDS, PARAMETRIZATIONS, SearchConfig
from .options import (
    Pair,
    all_of,
    check_study,
    data_files,
    first_task_options,
    llama_options,
    model_config,
    model_options,
    option,
    task_config,
    task_options,
    worker_options,
    workers_config,
)

NO_GAIN = 3
"""Exit status of ``--require-gain`` where there is none to recommend."""

_DEFAULTS = SearchConfig()
_COST, _GUARD, _OPTIMIZER = (f"Advanced: {name}" for name in ("cost", "guard", "optimizer"))


def _setting(name: str, metavar: str, kind: Any, text: str, heading: str | None) -> Callable[[Any], Any]:
    """Declare an option of `SearchConfig` with its default."""
    default = getattr(_DEFAULTS, name)
    shown = "{:g},{:g}".format(*default) if isinstance(default, tuple) else default
    if default is None:
        shown = "by the number of questions"
    declaration = f"--{name.replace('_', '-')}"
    return option(declaration, metavar=metavar, type=kind, default=default, heading=heading, help=f"{text} ({shown})")


_settings = all_of(
    option("--max-hours", metavar="H", type=float, heading=_COST, help="begin no candidate after so many hours"),
    _setting("search_contexts", "N", int, "contexts to compare candidates on", _COST),
    _setting("validation_contexts", "N", int, "contexts to choose the winner on", _COST),
    _setting("test_contexts", "N", int, "contexts to measure on", _COST),
    _setting("finalists", "N", int, "best candidates that go on to validation", _COST),
    _setting("racing_fraction", "F", float, "share of the candidates that sees more than a first context; 0.3 is good "
             "for four or more contexts, 1 shows them to all", _COST),
    _setting("max_kl", "NATS", float, "pass over curves that diverge more on ordinary text, per token", _GUARD),
    option("--guard-text", metavar="FILE", type=FILE, heading=_GUARD,
           help="ordinary text (the base model writes some)"),
    option("--algorithm", type=click.Choice(list(ALGORITHM_FIELDS)), default=_DEFAULTS.algorithm, heading=_OPTIMIZER,
           help=f"what proposes candidates ({_DEFAULTS.algorithm})"),
    option("--parametrization", type=click.Choice(PARAMETRIZATIONS), default=_DEFAULTS.parametrization,
           heading=_OPTIMIZER, help="a curve over all layers with own factors of the few that a scan finds to matter, "
                                    f"the curve alone, or own factors alone ({_DEFAULTS.parametrization})"),
    _setting("lag", "N", int, "candidates out at once: as many as there are workers is fastest, two or three times as "
             "many keeps them busy", _OPTIMIZER),
    _setting("bounds", "LOW,HIGH", Pair(), "range of the factors, around 1 and within 1/1024 and 1024", _OPTIMIZER),
    _setting("degree", "N", int, "degree of the Bézier curve", _OPTIMIZER),
    option("--start", metavar="FILE", multiple=True, type=FILE, heading=_OPTIMIZER,
           help="a curve to begin with, as of an earlier search or of a smaller model; as often as you like"),
    option("--population", metavar="N", type=int, heading=_OPTIMIZER,
           help="first candidates, or those of a generation (the algorithm's own)"),
    _setting("width", "W", float, "first width of mutation, as a logarithm of the factors", _OPTIMIZER),
    _setting("middle_weight", "W", float, "weigh the middle 1 + W times as much as the ends", _OPTIMIZER),
)  # fmt: skip


@click.command("search", cls=Command)
@model_argument
@first_task_options
@option("--output", metavar="FILE", type=FILE, default="best.json", help="curve file to write (best.json)")
@_setting("max_evaluations", "N", int, "candidates to try; a finished study continues with more", None)
@option("--dry-run", is_flag=True, help="say what the search would cost, and stop")
@option("--study", metavar="DIR", type=FILE, heading="Advanced",
        help="keep results here, and resume from them (OUTPUT's name + .study)")  # fmt: skip
@option("--require-gain", is_flag=True, heading="Advanced",
        help=f"end with status {NO_GAIN} unless the gain is significant")  # fmt: skip
@task_options
@_settings
@worker_options
@model_options
@llama_options
def command(model: str, output: str, study: str | None, dry_run: bool, require_gain: bool, **values: Any) -> int:
    """Search the layer factors with which MODEL answers best from a long context."""
    path, directory = Path(output), Path(study) if study else Path(output).with_name(f"{Path(output).stem}.study")
    workers = workers_config(values)
    how, task = model_config(model, values), task_config(values | {"seed": values["seed"]})
    settings = search_config({name: value for name, value in values.items() if hasattr(_DEFAULTS, name)})

    inputs = {"MODEL": model, "--guard-text": settings.guard_text}
    inputs |= data_files(task)
    inputs |= {f"--start {file}": file for file in values.get("start", ())}
    check_output("--output", path, inputs)
    check_study(directory)

    from .. import launch

    if dry_run:
        launch.estimate(how, task, settings, directory, workers=workers)
        return 0
    outcome = launch.search(how, task, settings, directory, workers=workers)
    outcome.best.save(path)
    say(outcome.text())
    if outcome.winner is None:
        say(f"{output}: holds the base model's factors, all 1")
    else:
        if outcome.winner.curve is not None and (hint := at_the_bounds(outcome.winner.curve)):
            say(hint)
        say(f"{output}: written; next: {next_command(model, output)}")
    return NO_GAIN if require_gain and not outcome.verdict.recommended else 0


def next_command(model: str, curve: str) -> str:
    """Return what to do with a curve: store it in the model, or for one that may not be changed, in a preset."""
    name = reference(model) or model
    words = ["lrope-gguf", "write", f"./{name}" if name.startswith("-") else name, "--curve", curve]
    return command_line([*words, "--preset", "presets.ini"] if keeper(model) else words)


def search_config(values: dict[str, Any]) -> SearchConfig:
    """Make the settings; ``start`` still holds files.

    Raises:
        LropeError: a value out of range, or a file that holds no curve that this search could find.
    """
    paths = values.pop("start")
    settings = SearchConfig(**values)
    curves = []
    for path in paths:
        file = CurveFile.load(path)
        start = file.control_points or file.layer_factors
        assert start is not None  # a curve file has one of them
        settings.started(start, f"--start {path}")
        curves.append(start)
    return replace(settings, start=tuple(curves))


def at_the_bounds(curve: Curve) -> str | None:
    """Say so where the bounds, not the model, have decided a control point."""
    at = sorted({y for _, y in curve.control_points} & set(curve.bounds))
    points = " and ".join(f"{y:g}" for y in at)
    return f"control points lie at the bounds ({points}): wider --bounds may find more" if at else None
