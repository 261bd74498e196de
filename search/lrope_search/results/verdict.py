"""Is the curve worth using? The answer in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .comparison import Comparison, contexts_needed
from .intervals import Interval

if TYPE_CHECKING:
    from .findings import Findings


@dataclass(frozen=True)
class Verdict:
    """Whether to use the curve, and why, in words."""

    recommended: bool
    text: str


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
            text = f"; that is the uniform factor {factor}: factors that differ more gain no more"
        else:
            text = f"; best uniform factor {factor} gains {_points(found.uniform_gain.accuracy_gain.mean)}"
        if found.over_uniform is not None and found.gain is not None:
            more = _gain(found.over_uniform.accuracy_gain)
            text += (
                f"; {more} above it" if found.over_uniform.significant else f"; above it {more}, which may be chance"
            )
    if found.guard is not None and (kl := found.guard.kl) is not None:
        text += f"; KL on ordinary text {f'{kl:.3f}' if not 0.0 < kl < 0.0005 else 'under 0.001'}"
    return text


def _each(tasks: Mapping[str, Comparison]) -> str:
    """Each task's gain, and which of them the curve harms."""
    if not tasks:
        return ""
    gains = [
        f"{name} {_gain(comparison.accuracy_gain) if comparison.enough else _points(comparison.accuracy_gain.mean)}"
        for name, comparison in tasks.items()
    ]
    harmed = [name for name, comparison in tasks.items() if comparison.harmful]
    return f" ({', '.join(gains)}){'; harms ' + ' and '.join(harmed) if harmed else ''}"


def _gain(gain: Interval) -> str:
    return f"{_points(gain.mean)} points [{_points(gain.low)}, {_points(gain.high)}]"


def _points(share: float) -> str:
    return f"{100.0 * share + 0.0:.1f}"
