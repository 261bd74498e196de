"""What benchmarks and studies print: tables in Markdown, the command, the machine, and errors in one line."""

from __future__ import annotations

import contextlib
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lrope_gguf.errors import LropeError


def head(*names: str) -> str:
    return f"{row(names)}\n|{'---|' * len(names)}"


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    return "\n".join((head(*names), *map(row, rows)))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def command() -> str:
    return f"`{shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`\n"


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def script(main: Callable[[], None]) -> None:
    """Run the main function of a benchmark; an LropeError becomes one line and exit status 1."""
    try:
        main()
    except LropeError as error:
        sys.exit(f"error: {error}")
