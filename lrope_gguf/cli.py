"""The `lrope-gguf` command. Only the chosen subcommand's module is imported, so that each starts fast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType

from lrope_gguf.errors import LropeError

COMMANDS = {
    "write": ("lrope_gguf.commands.write", "store layer factors in a model"),
    "show": ("lrope_gguf.commands.show", "show a model's RoPE settings and layer factors"),
    "remove": ("lrope_gguf.commands.remove", "take the layer factors out of a model"),
    "search": ("lrope_search.commands.search", "search layer factors for a model and a task"),
    "eval": ("lrope_search.commands.evaluate", "compare base model and layer factors on a task"),
    "report": ("lrope_search.commands.report", "make the report of a search"),
    "demo": ("lrope_search.commands.demo", "search, write and serve on a small real model"),
    "completion": ("lrope_gguf.commands.completion", "print a script that completes commands in a shell"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (an error), 2 (usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # names that the terminal cannot show get question marks
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except LropeError as error:
        print("lrope-gguf:", *str(error).splitlines(), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("lrope-gguf: interrupted", file=sys.stderr)
        return next((code for code in error.args if isinstance(code, int)), 130)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"lrope-gguf: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return status


def build_parser(modules: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    """The parser of the command line, with the arguments of those commands whose modules are given."""
    parser = argparse.ArgumentParser(
        prog="lrope-gguf", description="Layer-specific RoPE scaling for GGUF models: search it, write it, serve it."
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in modules:
            modules[name].add_arguments(command)
    return parser


def _run(arguments: Sequence[str]) -> int:
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    module = _load(chosen, COMMANDS[chosen][0]) if chosen in COMMANDS else None
    parser = build_parser({} if module is None or chosen is None else {chosen: module})
    options = parser.parse_args(arguments)
    if options.version:
        from lrope_gguf import __version__

        print(f"lrope-gguf {__version__}")
        return 0
    if module is None:
        parser.error("give a command")
    try:
        status: int = module.run(options)
    except ModuleNotFoundError as error:
        raise _missing(options.command, error) from error
    return status


def _load(name: str, module_name: str) -> ModuleType:
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        raise _missing(name, error) from error


def _missing(command: str, error: ModuleNotFoundError) -> Exception:
    """What to say where a module is missing: an extra to install, unless it is one of our own."""
    package = (error.name or "").partition(".")[0]
    if package == "lrope_gguf" or (package == "lrope_search" and error.name != package):
        return error
    extra = "demo" if command == "demo" else "search"
    wanted = "'lrope-gguf'" if COMMANDS[command][0].startswith("lrope_gguf") else f"'lrope-gguf[{extra}]'"
    return LropeError(f"{command}: needs the Python package {package}; pip install {wanted}")
