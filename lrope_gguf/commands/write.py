"""`lrope-gguf write`: store layer factors in a model's metadata."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import ModelInfo, read_model, shortest, write_factors


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
    parser.add_argument("--output", metavar="OUT", help="write this file and leave MODEL as it is")


def run(args: argparse.Namespace) -> int:
    """Write the factors and say what was done."""
    info = read_model(args.model)
    if args.curve is not None:
        document, factors = curve_for(args.curve, info)
        curve_json = document.dumps(compact=True)
    else:
        factors = args.factors if args.uniform is None else (args.uniform,) * (info.n_layer or 1)
        curve_json = None
    result = write_factors(args.model, factors, curve_json=curve_json, output=args.output)
    low, high = shortest(min(result.factors)), shortest(max(result.factors))
    done = {
        "in place": f"written in place ({result.bytes_written} bytes)",
        "rewritten": f"written ({result.bytes_written} bytes, the whole file)",
        "unchanged": "unchanged, it held them already",
    }[result.how]
    print(
        f"{result.path}: {done}; {len(result.factors)} layer factors from {low} to {high}; "
        f"next: llama-server -m {shlex.quote(str(result.path))}"
    )
    return 0


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
