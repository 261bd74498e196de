"""Float64 NumPy reference of the tiny transformers that the native tests run: the oracle for every rotation.

Written from the papers and the published angle function, not from the patch: layer ``l`` evaluates the stock angle
at the real-valued position ``p / s_l`` and keeps the stock magnitude.

A position has four components, of which M-RoPE uses several (time, height, width); everything else uses the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Factors = Sequence[float] | Sequence[Sequence[float]]

# BLAS multiplies so few tokens in one thread; more would wait for each other
PART = 50
# float32 against float64 through a few layers, relative to the spread of the logits
TOLERANCE = 2e-4


def relative_error(got: NDArray[Any], expected: Array) -> float:
    """Largest deviation of a logit, relative to the spread of that token's logits."""
    return float(np.max(np.abs(got - expected) / np.std(expected, axis=-1, keepdims=True)))


def rms_error(got: NDArray[Any], expected: Array) -> float:
    """Root mean square deviation relative to the spread: where rounding noise is compared, not bounded."""
    return float(np.sqrt(np.mean((got - expected) ** 2)) / np.std(expected))


def no_noisier(error: float, stock: float) -> bool:
    """Whether an error is that of stock llama.cpp in the same place, which float16 and quantization make large."""
    return error <= 1.5 * stock + TOLERANCE


def text_positions(first: int, n: int) -> Array:
    p = first + np.arange(n)
    return np.stack([p, p, p, np.zeros(n)], axis=1)


@dataclass(frozen=True)
class Rope:
    """Stock RoPE of one layer: linear scaling and YaRN (arXiv 2309.00071, as ggml's ``rope_yarn`` computes it).

    ``divisors`` are the per-dimension factors of LongRoPE and Llama 3, ``component`` is the component of the position
    that each pair of dimensions follows under M-RoPE.
    """

    n_rot: int
    base: float = 10000.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    n_ctx_orig: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    neox: bool = False
    divisors: tuple[float, ...] | None = None
    component: tuple[int, ...] | None = None

    def angles(self, position: Array) -> Array:
        """Angles at real-valued positions of shape (..., 4), shape (..., n_rot / 2)."""
        i = np.arange(self.n_rot // 2)
        extrapolated = position[..., self.component or (0,)] * self.base ** (-2.0 * i / self.n_rot)
        if self.divisors is not None:
            extrapolated = extrapolated / np.array(self.divisors)
        interpolated = extrapolated * self.freq_scale
        mix = self.ramp() * self.ext_factor
        return np.asarray(interpolated * (1.0 - mix) + extrapolated * mix)

    def ramp(self) -> Array:
        """YaRN's ramp: 1 where a dimension turns often enough to be left alone, 0 where it is interpolated."""
        i = np.arange(self.n_rot // 2)
        if self.ext_factor == 0.0:
            return np.zeros(len(i))
        low, high = (self._correction_dim(beta) for beta in (self.beta_fast, self.beta_slow))
        low, high = max(0.0, np.floor(low)), min(self.n_rot - 1.0, np.ceil(high))
        return np.asarray(1.0 - np.clip((i - low) / max(0.001, high - low), 0.0, 1.0))

    def _correction_dim(self, beta: float) -> float:
        return float(self.n_rot * np.log(self.n_ctx_orig / (beta * 2 * np.pi)) / (2 * np.log(self.base)))

    @property
    def magnitude(self) -> float:
        return self.attn_factor * (1.0 if self.ext_factor == 0.0 else 1.0 + 0.1 * np.log(1.0 / self.freq_scale))

    def rotate(self, x: Array, position: Array) -> Array:
        """Rotate ``x``, shape (tokens, heads, head_dim), as if at real-valued ``position``, (tokens, heads, 4)."""
        theta = self.angles(position)
        cos, sin = np.cos(theta) * self.magnitude, np.sin(theta) * self.magnitude
        first, second = self.pairs
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    @property
    def pairs(self) -> tuple[slice, slice]:
        """Where the first and the second elements of the rotated pairs stand in a head."""
        half = self.n_rot // 2
        if self.neox:
            return slice(0, half), slice(half, self.n_rot)
        return slice(0, self.n_rot, 2), slice(1, self.n_rot, 2)


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
    causal: bool = True

    @property
    def n_layer(self) -> int:
        return len(self.ropes)


class Reference:
    """Decodes with a cache of keys that are not rotated: each decode rotates them anew, at their present position.

    The weights tell the layout: fused projections and norms are used where there are any.
    """

    def __init__(
        self, config: Config, weights: dict[str, NDArray[np.float32]], factors: Factors | None = None,
        scales: ArrayLike | None = None,
    ) -> None:  # fmt: skip
        """``factors``: one a layer, or a list of one a KV head of the layer."""
        self.config = config
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.factors = factors or [1.0] * config.n_layer
        # of the attention logits, shape (layers, heads)
        self.scales = np.ones((config.n_layer, config.n_head)) if scales is None else np.asarray(scales, np.float64)
        self.positions = np.empty((0, 4))
        # where a cached key stands besides its position, see `divide`
        self._astray = np.empty((0, 4))
        empty = np.empty((0, config.n_head_kv, config.head_dim))
        self._keys, self._values = [empty] * config.n_layer, [empty] * config.n_layer

    def remove(self, start: int, stop: int) -> None:
        """Drop the tokens at positions ``start`` to ``stop`` and move the later ones down: a context shift."""
        keep = ~self._between(start, stop)
        self.positions, self._astray = self.positions[keep], self._astray[keep]
        self._keys, self._values = [k[keep] for k in self._keys], [v[keep] for v in self._values]
        self.add(stop, None, start - stop)

    def add(self, start: int, stop: int | None, delta: int) -> None:
        self.positions = self.positions + np.where(self._between(start, stop), delta, 0)[:, None]

    def divide(self, start: int, stop: int | None, divisor: int, direction: int = 1) -> None:
        """Divide the positions from ``start`` to ``stop``, rounding down.

        With ``direction`` -1, the keys turn by as much the other way.
        """
        here = self._between(start, stop)[:, None]
        moved = np.where(here, self.positions // divisor - self.positions, 0.0)
        self.positions = self.positions + moved
        self._astray = self._astray + (direction - 1) * moved

    def _between(self, start: int, stop: int | None) -> NDArray[np.bool_]:
        p = self.positions[:, 0]
        return np.asarray((p >= start) & (p < (np.inf if stop is None else stop)))

    def magnify_keys(self) -> None:
        """Multiply the cached keys by the magnitude of their layer once more."""
        self._keys = [k * rope.magnitude for k, rope in zip(self._keys, self.config.ropes, strict=True)]

    def decode(self, tokens: Sequence[int], positions: ArrayLike | None = None) -> Array:
        """Append tokens at the next positions, or at those given; logits, shape (tokens, n_vocab)."""
        w = self.weights
        return np.asarray(self.hidden(tokens, positions) @ w.get("output.weight", w["token_embd.weight"]).T)

    def hidden(self, tokens: Sequence[int], positions: ArrayLike | None = None) -> Array:
        """As :meth:`decode`, but the hidden states after the last norm, shape (tokens, n_embd)."""
        if positions is None:
            positions = text_positions(int(self.positions[-1, 0]) + 1 if len(self.positions) else 0, len(tokens))
        positions = np.asarray(positions, np.float64)
        step = PART if self.config.causal else len(tokens)
        parts = [slice(i, i + step) for i in range(0, len(tokens), step)]
        return np.concatenate([self._hidden(tokens[part], positions[part]) for part in parts])

    def _hidden(self, tokens: Sequence[int], positions: Array) -> Array:
        c, w = self.config, self.weights
        self.positions = np.concatenate([self.positions, positions])
        self._astray = np.concatenate([self._astray, np.zeros((len(tokens), 4))])
        x = w["token_embd.weight"][list(tokens)] * (np.sqrt(c.n_embd) if c.gemma else 1.0)
        for il in range(c.n_layer):
            b = f"blk.{il}."
            x = x + self._post(self._attention(self._norm(x, f"{b}attn_norm"), il), f"{b}post_attention_norm")
            x = x + self._post(self._feed_forward(self._norm(x, f"{b}ffn_norm"), il), f"{b}post_ffw_norm")
        return self._norm(x, "output_norm" if "output_norm.weight" in w else "enc.output_norm")

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.eps)
        return np.asarray(x / scale * self.weights[f"{name}.weight"])

    def _post(self, x: Array, name: str) -> Array:
        return self._norm(x, name) if f"{name}.weight" in self.weights else x

    def _project(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0))

    def _attention(self, x: Array, il: int) -> Array:
        c, rope, b = self.config, self.config.ropes[il], f"blk.{il}.attn_"
        if f"{b}qkv.weight" in self.weights:
            fused = self._project(x, f"{b}qkv").reshape(len(x), -1, c.head_dim)
            q, k, v = np.split(fused, [c.n_head, c.n_head + c.n_head_kv], axis=1)
        else:
            q, k, v = (self._project(x, f"{b}{name}").reshape(len(x), -1, c.head_dim) for name in "qkv")
        q, k = self._post(q, f"{b}q_norm"), self._post(k, f"{b}k_norm")
        self._keys[il] = np.concatenate([self._keys[il], k])
        self._values[il] = np.concatenate([self._values[il], v])

        there, here = self.positions, self.positions[-len(x) :]
        group = c.n_head // c.n_head_kv
        s = np.broadcast_to(self.factors[il], c.n_head_kv)[:, None]
        # heads first: (heads, tokens, head_dim)
        q = rope.rotate(q, here[:, None] / np.repeat(s, group, axis=0)).swapaxes(0, 1)
        keys = rope.rotate(self._keys[il], (there + self._astray)[:, None] / s)
        keys = np.repeat(keys, group, axis=1).swapaxes(0, 1)
        values = np.repeat(self._values[il], group, axis=1).swapaxes(0, 1)
        score = q @ keys.swapaxes(1, 2) / np.sqrt(c.head_dim) * self.scales[il][:, None, None]
        score = np.where(self._visible(here, there, c.windows[il]), score, -np.inf)
        p = np.exp(score - score.max(axis=-1, keepdims=True))
        out = (p / p.sum(axis=-1, keepdims=True) @ values).swapaxes(0, 1)
        return np.asarray(out.reshape(len(x), -1) @ self.weights[f"{b}output.weight"].T)

    def _visible(self, here: Array, there: Array, window: int | None) -> NDArray[np.bool_]:
        if not self.config.causal:
            return np.ones((len(here), len(there)), bool)
        distance = here[:, None, 0] - there[:, 0]
        # the parts of one image share their time: there, rows and then columns are the order
        row, column = here[:, None, 1] - there[:, 1], here[:, None, 2] - there[:, 2]
        earlier = (distance > 0) | ((distance == 0) & ((row > 0) | ((row == 0) & (column >= 0))))
        return np.asarray(earlier & (distance < (window or np.inf)))

    def _feed_forward(self, x: Array, il: int) -> Array:
        w, b = self.weights, f"blk.{il}.ffn_"
        up = x @ w[f"{b}up.weight"].T
        gate, up = (x @ w[f"{b}gate.weight"].T, up) if f"{b}gate.weight" in w else np.split(up, 2, axis=1)
        if self.config.gemma:
            # ggml's CPU backend looks GELU up in a float16 table
            half = gate.astype(np.float16).astype(np.float64)
            gelu = 0.5 * half * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * half * (1.0 + 0.044715 * half * half)))
            activated = gelu.astype(np.float16).astype(np.float64)
        else:
            activated = gate / (1.0 + np.exp(-gate))
        return np.asarray((activated * up) @ w[f"{b}down.weight"].T)
