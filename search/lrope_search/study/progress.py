"""Progress for people: a bar on a terminal, plain lines elsewhere, and the same lines in the log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Never, TextIO

from tqdm import tqdm

from lrope_gguf.text import printable


class Progress:
    """Counts evaluations done of those planned; results replayed from a study do not count as speed.

    Args:
        log: Takes every line too (`Study.log`).
        stream: Where to show it; a bar if it is a terminal.
        quiet: Show nothing; lines still go to ``log``.
    """

    def __init__(
        self, log: Callable[[str], None] | None = None, *, stream: TextIO | None = None, quiet: bool = False
    ) -> None:
        self._log = log
        self._stream = None if quiet else stream or sys.stderr
        self._bar: tqdm[Never] | None = None
        self._total = self._done = self._fresh = 0
        self._start, self._unit = time.monotonic(), "evaluation"

    def start(self, total: int, unit: str = "evaluation") -> None:
        """Begin, with ``total`` evaluations planned, or what else ``unit`` says."""
        self._total, self._start, self._unit = total, time.monotonic(), unit
        self._done = self._fresh = 0
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=total, unit=unit[:4], file=self._stream, smoothing=0, dynamic_ncols=True)

    def expect(self, total: int) -> None:
        """Change the number of evaluations planned."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def advance(self, *, replayed: bool = False) -> None:
        """Count one evaluation."""
        self._done += 1
        self._fresh += not replayed
        if self._bar is not None and replayed:
            self._bar.initial += 1  # tqdm's rate is (n - initial) / time
            self._bar.n += 1
            self._bar.last_print_n = self._bar.n
        elif self._bar is not None:
            self._bar.update()

    def best(self, text: str) -> None:
        """Show ``text`` beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def line(self, text: str) -> None:
        """Show one line and log it."""
        if self._log is not None:
            self._log(text)
        if self._bar is not None:
            self._bar.write(printable(text), file=self._stream)
        elif self._stream is not None:
            print(printable(text), file=self._stream, flush=True)

    def status(self) -> str:
        """Return how far it is, how fast, and how long it will take, in words."""
        text = f"{self._done}/{self._total} {self._unit}s"
        elapsed = time.monotonic() - self._start
        if self._fresh and elapsed > 0.0:
            left = (self._total - self._done) * elapsed / self._fresh
            text += f", {60.0 * self._fresh / elapsed:.1f} a minute, {tqdm.format_interval(left)} left"
        return text

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
