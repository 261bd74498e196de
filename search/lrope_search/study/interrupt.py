"""Handling of Ctrl-C and `kill`, repeated ones too."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What ends a program, and how Python meets it if nobody asks for something else."""
_STATUS = 128  # and the signal's number: a shell's exit status for it


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM raise `KeyboardInterrupt`, and nothing disturb what it sets going: the end.

    SIGTERM is what batch systems and `kill` send, also to a job in the background, which knows no Ctrl-C. The
    exception's argument is the exit status. The second signal only says that the end is near; the third ends the
    process at once, which costs no more than a kill: what is in flight. Does nothing outside the main thread, or to
    signals for which the program already does something else.
    """
    here = threading.current_thread() is threading.main_thread()
    mine = {number: usual for number, usual in _SIGNALS.items() if here and signal.getsignal(number) is usual}
    count = 0

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt(_STATUS + number)
        if count == 2:
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping; interrupt once more to end at once\n"
            )
        else:
            os._exit(_STATUS + number)

    for number in mine:
        signal.signal(number, interrupted)
    try:
        yield
    finally:
        # after the first, Python is on its way out, which a late second one must not turn into a death by signal
        for number, usual in mine.items():
            signal.signal(number, signal.SIG_IGN if count else usual)
