"""A Gaussian process that guesses what a curve is worth before it is evaluated.

Our own rather than a library's: its fit is a walk on a grid, equal on every machine, and it knows what is pending;
measured in ``research/algorithms.md``.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

Floats = NDArray[np.float64]

_JITTER = 1e-9  # in units of the variance; keeps covariances definite

_libraries = ThreadpoolController()  # NumPy's and SciPy's, both imported by now


def one_thread() -> AbstractContextManager[object]:
    """Keep linear algebra to this thread: these matrices are small, and more threads would only wait for each other."""
    limit: AbstractContextManager[object] = _libraries.limit(limits=1, user_api="blas")
    return limit


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """Return how much more than ``best`` normal distributions give on average (Jones et al. 1998, eq. 15)."""
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    return np.asarray(deviation * (z * ndtr(z) + density))


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
        self._steps = np.zeros(n_inputs + 1, dtype=np.int64)  # octaves from the start: lengths, then the noise
        self._start = np.log(np.append(np.full(n_inputs, length), noise))
        self._x = np.empty((0, n_inputs))

    def fit(self, x: Floats, y: Floats, weight: Floats, *, sweeps: int = 0) -> None:
        """Take the data; with ``sweeps``, improve lengths and noise first.

        Args:
            x: Inputs, shape ``(n, d)``.
            y: Observations, shape ``(n,)``.
            weight: An observation's noise variance is that of weight 1 over its weight; shape ``(n,)``.
            sweeps: How often each length and the noise may move by an octave.
        """
        self._x, self._weight = x, weight
        for _ in range(sweeps):
            start, best = self._steps, self._evidence(self._steps, y)
            for i in range(len(self._steps)):
                for step in (-1, 1):
                    steps = self._steps.copy()
                    steps[i] += step
                    evidence = self._evidence(steps, y) if abs(steps[i]) <= self._OCTAVES else -math.inf
                    if evidence > best:
                        best, self._steps = evidence, steps
                        break
            if self._steps is start:
                break
        _, factor, white, self._mean, self._variance = self._solve(self._steps, y)
        self._whitener = solve_triangular(factor, np.eye(len(factor)), lower=True)
        self._alpha = self._whitener.T @ white

    def predict(self, x: Floats, pending: Floats | None = None) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the noiseless function at ``x``, each of shape ``(m,)``.

        ``pending``, shape ``(p, d)``: inputs whose observations, of weight 1, will come. Seen from now they are
        expected to be what the mean says there: the mean stays as it is, the doubt shrinks.
        """
        k = self._kernel(x, self._x, self._steps)
        white = k @ self._whitener.T
        variance = 1.0 - (white**2).sum(axis=1)
        if pending is not None and len(pending):
            theirs = self._kernel(pending, self._x, self._steps) @ self._whitener.T
            noise = np.diag(np.full(len(pending), self._noise(self._steps) + _JITTER))
            own = self._kernel(pending, pending, self._steps) - theirs @ theirs.T + noise
            cross = self._kernel(x, pending, self._steps) - white @ theirs.T
            variance -= (solve_triangular(np.linalg.cholesky(own), cross.T, lower=True) ** 2).sum(axis=0)
        return self._mean + k @ self._alpha, np.sqrt(self._variance * np.maximum(variance, _JITTER))

    def _solve(self, steps: NDArray[np.int64], y: Floats) -> tuple[float, Floats, Floats, float, float]:
        """Return log evidence, Cholesky factor, whitened residuals, mean and variance, the latter in closed form."""
        noise = np.diag(self._noise(steps) / self._weight + _JITTER)
        factor: Floats = np.asarray(np.linalg.cholesky(self._kernel(self._x, self._x, steps) + noise), np.float64)
        both: Floats = np.asarray(solve_triangular(factor, np.stack([y, np.ones(len(y))], axis=1), lower=True))
        white_y, white_one = both.T
        mean = float(white_one @ white_y / (white_one @ white_one))
        white = white_y - mean * white_one
        variance = max(float(white @ white) / len(y), 1e-12)
        evidence = -0.5 * len(y) * math.log(variance) - float(np.log(np.diag(factor)).sum())
        return evidence, factor, white, mean, variance

    def _noise(self, steps: NDArray[np.int64]) -> float:
        return math.exp(self._start[-1] + math.log(2.0) * steps[-1])

    def _evidence(self, steps: NDArray[np.int64], y: Floats) -> float:
        return self._solve(steps, y)[0] - 0.5 * float((steps**2).sum()) * (math.log(2.0) / self._PRIOR) ** 2

    def _kernel(self, a: Floats, b: Floats, steps: NDArray[np.int64]) -> Floats:
        length = np.exp(self._start[:-1] + math.log(2.0) * steps[:-1])
        a, b = a / length, b / length
        squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
        r = np.sqrt(5.0 * np.maximum(squared, 0.0))
        return np.asarray((1.0 + r + r**2 / 3.0) * np.exp(-r))
