"""Tables in Markdown, as all benchmarks print them: whole, or a head and then rows that come one by one."""

from __future__ import annotations

from collections.abc import Iterable


def head(*names: str) -> str:
    """The names of the columns and the line below them."""
    return f"{row(names)}\n|{'---|' * len(names)}"


def row(cells: Iterable[object]) -> str:
    """One row."""
    return f"| {' | '.join(map(str, cells))} |"


def table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A whole table."""
    return "\n".join((head(*names), *map(row, rows)))
