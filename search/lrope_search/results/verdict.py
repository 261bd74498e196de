"""Is the curve worth using? The answer in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .comparison import Comparison, contexts_needed
from .intervals import Interval


@dataclass(frozen=True)
class Verdict:
    """Whether to use the curve, and why, in words."""

    recommended: bool
    text: str


def verdict(
    curve: Comparison | None,
    uniform: tuple[float, Comparison] | None = None,
    kl: float | None = None,
    *,
    over_uniform: Comparison | None = None,
    tasks: Mapping[str, Comparison] | None = None,
) -> Verdict:
    """Say whether the curve is worth using: its accuracy must lie above the base model's, interval and all.

    Args:
        curve: The curve against the base model on contexts that neither search nor validation saw;
            None if no curve beat the base model on validation.
        uniform: The best uniform factor, and its comparison with the base model on the same contexts.
        kl: KL divergence from the base model on ordinary text, in nats per token; None if not measured.
        over_uniform: The curve against the best uniform factor (`compare` with that as the base), on the same
            contexts; says how much of the gain is owed to the layers' different factors.
        tasks: Of several tasks, the curve against the base model on each.
    """
    beside = ""
    if uniform is not None and uniform[1] == curve:  # it is the winner
        beside = f"; that is the uniform factor {uniform[0]:g}, factors that differ bring no more"
    elif uniform is not None:
        beside = f"; best uniform factor {uniform[0]:g} gains {_points(uniform[1].accuracy_gain.mean)}"
        if over_uniform is not None and curve is not None:
            more = _gain(over_uniform.accuracy_gain)
            beside += f"; {more} above it" if over_uniform.significant else f"; not significantly better: {more}"
    if kl is not None:
        size = f"{kl:.3f}" if not 0.0 < kl < 0.0005 else "under 0.001"
        beside += f"; KL on ordinary text {size}"
    if curve is None:
        return Verdict(False, f"no curve beat the base model on validation: no gain, not recommended{beside}")
    n, needed = curve.n_contexts, contexts_needed(curve.confidence)
    text = f"gain {_gain(curve.accuracy_gain)} on {n} unseen contexts{_each(tasks or {})}{beside}"
    if curve.significant:
        return Verdict(True, text)
    if not curve.enough:
        return Verdict(False, f"too few contexts to tell, at least {needed} are needed, not recommended: {text}")
    return Verdict(False, f"no significant gain, not recommended: {text}")


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
    return f"{100.0 * share:.1f}"
