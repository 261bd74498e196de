"""The guard: KL divergence of a curve from the base model on ordinary text, short and long.

The text is the user's, or what the base model itself writes from a seed: then it needs no data, and is what that model
takes for ordinary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

from ..scores import DivergenceScore, Factors
from .batch import Tokens
from .logits import RowWorkers, kl_divergences
from .model import FactorsRefusedError, Model
from .tuning import Tuner

SHORT_TOKENS = 256
LONG_TOKENS = 2048
N_SHORT = 4
_LONG_ROWS = 256  # positions of a long text that are looked at
_SPAWN_KEY = 0x67756172  # apart from the streams of tasks and algorithms with the same seed


@dataclass(frozen=True)
class GuardTexts:
    """Texts in tokens: some short ones and a long one. Plain numbers, so that they can be kept and sent."""

    short: tuple[tuple[int, ...], ...]
    long: tuple[int, ...]


def read_texts(
    model: Model, path: Path | str, *, n_short: int = N_SHORT, short: int = SHORT_TOKENS, long: int = LONG_TOKENS
) -> GuardTexts:
    """Return the user's text, cut for a guard.

    The long text is the file's beginning, up to ``long`` tokens; the short ones stand evenly spaced in all of it.
    Raises `LropeError` if the file cannot be read as UTF-8 or has fewer than twice ``short`` tokens.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LropeError(f"{path}: cannot be read as text ({reason}); give guard_text a UTF-8 file") from error
    tokens = model.tokenize(text).tolist()
    if len(tokens) < 2 * short:
        raise LropeError(
            f"{path}: {len(tokens)} tokens, too few; give guard_text at least {2 * short} tokens, or leave it out"
        )
    begin = model.text_start()
    body = short - len(begin)
    starts = np.linspace(0, len(tokens) - body, n_short).astype(int).tolist()
    return GuardTexts(
        short=tuple((*begin, *tokens[start : start + body]) for start in starts),
        long=(*begin, *tokens[: long - len(begin)]),
    )


def write_texts(
    model: Model, seed: int, *, n_short: int = N_SHORT, short: int = SHORT_TOKENS, long: int = LONG_TOKENS
) -> GuardTexts:
    """Let the base model write the texts: sampled at temperature 1 from the generator of ``seed``.

    ``n_short`` texts of ``long / n_short`` tokens are written side by side. Their beginnings are the short texts; all
    of them in a row, as documents stand in training data, the long one. One after the other is the order of the
    generator's numbers, whatever machine computes; yet where two machines round differently, their texts part sooner
    or later. So one of them should write for all.

    Raises `LropeError` if the model computes something else than numbers.
    """
    begin = model.text_start()
    length = max(short, -(-long // n_short))
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_SPAWN_KEY,)))
    rows: list[list[int]] = [list(begin) for _ in range(n_short)]
    with model.another_context() as writer:
        writer.reserve(n_short * (length + 1), n_short)
        writer.set_factors((1.0,) * model.n_layer)
        if not begin:  # no token of its own begins a text: any other one
            for row, token in zip(rows, generator.choice(model.n_vocab, n_short, replace=False).tolist(), strict=True):
                row.append(token)
        sequences = np.arange(n_short)
        tokens = np.array([row[0] for row in rows], np.int32)
        for position in range(length - 1):
            known = len(rows[0]) > position + 1
            wanted = np.full(n_short, not known)
            for part, logits in writer.decode(tokens, np.full(n_short, position), sequences, wanted):
                for row, of_row in zip(rows[part], logits, strict=True):
                    row.append(_sample(model, of_row.astype(np.float64), generator))
            tokens = np.array([row[position + 1] for row in rows], np.int32)
    joined = [token for row in rows for token in row]
    return GuardTexts(short=tuple(tuple(row[:short]) for row in rows), long=tuple(joined[:long]))


def _sample(model: Model, logits: NDArray[np.float64], generator: np.random.Generator) -> int:
    """Draw a token that ends no text from softmax(logits), by one number of the generator; overwrites them."""
    top = float(logits.max())
    if not np.isfinite(top):
        raise LropeError(f"{model.path}: its logits are NaN on text of its own; the file may be damaged")
    p = np.exp(logits - top, out=logits)
    where = generator.random()
    while True:
        cumulated = np.cumsum(p)
        token = int(np.searchsorted(cumulated[:-1], where * cumulated[-1], side="right"))
        if not model.is_end(token):
            return token
        p[token] = 0.0


class Guard:
    """Measures KL(base || curve), token by token, over the whole vocabulary.

    Base and curve run side by side in two contexts of the loaded model, so that the rows of both are there at once and
    none is kept: exact, at the price of computing the base again each time (a guard looks at few curves), and the
    memory is that of two small contexts, only while it looks.

    Attributes:
        n_tokens: Tokens that a call of `score` computes: each twice.
        n_cells, n_seq: Tokens and sequences that each of its two contexts holds.
    """

    def __init__(self, model: Model, texts: GuardTexts) -> None:
        self._model, self.texts, self._tune = model, texts, Tuner(model.path)
        self._workers = RowWorkers(model.n_threads)
        short = [np.array(text, np.int32) for text in texts.short]
        long = np.array(texts.long, np.int32)
        # of the long text, positions that no short text reaches
        start = min(max(map(len, short)), len(long) - 1)
        rows = np.zeros(len(long), np.bool_)
        rows[np.unique(np.linspace(start, len(long) - 1, min(_LONG_ROWS, len(long) - start)).astype(int))] = True
        self._texts = ((short, [np.ones(len(text), np.bool_) for text in short]), ([long], [rows]))
        sizes = [sum(map(len, of_kind)) for of_kind, _ in self._texts]
        self.n_tokens, self.n_cells, self.n_seq = 2 * sum(sizes), max(sizes), len(short)

    def score(self, factors: Factors) -> DivergenceScore:
        """Compare ``factors`` with the base model. Where they lead to NaN or are refused, the divergence is inf.

        Raises `LropeError` if the base model computes something else than numbers.
        """
        begin = time.perf_counter()
        with self._model.another_context() as base, self._model.another_context() as curve:
            for side, of_side in ((base, (1.0,) * self._model.n_layer), (curve, factors)):
                side.reserve(self.n_cells, self.n_seq)
                try:
                    self._tune(side, of_side)
                except FactorsRefusedError:
                    return DivergenceScore(math.inf, math.inf, 0, time.perf_counter() - begin)
            short, long = (self._diverge(base, curve, texts, rows) for texts, rows in self._texts)
        return DivergenceScore(short, long, self.n_tokens, time.perf_counter() - begin)

    def _diverge(self, base: Model, curve: Model, texts: Sequence[Tokens], rows: Sequence[NDArray[np.bool_]]) -> float:
        """Return the mean divergence over the wanted ``rows`` of ``texts``, in nats per token."""
        tokens = np.concatenate(texts)
        positions = np.concatenate([np.arange(len(text)) for text in texts])
        sequences = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        wanted = np.concatenate(rows)
        divergences = np.empty(np.count_nonzero(wanted))
        for side in (base, curve):
            side.clear()
        both = (side.decode(tokens, positions, sequences, wanted) for side in (base, curve))
        for (part, p), (_, q) in zip(*both, strict=True):
            divergences[part] = kl_divergences(p, q, self._workers)
        if np.isnan(divergences).any():
            raise LropeError(f"{self._model.path}: its logits are NaN on ordinary text; the file may be damaged")
        return float(divergences.mean()) if np.isfinite(divergences).all() else math.inf
