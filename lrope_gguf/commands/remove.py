"""`lrope-gguf remove`: take the layer factors out of a model's metadata."""

from __future__ import annotations

import argparse

from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.commands.write import add_output_arguments, plan_line, print_notes, whole_file
from lrope_gguf.metadata import WritePlan, plan_remove, remove_factors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file; of a split model the first shard")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Remove the factors, or plan it, and say what was done or would be."""
    if args.dry_run:
        plan = plan_remove(args.model, args.output)
        print_notes(plan.notes)
        if not args.quiet:
            print("\n".join(_plan_lines(plan)))
        return 0
    with CopyProgress(quiet=args.quiet) as progress:
        result = remove_factors(args.model, args.output, progress=progress)
    print_notes(result.notes)
    if not args.quiet:
        if result.how == "unchanged":
            print(f"{result.path}: holds no layer factors; unchanged")
        else:
            shared = f", {whole_file(result)}" if result.bytes_shared else ""
            print(f"{result.path}: written without layer factors ({result.bytes_written} bytes{shared})")
    return 0


def _plan_lines(plan: WritePlan) -> list[str]:
    return [plan_line(plan), *(f"  remove {key}" for key in plan.removed or ["nothing: it holds no layer factors"])]
