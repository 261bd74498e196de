"""`lrope-gguf report`: what a study has found so far."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lrope_gguf.commands.show import sparkline
from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("study", metavar="STUDY", help="directory of a search, such as best.study")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the best curve, its results, and whether to use it."""
    path = Path(args.study) / "best.json"
    if not path.is_file():
        raise LropeError(f"{args.study}: no best.json there; give the directory of a search that has begun")
    document = CurveFile.load(path)
    provenance: dict[str, Any] = document.provenance if isinstance(document.provenance, dict) else {}
    results = provenance.get("results", {})
    if args.json:
        print(json.dumps(results, indent=2))
        return 0
    print("\n".join(_lines(document, provenance, results)))
    return 0


def _lines(document: CurveFile, provenance: dict[str, Any], results: dict[str, Any]) -> list[str]:
    config = provenance.get("config", {})
    lines = [f"{section:<11} {_words(config[section])}" for section in ("model", "task") if section in config]
    if document.curve is not None:
        factors = document.curve.factors(document.block_count or 32).tolist()
        lines.append(f"factors     {sparkline(factors)} from {min(factors):.4g} to {max(factors):.4g}")
        points = ", ".join(f"({x:.3g}, {y:.4g})" for x, y in document.curve.control_points)
        lines.append(f"curve       control points {points}")
    for split in ("search", "validation"):
        if split in results:
            lines.append(
                f"{split:<11} {results[split]['fitness']:+.4f} nats a token on {results[split]['contexts']} contexts"
            )
    test = results.get("test")
    if test is None:
        return [*lines, "the search has not ended: the same command resumes it"]
    lines += ["", "depth   base  curve   gain, points"]
    for row in test.get("by_depth", ()):
        gain = "  ".join(f"{100 * value:+6.1f}" for value in row["accuracy_gain"])
        lines.append(f"{row['depth']:5.2f}  {row['base_accuracy']:5.1%}  {row['accuracy']:5.1%}  {gain}")
    return [*lines, "", results["verdict"]]


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, ""))
