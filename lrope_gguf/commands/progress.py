"""A progress bar for long copies, on a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_DELAY = 1.0  # seconds; what takes less needs no bar
_PAUSE = 0.1


class CopyProgress:
    """Shows done bytes, rate and time left, and nothing where `stream` is no terminal; gone when its block ends.

    Call it with the bytes done and those in all.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._stream = None if quiet or not stream.isatty() else stream
        self._clock = clock
        self._start = clock()
        self._next = self._start + _DELAY
        self._shown = False

    def __enter__(self) -> CopyProgress:
        """Begin; time counts from the construction on."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Clear the line."""
        if self._shown and self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written."""
        now = self._clock()
        if self._stream is None or (now < self._next and not (self._shown and done == total)):
            return
        seconds = max(now - self._start, 1e-9)
        rate = done / seconds
        if not self._shown and total - done < rate * _DELAY and done < total:
            return  # nearly done before the first line
        self._next = now + _PAUSE
        left = "to disk" if done == total else f"{_time((total - done) / rate)} left" if rate else "-- left"
        figures = f" {100 * done // max(total, 1):3}%  {size(done)} of {size(total)}  {size(rate)}/s  {left}"
        import shutil  # and with it four compressors

        room = shutil.get_terminal_size().columns - 1
        width = min(40, room - len(figures) - 2)
        full = width * done // max(total, 1)
        bar = f"[{'#' * full}{' ' * (width - full)}]" if width >= 8 else ""
        self._stream.write(f"\r{(bar + figures)[:room]}\x1b[K")
        self._stream.flush()
        self._shown = True


def size(count: float) -> str:
    """A number of bytes in words: 812 B, 4.10 kB, 253 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < (1000 if unit == "B" else 999.5):
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:.0f} TB"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
