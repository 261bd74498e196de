"""`lrope-gguf write`: store layer factors in a model's metadata."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import (
    CURVE_KEY,
    ModelInfo,
    WritePlan,
    WriteResult,
    factors_key,
    plan_write,
    read_model,
    shortest,
    write_factors,
)


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list such as `1,1.05,0.98`, for argparse."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,1.05,0.98") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file; of a split model the first shard")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--curve", metavar="FILE", help="curve file, such as a search's best.json")
    what.add_argument("--factors", metavar="F0,F1,...", type=numbers, help="one factor a layer")
    what.add_argument("--uniform", metavar="S", type=float, help="the same factor for all layers")
    add_output_arguments(parser)
    parser.add_argument(
        "--mapped-ok", action="store_true", help="change MODEL in place even while a running program maps it"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `write` and `remove` share: where the result goes and what is said."""
    parser.add_argument("--output", metavar="OUT", help="write this file and leave MODEL as it is")
    parser.add_argument("--dry-run", action="store_true", help="say what would change and change nothing")
    parser.add_argument("--quiet", action="store_true", help="print notes and errors only")


def run(args: argparse.Namespace) -> int:
    """Write the factors, or plan it, and say what was done or would be."""
    info = read_model(args.model)
    if args.curve is not None:
        document, factors = curve_for(args.curve, info)
        curve_json = document.dumps(compact=True)
    else:
        factors = args.factors if args.uniform is None else (args.uniform,) * (info.n_layer or 1)
        curve_json = None
    if args.dry_run:
        plan = plan_write(args.model, factors, curve_json=curve_json, output=args.output, mapped_ok=args.mapped_ok)
        print_notes(plan.notes)
        if not args.quiet:
            print("\n".join(_plan_lines(plan, info)))
        return 0
    with CopyProgress(quiet=args.quiet) as progress:
        result = write_factors(
            args.model,
            factors,
            curve_json=curve_json,
            output=args.output,
            progress=progress,
            mapped_ok=args.mapped_ok,
        )
    print_notes(result.notes)
    if not args.quiet:
        done = {
            "in place": f"written in place ({result.bytes_written} bytes)",
            "rewritten": f"written ({result.bytes_written} bytes, {whole_file(result)})",
            "unchanged": "unchanged, it held them already",
        }[result.how]
        print(
            f"{result.path}: {done}; {_factors(result.factors)}; next: llama-server -m {shlex.quote(str(result.path))}"
        )
    return 0


def whole_file(result: WriteResult) -> str:
    """What the bytes of a rewritten file are."""
    if not result.bytes_shared:
        return "the whole file"
    return f"{result.bytes_shared} of them shared with the old file"


def print_notes(notes: Iterable[str]) -> None:
    """Print what the user should know besides, on the standard error."""
    for note in notes:
        print(f"lrope-gguf: note: {note}", file=sys.stderr)


def plan_line(plan: WritePlan) -> str:
    """What a write or removal would do to the file as a whole."""
    if plan.how == "unchanged":
        return f"{plan.path}: would stay unchanged"
    if plan.how == "in place":
        return f"{plan.path}: would be changed in place, {plan.bytes_written} bytes of it"
    data = {
        True: "the tensor data shared with the old file on the disk",
        False: "all of them copied",
        None: "the tensor data shared with the old file where the file system can, else copied",
    }[plan.shares]
    return f"{plan.path}: would be a new file of {plan.bytes_written} bytes, {data}"


def _plan_lines(plan: WritePlan, info: ModelInfo) -> list[str]:
    lines = [plan_line(plan)]
    key = factors_key(info.architecture or "")
    had_array = info.factors is not None or info.factors_error is not None
    for name, had, what in (
        (key, had_array, _factors(plan.factors)),
        (CURVE_KEY, info.curve_json is not None, "where the factors come from"),
    ):
        kept = plan.how == "unchanged" or (name == key and info.factors == plan.factors)
        lines.append(f"  {'keep' if kept else 'replace' if had else 'add'} {name}: {what}")
    return lines


def _factors(factors: tuple[float, ...]) -> str:
    return f"{len(factors)} layer factors from {shortest(min(factors))} to {shortest(max(factors))}"


def curve_for(path: str | Path, info: ModelInfo) -> tuple[CurveFile, tuple[float, ...]]:
    """The document of a curve file with its factors for a model listed, and these factors.

    Raises:
        LropeError: where the file is not valid or made for another architecture or number of layers.
    """
    document = CurveFile.load(path)
    for name in ("architecture", "block_count"):
        wanted, found = getattr(document, name), getattr(info, name)
        if None not in (wanted, found) and wanted != found:
            raise LropeError(f"{path}: is for {name} {wanted}, but {info.path} has {found}; give a curve made for it")
    try:
        factors = document.factors_for(info.n_layer or 1)
    except LropeError as error:
        raise LropeError(f"{path}: {error}; give a curve made for {info.path}") from None
    return replace(document, layer_factors=tuple(map(shortest, factors))), factors
