"""`lrope-gguf report`: what a study has found so far, as text and as a page with pictures."""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrope_gguf.plot import PlotUnavailableError

from ..report.page import NAME, summary_lines, write_report
from ..report.summary import Cost, StudySummary, summarise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("study", metavar="STUDY", help="directory of a search, such as best.study")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"page to write (STUDY/{NAME}); PNGs go beside it")
    parser.add_argument("--json", action="store_true", help="print JSON; write a page only if --output is given")
    parser.add_argument(
        "--mlflow", action="store_true", help="log the study to MLflow as a run (where MLFLOW_TRACKING_URI says)"
    )
    parser.add_argument("--open", action="store_true", help="show the page in a browser")


def run(args: argparse.Namespace) -> int:
    """Print what was found, and write the page."""
    directory = Path(args.study)
    study = summarise(directory)
    print(json.dumps(_json(study), indent=2) if args.json else "\n".join(summary_lines(study)))
    sys.stdout.flush()
    if not args.json or args.output is not None or args.open:
        status = _page(args, directory, study)
        if status != 0:
            return status
    if args.mlflow:
        from ..report.tracking import log_study

        print(f"mlflow: run {log_study(directory)}", file=sys.stderr if args.json else sys.stdout)
    return 0


def _page(args: argparse.Namespace, directory: Path, study: StudySummary) -> int:
    try:
        page = write_report(directory, args.output)
    except PlotUnavailableError as error:
        print(f"lrope-gguf: {error}", file=sys.stderr)
        return 1 if args.output is not None or args.open else 0
    print(f"{page}: written, with its pictures as PNG beside it", file=sys.stderr if args.json else sys.stdout)
    if study.recommended and not args.json:
        print(f"next: lrope-gguf write MODEL --curve {directory / 'best.json'}")
    if args.open:
        webbrowser.open(page.absolute().as_uri())
    return 0


def _json(study: StudySummary) -> dict[str, Any]:
    """The results of ``best.json`` and what the evaluations add; finite numbers only."""
    return study.results | {
        "finished": study.finished,
        "recommended": study.recommended,
        "verdict": study.verdict,
        "candidates": len(study.trials),
        "accuracy": None if study.table is None else {"split": study.table_split, **study.table.json()},
        "kl": study.guard,
        "cost": [_cost(cost) for cost in (*study.costs, study.total)],
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return asdict(cost) | {"tokens_per_second": cost.rate if cost.seconds > 0.0 else None}
