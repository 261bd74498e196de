"""`lrope-gguf remove`: take the layer factors out of a model's metadata."""

from __future__ import annotations

import argparse

from lrope_gguf.metadata import remove_factors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file; of a split model the first shard")
    parser.add_argument("--output", metavar="OUT", help="write this file and leave MODEL as it is")


def run(args: argparse.Namespace) -> int:
    """Remove the factors and say what was done."""
    result = remove_factors(args.model, args.output)
    if result.how == "unchanged":
        print(f"{result.path}: holds no layer factors; unchanged")
    else:
        print(f"{result.path}: written without layer factors ({result.bytes_written} bytes)")
    return 0
