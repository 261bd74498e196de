"""A synthetic evaluator for search tests: rugged, asymmetric, with noise of its own for every context."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np

from lrope_search.scores import ContextScore, DivergenceScore, ProbeScore

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def noise(*key: object) -> float:
    """Standard deviation 1, the same for the same key on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return math.sqrt(12.0) * (struct.unpack("<Q", digest[:8])[0] / 2.0**64 - 0.5)


class Landscape:
    """Answers get likelier near factors that rise from 1 to ``peak`` in the middle layers.

    Early layers tolerate least, the optimum of every context lies elsewhere, ripples make local optima, and every
    (factors, context) has noise. Uniform factors do not help: the base model beats them all.
    """

    def __init__(
        self, n_layer: int = 12, *, seed: int = 0, peak: float = 1.12, ripple: float = 0.02, jitter: float = 0.01
    ) -> None:
        rng = np.random.default_rng(seed)
        x = np.arange(n_layer) / max(n_layer - 1, 1)
        self.n_layer, self.seed, self.jitter, self.ripple = n_layer, seed, jitter, ripple
        self.target = math.log(peak) * np.exp(-(((x - 0.6) / 0.25) ** 2)) - 0.03 * x**4
        self.weight = (1.0 + 3.0 * np.exp(-8.0 * x)) / n_layer
        self.waves = rng.normal(size=(4, n_layer)) * 25.0

    def log_probability(self, factors: tuple[float, ...], context: object) -> float:
        """Mean over a context, in nats."""
        log_s = np.log(factors)
        shift = 0.01 * noise(self.seed, "shift", context)
        loss = 30.0 * float(np.sum(self.weight * np.abs(log_s - self.target - shift) ** 1.5))
        ripples = self.ripple * float(np.sum(np.cos(self.waves @ log_s)))
        return -0.8 - loss + ripples + self.jitter * noise(self.seed, factors, context)

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        """Probes in the middle are the hard ones; one is correct if likelier than a threshold of its own."""
        level = self.log_probability(factors, (split, index))
        probes = []
        for depth in DEPTHS:
            log_p = min(level - 0.6 * depth * (1.0 - depth), -1e-6)
            threshold = -1.2 + 0.15 * noise(self.seed, "threshold", split, index, depth)
            probes.append(ProbeScore(depth, log_p, log_p > threshold))
        return ContextScore(split, index, tuple(probes), n_tokens=100, seconds=0.0)

    def divergence(self, factors: tuple[float, ...]) -> DivergenceScore:
        """Ordinary text suffers by what the factors differ from 1, long text twice as much as short."""
        kl = max(abs(math.log(s)) for s in factors)
        return DivergenceScore(kl / 2.0, kl, n_tokens=512, seconds=0.0)
