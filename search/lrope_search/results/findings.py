"""What a search found: one typed record, kept in ``best.json`` and read back by reports; and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..scores import Factors
from .comparison import Comparison, contexts_needed
from .intervals import Interval, finite
from .table import DepthTable


@dataclass(frozen=True)
class Look:
    """Which test contexts a verdict is of; a study that goes on after its verdict takes another look.

    Attributes:
        number: from 1.
        contexts: from the first to before the last.
        new: whether no earlier look had them.
        confidence: of its intervals; see `looked_again`.
    """

    number: int
    contexts: range
    new: bool
    confidence: float

    @property
    def words(self) -> str:
        """How the verdict calls the contexts."""
        if self.number == 1:
            return "unseen contexts"
        look, level = f"look {self.number} of this study", f"intervals at {100.0 * self.confidence:g} %"
        if self.new:
            return f"unseen contexts ({look}, {level})"
        return f"contexts ({look}, at contexts of an earlier look, as the data has no more; {level})"

    def to_json(self) -> dict[str, Any]:
        """Return it as ``best.json`` and ``looks.jsonl`` hold it."""
        ends = [self.contexts.start, self.contexts.stop]
        return {"number": self.number, "contexts": ends, "new": self.new, "confidence": self.confidence}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Look:
        """Return what `to_json` wrote; raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        first, end = map(int, value["contexts"])
        number, confidence = int(value["number"]), float(value["confidence"])
        if number < 1 or not 0 <= first < end or not 0.0 < confidence < 1.0:
            raise ValueError("out of range")
        return cls(number, range(first, end), bool(value["new"]), confidence)


def looked_again(confidence: float, number: int) -> float:
    """Return the confidence of a study's look ``number``, whose first has ``confidence``.

    Each further look is another chance of a false gain. Look ``k`` errs half as often as the one before, from a quarter
    at the second on: however many looks, a study finds a gain that is not there at most 1.5 times as often as at one.
    """
    return confidence if number == 1 else 1.0 - (1.0 - confidence) / 2.0**number


@dataclass(frozen=True)
class Stage:
    """What the best candidate was worth on the contexts of a split; see `Objective` for the unit."""

    contexts: int
    fitness: float

    def to_json(self) -> dict[str, Any]:
        """Return it as ``best.json`` holds it."""
        return {"contexts": self.contexts, "fitness": finite(self.fitness, 6)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stage:
        """Return what `to_json` wrote."""
        return cls(int(value["contexts"]), -math.inf if value["fitness"] is None else float(value["fitness"]))


@dataclass(frozen=True)
class Uniform:
    """A uniform factor, and the ``factors`` that were measured with it, one a layer: it may move some of them alone."""

    factor: float
    factors: Factors

    @property
    def name(self) -> str:
        """Of this side in tables and pictures."""
        return f"uniform {self.factor:g}"

    @property
    def where(self) -> str:
        """Which layers have it, in words; nothing if all have."""
        moved = sum(factor != 1.0 for factor in self.factors)
        return "" if moved in (0, len(self.factors)) else f" ({moved} of {len(self.factors)} layers)"


@dataclass(frozen=True)
class TaskGain:
    """The gain in one of several tasks, and its weight."""

    weight: float
    gain: Comparison


@dataclass(frozen=True)
class GuardFinding:
    """KL divergence of the winner from the base model on ordinary text, nats a token; None if there is no winner.

    ``passed_over``: candidates that gain more and exceed ``max_kl``.
    """

    max_kl: float
    passed_over: int
    short: float | None = None
    long: float | None = None

    @property
    def kl(self) -> float | None:
        """The larger of the two, which the limit is for."""
        return None if self.short is None or self.long is None else max(self.short, self.long)


@dataclass(frozen=True)
class Verdict:
    """Whether to use the curve, and why, in words."""

    recommended: bool
    text: str


@dataclass(frozen=True)
class Findings:
    """What a search found.

    Attributes:
        factors: of the winner, or all 1.
        candidates: how many were evaluated.
        stopped_by: ``evaluations``, ``converged`` or ``hours``.
        search, validation: what the winner was worth there.
        look: which test contexts the rest is of.
        base_accuracy: of the base model on them, 0 to 1.
        gain: the winner against the base model; None if no candidate won.
        uniform: the best uniform factor; None if none was tried.
        uniform_gain: that against the base model.
        over_uniform: the winner against that; None if it is that.
        tasks: the gain in each of several tasks.
        guard: None if ordinary text was not looked at.
    """

    factors: Factors
    candidates: int
    stopped_by: str
    search: Stage
    validation: Stage
    look: Look
    base_accuracy: float = math.nan
    gain: Comparison | None = None
    uniform: Uniform | None = None
    uniform_gain: Comparison | None = None
    over_uniform: Comparison | None = None
    tasks: Mapping[str, TaskGain] = field(default_factory=dict)
    guard: GuardFinding | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether to use the curve."""
        return judge(self)

    def measured(self, table: DepthTable) -> Findings:
        """Return this with the gains on test contexts that ``table`` has."""
        gain = table.comparisons.get("curve")
        beside = None if self.uniform is None else table.comparisons.get(self.uniform.name)
        tasks = {} if gain is None else table.tasks
        alone = {name: one.comparisons["curve"].recorded() for name, one in tasks.items()}
        return replace(
            self,
            base_accuracy=round(table.totals["base"].accuracy, 6),
            gain=gain and gain.recorded(),
            uniform_gain=beside and beside.recorded(),
            over_uniform=table.over and table.over.recorded(),
            tasks={name: TaskGain(table.weights[name], one) for name, one in alone.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``best.json`` holds as the ``results`` of its provenance."""
        alone = {"contexts": len(self.look.contexts), "base_accuracy": finite(self.base_accuracy, 6)}
        test: dict[str, Any] = alone if self.gain is None else self.gain.to_json()
        if self.tasks:
            test["tasks"] = {name: {"weight": task.weight, **task.gain.to_json()} for name, task in self.tasks.items()}
        judgement = self.verdict
        results: dict[str, Any] = {
            "candidates": self.candidates,
            "stopped_by": self.stopped_by,
            "search": self.search.to_json(),
            "validation": self.validation.to_json(),
            "look": self.look.to_json(),
            "test": test,
            "recommended": judgement.recommended,
            "verdict": judgement.text,
        }
        if self.uniform is not None and self.uniform_gain is not None:
            known = {"factor": self.uniform.factor, "factors": list(self.uniform.factors)}
            results["best_uniform"] = known | {"test": self.uniform_gain.to_json()}
        if self.over_uniform is not None:
            results["over_uniform"] = self.over_uniform.to_json()
        if (guard := self.guard) is not None:
            lengths = {} if guard.kl is None else {"short": guard.short, "long": guard.long}
            results["guard"] = {"max_kl": guard.max_kl, "passed_over": guard.passed_over, **lengths}
        return results

    @classmethod
    def from_json(cls, value: Any, factors: Factors, confidence: float) -> Findings | None:
        """Return what `to_json` wrote, also before there were looks; None if it is something else, or not finished.

        Args:
            value: the ``results`` of a curve file's provenance, which may hold anything.
            factors: of that file.
            confidence: of intervals, where the file does not say.
        """
        if not (isinstance(value, Mapping) and isinstance(value.get("verdict"), str)):
            return None
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            return cls._from_json(value, factors, confidence)
        return None

    @classmethod
    def _from_json(cls, value: Mapping[str, Any], factors: Factors, confidence: float) -> Findings:
        test, uniform, guard = value["test"], value.get("best_uniform"), value.get("guard")
        first = Look(1, range(int(test["contexts"])), True, confidence)
        look = Look.from_json(value["look"]) if "look" in value else first

        best = None if uniform is None else (float(uniform["factor"]), tuple(map(float, uniform.get("factors", ()))))
        kl = None if guard is None else (float(guard["max_kl"]), int(guard["passed_over"]))

        def read(comparison: Mapping[str, Any]) -> Comparison:
            return Comparison.from_json(comparison, look.confidence)

        return cls(
            factors=factors,
            candidates=int(value["candidates"]),
            stopped_by=str(value["stopped_by"]),
            search=Stage.from_json(value["search"]),
            validation=Stage.from_json(value["validation"]),
            look=look,
            base_accuracy=float(test["base_accuracy"]),
            gain=read(test) if "accuracy" in test else None,
            uniform=best and Uniform(*best),
            uniform_gain=None if uniform is None else read(uniform["test"]),
            over_uniform=read(value["over_uniform"]) if "over_uniform" in value else None,
            tasks={name: TaskGain(float(task["weight"]), read(task)) for name, task in test.get("tasks", {}).items()},
            guard=kl and GuardFinding(*kl, *((guard or {}).get(name) for name in ("short", "long"))),
        )


def judge(found: Findings) -> Verdict:
    """Say whether the curve is worth using: its accuracy must lie above the base model's, interval and all."""
    gain, guard = found.gain, found.guard
    if gain is None and guard is not None and guard.passed_over:
        return Verdict(
            False,
            "not recommended: every curve that beats the base model on validation changes ordinary text by more than "
            f"{guard.max_kl:g} nats a token (--max-kl)",
        )
    beside = _beside(found)
    if gain is None:
        return Verdict(False, f"not recommended: no curve beat the base model on validation{beside}")
    text = (
        f"gain {_gain(gain.accuracy_gain)} on {gain.n_contexts} {found.look.words}"
        f"{_each({name: task.gain for name, task in found.tasks.items()})}{beside}"
    )
    if gain.significant:
        return Verdict(True, text)
    if not gain.enough:
        n, equal, needed = gain.n_contexts, gain.n_effective, contexts_needed(gain.confidence)
        worth = "" if equal is None or n < needed else f", which count as {equal:.1f} by their weights,"
        return Verdict(
            False,
            f"not recommended: {n} contexts{worth} are too few to tell a gain from chance, at least {needed} are "
            f"needed (--set test_contexts=N): {text}",
        )
    why = "the gain may be chance" if gain.accuracy_gain.mean > 0.0 else "no gain"
    return Verdict(False, f"not recommended, {why}: {text}")


def _beside(found: Findings) -> str:
    """What the best uniform factor gains on the same contexts, and how far the curve changes ordinary text."""
    text = ""
    if found.uniform is not None and found.uniform_gain is not None:
        factor = f"{found.uniform.factor:g}{found.uniform.where}"
        if found.gain is not None and found.uniform.factors == found.factors:  # it is the winner
            text = f"; the winner is the uniform factor {factor}: factors that differ between layers gain no more"
        else:
            text = f"; best uniform factor {factor} gains {_points(found.uniform_gain.accuracy_gain.mean)}"
        if found.over_uniform is not None and found.gain is not None:
            more = _gain(found.over_uniform.accuracy_gain)
            chance = f"; above it {more}, which may be chance"
            text += f"; {more} above it" if found.over_uniform.significant else chance
    if found.guard is not None and (kl := found.guard.kl) is not None:
        text += f"; KL on ordinary text {f'{kl:.3f}' if not 0.0 < kl < 0.0005 else 'under 0.001'}"
    return text


def _each(tasks: Mapping[str, Comparison]) -> str:
    """Each task's gain, and which of them the curve harms."""
    if not tasks:
        return ""
    gains = [
        f"{name} {_gain(c.accuracy_gain) if c.enough else _points(c.accuracy_gain.mean)}" for name, c in tasks.items()
    ]
    harmed = [name for name, comparison in tasks.items() if comparison.harmful]
    return f" ({', '.join(gains)}){'; harms ' + ' and '.join(harmed) if harmed else ''}"


def _gain(gain: Interval) -> str:
    return f"{_points(gain.mean)} points [{_points(gain.low)}, {_points(gain.high)}]"


def _points(share: float) -> str:
    return f"{100.0 * share + 0.0:.1f}"
