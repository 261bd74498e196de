"""What the commands' options share: values that click checks, and options of several commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

FILE = click.Path(readable=False)
"""A file name that the shell completes. Whoever opens the file reports what is wrong with it."""

_NUMBER = re.compile(r" *-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)? *")


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A list such as ``1,1.05,0.98``; a tuple of floats. The numbers are JSON's, as for ``--rope-layer-factors``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read the list."""
        if not isinstance(value, str):
            return tuple(map(float, value))
        parts = value.split(",")
        if not all(map(_NUMBER.fullmatch, parts)):
            self.fail(f"{value!r} is not a list of numbers such as 1,1.05,0.98", param, ctx)
        return tuple(map(float, parts))


class Model(click.Path):
    """A model: a file, or ``user/repo[:quant]`` of one that is in a cache; the file's name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find the file."""
        value = super().convert(value, param, ctx)
        if not isinstance(value, str) or "/" not in value or value.endswith(".gguf"):
            return value
        from lrope_gguf.stores import find_model

        return find_model(value)


_MODEL = """

    MODEL is a GGUF file (of a split model the first shard), or user/repo[:quant] of a model that llama-server -hf or hf
    download has downloaded.
    """


def model_argument(function: Function) -> Function:
    """Declare MODEL, and say in the command's help what it may be."""
    function.__doc__ = f"{function.__doc__ or ''}{_MODEL}"
    return click.argument("model", type=Model(readable=False))(function)


def output_options(function: Function) -> Function:
    """Declare what `write` and `remove` share: where the result goes and what is said."""
    function = click.option("--quiet", is_flag=True, help="print notes and errors only")(function)
    function = click.option("--dry-run", is_flag=True, help="say what would change, and change nothing")(function)
    told = "write to this file and leave MODEL unchanged"
    return click.option("--output", type=FILE, metavar="OUT", help=told)(function)


def exactly_one(*, required: bool = True, **values: object) -> None:
    """Take one of some options, given by their parameters' names; None stands for one that is not given.

    Raises:
        click.UsageError: several are given, or none though one is required.
    """
    options = {name: f"--{name.replace('_', '-')}" for name in values}
    given = [options[name] for name, value in values.items() if value is not None]
    if required and not given:
        raise click.UsageError(f"one of the arguments {' '.join(options.values())} is required")
    if len(given) > 1:
        raise click.UsageError(f"argument {given[1]}: not allowed with argument {given[0]}")
