"""Running programs, and being one: errors in one line, and tables in Markdown.

Needs nothing but the standard library, like `native_build`.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """Something cannot be run; the message says why."""


def run(
    command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None,
    check: bool = True, timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run ``command`` with ``env`` added to the environment and return its output."""
    words = [str(word) for word in command]
    try:
        result = subprocess.run(
            words, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )
    except FileNotFoundError:
        raise CommandError(f"{words[0]}: no such program") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{words[0]}: not done after {timeout:.0f} s") from None
    if check and result.returncode:
        output = "\n".join((result.stdout + result.stderr).strip().splitlines()[-25:])
        raise CommandError(f"{' '.join(words[:4])} ... failed:\n{output}")
    return result


def lrope_gguf(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command of the package in this process: for what depends on no terminal, signal or encoding."""
    from lrope_gguf.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess([*map(str, arguments)], status, out.getvalue(), err.getvalue())


def on_a_terminal(command: Sequence[str | Path], stream: str, columns: int, **options: Any) -> tuple[int, str]:
    """Run ``command`` with a pseudo-terminal for ``stream``: exit status, and what was shown there."""
    import fcntl
    import pty
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    options |= {"stdout": subprocess.DEVNULL, stream: terminal}
    process = subprocess.Popen(command, **options)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(controller, 1 << 16):
            shown += part
    os.close(controller)
    return process.wait(60), shown.decode()


def script(main: Callable[[], int | None]) -> None:
    """Run the main function of a script; a CommandError becomes one line and exit status 1."""
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"error: {error}")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
