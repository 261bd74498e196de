"""The Gaussian process against its textbook formulas and against functions that it must learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from lrope_search.optimizers.surrogate import GaussianProcess, expected_improvement


def test_equals_the_textbook_formulas() -> None:
    rng = np.random.default_rng(0)
    x, y, weight, at = rng.normal(size=(20, 3)), rng.normal(size=20), rng.uniform(0.5, 2.0, 20), rng.normal(size=(7, 3))
    process = GaussianProcess(3, length=1.5, noise=0.2)
    process.fit(x, y, weight)
    mean, deviation = process.predict(at)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = math.sqrt(5.0) * np.linalg.norm(a[:, None] - b, axis=2) / 1.5
        return (1.0 + r + r**2 / 3.0) * np.exp(-r)

    # Rasmussen and Williams 2006, eq. 2.25, 2.26; mean and variance by maximum likelihood
    covariance = kernel(x, x) + np.diag(0.2 / weight)
    ones = np.ones(20)
    level = ones @ np.linalg.solve(covariance, y) / (ones @ np.linalg.solve(covariance, ones))
    variance = (y - level) @ np.linalg.solve(covariance, y - level) / 20
    cross = kernel(at, x)
    np.testing.assert_allclose(mean, level + cross @ np.linalg.solve(covariance, y - level), atol=1e-6)
    spread = variance * (1.0 - np.diag(cross @ np.linalg.solve(covariance, cross.T)))
    np.testing.assert_allclose(deviation, np.sqrt(spread), atol=1e-6)


def test_fitting_raises_the_evidence_and_finds_the_input_that_matters() -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(-1.0, 1.0, (80, 2))
    y = np.sin(4.0 * x[:, 0]) + 0.05 * rng.normal(size=80)
    at = rng.uniform(-1.0, 1.0, (200, 2))
    errors = []
    for sweeps in (0, 6):
        process = GaussianProcess(2, length=0.2, noise=1.0)
        process.fit(x, y, np.ones(80), sweeps=sweeps)
        errors.append(float(np.sqrt(np.mean((process.predict(at)[0] - np.sin(4.0 * at[:, 0])) ** 2))))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.1


def test_pending_observations_count_as_if_they_had_come_as_expected() -> None:
    rng = np.random.default_rng(2)
    x, y, weight = rng.normal(size=(15, 2)), rng.normal(size=15), rng.uniform(0.5, 2.0, 15)
    pending, at = rng.normal(size=(4, 2)), rng.normal(size=(6, 2))
    process = GaussianProcess(2, length=1.0)
    process.fit(x, y, weight)
    expected, _ = process.predict(pending)
    mean, deviation = process.predict(at, pending=pending)
    told = GaussianProcess(2, length=1.0)
    told.fit(np.concatenate([x, pending]), np.concatenate([y, expected]), np.concatenate([weight, np.ones(4)]))
    np.testing.assert_allclose(told.predict(at)[0], mean, atol=1e-6)
    # told's variance comes from 19 observations, of which 4 tell nothing new
    np.testing.assert_allclose(told.predict(at)[1] * math.sqrt(19 / 15), deviation, rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constant_observations_are_no_trouble(constant: float) -> None:
    process = GaussianProcess(2)
    x = np.zeros((5, 2))
    process.fit(x, np.full(5, constant), np.ones(5), sweeps=2)
    mean, deviation = process.predict(np.ones((3, 2)))
    np.testing.assert_allclose(mean, constant, atol=1e-9)
    assert np.isfinite(deviation).all() and np.isfinite(expected_improvement(mean, deviation, constant)).all()


def test_expected_improvement_is_the_integral() -> None:
    mean, deviation = np.array([0.0, -1.0, 2.0]), np.array([1.0, 0.5, 0.1])
    grid = np.linspace(-8.0, 8.0, 20001)
    integral = [
        np.trapezoid(np.maximum(grid - 0.3, 0.0) * norm.pdf(grid, m, d), grid)
        for m, d in zip(mean, deviation, strict=True)
    ]
    np.testing.assert_allclose(expected_improvement(mean, deviation, 0.3), integral, atol=1e-6)
