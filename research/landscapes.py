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

A class of its own is `SparseLandscape`, as single layers were measured on Qwen2.5-Coder 0.5B.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TUNING = ("narrow", "late", "middle", "cliff")
HELD_OUT = ("wave", "step", "far")
"""Kinds that no setting was ever chosen on; neither were seeds from 1000 on of the other kinds."""

SPARSE = "sparse"

_TRUE_CONTEXTS = 32


class Landscape:
    """One landscape of a kind; the seed draws all of its parameters, the number of layers included."""

    def __init__(self, kind: str, seed: int) -> None:
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

    @property
    def lack(self) -> float:
        """About what there is to gain, nats."""
        return float(self._height)

    def optimum(self) -> tuple[float, ...]:
        return tuple(np.exp(self.target).tolist())

    def true_gain(self, factors: tuple[float, ...]) -> float:
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


class SparseLandscape:
    """Few layers help when they are raised a little, a few near them tolerate nothing, the rest does next to nothing.

    The seed draws all parameters from ranges around what was measured on Qwen2.5-Coder 0.5B (``yardsticks.py fit``
    shows both). Each layer has a utility of its own; utilities add up, and so does what moving many layers at once
    costs. The gain follows from the sum as a log-probability must: it ends at what the base model lacks, and
    losses grow without end.

    A context shows the gain with the error of its probes: for every context a smooth random function of the factors
    (candidates that are alike err alike), 0 at the identity, whose variance grows to `PROBE_VARIANCE` over the number
    of probes as fast as the layers moved change the model. Contexts have no error beside that of their probes.
    """

    PROBE_VARIANCE = 0.0034  # nats squared, of a candidate's gain on one probe; measured
    _FEATURES = 96  # of a context's random function

    def __init__(self, seed: int, probes: int = 60) -> None:
        rng = np.random.default_rng([seed, len((*TUNING, *HELD_OUT))])
        self.kind, self.seed, self.probes = SPARSE, seed, probes
        n = self.n_layer = int(rng.integers(24, 33))
        depth = np.arange(n) / (n - 1)
        quiet = np.where(depth > 0.7, 0.2, 1.0)  # late layers do less than early ones
        main = int(rng.integers(n // 5, 3 * n // 5))
        near = [i for i in range(max(0, main - 3), min(n, main + 10)) if i not in (main, main + 1)]
        self.harmful = [main + 1, *rng.choice(near, int(rng.integers(1, 4)), replace=False).tolist()]
        free = [i for i in range(int(0.8 * n)) if i not in (main, *self.harmful)]
        self.helpful = [main, *rng.choice(free, int(rng.integers(0, 4)), replace=False).tolist()]

        self.lack = float(rng.uniform(0.05, 0.09))  # of the base model, nats
        self._slope = 0.004 * rng.standard_normal(n) * quiet
        self._above = rng.uniform(0.02, 0.07, n) * quiet
        self._below = self._above.copy()
        self._best = np.zeros(n)
        self._height = np.zeros(n)
        length = np.exp(rng.uniform(np.log(0.4), np.log(1.2), n)) / quiet**1.5
        for i in self.harmful:
            self._above[i] = self._below[i] = np.exp(rng.uniform(np.log(0.3), np.log(1.4)))
            self._slope[i] = 0.02 * rng.standard_normal()
            length[i] = rng.uniform(0.07, 0.12)
        for i in self.helpful:
            self._height[i] = self.lack * (rng.uniform(0.55, 0.8) if i == main else rng.uniform(0.08, 0.3))
            self._best[i], self._slope[i] = rng.uniform(0.12, 0.19), 0.0
            self._above[i] = rng.uniform(0.3, 1.2) * self._height[i] / 0.046
            self._below[i] = rng.uniform(0.1, 0.5) * self._height[i] / 0.046
            length[i] = rng.uniform(0.07, 0.12) if i == main else rng.uniform(0.2, 0.5)
        self._together = rng.uniform(20.0, 35.0)
        self._length = length
        self._functions: dict[int, tuple[Floats, Floats, float]] = {}  # frequencies, phases, value at the identity

    def gain(self, factors: tuple[float, ...], context: int) -> float:
        log_s = np.log(factors)
        frequencies, phases, at_identity = self._function(context)
        error = float(np.cos(frequencies @ log_s + phases).sum()) - at_identity
        scale = np.sqrt(self.PROBE_VARIANCE / self.probes / self._FEATURES)
        return float(self._value(log_s)) + float(scale) * error

    def true_gain(self, factors: tuple[float, ...]) -> float:
        return float(self._value(np.log(factors)))

    def optimum(self) -> tuple[float, ...]:
        """Factors that gain the most, but for what moving them together costs, which is next to nothing."""
        grid = np.linspace(-0.3, 0.3, 1201)
        utilities = self._utility(np.repeat(grid[:, None], self.n_layer, axis=1))
        return tuple(np.exp(grid[utilities.argmax(axis=0)]).tolist())

    def _value(self, log_s: Floats) -> Floats:
        total = self._utility(log_s).sum(axis=-1) - self._together * (log_s**2).mean(axis=-1) ** 2
        return np.asarray(self.lack * (1.0 - np.exp(np.minimum(-total / self.lack, 30.0))))

    def _utility(self, x: Floats) -> Floats:
        width = np.where(self._best > 0.0, self._best / 2.0, 1.0)
        bump = np.exp(-0.5 * ((x - self._best) / width) ** 2) - np.exp(-0.5 * (self._best / width) ** 2)
        beyond = self._above * np.maximum(x - self._best, 0.0) ** 2 + self._below * np.maximum(-x, 0.0) ** 2
        return np.asarray(self._height * bump + self._slope * x - beyond)

    def _function(self, context: int) -> tuple[Floats, Floats, float]:
        """Random Fourier features of a Matern 3/2 process over log factors (Rahimi and Recht 2007)."""
        if context not in self._functions:
            rng = np.random.default_rng([self.seed, context, 1])
            heavy = np.sqrt(3.0 / rng.chisquare(3.0, (self._FEATURES, 1)))
            frequencies = rng.standard_normal((self._FEATURES, self.n_layer)) / self._length * heavy
            phases = rng.uniform(0.0, 2.0 * np.pi, self._FEATURES)
            self._functions[context] = frequencies, phases, float(np.cos(phases).sum())
        return self._functions[context]
