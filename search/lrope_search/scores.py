"""Jobs and their results: scores on questions or on ordinary text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from lrope_gguf.curve import ROWS, Rows

Factors: TypeAlias = tuple[float, ...]
"""One positive float a layer: layer ``l`` rotates by ``position / factors[l]``; 1 changes nothing."""

SCALES = ("layers", "heads", "queries", "both")
"""What may be scaled: positions of layers, positions of KV heads, queries of heads, or the last two together."""


class Tuned(Factors):
    """Factors of layers with what heads have of their own; equal only to those with the same of both.

    Attributes:
        head_factors: Of KV heads, in place of their layer's; None: none have their own.
        query_scales: What the attention logits of each head are multiplied with; None: 1.
    """

    head_factors: Rows | None
    query_scales: Rows | None

    def __new__(
        cls, factors: Iterable[float], head_factors: Rows | None = None, query_scales: Rows | None = None
    ) -> Tuned:
        """Join them."""
        self = super().__new__(cls, factors)
        self.head_factors, self.query_scales = head_factors, query_scales
        return self

    def __getnewargs__(self) -> tuple[Factors, Rows | None, Rows | None]:
        """Return what `__new__` takes, for pickle."""
        return tuple(self), self.head_factors, self.query_scales

    def __eq__(self, other: object) -> bool:
        """Whether all three are the same."""
        return isinstance(other, Tuned) and self.__getnewargs__() == other.__getnewargs__()

    def __ne__(self, other: object) -> bool:
        """Whether they are not (a tuple's own would not ask `__eq__`)."""
        return not self == other

    def __hash__(self) -> int:
        """Return a number that is the same for equals."""
        return hash(self.__getnewargs__())


def rows_of(factors: Factors) -> dict[str, Rows]:
    """Return what heads have of their own, by its name in a curve file."""
    return {name: rows for name in ROWS if (rows := getattr(factors, name, None)) is not None}


def tuned(factors: Iterable[float], rows: Mapping[str, Rows | None]) -> Factors:
    """Return factors of layers, with those of `ROWS` that there are."""
    there = {name: tuple(map(tuple, of_heads)) for name in ROWS if (of_heads := rows.get(name)) is not None}
    return Tuned(factors, **there) if there else tuple(factors)


def read_factors(record: Mapping[str, Any]) -> Factors:
    """Return the factors of a line of a study. Raises `ValueError` or another: they are damaged."""
    factors = tuned(map(float, record["factors"]), record)
    if not all(0.0 < value < math.inf for value in numbers_of(factors)):
        raise ValueError("factors")
    return factors


def numbers_of(factors: Factors) -> list[float]:
    """Return all numbers, of layers and of heads."""
    return [*factors, *(value for rows in rows_of(factors).values() for row in rows for value in row)]


def with_numbers(factors: Factors, numbers: Iterable[float]) -> Factors:
    """Return factors of the same shape with other numbers, in the order of `numbers_of`."""
    left = iter(numbers)
    of_layers = tuple(itertools.islice(left, len(factors)))
    rows = {
        name: tuple(tuple(itertools.islice(left, len(row))) for row in rows) for name, rows in rows_of(factors).items()
    }
    return tuned(of_layers, rows)


def n_changed(factors: Factors) -> int:
    """Return how many of them are not 1."""
    return sum(value != 1.0 for value in numbers_of(factors))


def depth_weight(depth: float, middle_weight: float) -> float:
    """Return how much a probe at this relative depth counts: ``1 + middle_weight * 4 d (1 - d)``."""
    return 1.0 + middle_weight * 4.0 * depth * (1.0 - depth)


@dataclass(frozen=True)
class ProbeScore:
    """The score of one probe.

    ``log_probability`` is the mean natural log-probability per token of the gold answer;
    ``correct`` is true if greedy decoding gives exactly that answer. Where the model has written an answer of several
    parts, it is the share of them that stand there, 0 to 1.
    """

    depth: float
    log_probability: float
    correct: float


@dataclass(frozen=True)
class ContextScore:
    """The scores of one context's probes, and their cost: tokens computed and wall-clock seconds.

    ``task``: the name of the context's task where several are asked; empty where there is one.
    """

    split: str
    index: int
    probes: tuple[ProbeScore, ...]
    n_tokens: int
    seconds: float
    task: str = ""

    @property
    def log_probability(self) -> float:
        """Mean of the probes' log-probabilities, in nats per token."""
        return sum(probe.log_probability for probe in self.probes) / len(self.probes)

    @property
    def accuracy(self) -> float:
        """Share of the probes answered exactly (of written ones, mean of `ProbeScore.correct`), 0 to 1."""
        return sum(probe.correct for probe in self.probes) / len(self.probes)


@dataclass(frozen=True)
class DivergenceScore:
    """KL divergence of factors from the base model on ordinary text, and its cost: see `GUARD`.

    ``short`` and ``long``: mean KL(base || factors) over tokens of short texts and of a long one, in nats per token;
    ``inf`` where the factors lead to something else than numbers.
    """

    short: float
    long: float
    n_tokens: int
    seconds: float


Evaluation: TypeAlias = ContextScore | DivergenceScore
"""The result of a `Job`."""

LAYER_SCAN = "layer scan"
"""Origin of the candidates that move a single layer, or a single group of layers."""

PROPOSED = "gradient"
"""Origin of the candidates that derivatives have led to."""

GUARD = "guard"
"""The split of jobs that score no questions: the guard keeps a curve from harming ordinary text."""


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation: layer factors on context ``index`` of ``split``, or on ordinary text (`GUARD`, index 0)."""

    factors: Factors
    split: str
    index: int

    def run(self, evaluator: Evaluator) -> Evaluation:
        """Have ``evaluator`` do it; raises what that raises."""
        if self.split == GUARD:
            return evaluator.divergence(self.factors)
        return evaluator.evaluate(self.factors, self.split, self.index)


class Evaluator(Protocol):
    """A model and a task: scores layer factors on one context, or on ordinary text."""

    @property
    def n_layer(self) -> int:
        """Number of transformer layers, the length of ``factors``."""

    def evaluate(self, factors: Factors, split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors`` (one positive float a layer)."""

    def divergence(self, factors: Factors) -> DivergenceScore:
        """Hold ``factors`` against the base model on ordinary text."""
