"""Gradient ascent on logarithms of factors: pure NumPy, no I/O; whoever has gradients asks where and tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class AscentConfig:
    """Adam, on gains in spreads of a task's answers (`Climb`), as it was found to work (research/gradient.md).

    Args:
        steps: How many gradients there will be; the size of a step falls evenly from ``first`` to ``last``.
        first: Size of the first step, in natural logarithms of a factor.
        last: And of the last.
        beta1: How much of the mean of gradients each step keeps.
        beta2: How much of the mean of their squares.
        epsilon: Derivatives below this move a factor little.
        low: The least logarithm of a factor.
        high: The largest.
        query_step: How large steps of a query scale are, of those of a factor.
        query_bound: The largest logarithm of a query scale; the least is as far below 0.
        max_divergence: What the KL divergence may be, in nats a token.
        reserve: The share of it that the ascent leaves: its texts are not all that a guard looks at.
        query_reserve: That share where query scales move, whose divergence rises faster than was foretold.
        visits: How many steps look at one context. From the second on, a factor whose derivative has changed its sign
            there, or grew against the way it went, has gone too far: it goes back, and its steps are halved.
    """

    steps: int = 20
    first: float = 0.12
    last: float = 0.02
    beta1: float = 0.8
    beta2: float = 0.9
    epsilon: float = 0.025
    low: float = -0.7
    high: float = 0.9
    query_step: float = 0.6
    query_bound: float = math.log(2.0)
    max_divergence: float = 0.1
    reserve: float = 0.2
    query_reserve: float = 0.3
    visits: int = 1


class Ascent:
    """Climbs from ``start``, step by step; the same gradients give the same way.

    ``queries``: which values are of query scales, of the shape of ``start``; None: none, all are of factors.

    Divergence is measured on one of several texts at a time. The last of each text foretell, by their derivatives,
    the mean of each kind of texts after a step; where one is above the limit, the step is the one that would end at the
    limit.

    Attributes:
        at: Where it stands: logarithms, of any shape. Not to be changed.
        step: Gradients told so far.
        price: Of divergence at the last step: how much gain was left for each nat of it.
    """

    def __init__(
        self, start: Values, config: AscentConfig | None = None, queries: NDArray[np.bool_] | None = None
    ) -> None:
        self.config = c = config or AscentConfig()
        which = np.zeros(np.shape(start), np.bool_) if queries is None else queries
        self._low, self._high = np.where(which, -c.query_bound, c.low), np.where(which, c.query_bound, c.high)
        self._share = np.where(which, c.query_step, 1.0)
        self._limit = c.max_divergence * (1.0 - (c.query_reserve if which.any() else c.reserve))
        self.at = np.clip(np.asarray(start, np.float64), self._low, self._high)
        self.step = 0
        self.price = 0.0
        self._mean = np.zeros_like(self.at)
        self._square = np.zeros_like(self.at)
        self._halved = np.ones_like(self.at)  # how large steps still are
        self._before: tuple[Values, Values] | None = None  # the last derivatives, and where
        self._texts: dict[int, tuple[float, Values, Values, int]] = {}  # divergence, derivatives, where, and its kind

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.steps

    @property
    def at_bound(self) -> NDArray[np.bool_]:
        """Which values have run to a bound."""
        return (self.at <= self._low) | (self.at >= self._high)

    def tell(
        self,
        gradient: Values,
        divergence: float = 0.0,
        divergence_gradient: Values | None = None,
        text: int = 0,
        kind: int = 0,
    ) -> None:
        """Take the derivatives of the gain, and the divergence of a text if that is to be limited, at `at`; move there.

        Raises:
            LropeError: a derivative is not a number; nothing has moved.
        """
        c = self.config
        gradient = np.asarray(gradient, np.float64)
        told = [gradient] if divergence_gradient is None else [gradient, divergence_gradient, np.array(divergence)]
        if not all(np.isfinite(values).all() for values in told):
            raise LropeError(f"step {self.step + 1} of the gradient ascent: a derivative is not a number")
        if divergence_gradient is not None:
            rising = self._rising(float(divergence), divergence_gradient)
            self._texts[text] = float(divergence), rising, self.at, kind
        back = self._back(gradient)
        too_far = back != 0.0
        self._mean = np.where(too_far, 0.0, c.beta1 * self._mean + (1.0 - c.beta1) * gradient)
        self._square = c.beta2 * self._square + (1.0 - c.beta2) * gradient**2
        self._halved = np.where(too_far, 0.5, 1.0) * self._halved
        self._before = gradient, self.at
        size = self._share * self._halved * (c.first + (c.last - c.first) * self.step / max(1, c.steps - 1))
        self.step += 1
        mean = self._mean / (1.0 - c.beta1**self.step)
        rate = size / (np.sqrt(self._square / (1.0 - c.beta2**self.step)) + c.epsilon)
        self.at = np.clip(self.at + back + self._limited(mean, rate, size), self._low, self._high)

    def _back(self, gradient: Values) -> Values:
        """Return how far factors go back that went too far since the last look at the same context; 0: they did not.

        To where the line through both derivatives is 0; where another context had sent them against the first of
        these, by as much of the way as the second is worse.
        """
        if self._before is None or self.step % self.config.visits == 0:
            return np.zeros_like(self.at)
        before, at = self._before
        moved = self.at - at
        against = -gradient * np.sign(moved)
        wanted = before * np.sign(moved)
        share = 1.0 - np.abs(wanted) / np.maximum(against + np.maximum(wanted, 0.0), np.finfo(np.float64).tiny)
        return np.where((against > 0.0) & (against > -wanted), -share * moved, 0.0)

    def _rising(self, divergence: float, slope: Values) -> Values:
        """Return the divergence's derivatives, not less than those of one that rises with the square from 0 to here.

        Coherent derivatives leave out fast pairs, which harm ordinary text too.
        """
        missing = 2.0 * divergence - float((slope * self.at).sum())
        square = float((self.at**2).sum())
        return np.asarray(slope, np.float64) + (max(0.0, missing) / square * self.at if square else 0.0)

    def _limited(self, mean: Values, rate: Values, size: Values) -> Values:
        """Return the step along ``mean`` whose foretold divergence is within the limit."""
        move = np.clip(rate * mean, -size, size)
        self.price = 0.0
        for kind in sorted({kind for *_, kind in self._texts.values()}):
            known = [(value, slope, at) for value, slope, at, of in self._texts.values() if of == kind]
            slope = np.mean([slope for _, slope, _ in known], axis=0)
            now = np.mean([value + ((self.at - at) * slope).sum() for value, slope, at in known])
            for metric in (rate, size):  # the second where the first may not go as far as it would
                above = now + (slope * move).sum() - self._limit
                if above > 0.0 and slope.any():
                    price = float(above / (metric * slope**2).sum())
                    self.price = max(self.price, price)
                    move = np.clip(move - price * metric * slope, -size, size)
        return move

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, for JSON."""
        arrays = {"at": self.at, "mean": self._mean, "square": self._square}
        texts = [
            [text, value, slope.tolist(), at.tolist(), kind] for text, (value, slope, at, kind) in self._texts.items()
        ]
        if self.config.visits > 1 and self._before is not None:
            arrays |= {"halved": self._halved, "gradient": self._before[0], "before": self._before[1]}
        kept = {name: values.tolist() for name, values in arrays.items()}
        return {"step": self.step, "price": self.price, "texts": texts} | kept

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another stood, exactly.

        Raises:
            LropeError: it is the state of something else.
        """
        try:
            names = ("at", "mean", "square", *(("halved", "gradient", "before") if "before" in state else ()))
            arrays = [np.array(state[name], np.float64) for name in names]
            step, price = int(state["step"]), float(state["price"])
            texts = {
                int(text): (
                    float(value),
                    np.array(slope, np.float64),
                    np.array(at, np.float64),
                    int(kind[0]) if kind else 0,
                )
                for text, value, slope, at, *kind in state["texts"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise LropeError(f"the kept state of the gradient ascent is damaged ({error})") from error
        if any(
            values.shape != self.at.shape for values in (*arrays, *(x for text in texts.values() for x in text[1:3]))
        ):
            raise LropeError(f"the kept state of the gradient ascent is not of {self.at.shape} values")
        self.at, self._mean, self._square = arrays[:3]
        self._halved, *before = arrays[3:] or [np.ones_like(self.at)]
        self._before = (before[0], before[1]) if before else None
        self.step, self.price, self._texts = step, price, texts
