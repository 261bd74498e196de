"""`lrope-gguf remove`: take the layer factors and a written RoPE scaling out of a model's metadata."""

from __future__ import annotations

import click

from lrope_gguf.commands.options import Command, model_argument, output_options
from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.commands.write import change_line, plan_line, report, whole_file
from lrope_gguf.metadata import WriteResult, plan_remove, remove_factors


@click.command("remove", cls=Command)
@model_argument
@output_options
def command(model: str, output: str | None, dry_run: bool, quiet: bool) -> None:
    """Take the layer factors and a written RoPE scaling out of MODEL: the original again."""
    if dry_run:
        plan = plan_remove(model, output)
        removed = [f"  remove {key}" for key in plan.removed]
        restored = [f"  {change_line(change)}" for change in plan.changes]
        lines = [*removed, *restored] or [
            "  remove nothing: it holds no layer factors, and no scaling that write has added"
        ]
        report(plan.notes, [] if quiet else [plan_line(plan), *lines])
        return
    with CopyProgress(quiet=quiet) as progress:
        result = remove_factors(model, output, progress=progress)
    report(result.notes, [] if quiet else [_done(result)])


def _done(result: WriteResult) -> str:
    if result.how == "unchanged":
        return f"{result.path}: holds no layer factors; unchanged"
    shared = f", {whole_file(result)}" if result.bytes_shared else ""
    return f"{result.path}: written without layer factors ({result.bytes_written} bytes{shared})"
