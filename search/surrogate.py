"""A Gaussian process that guesses what a curve is worth before it is evaluated; pure NumPy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """Return how much more than ``best`` normal distributions give on average (Jones et al. 1998, eq. 15)."""
    z = (mean - best) / deviation
    below = 0.5 * (1.0 + np.array([math.erf(value) for value in z / math.sqrt(2.0)]))
    density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    return np.asarray(deviation * (z * below + density))


class GaussianProcess:
    """Gaussian process regression (Rasmussen and Williams 2006, ch. 2 and 5), Matern 5/2 kernel with a length an input.

    Lengths and noise are powers of two and are chosen by steps on that grid, the mean and the variance follow in
    closed form: all that is fitted comes from discrete choices, so that rounding on another machine does not add up.

    Args:
        n_inputs: Number of inputs d.
        length: Where the lengths start, in units of the inputs; also the centre of their prior.
        noise: Where the noise starts, as a variance of an observation of weight 1 in units of the signal's.
    """

    _PRIOR = 1.0  # standard deviation of log length and log noise, in octaves times ln 2
    _OCTAVES = 6  # furthest step from the start

    def __init__(self, n_inputs: int, *, length: float = 0.2, noise: float = 0.1) -> None:
        """Begin without data."""
        self._steps = np.zeros(n_inputs + 1, dtype=np.int64)  # octaves from the start: lengths, then the noise
        self._start = np.log(np.append(np.full(n_inputs, length), noise))
        self._x = np.empty((0, n_inputs))

    def fit(self, x: Floats, y: Floats, weight: Floats, *, sweeps: int = 0) -> None:
        """Take the data; with ``sweeps``, improve lengths and noise first.

        Args:
            x: Inputs, shape ``(n, d)``.
            y: Observations, shape ``(n,)``.
            weight: An observation's noise variance is ``1 / weight``; shape ``(n,)``.
            sweeps: How often each length and the noise may move by an octave.
        """
        self._x, self._weight = x, weight
        for _ in range(sweeps):
            moved = False
            best = self._evidence(self._steps, y)
            for i in range(len(self._steps)):
                for step in (-1, 1):
                    steps = self._steps.copy()
                    steps[i] += step
                    if abs(steps[i]) > self._OCTAVES:
                        continue
                    evidence = self._evidence(steps, y)
                    if evidence > best:
                        best, self._steps, moved = evidence, steps, True
                        break
            if not moved:
                break
        self._solve(self._steps, y)

    def predict(self, x: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the noiseless function at ``x``, each of shape ``(m,)``."""
        k = self._kernel(x, self._x, self._steps)
        mean = self._mean + k @ self._alpha
        variance = 1.0 - np.einsum("ij,jk,ik->i", k, self._inverse, k, optimize=True)
        return mean, np.sqrt(self._variance * np.maximum(variance, 1e-9))

    def _solve(self, steps: NDArray[np.int64], y: Floats) -> float:
        """Fit mean and variance in closed form; return the log evidence."""
        noise = math.exp(self._start[-1] + math.log(2.0) * steps[-1])
        covariance = self._kernel(self._x, self._x, steps) + np.diag(noise / self._weight + 1e-9)
        factor = np.linalg.cholesky(covariance)
        inverse_factor = np.linalg.inv(factor)
        self._inverse = inverse_factor.T @ inverse_factor
        ones = self._inverse.sum(axis=1)
        self._mean = float(ones @ y / ones.sum())
        self._alpha = self._inverse @ (y - self._mean)
        self._variance = max(float((y - self._mean) @ self._alpha) / len(y), 1e-12)
        return -0.5 * len(y) * math.log(self._variance) - float(np.log(np.diag(factor)).sum())

    def _evidence(self, steps: NDArray[np.int64], y: Floats) -> float:
        return self._solve(steps, y) - 0.5 * float((steps**2).sum()) * (math.log(2.0) / self._PRIOR) ** 2

    def _kernel(self, a: Floats, b: Floats, steps: NDArray[np.int64]) -> Floats:
        length = np.exp(self._start[:-1] + math.log(2.0) * steps[:-1])
        a, b = a / length, b / length
        squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
        r = np.sqrt(5.0 * np.maximum(squared, 0.0))
        return np.asarray((1.0 + r + r**2 / 3.0) * np.exp(-r))
