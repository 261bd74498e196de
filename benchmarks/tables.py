"""Tables in Markdown, as all benchmarks print them: a head, then rows that may come one by one."""

from __future__ import annotations

from collections.abc import Iterable


def head(*names: str) -> str:
    """The names of the columns and the line below them."""
    return f"{row(names)}\n|{'---|' * len(names)}"


def row(cells: Iterable[object]) -> str:
    """One row."""
    return f"| {' | '.join(map(str, cells))} |"
