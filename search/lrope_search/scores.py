"""What is evaluated and what comes of it: jobs and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

Factors: TypeAlias = tuple[float, ...]
"""One RoPE factor a layer, first layer first; 1 changes nothing."""


@dataclass(frozen=True)
class ProbeScore:
    """What a model made of one probe.

    ``log_probability`` is the mean natural log-probability per token of the gold answer;
    ``correct`` is true if greedy decoding gives exactly that answer.
    """

    depth: float
    log_probability: float
    correct: bool


@dataclass(frozen=True)
class ContextScore:
    """The scores of one context's probes, and their cost: tokens computed and wall-clock seconds."""

    split: str
    index: int
    probes: tuple[ProbeScore, ...]
    n_tokens: int
    seconds: float

    @property
    def log_probability(self) -> float:
        """Mean of the probes' log-probabilities, in nats per token."""
        return sum(probe.log_probability for probe in self.probes) / len(self.probes)

    @property
    def accuracy(self) -> float:
        """Share of the probes answered exactly, 0 to 1."""
        return sum(probe.correct for probe in self.probes) / len(self.probes)


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation: layer factors on context ``index`` of ``split``."""

    factors: Factors
    split: str
    index: int


class Evaluator(Protocol):
    """A model and a task: scores layer factors on one context."""

    @property
    def n_layer(self) -> int:
        """Number of transformer layers, the length of ``factors``."""
        ...

    def evaluate(self, factors: Factors, split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors`` (one positive float a layer)."""
        ...
