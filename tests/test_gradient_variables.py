"""What an ascent may move: vectors, rows of heads, padding."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lrope_gguf.errors import LropeError
from lrope_search.gradient.variables import Heads, Moving, logarithms
from lrope_search.scores import Tuned

# four layers: of 2 KV heads and 4 heads, of 1 and 2, without attention, and one that attends without rotating
HEADS = Heads(kv={0: 2, 1: 1}, queries={0: 4, 1: 2, 3: 3}, n_head_kv=(2, 1, 0, 1), n_head=(4, 2, 0, 3))
ONES = (1.0,) * 4
MOVED = {"layers": 2, "heads": 3, "queries": 9, "both": 12}


@pytest.mark.parametrize("scale", MOVED)
def test_padding_never_moves(scale: str) -> None:
    moving = Moving(scale, [0, 1], HEADS, ONES)
    n = MOVED[scale]
    assert moving.start.tolist() == [0.0] * n
    positions, queries = moving.at(np.arange(1.0, n + 1.0))
    wanted = {
        "layers": ([[1], [2], [0], [0]], [[0] * 4] * 4),
        "heads": ([[1, 2], [3, 0], [0, 0], [0, 0]], [[0] * 4] * 4),
        "queries": ([[0]] * 4, [[1, 2, 3, 4], [5, 6, 0, 0], [0] * 4, [7, 8, 9, 0]]),
        "both": ([[1, 2], [3, 0], [0, 0], [0, 0]], [[4, 5, 6, 7], [8, 9, 0, 0], [0] * 4, [10, 11, 12, 0]]),
    }
    assert (positions.tolist(), queries.tolist()) == wanted[scale]
    assert moving.queries.sum() == {"queries": 9, "both": 9}.get(scale, 0)
    slope = moving.slope(np.array([[1.0, 2], [4, 8], [16, 32], [64, 128]]), np.arange(16.0).reshape(4, 4))
    of = {"layers": [3.0, 12.0], "heads": [1.0, 2, 4], "queries": [0.0, 1, 2, 3, 4, 5, 12, 13, 14]}
    assert slope.tolist() == (of["heads"] + of["queries"] if scale == "both" else of[scale])
    assert moving.layers_of(np.arange(n) == n - 1) == ((1,) if scale in ("layers", "heads") else (3,))


def test_rows_go_there_and_back() -> None:
    moving = Moving("both", [1], HEADS, (1.0, 1.5, 1.0, 1.0))
    vector = np.linspace(-0.5, 0.5, len(moving.start))
    tuned = moving.factors(vector)
    assert isinstance(tuned, Tuned) and tuned == (tuned and pickle.loads(pickle.dumps(tuned)))
    assert tuned.head_factors == ((1.0, 1.0), (0.6065,), (), (1.0,))
    assert tuned.query_scales is not None and [*map(len, tuned.query_scales)] == [4, 2, 0, 3]
    again = Moving("both", [1], HEADS, tuned)
    assert again.start == pytest.approx(vector, abs=1e-4)
    for got, wanted in zip(logarithms(tuned, HEADS), moving.at(vector), strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)


def test_what_is_kept_beside_what_moves() -> None:
    rows = ((1.0, 2.0), (0.5,), (), (1.0,))
    moving = Moving("queries", [0], HEADS, Tuned(ONES, rows))
    kept = moving.factors(moving.start)
    assert isinstance(kept, Tuned) and kept.head_factors == rows
    assert np.exp(moving.at(moving.start)[0]).tolist() == [[1.0, 2.0], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]]
    of_layers = Moving("layers", [0, 1], HEADS, (1.0, 1.25, 1.0, 1.0))
    assert of_layers.factors(of_layers.start) == (1.0, 1.25, 1.0, 1.0)


def test_what_cannot_move_is_said() -> None:
    with pytest.raises(LropeError, match="no layer has a factor that moves"):
        Moving("layers", [], HEADS, ONES)
    fused = Heads(kv={0: 1}, queries={}, n_head_kv=(4,) * 4, n_head=(4,) * 4)
    with pytest.raises(LropeError, match=r"layer 0 does not rotate its heads one by one; scale layers or queries"):
        Moving("heads", [0], fused, ONES)
    with pytest.raises(LropeError, match=r"query_scales: rows of \[4, 2\] numbers; this model wants \[4, 2, 0, 3\]"):
        logarithms(Tuned(ONES, None, ((1.0,) * 4, (1.0,) * 2)), HEADS)


def test_tuned_equals_itself_alone() -> None:
    rows = ((1.0,), (2.0,))
    one = Tuned((1.0, 1.0), None, rows)
    assert one == Tuned((1.0, 1.0), None, rows) and hash(one) == hash(Tuned((1.0, 1.0), None, rows))
    for other in ((1.0, 1.0), Tuned((1.0, 1.0), rows), Tuned((1.0, 1.0), None, ((1.0,), (1.0,)))):
        assert one != other and other != one
    assert len({one, (1.0, 1.0), Tuned((1.0, 1.0), None, rows)}) == 2
