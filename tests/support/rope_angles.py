"""Reading the angles of a library: queries and keys that are known before they turn, and what float32 may be off by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.rope_models import TinyModel, Weights
from support.rope_reference import Array, Rope

ULP = 2.0**-24  # a float32 result is off by this much, relatively


def constant(model: TinyModel, head: NDArray[np.float32]) -> Weights:
    """The model's weights, but every query, key and value of every token is ``head`` before it turns."""
    c, weights = model.config, model.weights()
    heads = {"q": c.n_head, "k": c.n_head_kv, "v": c.n_head_kv, "qkv": c.n_head + 2 * c.n_head_kv}
    for il in range(c.n_layer):
        for name in ("qkv",) if model.fused else ("q", "k", "v"):
            weight = f"blk.{il}.attn_{name}.weight"
            weights[weight] = np.zeros_like(weights[weight])
            weights[f"blk.{il}.attn_{name}.bias"] = np.tile(head, heads[name])
            if (norm := f"blk.{il}.attn_{name}_norm.weight") in weights:
                # undoes the norm
                weights[norm] = np.full(c.head_dim, np.sqrt(np.mean(head**2) + c.eps), np.float32)
    return weights


def unit_pairs(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """A head whose pairs all are (1, 0): turned, they are cosine and sine of their angles."""
    head = np.zeros(head_dim, np.float32)
    head[rope.pairs[0]] = 1.0
    return head


def bound(rope: Rope, position: Array, s: float) -> Array:
    """What float32 allows an angle to be off by.

    Dimension i multiplies the position by the i-th power of a rounded constant, by i rounded products: 2 i roundings,
    and some four more for scale, divisor, ramp and sum. They act on the terms of the sum ``te (fs' (1 - m) + m)``, of
    which ``m = r e'`` may be larger than the sum near YaRN's scale. Reading the angle off two float32 numbers adds 4.
    """
    i = np.arange(rope.n_rot // 2)
    plain = Rope(rope.n_rot, rope.base, divisors=rope.divisors, component=rope.component).angles(position)
    scale = rope.freq_scale / s
    mix = np.abs(rope.ext_factor * (1.0 if s == 1.0 else (1.0 - rope.freq_scale) / (s - rope.freq_scale)))
    return np.asarray(ULP * (np.abs(plain) * (scale * (1.0 + mix) + mix) * (2 * i + 4) + 4))


def check(rope: Rope, got: NDArray[Any], position: Array, s: float, grain: float = 0.0) -> None:
    """Fail unless heads of unit pairs, of shape (tokens, heads, head_dim), have turned as the reference says.

    ``grain``: what a position divided by ``s`` may be off by beforehand.
    """
    real, imaginary = (got[..., pair].astype(np.float64) for pair in rope.pairs)
    angle = rope.angles(position / s)[:, None, :]
    off = np.abs(np.angle((real + 1j * imaginary) * np.exp(-1j * angle)))
    assert np.all(off <= bound(rope, position, s)[:, None, :] + np.abs(rope.angles(np.full((1, 4), grain))))
    # two rounded logarithms and some products and quotients
    np.testing.assert_allclose(np.hypot(real, imaginary), rope.magnitude, rtol=8 * ULP)
    assert np.all(got[..., rope.n_rot :] == 0.0)
