"""Text for a terminal: what stands in files made safe to show, values as a line of blocks, and ASCII for both."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans({**dict(zip(_BLOCKS, "_.-~=+*#", strict=True)), "é": "e", "…": "...", "\ufffd": "?"})


def printable(text: str, limit: int | None = None) -> str:
    """`text` with a mark for each control character, which could steer a terminal, and cut to `limit` characters."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def say(text: str, *, err: bool = False) -> None:
    """Print lines for people, on the standard output or error: all output that holds names and paths goes this way."""
    lines = "\n".join(printable(line) for line in text.split("\n"))
    print(lines, file=sys.stderr if err else sys.stdout, flush=True)


def command_line(words: Iterable[str]) -> str:
    """A command that can be pasted into a shell, whatever its words hold, and does nothing to a terminal."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    """A word in the quotes of bash, zsh and POSIX 2024 that take escapes; undecodable bytes are kept."""
    plain = {ord("\\"): "\\\\", ord("'"): "\\'"}
    parts = (
        char.translate(plain) if char.isprintable() else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in word
    )
    return f"$'{''.join(parts)}'"


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """One block character a value, from `low` to `high`; by default from the lowest to the highest value."""
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    return "".join(_BLOCKS[round(7 * (value - low) / (high - low)) if high > low else 3] for value in values)


def shown_in(text: str, encoding: str | None) -> str:
    """`text`, with ASCII characters for blocks and the like where `encoding` does not have them."""
    try:
        f"{_BLOCKS}é…".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII)
    return text
