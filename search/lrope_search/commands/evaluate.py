"""`lrope-gguf eval`: base model and layer factors on the same contexts, by depth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrope_gguf.commands.options import FILE, Command, Numbers, model_argument
from lrope_gguf.errors import LropeError
from lrope_gguf.files import check_output
from lrope_gguf.text import say

from ..scores import Factors
from .options import (
    POSITIVE,
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

if TYPE_CHECKING:
    from lrope_gguf.model_info import ModelInfo


@click.command("eval", cls=Command)
@model_argument
@option("--curve", metavar="FILE", type=FILE, multiple=True,
        help="curve file, as often as you like (the factors in MODEL, if it has any)")  # fmt: skip
@option("--factors", metavar="F0,F1,...", type=Numbers(), help="one factor a layer")
@option("--uniform", metavar="S", type=float, multiple=True,
        help="the same factor for all layers, as a side of its own; as often as you like")  # fmt: skip
@first_task_options
@option("--contexts", metavar="N", type=POSITIVE, default=8, help="contexts to ask (8)")
@option("--generate", is_flag=True, help="also let the model write its answers, and score these")
@option("--study", metavar="DIR", type=FILE,
        help="keep results here, and go on from them, with more sides and contexts if you like")  # fmt: skip
@option("--plot", metavar="FILE", type=FILE, help="draw accuracy by depth into a .png or .svg file")
@option("--json", "as_json", is_flag=True, help="print JSON")
@option("--split", type=click.Choice(["search", "validation", "test"]), default="test", heading="Advanced: task",
        help="which contexts (test)")  # fmt: skip
@task_options
@worker_options
@model_options
@llama_options
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
    workers = workers_config(values)
    how, what = model_config(model, values), task_config(values)
    if study is not None:
        check_study(study)
    if plot is not None:
        check_output(
            "--plot", plot, {"MODEL": model, **{f"--curve {file}": file for file in curve}, **data_files(what)}
        )
        from lrope_gguf.plot import picture_kind

        picture_kind(plot)

    from lrope_gguf.model_info import read_model

    from ..measurement import measure

    sides = _sides(read_model(model), curve, factors, uniform)
    found = measure(
        how, what, sides, contexts=contexts, split=split, generate=generate, directory=study, workers=workers
    )
    table = found.table
    if plot is not None:
        from ..report.pictures import plot_table

        questions = f"{table.n_probes} questions on {table.n_contexts} contexts"
        plot_table(plot, table, title=f"{Path(model).name}: {questions}")
    if as_json:
        print(json.dumps({"model": model, **found.json()}, indent=2))
    else:
        say(f"{model}: {table.n_probes} questions on {table.n_contexts} {split} contexts\n\n{found}")


def _sides(
    info: ModelInfo, curves: Sequence[str], factors: Factors | None, uniform: Sequence[float]
) -> Mapping[str, Factors]:
    """Return the factors of each side beside the base model's."""
    from lrope_gguf.commands.write import curve_for

    sides: dict[str, Factors] = {}
    for curve in curves:
        name = "curve" if len(curves) == 1 else _short(curve)
        if name in sides:
            raise LropeError(f"--curve {curve}: {name} is given already; give files of different names")
        sides[name] = curve_for(curve, info)[1]
    if factors is not None:
        try:
            sides["given"] = info.shaped(factors)  # "factors" is another key of the JSON
        except LropeError as error:
            raise LropeError(f"--factors: {error}") from None
    if not curves and factors is None and not uniform and info.factors is not None:
        sides["file"] = info.factors[: info.n_layer]
    return sides | {f"uniform {factor:g}": (factor,) * (info.n_layer or 0) for factor in uniform}


def _short(curve: str) -> str:
    """The name of a curve among several."""
    return f"curve {Path(curve).stem}" if curve.endswith(".json") else f"curve {curve}"
