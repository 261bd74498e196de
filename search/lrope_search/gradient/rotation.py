"""RoPE with a position factor for each KV head, and its coherent derivative.

A pair of dimensions turns by ``position * speed / factor``. The derivative of a score by the logarithm of the factor
grows with the distance of query and key, and where that is many wavelengths it says nothing about a step of any size:
the score has been through as many turns. The coherent derivative counts a pair only within distances of ``limit``
wavelengths. The forward pass is exact.

Pairs that turn slowly enough to count at every distance of a context are differentiated here, by positions; those that
count only nearby, where distances are known: in `attention`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .capture import Node

Tensor = Any  # torch.Tensor; torch is not there where types are checked

NORMAL, NEOX, MROPE, IMROPE = 0, 2, 8, 40
"""GGML_ROPE_TYPE_*, ggml.h"""


class Pairs(NamedTuple):
    """The pairs of dimensions that a rotation turns."""

    first: Tensor
    """Indices of one dimension of each pair, shape (pairs,)."""
    second: Tensor
    """And of the other."""
    speed: Tensor
    """Radians a position, float64, shape (pairs,)."""
    magnitude: float
    """What the rotated dimensions are multiplied with: YaRN's."""


def pairs_of(node: Node, freq_factors: Tensor | None, device: Any) -> Pairs | None:
    """Return the pairs of a ROPE on text, or None of a kind that is not known."""
    _, n_dims, mode, _, n_original = node.ints(5)
    base, scale, extrapolation, magnitude, fast, slow = struct.unpack("=6f", node.params[20:44])
    start = struct.unpack("=i", node.params[60:64])[0]
    if mode not in (NORMAL, NEOX, MROPE, IMROPE):
        return None
    i = torch.arange(n_dims // 2, dtype=torch.float64)
    speed = base ** (-2.0 * i / n_dims)
    if freq_factors is not None:
        speed = speed / freq_factors.reshape(-1)[: n_dims // 2].double().cpu()
    share = torch.zeros_like(i)
    if extrapolation:
        low, high = (
            n_dims * math.log(n_original / (turns * 2.0 * math.pi)) / (2.0 * math.log(base)) for turns in (fast, slow)
        )
        low, high = max(0.0, math.floor(low)), min(n_dims - 1.0, math.ceil(high))
        share = extrapolation * (1.0 - ((i - low) / max(0.001, high - low)).clamp(0.0, 1.0))
        magnitude *= 1.0 + 0.1 * math.log(1.0 / scale)
    speed = speed * (scale * (1.0 - share) + share)
    if mode in (MROPE, IMROPE):
        speed = speed * ~_of_fourth_position(node, mode, n_dims // 2)
    index = torch.arange(n_dims // 2)
    first, second = (2 * index, 2 * index + 1) if mode == NORMAL else (index, index + n_dims // 2)
    return Pairs((first + start).to(device), (second + start).to(device), speed.to(device), magnitude)


def text_positions(values: Tensor, n: int) -> Tensor | None:
    """Return the positions of ``n`` tokens, shape (n,), from those that a ROPE takes, one or four for each.

    None where the four are not those of text: three alike and 0.
    """
    rows = values.reshape(-1, n)
    text = len(rows) == 1 or bool((rows[1:3] == rows[0]).all() and (rows[3:] == 0).all())
    return rows[0] if text else None


def _of_fourth_position(node: Node, mode: int, n_pairs: int) -> Tensor:
    """Which pairs of M-RoPE turn by the last of four positions, which is 0 in text."""
    sections = struct.unpack("=4i", node.params[44:60])
    place = torch.arange(n_pairs) % sum(sections)
    if mode == MROPE:
        return place >= sum(sections[:3])
    turn = place % 3
    inside = torch.stack([(turn == axis) & (place < 3 * sections[axis]) for axis in range(3)])
    return ~inside.any(0)


class Band(NamedTuple):
    """Pairs that count within the same distance."""

    distance: float
    members: Tensor
    """Which of the pairs, shape (n,)."""


@dataclass(frozen=True)
class Coherence:
    """Within how many wavelengths a pair counts; None: at any distance, which is the exact derivative.

    Distances are rounded down to powers of 2, so that neighbouring pairs share one.
    """

    limit: float | None = 1.0

    def distances(self, speed: Tensor) -> Tensor:
        """Return the largest distance at which each pair counts, in positions; float64, shape (pairs,)."""
        if self.limit is None:
            return torch.full_like(speed, math.inf)
        return torch.exp2(torch.floor(torch.log2(self.limit * 2.0 * math.pi / speed.abs())))

    def split(self, speed: Tensor, longest: int) -> tuple[Tensor, tuple[Band, ...]]:
        """Return which pairs count everywhere in a context of ``longest`` positions, shape (pairs,), and the others."""
        distances = self.distances(speed)
        everywhere = distances >= longest
        near = torch.unique(distances[~everywhere]).tolist()
        return everywhere, tuple(Band(d, torch.nonzero(distances == d).squeeze(1)) for d in near)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """The rotation; its derivative by the factors is that of the pairs that count everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_factor: Tensor, positions: Tensor, pairs: Pairs, everywhere: Tensor) -> Tensor:
        n_kv = log_factor.numel()
        angle = positions.double()[:, None, None] * pairs.speed * torch.exp(-log_factor.double())[:, None]
        cos, sin = ((pairs.magnitude * f(angle)).to(x.dtype) for f in (torch.cos, torch.sin))
        y = _turn(x, cos, sin, pairs, n_kv)
        ctx.save_for_backward(y, cos, sin, angle[..., everywhere].to(x.dtype))
        ctx.pairs, ctx.n_kv, ctx.everywhere = pairs, n_kv, everywhere
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, cos, sin, angle = ctx.saved_tensors
        (dy,) = grads
        pairs: Pairs = ctx.pairs
        dlog = None
        if ctx.needs_input_grad[1]:
            first, second = pairs.first[ctx.everywhere], pairs.second[ctx.everywhere]
            turn = dy[..., second] * y[..., first] - dy[..., first] * y[..., second]
            by_head = _grouped(turn, ctx.n_kv).sum((0, 3))  # tokens, KV heads, pairs
            dlog = -(by_head * angle).sum((0, 2), dtype=torch.float64)
        return _turn(dy, cos, -sin, pairs, ctx.n_kv), dlog, None, None, None


def _grouped(x: Tensor, n_kv: int) -> Tensor:
    """Shape (batch, tokens, heads, d) to (batch, tokens, KV heads, heads of each, d)."""
    return x.reshape(*x.shape[:2], n_kv, x.shape[2] // n_kv, x.shape[3])


def _turn(x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, n_kv: int) -> Tensor:
    """Rotate ``x`` (batch, tokens, heads, d) by the angles of cos and sin (tokens, KV heads, pairs)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    x_of = _grouped(x, n_kv)
    y = x_of.clone()
    first, second = _steps(pairs.first), _steps(pairs.second)
    a, b = x_of[..., first], x_of[..., second]
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y.reshape(x.shape)


def _steps(indices: Tensor) -> slice:
    """Evenly spaced indices as a slice, which is read in place."""
    first, last, n = int(indices[0]), int(indices[-1]), len(indices)
    return slice(first, last + 1, (last - first) // max(1, n - 1) or 1)


def rotate(x: Tensor, log_factor: Tensor, positions: Tensor, pairs: Pairs, everywhere: Tensor) -> Tensor:
    """Turn queries or keys.

    Args:
        x: Shape (batch, tokens, heads, d).
        log_factor: Natural logarithm of each KV head's factor; heads are an equal number for each of them.
        positions: Shape (tokens,).
        pairs: What turns, and how fast.
        everywhere: Which pairs the derivative by the factors counts, shape (pairs,).
    """
    return _Rotate.apply(x, log_factor, positions, pairs, everywhere)
