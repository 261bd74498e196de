"""The words that tasks, evaluators, executors and the search share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .answers import holds


@dataclass(frozen=True)
class Probe:
    """One question about a context; its answer stands at ``depth`` (0 first, 1 last).

    ``answer`` is what teacher forcing feeds; of a generated text, ``aliases`` are as right. ``normalized``: punctuation
    and articles do not count (`normalize`).
    """

    depth: float
    question: str
    answer: str
    aliases: tuple[str, ...] = ()
    normalized: bool = False

    def answered_by(self, text: str) -> bool:
        """Whether a generated ``text`` contains the answer, or an alias of it."""
        return holds(text, (self.answer, *self.aliases), normalized=self.normalized)


@dataclass(frozen=True)
class Context:
    """One long prompt prefix with its probes; ``split`` is ``search``, ``validation`` or ``test``.

    ``lead``, of a calibration context: what stands between a question and its answer unless a model shows that it
    writes something else.
    """

    split: str
    index: int
    prefix: str
    probes: tuple[Probe, ...]
    lead: str = ""


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


class Evaluator(Protocol):
    """A model and a task: scores layer factors on one context."""

    @property
    def n_layer(self) -> int:
        """Number of transformer layers, the length of ``factors``."""
        ...

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors`` (one positive float a layer)."""
        ...
