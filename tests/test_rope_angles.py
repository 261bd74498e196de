"""The angles themselves: what the RoPE operations of each layer do to known queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.llama_direct import Context, RopeTrace
from support.rope_angles import bound, check, constant, unit_pairs
from support.rope_models import FACTORS, MODELS, MULTI, N_LAYER, TOKENS, YARNS, TinyModel, by_name
from support.rope_reference import text_positions

pytestmark = pytest.mark.native

N = 32
STARTS = (0, 1000, 4000, 30000)


def trace(model: TinyModel, path: Path, factors: list[float], start: int, n: int = N) -> dict[str, NDArray[Any]]:
    """All rotated queries and keys, each of shape (tokens, heads, head_dim)."""
    traced = RopeTrace()
    with Context(path, model.n_ctx, trace=traced) as context:
        assert context.set_factors(factors) == 0
        context.decode((TOKENS * 2)[:n], start=start)
    assert set(traced.outputs) == {f"{which}cur-{il}" for which in "QK" for il in range(N_LAYER)}
    return {name: out.reshape(n, -1, model.config.head_dim) for name, out in traced.outputs.items()}


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_angles_are_exact_and_magnitudes_unchanged(model: TinyModel, tmp_path: Path) -> None:
    ropes = model.config.ropes
    path = model.write(tmp_path / "model.gguf", weights=constant(model, unit_pairs(ropes[0], model.config.head_dim)))
    for start in STARTS:
        position = text_positions(start, N)
        for name, got in trace(model, path, FACTORS, start).items():
            il = int(name.split("-")[1])
            check(ropes[il], got, position, float(np.float32(FACTORS[il])))
    # the bound is far from what a factor does: at the last start, even one that is off by 1e-4
    wrong, right = (ropes[1].angles(position / s) for s in (1.3 * 1.0001, 1.3))
    assert np.all(np.max(np.abs(wrong - right), axis=1) > 10 * bound(ropes[1], position, 1.3).max(axis=1))


@pytest.mark.parametrize("model", YARNS, ids=by_name)
def test_angles_near_the_scale_of_yarn(model: TinyModel, tmp_path: Path) -> None:
    rope = model.config.ropes[0]
    if rope.freq_scale == 1.0:
        factors = [1.01, 0.99, 1.1, 0.9, 0.5, 2.0]
    else:
        factors = [rope.freq_scale * near for near in (1.25, 0.75, 1.4, 0.6, 2.0, 5.0)]
    path = model.write(tmp_path / "model.gguf", weights=constant(model, unit_pairs(rope, model.config.head_dim)))
    for name, got in trace(model, path, factors, 1000).items():
        check(rope, got, text_positions(1000, N), float(np.float32(factors[int(name.split("-")[1])])))


@pytest.mark.parametrize("model", MULTI, ids=by_name)
def test_angles_follow_time_height_and_width(model: TinyModel, tmp_path: Path) -> None:
    rope, traced = model.config.ropes[0], RopeTrace()
    path = model.write(tmp_path / "model.gguf", weights=constant(model, unit_pairs(rope, model.config.head_dim)))
    i = np.arange(N)
    position = np.stack([2000.0 + i // 8, 100.0 + 3 * i, 4000.0 + i % 8, 77.0 + i], axis=1)
    with Context(path, trace=traced) as context:
        assert context.set_factors(FACTORS) == 0
        context.decode_embeddings(np.ones((N, model.config.n_embd), np.float32), position)
    for name, out in traced.outputs.items():
        got = out.reshape(N, -1, model.config.head_dim)
        check(rope, got, position, float(np.float32(FACTORS[int(name.split("-")[1])])))


@pytest.mark.parametrize("s", [2, 4])
@pytest.mark.parametrize("model", [m for m in MODELS if m not in YARNS and m.name != "qwen2vl-yarn"], ids=by_name)
def test_positions_times_the_factor_turn_as_stock_bit_for_bit(model: TinyModel, s: int, tmp_path: Path) -> None:
    """Positions between are filled: llama.cpp wants them without gaps."""
    head = np.random.default_rng(3).standard_normal(model.config.head_dim).astype(np.float32)
    path = model.write(tmp_path / "model.gguf", weights=constant(model, head))
    stock = trace(model, path, [1.0] * N_LAYER, 1000)
    wide = trace(model, path, [float(s)] * N_LAYER, 1000 * s, N * s)
    for name, got in stock.items():
        np.testing.assert_array_equal(wide[name][::s], got)
        assert not np.array_equal(wide[name][1::s], got)
