"""Which variables an ascent moves: between the vector that it sees and the heads of a model. Pure NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.curve import Rows
from lrope_gguf.errors import LropeError

from ..scores import Factors, Tuned

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Heads:
    """What there is to move.

    Attributes:
        kv: KV heads by layer, of the layers that rotate.
        queries: Heads by layer, of the layers whose queries may be scaled.
        n_head_kv: Numbers in the row of each layer's KV heads, whether it attends or not.
        n_head: And of its heads.
    """

    kv: Mapping[int, int]
    queries: Mapping[int, int]
    n_head_kv: Sequence[int]
    n_head: Sequence[int]


def logarithms(factors: Factors, heads: Heads) -> tuple[Values, Values]:
    """Return what derivatives are taken at: of positions, shape (layers, 1 or KV heads), of queries (layers, heads).

    Rows end with zeros where a layer has fewer heads than another.

    Raises:
        LropeError: there is not a number for each head.
    """
    tuned = factors if isinstance(factors, Tuned) else Tuned(factors)
    positions = np.log(np.array(factors))[:, None]
    if tuned.head_factors is not None:
        positions = _padded("head_factors", tuned.head_factors, heads.n_head_kv, heads.kv)
    if tuned.query_scales is None:
        return positions, np.zeros((len(factors), max(heads.queries.values(), default=1)))
    return positions, _padded("query_scales", tuned.query_scales, heads.n_head, heads.queries)


def _padded(name: str, rows: Rows, sizes: Sequence[int], moved: Mapping[int, int]) -> Values:
    if [*map(len, rows)] != [*sizes]:
        raise LropeError(f"{name}: rows of {[*map(len, rows)]} numbers; this model wants {[*sizes]}")
    values = np.zeros((len(sizes), max(moved.values())))
    for layer, n in moved.items():
        values[layer, : min(n, sizes[layer])] = np.log(rows[layer][:n])
    return values


class Moving:
    """Variables that move, from where all of them start.

    Args:
        scale: One of `SCALES`.
        layers: Whose positions move; queries may be scaled in all.
        heads: There are.
        start: Factors of all layers, or more.

    Attributes:
        start: Logarithms of those that move, shape (n,): layer after layer, positions before queries.
        queries: Which of them are of query scales.

    Raises:
        LropeError: there are none, or heads of a layer that cannot be told apart.
    """

    def __init__(self, scale: str, layers: Sequence[int], heads: Heads, start: Factors) -> None:
        self._start = start if isinstance(start, Tuned) else Tuned(start)
        self._heads, self._of_heads, self._of_queries = heads, scale in ("heads", "both"), scale in ("queries", "both")
        self._positions, self._queries = logarithms(start, heads)
        of_positions, of_queries = np.zeros(self._positions.shape, np.bool_), np.zeros(self._queries.shape, np.bool_)
        if self._of_heads:
            for layer in layers:
                if heads.n_head_kv[layer] != heads.kv.get(layer):
                    raise LropeError(f"layer {layer} does not rotate its heads one by one; scale layers or queries")
            width = np.arange(max(heads.kv.values()))
            there = np.array([width < heads.kv.get(layer, 0) for layer in range(len(start))])
            self._positions = np.where(there, self._positions, 0.0)
            of_positions = np.zeros(self._positions.shape, np.bool_)
        if scale != "queries":
            for layer in layers:
                of_positions[layer, : heads.kv[layer] if self._of_heads else 1] = True
        if self._of_queries:
            for layer, n in heads.queries.items():
                of_queries[layer, :n] = True
        self._masks = of_positions, of_queries
        self.start = self._vector(self._positions, self._queries)
        if not len(self.start):
            raise LropeError("no layer has a factor that moves; no gradients")
        self.queries = np.arange(len(self.start)) >= of_positions.sum()

    def slope(self, factors: Values, scales: Values) -> Values:
        """Return derivatives by those that move, of a `Gradient`'s by factors and by scales."""
        return self._vector(factors if self._of_heads else factors.sum(1, keepdims=True), scales)

    def at(self, vector: Values) -> tuple[Values, Values]:
        """Return logarithms of all, as `logarithms` does."""
        positions, queries = self._positions.copy(), self._queries.copy()
        n = int(self._masks[0].sum())
        positions[self._masks[0]], queries[self._masks[1]] = vector[:n], vector[n:]
        return positions, queries

    def factors(self, vector: Values) -> Factors:
        """Return what those make of a model, rounded to 1e-4."""
        rounded: list[Values] = [np.exp(values).round(4) for values in self.at(vector)]
        positions, queries = rounded
        if not (self._of_heads or self._of_queries):
            return tuple(positions[:, 0].tolist())
        head_factors = _rows(positions, self._heads.n_head_kv) if self._of_heads else self._start.head_factors
        query_scales = _rows(queries, self._heads.n_head) if self._of_queries else self._start.query_scales
        return Tuned(self._start, head_factors, query_scales)

    def layers_of(self, which: NDArray[np.bool_]) -> tuple[int, ...]:
        """Return the layers of which any of these moves, shape (n,)."""
        layers = self._vector(*(np.indices(mask.shape, np.float64)[0] for mask in self._masks))
        return tuple(np.unique(layers[which].astype(int)).tolist())

    def _vector(self, positions: Values, queries: Values) -> Values:
        return np.concatenate([positions[self._masks[0]], queries[self._masks[1]]])


def _rows(values: Values, sizes: Sequence[int]) -> Rows:
    return tuple((*row[:n].tolist(), *(1.0,) * (n - len(row))) for row, n in zip(values, sizes, strict=True))
