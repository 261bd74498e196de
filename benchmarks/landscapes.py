"""Synthetic fitness landscapes over layer factors, as real models have them: what optimizers are tuned and tested on.

A landscape's gain is over the identity, in nats per answer token. All are rugged; each context has its own optimum
and its own noise; early layers tolerate little, too large a factor hurts more than too small a one (or the other way
round), and a ruined model is all the same to a worse one. The kinds differ in where the optimum lies:

narrow  a smooth curve within 0.9 to 1.15
late    1 in the early layers, 1.5 to 2.2 in the last ones; uniform factors above 1 only hurt
middle  a hump of 1.15 to 1.4 in the middle, 1 elsewhere
wave    above 1 in some layers, below it in others
cliff   as narrow, but a short way off the optimum the model is ruined: no slope tells where to go
step    1 up to some layer, 1.2 to 1.6 from there on: no curve of low degree is quite right
far     1.5 to 3 nearly everywhere, as beyond the trained length
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TUNING = ("narrow", "late", "middle", "cliff")
HELD_OUT = ("wave", "step", "far")
"""Kinds that no setting was ever chosen on; neither were seeds from 1000 on of the other kinds."""

_TRUE_CONTEXTS = 32


class Landscape:
    """One landscape of a kind; the seed draws all of its parameters, the number of layers included."""

    def __init__(self, kind: str, seed: int) -> None:
        """Draw the landscape."""
        rng = np.random.default_rng([seed, (*TUNING, *HELD_OUT).index(kind)])
        self.kind, self.seed = kind, seed
        self.n_layer = int(rng.integers(12, 33))
        x = np.linspace(0.0, 1.0, self.n_layer)
        self.target = _target(kind, x, rng)
        self._weight = (0.5 + rng.uniform(1.0, 5.0) * np.exp(-rng.uniform(3.0, 8.0) * x)) / self.n_layer
        self._weight *= rng.uniform(0.7, 1.3, self.n_layer)
        self._above = np.exp(rng.uniform(-0.3, 1.2))  # a factor too large against one too small
        self._power = rng.uniform(1.2, 2.0)
        spread = max(0.05, float(np.abs(self.target).max()) / 2.0)
        self._height = rng.uniform(0.5, 1.5)  # about the gain at the optimum
        self._floor = self._height * (1.2 if kind == "cliff" else rng.uniform(3.0, 6.0))
        self._slope = 1.0
        self._slope = self._height / max(float(self._loss(-self.target)), 1e-6)
        if kind == "cliff":
            self._slope *= 3.0
        n_waves = 5
        self._waves = rng.normal(size=(n_waves, self.n_layer)) / spread * 2.0 / np.sqrt(self.n_layer)
        self._phase = rng.uniform(0.0, 2.0 * np.pi, n_waves)
        self._ripple = self._height * rng.uniform(0.02, 0.1)
        self._noise = self._height * rng.uniform(0.05, 0.3)
        self._shift = spread * rng.uniform(0.1, 0.3)
        self._x = x

    def gain(self, factors: tuple[float, ...], context: int) -> float:
        """What one context shows: its own optimum, and noise that is the same for the same factors."""
        log_s, shift = np.log(factors), self._shift_of(context)
        words = np.frombuffer(np.round(log_s, 9).tobytes(), np.uint32)
        noise = np.random.default_rng([self.seed, context, *words.tolist()]).normal() * self._noise
        return float(self._value(log_s, shift) - self._value(np.zeros(self.n_layer), shift) + noise)

    def true_gain(self, factors: tuple[float, ...]) -> float:
        """Mean over many contexts without noise."""
        shifts = np.array([self._shift_of(10**6 + context) for context in range(_TRUE_CONTEXTS)])
        gains = self._value(np.log(factors), shifts) - self._value(np.zeros(self.n_layer), shifts)
        return float(gains.mean())

    def _shift_of(self, context: int) -> Floats:
        """How far the optimum of a context lies from the common one; shape (n_layer,)."""
        level, slope = np.random.default_rng([self.seed, context]).normal(size=2) * self._shift / np.sqrt(2.0)
        return np.asarray(level + slope * (2.0 * self._x - 1.0))

    def _value(self, log_s: Floats, shift: Floats) -> Floats:
        loss = self._loss(log_s - self.target - shift)
        ripples = self._ripple * np.cos(self._waves @ log_s + self._phase).sum()
        return np.asarray(-self._floor * (1.0 - np.exp(-loss / self._floor)) + ripples)

    def _loss(self, off: Floats) -> Floats:
        uneven = np.where(off > 0.0, self._above, 1.0) * np.abs(off) ** self._power
        return np.asarray(self._slope * (self._weight * uneven).sum(axis=-1))


def _target(kind: str, x: Floats, rng: np.random.Generator) -> Floats:
    """Logarithms of the best factors."""
    center, width = rng.uniform(0.35, 0.7), rng.uniform(0.1, 0.25)
    rise = 1.0 / (1.0 + np.exp(-(x - rng.uniform(0.5, 0.75)) / rng.uniform(0.05, 0.12)))
    hump = np.exp(-(((x - center) / width) ** 2))
    if kind in ("narrow", "cliff"):
        curve = rng.normal() + rng.normal() * (2.0 * x - 1.0) + rng.normal() * np.cos(np.pi * x * rng.uniform(1.0, 2.5))
        return np.asarray(curve / np.abs(curve).max() * rng.uniform(0.06, 0.13))
    if kind == "late":
        return np.asarray(rise * np.log(rng.uniform(1.5, 2.2)))
    if kind == "middle":
        return np.asarray(hump * np.log(rng.uniform(1.15, 1.4)))
    if kind == "wave":
        return np.asarray(np.sin(2.0 * np.pi * (x * rng.uniform(0.7, 1.2) + rng.random())) * rng.uniform(0.08, 0.25))
    if kind == "step":
        return np.asarray(np.where(x > rng.uniform(0.3, 0.7), np.log(rng.uniform(1.2, 1.6)), 0.0))
    return np.asarray(np.log(rng.uniform(1.5, 3.0)) * (0.3 + 0.7 * np.minimum(1.0, x / rng.uniform(0.2, 0.5))))
