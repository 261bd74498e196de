"""Running programs, and being one: errors in one line, and tables in Markdown.

Needs nothing but the standard library, like `native_build`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


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
