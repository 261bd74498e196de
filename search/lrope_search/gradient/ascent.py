"""Gradient ascent on logarithms of factors: pure NumPy, no I/O; whoever has gradients asks where and tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class AscentConfig:
    """Adam, as it was found to work on gradients of order 0.01 to 1 nat.

    Args:
        steps: How many gradients there will be; the size of a step falls evenly from ``first`` to ``last``.
        first: Size of the first step, in natural logarithms of a factor.
        last: And of the last.
        beta1: How much of the mean of gradients each step keeps.
        beta2: How much of the mean of their squares.
        epsilon: Gradients below this, in nats, move a factor little.
        low: The least logarithm of a factor.
        high: The largest.
        max_divergence: What the KL divergence may be, in nats a token.
        price_rate: How fast the price of divergence, in nats of gain for each of divergence, rises with what is above.
    """

    steps: int = 20
    first: float = 0.07
    last: float = 0.015
    beta1: float = 0.8
    beta2: float = 0.9
    epsilon: float = 0.05
    low: float = -0.7
    high: float = 0.9
    max_divergence: float = 0.1
    price_rate: float = 5.0


class Ascent:
    """Climbs from ``start``, step by step; the same gradients give the same way.

    Attributes:
        at: Where it stands: logarithms, of any shape. Not to be changed.
        step: Gradients told so far.
        price: Of divergence, at present.
    """

    def __init__(self, start: Values, config: AscentConfig | None = None) -> None:
        self.config = config or AscentConfig()
        self.at = np.clip(np.asarray(start, np.float64), self.config.low, self.config.high)
        self.step = 0
        self.price = 0.0
        self._mean = np.zeros_like(self.at)
        self._square = np.zeros_like(self.at)

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.steps

    @property
    def at_bound(self) -> NDArray[np.bool_]:
        """Which values have run to a bound."""
        return (self.at <= self.config.low) | (self.at >= self.config.high)

    def tell(self, gradient: Values, divergence: float = 0.0, divergence_gradient: Values | None = None) -> None:
        """Take the derivatives of the gain, and of the divergence if that is to be limited, at `at`; move there.

        Raises:
            LropeError: a derivative is not a number; nothing has moved.
        """
        c = self.config
        total = np.asarray(gradient, np.float64)
        price = self.price
        if divergence_gradient is not None:
            price = max(0.0, price + c.price_rate * (divergence / c.max_divergence - 1.0))
            total = total - price * np.asarray(divergence_gradient, np.float64)
        if not np.isfinite(total).all():
            raise LropeError(f"step {self.step + 1} of the gradient ascent: a derivative is not a number")
        self.price = price
        self._mean = c.beta1 * self._mean + (1.0 - c.beta1) * total
        self._square = c.beta2 * self._square + (1.0 - c.beta2) * total**2
        size = c.first + (c.last - c.first) * self.step / max(1, c.steps - 1)
        self.step += 1
        mean = self._mean / (1.0 - c.beta1**self.step)
        spread = np.sqrt(self._square / (1.0 - c.beta2**self.step))
        self.at = np.clip(self.at + size * mean / (spread + c.epsilon), c.low, c.high)

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, for JSON."""
        arrays = {"at": self.at, "mean": self._mean, "square": self._square}
        return {"step": self.step, "price": self.price} | {name: values.tolist() for name, values in arrays.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another stood, exactly.

        Raises:
            LropeError: it is the state of something else.
        """
        try:
            arrays = [np.array(state[name], np.float64) for name in ("at", "mean", "square")]
            step, price = int(state["step"]), float(state["price"])
        except (KeyError, TypeError, ValueError) as error:
            raise LropeError(f"the kept state of the gradient ascent is damaged ({error})") from error
        if any(values.shape != self.at.shape for values in arrays):
            raise LropeError(f"the kept state of the gradient ascent is not of {self.at.shape} values")
        self.at, self._mean, self._square = arrays
        self.step, self.price = step, price
