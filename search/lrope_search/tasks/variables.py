"""Variable tracking."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..settings import setting
from .generated import GeneratedTask, distinct, listing
from .settings import POSITIONS, SizedTaskConfig, positions_setting, probes_setting
from .sizing import TokenLimit
from .task import Context, check_probes, places

DEFAULT_LINES = 100
"""Of a context."""
_LINKS = 5  # statements of a chain: a number, and four hops
_N_CALIBRATION = 4  # chains
_LETTERS = 5  # of a name

_TASK = (
    "A line that begins with VAR gives a variable a number, or the value of another variable. Find all variables that "
    "have the number asked for, and name them in the order of their lines; all other lines mean nothing."
)
_THINGS = ("boat", "book", "chair", "door", "hat", "lamp", "road", "roof", "stone", "table", "tree", "wall")
_KINDS = ("big", "dry", "far", "long", "new", "old", "open", "plain", "round", "short", "small", "wide")
_COLOURS = ("black", "blue", "brown", "green", "grey", "pink", "red", "white", "yellow")


class VariableTask(GeneratedTask):
    """Variable tracking, ``vt`` of RULER (Hsieh et al., arXiv 2404.06654, section 3), in words of our own.

    Among lines of noise a variable is given a number, a second one the value of the first, and so on: a chain of four
    hops, whose five names are asked for by the number. Before the context stands a small one with its answer. A chain
    has a statement in each fifth of the context, in order. RULER has one chain, placed freely; several are all asked
    for, as the probes of one context. A probe's depth is the mean of its statements'.
    """

    name = "vt"
    unit = "lines"
    least = _LINKS

    def __init__(
        self,
        n_lines: int | None = None,
        *,
        probes: int | None = None,
        positions: str = POSITIONS[0],
        seed: int = 0,
        limit: TokenLimit | None = None,
    ) -> None:
        """Make contexts of ``n_lines`` lines from ``seed``, or as many as the chains need; see `VariableConfig`.

        ``limit``, in place of ``n_lines``: as many lines as fit. Raises `LropeError`: wrong numbers.
        """
        check_probes(probes)
        self._n_chains, self._positions = 1 if probes is None else probes, positions
        least = _LINKS * self._n_chains
        self.least_is = f"{'a chain' if self._n_chains == 1 else f'{self._n_chains} chains'} of {_LINKS} lines"
        n_lines = max(DEFAULT_LINES, least) if n_lines is None else n_lines
        super().__init__(n_lines, least, most=None, seed=seed, limit=limit)

    def calibration(self) -> Context:
        """Return a context of four chains and nothing else."""
        return self._with("calibration", 0, _LINKS * _N_CALIBRATION, _N_CALIBRATION, "even")

    def _make(self, split: str, index: int, size: int) -> Context:
        return self._with(split, index, size, self._n_chains, self._positions)

    def _with(self, split: str, index: int, n_lines: int, n_chains: int, positions: str) -> Context:
        generator = self._generator(split, index)
        numbers = distinct(generator, split, _LINKS * (n_chains + 1), len(string.ascii_uppercase) ** _LETTERS)
        names = list(map(_name, numbers))
        values = [str(10000 + n) for n in distinct(generator, split, n_chains + 1, 90000)]
        (example, *chains) = [names[i : i + _LINKS] for i in range(0, len(names), _LINKS)]
        (shown, *asked) = values
        order = [chain for _ in range(_LINKS) for chain in generator.permutation(n_chains).tolist()]
        where = places(split, index, n_lines, len(order), self._seed, positions)

        statements = [iter(_statements(chain, value)) for chain, value in zip(chains, asked, strict=True)]
        at = {place: next(statements[chain]) for (place, _), chain in zip(where, order, strict=True)}
        noise = _noise(generator, n_lines)
        lines = "\n".join(at.get(place, noise[place]) for place in range(n_lines))
        depths = [[depth for (_, depth), own in zip(where, order, strict=True) if own == i] for i in range(n_chains)]
        first = "\n".join(_statements(example, shown))
        prefix = f"{_TASK}\n\n{first}\n\n{_question(shown)} {', '.join(example)}\n\n{lines}\n\n"
        each = zip(depths, asked, chains, strict=True)
        probes = tuple(listing(sum(of) / _LINKS, _question(value), chain) for of, value, chain in each)
        return Context(split, index, prefix, probes, lead=" ", n_places=n_lines // _LINKS)


def _name(number: int) -> str:
    letters = ""
    for _ in range(_LETTERS):
        number, letter = divmod(number, len(string.ascii_uppercase))
        letters += string.ascii_uppercase[letter]
    return letters


def _statements(chain: Sequence[str], value: str) -> list[str]:
    first, *rest = chain
    hops = zip(rest, chain, strict=False)  # each with the one before it
    return [f"VAR {first} = {value}", *(f"VAR {name} = VAR {before}" for name, before in hops)]


def _question(value: str) -> str:
    return f"Question: Which variables have the value {value}?\nAnswer:"


def _noise(generator: np.random.Generator, n: int) -> list[str]:
    """Return ``n`` sentences that say nothing of variables."""
    kinds = [generator.integers(len(words), size=n).tolist() for words in (_KINDS, _THINGS, _COLOURS)]
    return [
        f"The {_KINDS[kind]} {_THINGS[thing]} is {_COLOURS[colour]}."
        for kind, thing, colour in zip(*kinds, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class VariableConfig(SizedTaskConfig):
    """Settings of `VariableTask`."""

    section = "vt"
    summary = "variable tracking"
    size = "lines"
    task = VariableTask

    lines: int | None = setting(None, "lines per context", metavar="N", least=1, unset=str(DEFAULT_LINES))
    probes: int | None = probes_setting("chains per context", "1")
    positions: str = positions_setting()

    def to_json(self) -> dict[str, Any]:
        """Return all that decides the questions."""
        return super().to_json() | {"probes": self.probes or 1}
