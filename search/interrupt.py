"""Ctrl-C, pressed once or more often than once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_INTERRUPTED = 130  # a shell's exit status for it


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C raise `KeyboardInterrupt`, and nothing disturb what it sets going: the program's end.

    The second one only says that the end is near; the third ends the process at once, which costs no more than a kill:
    what is in flight. Does nothing outside the main thread, or where the program already does something else.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    count = 0

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt
        if count == 2:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping; once more to end at once\n")
        else:
            os._exit(_INTERRUPTED)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        # after the first, Python is on its way out, which a late second one must not turn into a death by signal
        signal.signal(signal.SIGINT, signal.SIG_IGN if count else signal.default_int_handler)
