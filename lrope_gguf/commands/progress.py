"""A progress bar for long copies, on a terminal only."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

import click

_DELAY = 1.0  # seconds; what takes less needs no bar


class CopyProgress:
    """Shows how much of a copy is done and the time left. Call it with the bytes done and those in all.

    Nothing is shown in the first second, with `quiet`, or where the standard error is no terminal.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._bar: Any = None
        self._shown = not quiet and sys.stderr.isatty()
        self._start = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> CopyProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written."""
        if self._bar is None:
            if not self._shown or done == total or time.monotonic() - self._start < _DELAY:
                return
            bar = click.progressbar(length=total, file=sys.stderr, label=f"{total / 1e9:.3g} GB")
            self._bar = self._stack.enter_context(bar)
        self._bar.update(done - self._bar.pos)
