"""Float64 NumPy reference of the tiny transformers that the native tests run: the oracle for every rotation.

Written from the papers and the published angle function, not from the patch: layer ``l`` evaluates the stock angle
at the real-valued position ``p / s_l`` and keeps the stock magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rope:
    """Stock RoPE of one layer: linear scaling and YaRN (arXiv 2309.00071, as ggml's ``rope_yarn`` computes it)."""

    n_rot: int
    base: float = 10000.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    n_ctx_orig: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    neox: bool = False

    def angles(self, position: Array) -> Array:
        """Angles at real-valued positions, shape (positions, n_rot / 2)."""
        i = np.arange(self.n_rot // 2)
        extrapolated = position[:, None] * self.base ** (-2.0 * i / self.n_rot)
        interpolated = extrapolated * self.freq_scale
        if self.ext_factor == 0.0:
            return interpolated
        low, high = (self._correction_dim(beta) for beta in (self.beta_fast, self.beta_slow))
        low, high = max(0.0, np.floor(low)), min(self.n_rot - 1.0, np.ceil(high))
        ramp = 1.0 - np.clip((i - low) / max(0.001, high - low), 0.0, 1.0)
        mix = ramp * self.ext_factor
        return interpolated * (1.0 - mix) + extrapolated * mix

    def _correction_dim(self, beta: float) -> float:
        return float(self.n_rot * np.log(self.n_ctx_orig / (beta * 2 * np.pi)) / (2 * np.log(self.base)))

    @property
    def magnitude(self) -> float:
        return self.attn_factor * (1.0 if self.ext_factor == 0.0 else 1.0 + 0.1 * np.log(1.0 / self.freq_scale))

    def rotate(self, x: Array, position: Array) -> Array:
        """Rotate ``x`` of shape (tokens, heads, head_dim) as standing at real-valued ``position``."""
        theta = self.angles(position)[:, None, :]
        cos, sin = np.cos(theta) * self.magnitude, np.sin(theta) * self.magnitude
        half = self.n_rot // 2
        first, second = (
            (slice(0, half), slice(half, self.n_rot))
            if self.neox
            else (slice(0, self.n_rot, 2), slice(1, self.n_rot, 2))
        )
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


@dataclass(frozen=True)
class Config:
    """What the tiny models have in common; ``ropes`` and ``windows`` have one entry a layer."""

    n_vocab: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    eps: float = 1e-6
    gemma: bool = False

    @property
    def n_layer(self) -> int:
        return len(self.ropes)


class Reference:
    """Decodes with a cache of keys that are not rotated: each decode rotates them anew, at their present position."""

    def __init__(
        self, config: Config, weights: dict[str, NDArray[np.float32]], factors: Sequence[float] | None = None
    ) -> None:
        self.config = config
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.factors = factors or [1.0] * config.n_layer
        self.positions = np.empty(0)
        empty = np.empty((0, config.n_head_kv, config.head_dim))
        self._keys, self._values = [empty] * config.n_layer, [empty] * config.n_layer

    def remove(self, start: int, stop: int) -> None:
        """Drop the tokens at positions ``start`` to ``stop`` and move the later ones down: a context shift."""
        keep = (self.positions < start) | (self.positions >= stop)
        moved = np.where(self.positions >= stop, self.positions - (stop - start), self.positions)
        self.positions = moved[keep]
        self._keys, self._values = [k[keep] for k in self._keys], [v[keep] for v in self._values]

    def decode(self, tokens: Sequence[int]) -> Array:
        """Append tokens at the next positions; logits, shape (tokens, n_vocab)."""
        c, w = self.config, self.weights
        start = self.positions[-1] + 1 if len(self.positions) else 0
        self.positions = np.concatenate([self.positions, start + np.arange(len(tokens))])
        x = w["token_embd.weight"][list(tokens)] * (np.sqrt(c.n_embd) if c.gemma else 1.0)
        for il in range(c.n_layer):
            b = f"blk.{il}."
            x = x + self._post(self._attention(self._norm(x, f"{b}attn_norm"), il), f"{b}post_attention_norm")
            x = x + self._post(self._feed_forward(self._norm(x, f"{b}ffn_norm"), il), f"{b}post_ffw_norm")
        return np.asarray(self._norm(x, "output_norm") @ w.get("output.weight", w["token_embd.weight"]).T)

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.eps)
        return np.asarray(x / scale * self.weights[f"{name}.weight"])

    def _post(self, x: Array, name: str) -> Array:
        return self._norm(x, name) if self.config.gemma else x

    def _attention(self, x: Array, il: int) -> Array:
        c, w, rope, s, b = self.config, self.weights, self.config.ropes[il], self.factors[il], f"blk.{il}.attn_"

        def project(name: str, heads: int) -> Array:
            y = x @ w[f"{b}{name}.weight"].T + w.get(f"{b}{name}.bias", 0.0)
            return np.asarray(y).reshape(len(x), heads, c.head_dim)

        q, k, v = project("q", c.n_head), project("k", c.n_head_kv), project("v", c.n_head_kv)
        if c.gemma:
            q, k = self._norm(q, f"{b}q_norm"), self._norm(k, f"{b}k_norm")
        self._keys[il] = np.concatenate([self._keys[il], k])
        self._values[il] = np.concatenate([self._values[il], v])

        there, here = self.positions, self.positions[-len(x) :]
        distance = here[:, None] - there
        visible = (distance >= 0) & (distance < (c.windows[il] or np.inf))
        group = c.n_head // c.n_head_kv
        q = rope.rotate(q, here / s)
        keys = np.repeat(rope.rotate(self._keys[il], there / s), group, axis=1)
        values = np.repeat(self._values[il], group, axis=1)
        score = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(c.head_dim)
        score = np.where(visible, score, -np.inf)
        p = np.exp(score - score.max(axis=-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), values)
        return np.asarray(out.reshape(len(x), -1) @ w[f"{b}output.weight"].T)

    def _feed_forward(self, x: Array, il: int) -> Array:
        w, b = self.weights, f"blk.{il}.ffn_"
        gate, up = x @ w[f"{b}gate.weight"].T, x @ w[f"{b}up.weight"].T
        if self.config.gemma:
            # ggml's CPU backend looks GELU up in a float16 table
            half = gate.astype(np.float16).astype(np.float64)
            gelu = 0.5 * half * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * half * (1.0 + 0.044715 * half * half)))
            activated = gelu.astype(np.float16).astype(np.float64)
        else:
            activated = gate / (1.0 + np.exp(-gate))
        return np.asarray((activated * up) @ w[f"{b}down.weight"].T)
