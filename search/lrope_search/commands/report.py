"""`lrope-gguf report`: what a study has found so far, as text and as a page with pictures."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import click

from lrope_gguf.files import check_output
from lrope_gguf.plot import PlotUnavailableError
from lrope_gguf.text import command_line, say


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path),
    help="page to write (STUDY/report.html); PNGs go beside it",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print JSON; write a page only if --output is given")
@click.option("--mlflow", is_flag=True, help="log the study to MLflow as a run (where MLFLOW_TRACKING_URI says)")
@click.option("--open", "show", is_flag=True, help="show the page in a browser")
def command(study: Path, output: Path | None, as_json: bool, mlflow: bool, show: bool) -> int:
    """Show what a search has found so far, as text and as a page with pictures.

    STUDY is the directory of a search, such as best.study.
    """
    if output is not None:
        kept = ("config.json", "evaluations.jsonl", "candidates.jsonl", "guard.json", "looks.jsonl", "objective.json",
                "best.json", "log.txt")  # fmt: skip
        check_output("--output", output, {f"STUDY's {name}": study / name for name in kept})

    from ..report.page import write_report
    from ..report.reading import read_study
    from ..report.text import summary_lines

    summary = read_study(study)
    if as_json:
        print(json.dumps(summary.json(), indent=2))
    else:
        say("\n".join(summary_lines(summary)))
    if not as_json or output is not None or show:
        try:
            page = write_report(summary, output)
        except PlotUnavailableError as error:
            say(f"lrope-gguf: {error}", err=True)
            if output is not None or show:
                return 1
        else:
            say(f"{page}: written, with its pictures as PNG beside it", err=as_json)
            if summary.recommended and not as_json:
                command = command_line(["lrope-gguf", "write", "MODEL", "--curve", str(study / "best.json")])
                say(f"next: {command}")
            if show:
                webbrowser.open(page.absolute().as_uri())
    if mlflow:
        from ..report.tracking import log_study

        say(f"mlflow: run {log_study(summary)}", err=as_json)
    return 0
