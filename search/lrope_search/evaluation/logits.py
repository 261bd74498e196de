"""Log-probabilities of given tokens, and divergences, from rows of logits.

Row by row, so that a large vocabulary's row stays in the processor's cache, and in threads: NumPy gives the
interpreter's lock back, and a row's result does not depend on who computes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import Logits, Tokens

_FEW = 1 << 18  # numbers that one thread deals with before a second could start


class RowWorkers:
    """Threads that share the rows of a batch."""

    def __init__(self, n_threads: int) -> None:
        """Use up to ``n_threads`` threads; they start when there is work for more than one."""
        self._n_threads = n_threads
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[slice], None], n_rows: int, n_vocab: int) -> None:
        """Call ``work`` with slices that cover ``n_rows`` rows of ``n_vocab`` numbers."""
        n_parts = min(self._n_threads, n_rows, 1 + n_rows * n_vocab // _FEW)
        if n_parts < 2:
            work(slice(0, n_rows))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_threads, "rows")
        ends = np.linspace(0, n_rows, n_parts + 1).astype(int).tolist()
        for done in [self._pool.submit(work, slice(a, b)) for a, b in itertools.pairwise(ends)]:
            done.result()


def gold_scores(logits: Logits, gold: Tokens, workers: RowWorkers) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the gold tokens' log-probabilities (natural, shape (rows,)) and whether they are the most likely.

    Overwrites ``logits``, shape (rows, n_vocab). A row with a NaN gives NaN and False.
    """
    log_p = np.empty(len(gold))
    hit = np.empty(len(gold), np.bool_)

    def score(rows: slice) -> None:
        for i, row, token in zip(range(rows.start, rows.stop), logits[rows], gold[rows].tolist(), strict=True):
            best = int(row.argmax())  # the first NaN, if there is one
            top = float(row[best])
            if not math.isfinite(top):
                log_p[i], hit[i] = math.nan, False
                continue
            np.subtract(row, row[best], out=row)
            own = float(row[token])
            np.exp(row, out=row)
            log_p[i] = own - math.log(row.sum(dtype=np.float64))
            hit[i] = best == token

    workers.run(score, len(gold), logits.shape[1])
    return log_p, hit


def kl_divergences(base: Logits, other: Logits, workers: RowWorkers) -> NDArray[np.float64]:
    """Return KL(base || other) of each row's distribution over the whole vocabulary, in nats, shape (rows,).

    ``sum p (ln p - ln q)``, exact but for the rounding of float64. NaN where ``base`` is not made of numbers, inf where
    ``other`` is not.
    """
    result = np.empty(len(base))

    def diverge(rows: slice) -> None:
        log_p, log_q, p = np.empty((3, base.shape[1]))
        for i, b, o in zip(range(rows.start, rows.stop), base[rows], other[rows], strict=True):
            _log_softmax(b, out=log_p, spare=p)
            _log_softmax(o, out=log_q, spare=p)
            np.exp(log_p, out=p)
            there: Any = p > 0.0  # a token that the model excludes adds nothing
            there = True if there.all() else there
            ratio = np.subtract(log_p, log_q, out=log_q, where=there)
            # no dot product: BLAS has threads of its own, which would wait for cores that others have
            value = float(np.multiply(p, ratio, out=ratio, where=there).sum(where=there))
            result[i] = max(value, 0.0) if math.isfinite(value) else math.inf
            if np.isnan(log_p[0]):
                result[i] = math.nan

    workers.run(diverge, len(base), base.shape[1])
    return result


def _log_softmax(row: Logits, *, out: NDArray[np.float64], spare: NDArray[np.float64]) -> None:
    """Write log-probabilities into ``out``, NaN where there are none; ``spare`` is for what lies between."""
    top = float(row.max())
    if not math.isfinite(top):
        out[:] = math.nan
        return
    np.subtract(row, top, out=out, dtype=np.float64)
    out -= math.log(np.exp(out, out=spare).sum())
