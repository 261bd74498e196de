"""`lrope-gguf search`: find the layer factors with which a model answers best from a long context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lrope_gguf.commands.options import model_argument
from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.files import check_output
from lrope_gguf.stores import keeper, reference
from lrope_gguf.text import command_line, say

from ..evaluation.settings import ModelConfig
from ..scores import SCALES, tuned
from ..study.settings import SearchConfig, Start
from ..workers.settings import WorkersConfig
from .config_file import printed
from .options import (
    SHARED,
    Gathered,
    SearchRun,
    SettingsCommand,
    check_study,
    config_options,
    data_files,
    option,
    options_of,
    tables,
    task_options,
)

NO_GAIN = 3
"""Exit status of ``--require-gain`` where there is none to recommend."""

_FIRST = (
    "Settings of lrope-gguf search and eval, for --config FILE. Each value is the default: keep only what you change. "
    "The table of a task or an algorithm counts only if that task or algorithm is used."
)


def _print_config(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        say(printed(_FIRST, SHARED, tables()).rstrip("\n"))
        ctx.exit()


@click.command("search", cls=SettingsCommand)
@model_argument
@options_of(SearchRun)
@task_options
@options_of(SearchConfig, WorkersConfig, ModelConfig)
@config_options
@option("--print-config", is_flag=True, is_eager=True, expose_value=False, callback=_print_config,
        help="write all settings with their defaults, for --config, and stop")  # fmt: skip
@option("--dry-run", is_flag=True, help="say what the search would cost, and stop")
@option("--require-gain", is_flag=True, help=f"end with status {NO_GAIN} unless the gain is significant")
def command(model: str, dry_run: bool, require_gain: bool, **values: Any) -> int:
    """Search the layer factors with which MODEL answers best from a long context."""
    gathered = Gathered(values, SHARED, "search")
    run = gathered.make(SearchRun)
    path = Path(run.output)
    directory = Path(run.study) if run.study else path.with_name(f"{path.stem}.study")
    workers, how, task = gathered.make(WorkersConfig), gathered.make(ModelConfig, model), gathered.task(run.seed)
    settings = starting_with(run.start, gathered.search(run.seed))

    inputs = {"MODEL": model, "guard_text": settings.guard_text, **data_files(task)}
    inputs |= {f"--start {file}": file for file in run.start}
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
        say(f"{run.output}: holds the base model's factors, all 1")
    else:
        if outcome.winner.curve is not None and (hint := at_the_bounds(outcome.winner.curve)):
            say(hint)
        say(f"{run.output}: written; next: {next_command(model, run.output)}")
    return NO_GAIN if require_gain and not outcome.verdict.recommended else 0


def next_command(model: str, curve: str) -> str:
    """Return what to do with a curve: store it in the model, or for one that may not be changed, in a preset."""
    name = reference(model) or model
    words = ["lrope-gguf", "write", f"./{name}" if name.startswith("-") else name, "--curve", curve]
    return command_line([*words, "--preset", "presets.ini"] if keeper(model) else words)


def starting_with(paths: Sequence[str], settings: SearchConfig) -> SearchConfig:
    """Return the settings of a search that begins with the curves of these files.

    Raises `LropeError`: a file that holds no curve that this search could find.
    """
    curves = []
    for path in paths:
        file = CurveFile.load(path)
        start: Start | None = file.control_points or file.layer_factors
        if file.rows and settings.scale != SCALES[0]:
            n_layer = len(next(iter(file.rows.values())))
            start = tuned((1.0,) * n_layer if start is None else file.factors_for(n_layer), file.rows)
        if start is None:
            raise LropeError(
                f"--start {path}: has no factors of layers to begin with; give a curve that has them, or --set scale"
            )
        settings.started(start, f"--start {path}")
        curves.append(start)
    return replace(settings, start=tuple(curves))


def at_the_bounds(curve: Curve) -> str | None:
    """Return a hint where a control point lies at the bounds, so that wider ones may find more; else None."""
    at = sorted({y for _, y in curve.control_points} & set(curve.bounds))
    points = " and ".join(f"{y:g}" for y in at)
    return (
        f"control points lie at the bounds ({points}); wider bounds may find more: --set bounds=LOW,HIGH"
        if at
        else None
    )
