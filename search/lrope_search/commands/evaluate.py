"""`lrope-gguf eval`: base model and layer factors on the same contexts, by depth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from lrope_gguf.commands.options import FILE, Command, Numbers, model_argument
from lrope_gguf.errors import LropeError
from lrope_gguf.text import say

from ..scores import Factors
from .options import (
    POSITIVE,
    first_task_options,
    llama_options,
    model_config,
    model_options,
    option,
    task_config,
    task_options,
)

if TYPE_CHECKING:
    from lrope_gguf.model_info import ModelInfo


@click.command("eval", cls=Command)
@model_argument
@option("--curve", metavar="FILE", type=FILE, help="curve file (the factors in MODEL, if it has any)")
@option("--factors", metavar="F0,F1,...", type=Numbers(), help="one factor a layer")
@option("--uniform", metavar="S", type=float, help="the same factor for all layers, as a side of its own")
@first_task_options
@option("--contexts", metavar="N", type=POSITIVE, default=8, help="contexts to ask (8)")
@option("--generate", is_flag=True, help="also let the model write its answers, and score these")
@option("--json", "as_json", is_flag=True, help="print JSON")
@option("--split", type=click.Choice(["search", "validation", "test"]), default="test", heading="Advanced: task",
        help="which contexts (test)")  # fmt: skip
@task_options
@model_options
@llama_options
def command(
    model: str,
    curve: str | None,
    factors: Factors | None,
    uniform: float | None,
    contexts: int,
    split: str,
    generate: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare MODEL with layer factors and without on the same contexts, by depth."""
    if curve is not None and factors is not None:
        raise click.UsageError("argument --factors: not allowed with argument --curve")
    how, what = model_config(model, values), task_config(values)

    from lrope_gguf.model_info import read_model

    from ..measurement import measure

    sides = _sides(read_model(model), curve, factors, uniform)
    found = measure(how, what, sides, contexts=contexts, split=split, generate=generate)
    if as_json:
        print(json.dumps({"model": model, **found.json()}, indent=2))
    else:
        table = found.table
        say(f"{model}: {table.n_probes} questions on {table.n_contexts} {split} contexts\n\n{found}")


def _sides(info: ModelInfo, curve: str | None, factors: Factors | None, uniform: float | None) -> Mapping[str, Factors]:
    """Return the factors of each side beside the base model's."""
    from lrope_gguf.commands.write import curve_for

    sides: dict[str, Factors] = {}
    if curve is not None:
        sides["curve"] = curve_for(curve, info)[1]
    elif factors is not None:
        try:
            sides["given"] = info.shaped(factors)  # "factors" is another key of the JSON
        except LropeError as error:
            raise LropeError(f"--factors: {error}") from None
    elif uniform is None and info.factors is not None:
        sides["file"] = info.factors[: info.n_layer]
    if uniform is not None:
        sides[f"uniform {uniform:g}"] = (uniform,) * (info.n_layer or 0)
    return sides
