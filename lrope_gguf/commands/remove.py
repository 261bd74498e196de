"""`lrope-gguf remove`: take layer factors, a written RoPE scaling and folded query scales out of a model."""

from __future__ import annotations

import click

from lrope_gguf.commands.options import model_argument, output_options
from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.commands.write import change_line, plan_line, report, whole_file
from lrope_gguf.metadata import WriteResult, plan_remove, remove_factors
from lrope_gguf.model_info import ModelInfo, read_model

_NOTHING = "has no layer factors and no scaling that write has added"


@click.command("remove")
@model_argument
@output_options
def command(model: str, output: str | None, dry_run: bool, quiet: bool) -> None:
    """Take layer factors, a written RoPE scaling and folded query scales out of MODEL: the original again."""
    if dry_run:
        plan = plan_remove(model, output)
        removed = [f"  remove {key}" for key in plan.removed]
        restored = [f"  {change_line(change)}" for change in plan.changes]
        if plan.folding is not None:
            restored += [f"  restore {made.name}" for file in plan.folding.made for made in file]
        lines = [plan_line(plan), *([*removed, *restored] or [f"  remove nothing: it {_NOTHING}"])]
        report(plan.notes, [] if quiet else lines)
        return
    info = read_model(model)
    with CopyProgress(quiet=quiet) as progress:
        result = remove_factors(model, output, progress=progress)
    report(result.notes, [] if quiet else [_done(result, info)])


def _done(result: WriteResult, info: ModelInfo) -> str:
    if result.how == "unchanged":
        return f"{result.path}: {_NOTHING}; unchanged"
    scaled = info.rope_before is not None or info.rope_dynamic_factor is not None
    folded = info.folded is not None
    had = {
        "layer factors": info.curve_json is not None or not (scaled or folded),
        "RoPE scaling": scaled,
        "query scales": folded,
    }
    shared = f", {whole_file(result)}" if result.bytes_shared else ""
    what = " and ".join(name for name, there in had.items() if there)
    return f"{result.path}: written without {what} ({result.bytes_written} bytes{shared})"
