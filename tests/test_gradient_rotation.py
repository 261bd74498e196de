"""The coherent derivative of RoPE's factors, held against finite differences of a reference in NumPy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from lrope_search.gradient.attention import Mask, Nearby, Scores, attention  # noqa: E402
from lrope_search.gradient.rotation import Coherence, Pairs, rotate  # noqa: E402

pytestmark = pytest.mark.gradient

N_KV, GROUP, HEAD = 2, 3, 8
BASE = 400.0  # wavelengths from 6 to 600 positions
Array = NDArray[np.float64]


class Case:
    """Queries, keys and values of a prefix that two questions continue, and a weight for each number of the output."""

    def __init__(self, seed: int, n_prefix: int = 70, n_question: int = 9) -> None:
        rng = np.random.default_rng(seed)
        places = [np.arange(n_prefix), *(n_prefix + np.arange(n_question) for _ in range(2))]
        owner = np.repeat([0, 1, 2], [n_prefix, n_question, n_question])
        self.positions = np.concatenate(places)
        n = len(owner)
        before = np.arange(n)[None, :] <= np.arange(n)[:, None]
        self.seen = before & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))
        self.q = rng.normal(size=(n, N_KV * GROUP, HEAD))
        self.k, self.v = rng.normal(size=(2, n, N_KV, HEAD))
        self.weight = rng.normal(size=(n, N_KV * GROUP, HEAD))
        self.log_factor = np.array([0.2, -0.1])
        self.speed = BASE ** (-np.arange(HEAD // 2) * 2.0 / HEAD)

    def loss(self, log_factor: Array, distances: Array | float, *, cap: float = 0.0) -> float:
        """The weighted output, where a pair follows ``log_factor`` within its distance only, else `log_factor`.

        Neither queries nor keys are rotated: each pair's part of a score is that of the angle between them.
        """
        delta = (self.positions[:, None] - self.positions[None, :])[..., None].astype(float)
        near = np.abs(delta) <= distances
        total = 0.0
        for h in range(N_KV * GROUP):
            kv = h // GROUP
            factor = np.where(near, log_factor[kv], self.log_factor[kv])
            angle = delta * self.speed * np.exp(-factor)
            qa, qb = self.q[:, None, h, 0::2], self.q[:, None, h, 1::2]
            ka, kb = self.k[None, :, kv, 0::2], self.k[None, :, kv, 1::2]
            part = (qa * ka + qb * kb) * np.cos(angle) + (qa * kb - qb * ka) * np.sin(angle)
            scores = part.sum(-1) / math.sqrt(HEAD)
            if cap:
                scores = cap * np.tanh(scores / cap)
            scores = np.where(self.seen, scores, -np.inf)
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            total += float((self.weight[:, h] * (p @ self.v[:, kv])).sum())
        return total

    def differences(self, distances: Array | float, *, cap: float = 0.0, step: float = 1e-5) -> list[float]:
        found = []
        for kv in range(N_KV):
            moved = np.eye(N_KV)[kv] * step
            above, below = (self.loss(self.log_factor + sign * moved, distances, cap=cap) for sign in (1, -1))
            found.append((above - below) / (2 * step))
        return found

    def derivative(self, coherence: Coherence, *, cap: float = 0.0) -> tuple[float, list[float]]:
        """Loss and derivatives, by what is tested."""
        q, k, v, weight = (torch.from_numpy(x) for x in (self.q, self.k, self.v, self.weight))
        positions = torch.from_numpy(self.positions)
        log_factor = torch.tensor(self.log_factor, requires_grad=True)
        index = torch.arange(HEAD // 2)
        pairs = Pairs(2 * index, 2 * index + 1, torch.from_numpy(self.speed), 1.0)
        everywhere, bands = coherence.split(pairs.speed, int(positions.max()) + 1)
        q, k = (rotate(x[None], log_factor, positions, pairs, everywhere)[0] for x in (q, k))
        hidden = torch.from_numpy(np.where(self.seen, 0.0, -np.inf))
        out = attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), Mask(hidden, len(hidden), N_KV * GROUP),
            Scores(HEAD**-0.5, cap), log_factor=log_factor if bands else None,
            nearby=Nearby(0, pairs, bands, positions, positions) if bands else None,
        )  # fmt: skip
        loss = (out.transpose(0, 1) * weight).sum()
        loss.backward()
        assert log_factor.grad is not None
        return float(loss.detach()), log_factor.grad.tolist()


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_without_a_limit_the_derivative_is_exact(cap: float) -> None:
    case = Case(1)
    loss, got = case.derivative(Coherence(None), cap=cap)
    assert loss == pytest.approx(case.loss(case.log_factor, np.inf, cap=cap), rel=1e-9)
    assert got == pytest.approx(case.differences(np.inf, cap=cap), rel=1e-5)


@pytest.mark.parametrize("limit", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_a_pair_counts_within_its_wavelengths(limit: float, cap: float) -> None:
    case = Case(2)
    distances = np.array([2.0 ** math.floor(math.log2(limit * 2.0 * math.pi / speed)) for speed in case.speed])
    assert (distances < 64).any()
    loss, got = case.derivative(Coherence(limit), cap=cap)
    assert loss == pytest.approx(case.loss(case.log_factor, np.inf, cap=cap), rel=1e-9), "the forward pass is exact"
    assert got == pytest.approx(case.differences(distances, cap=cap), rel=1e-5)
    assert got != pytest.approx(case.differences(np.inf, cap=cap), rel=1e-2)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3)
    whole = case.derivative(Coherence(1.0))
    monkeypatch.setattr("lrope_search.gradient.attention.BLOCK_NUMBERS", 7 * N_KV * GROUP * len(case.seen))
    parts = case.derivative(Coherence(1.0))
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert parts[1] == pytest.approx(whole[1], rel=1e-9)


def test_distances_grow_with_the_wavelength_alone() -> None:
    """The same pairs under another base, and in a head of another size, count within the same distances."""
    speed = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    assert Coherence(1.0).distances(speed).tolist() == [4.0, 8.0, 16.0]
    assert Coherence(2.0).distances(speed).tolist() == [8.0, 16.0, 32.0]
    assert Coherence(None).distances(speed).tolist() == [math.inf] * 3
