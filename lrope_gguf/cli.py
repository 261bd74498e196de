"""The `lrope-gguf` command. Only the chosen subcommand's module is imported, so that each starts fast."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

import click

from lrope_gguf.errors import LropeError
from lrope_gguf.text import say

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_PROGRAM = "lrope-gguf"
_COMPLETE = "_LROPE_GGUF_COMPLETE"  # click's own name: the variable by which a shell asks for completions

COMMANDS = {
    "search": ("lrope_search.commands.search", "search layer factors for a model and a task"),
    "eval": ("lrope_search.commands.evaluate", "compare base model and layer factors on a task"),
    "write": ("lrope_gguf.commands.write", "store factors, query scales and a RoPE scaling in a model"),
    "show": ("lrope_gguf.commands.show", "show a model's RoPE settings, factors and query scales"),
    "remove": ("lrope_gguf.commands.remove", "take what write has stored out of a model"),
    "report": ("lrope_search.commands.report", "make the report of a search"),
    "demo": ("lrope_search.commands.demo", "search, write and serve on a small real model"),
}
"""Name, module and summary of each; the module's ``command`` is the click command."""


class LazyGroup(click.Group):
    """The commands of `COMMANDS`; listing and completing their names imports none of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Ask for a command where none is given."""
        if not args and not ctx.resilient_parsing:
            ctx.fail(f"give a command: {', '.join(COMMANDS)}")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; None: no such command. Raises `LropeError`: a package is missing."""
        if cmd_name not in COMMANDS:
            return None
        try:
            module = import_module(COMMANDS[cmd_name][0])
        except ModuleNotFoundError as error:
            if ctx.resilient_parsing:  # completing a word: nothing to say
                return None
            raise _missing(cmd_name, error) from error
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names and summaries."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name or an option of the group."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lrope-gguf", message="lrope-gguf %(version)s")
def lrope_gguf() -> None:
    """Layer-specific RoPE scaling for GGUF models: search it, write it, serve it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (an error), 2 (usage) or 130 (interrupted)."""
    _open_streams()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        with suppress(OSError):
            say(shown.getvalue().rstrip("\n"), err=True)
        return error.exit_code
    except LropeError as error:
        _say(" ".join(str(error).splitlines()))
        return 1
    except KeyboardInterrupt as error:
        _say("interrupted")
        return next((code for code in error.args if isinstance(code, int)), 130)
    except BrokenPipeError:  # the reader has seen enough
        return 141
    except OSError as error:
        where = error.filename or ("standard output" if _output_fails() else "")
        _say(f"{where}: {error.strerror or error}" if where else f"{error.strerror or error}")
        return 1
    finally:
        if _output_fails():  # else the interpreter would try once more at its end
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Replace closed standard streams: the input is empty, the output cannot be written, errors are dropped."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        for number in range(3):  # else the next file opened would get the number, and be written to by mistake
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
        sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # names that the terminal cannot show get question marks


def _output_fails() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _say(message: str) -> None:
    with suppress(OSError):
        say(f"lrope-gguf: {message}", err=True)


def _run(arguments: list[str]) -> int:
    """Run a command. `click.Command.main` would do so too, but hides the exit status of an interrupt."""
    if instruction := os.environ.get(_COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(lrope_gguf, {}, _PROGRAM, _COMPLETE, instruction)
    chosen = next((word for word in arguments if not word.startswith("-")), "")
    try:
        with lrope_gguf.make_context(_PROGRAM, arguments) as context:
            return int(lrope_gguf.invoke(context) or 0)
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code
    except ModuleNotFoundError as error:
        if chosen not in COMMANDS:
            raise
        raise _missing(chosen, error) from error


def _missing(command: str, error: ModuleNotFoundError) -> Exception:
    """What to say where a module is missing: an extra to install, unless it is one of our own."""
    package = (error.name or "").partition(".")[0]
    if package == "lrope_gguf" or (package == "lrope_search" and error.name != package):
        return error
    extra = "demo" if command == "demo" else "search"
    wanted = "'lrope-gguf'" if COMMANDS[command][0].startswith("lrope_gguf") else f"'lrope-gguf[{extra}]'"
    return LropeError(f"{command}: needs the Python package {package}; pip install {wanted}")
