"""`lrope-gguf remove`: take factors, query scales and a written RoPE scaling out of a model's metadata."""

from __future__ import annotations

import click

from lrope_gguf.commands.options import model_argument, output_options
from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.commands.write import change_line, plan_line, report, whole_file
from lrope_gguf.metadata import WriteResult, plan_remove, remove_factors
from lrope_gguf.model_info import ModelInfo, read_model

_NOTHING = "has no factors, query scales or scaling that write has added"


@click.command("remove")
@model_argument
@output_options
def command(model: str, output: str | None, dry_run: bool, quiet: bool) -> None:
    """Take factors, query scales and a written RoPE scaling out of MODEL: the original again."""
    if dry_run:
        plan = plan_remove(model, output)
        removed = [f"  remove {key}" for key in plan.removed]
        restored = [f"  {change_line(change)}" for change in plan.changes]
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
    words = {"factors of KV heads": "head_factors", "query scales": "query_scales"}
    had = [said for said, name in words.items() if name in info.rows or info.error_of(name)]
    if info.factors or info.factors_error or not (had or scaled):
        had.insert(0, "layer factors")
    shared = f", {whole_file(result)}" if result.bytes_shared else ""
    *others, last = [*had, *(["RoPE scaling"] if scaled else [])]
    what = " and ".join(filter(None, (", ".join(others), last)))
    return f"{result.path}: written without {what} ({result.bytes_written} bytes{shared})"
