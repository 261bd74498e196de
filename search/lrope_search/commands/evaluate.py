"""`lrope-gguf eval`: base model and layer factors on the same contexts, by depth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrope_gguf.commands.options import FILE, Numbers, model_argument
from lrope_gguf.errors import LropeError
from lrope_gguf.files import check_output
from lrope_gguf.text import say

from ..evaluation.settings import ModelConfig
from ..scores import Factors, tuned
from ..workers.settings import WorkersConfig
from . import options
from .options import POSITIVE, Gathered, RunConfig, SettingsCommand, config_options, option, options_of, task_options

if TYPE_CHECKING:
    from lrope_gguf.model_info import ModelInfo


@click.command("eval", cls=SettingsCommand)
@model_argument
@option("--curve", metavar="FILE", type=FILE, multiple=True,
        help="curve file; may be repeated (the factors in MODEL, if it has any)")  # fmt: skip
@option("--factors", metavar="F0,F1,...", type=Numbers(), help="one factor a layer")
@option("--uniform", metavar="S", type=float, multiple=True,
        help="also compare this factor in all layers that rotate over the whole context; may be repeated")  # fmt: skip
@options_of(RunConfig)
@task_options
@option("--contexts", metavar="N", type=POSITIVE, default=8, help="number of contexts (8)")
@option("--split", type=click.Choice(["search", "validation", "test"]), default="test", help="which contexts (test)")
@option("--generate", is_flag=True, help="also let the model write its answers, and score these")
@option("--study", metavar="DIR", type=FILE,
        help="keep results here and reuse them; more curves and contexts can be added")  # fmt: skip
@option("--plot", metavar="FILE", type=FILE, help="draw accuracy by depth into a .png or .svg file")
@option("--json", "as_json", is_flag=True, help="print JSON")
@options_of(WorkersConfig, ModelConfig)
@config_options
def command(
    model: str,
    curve: tuple[str, ...],
    factors: Factors | None,
    uniform: tuple[float, ...],
    study: str | None,
    plot: str | None,
    contexts: int,
    split: str,
    generate: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare MODEL with layer factors and without on the same contexts, by depth."""
    if curve and factors is not None:
        raise click.UsageError("argument --factors: not allowed with argument --curve")
    gathered = Gathered(values, (RunConfig, ModelConfig, WorkersConfig), "eval")
    run = gathered.make(RunConfig)
    workers, how, what = gathered.make(WorkersConfig), gathered.make(ModelConfig, model), gathered.task(run.seed)
    if study is not None:
        options.check_study(study)
    if plot is not None:
        inputs = {"MODEL": model, **{f"--curve {file}": file for file in curve}, **options.data_files(what)}
        check_output("--plot", plot, inputs)
        from lrope_gguf.plot import picture_kind

        picture_kind(plot)

    from lrope_gguf.model_info import read_model

    from ..measurement import measure

    sides = _sides(read_model(model), curve, factors, alone=not uniform)
    which: dict[str, Any] = {"contexts": contexts, "split": split, "generate": generate}
    found = measure(how, what, sides, uniform=uniform, directory=study, workers=workers, **which)
    table = found.table
    if plot is not None:
        from ..report.pictures import plot_table

        questions = f"{table.n_probes} questions on {table.n_contexts} contexts"
        plot_table(plot, table, title=f"{Path(model).name}: {questions}")
    if as_json:
        print(json.dumps({"model": model, **found.json()}, indent=2))
    else:
        say(f"{model}: {table.n_probes} questions on {table.n_contexts} {split} contexts\n\n{found}")


def _sides(info: ModelInfo, curves: Sequence[str], factors: Factors | None, *, alone: bool) -> Mapping[str, Factors]:
    """Return the factors of each side beside the base model's; what the file holds if nothing else is asked for."""
    from .curve_files import factors_of_curve

    sides: dict[str, Factors] = {}
    for curve in curves:
        name = "curve" if len(curves) == 1 else f"curve {Path(curve).stem if curve.endswith('.json') else curve}"
        if name in sides:
            raise LropeError(f"--curve {curve}: {name} is given already; give files of different names")
        sides[name] = factors_of_curve(curve, info)
    if factors is not None:
        try:
            sides["given"] = info.shaped(factors)  # "factors" is another key of the JSON
        except LropeError as error:
            raise LropeError(f"--factors: {error}") from None
    if alone and not curves and factors is None and (info.factors is not None or info.rows):
        kept = {name: rows[: info.n_layer] for name, rows in info.rows.items()}
        sides["file"] = tuned((info.factors or (1.0,) * (info.n_layer or 0))[: info.n_layer], kept)
    return sides
