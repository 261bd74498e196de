"""Attention in blocks of queries, of which no more than one is ever held, with the derivative of nearby pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .rotation import Band, Pairs

Tensor = Any

BLOCK_NUMBERS = 2_000_000
"""The most scores that are held at once, of all heads: 8 MB in float32; from 32 MB on, each is mapped anew."""


class Block(NamedTuple):
    """Queries that are computed together, and the keys that any of them sees."""

    queries: slice
    keys: Any
    """A slice or indices."""
    mask: Tensor
    """What is added to the scores of the last keys, shape (queries, n); it is 0 for those before."""
    blind: Tensor | None
    """Which queries see no key, shape (queries, 1); None: there is no such."""


class Mask:
    """A mask of shape (queries, keys), -inf where a query does not see a key, cut into blocks."""

    def __init__(self, values: Tensor, n_queries: int, n_heads: int) -> None:
        self._values = values[:n_queries]
        n_keys = values.shape[1]
        size = max(1, min(256, BLOCK_NUMBERS // max(1, n_heads * n_keys)))
        self._places: list[tuple[slice, Any, int, Tensor | None]] = []
        for start in range(0, n_queries, size):
            queries = slice(start, min(start + size, n_queries))
            open_ = self._values[queries] > -math.inf
            seen = torch.nonzero(open_.any(0)).squeeze(1)
            n = int(seen[-1]) + 1 if len(seen) else 1
            keys = slice(0, n) if len(seen) > 0.9 * n or not len(seen) else seen
            masked = torch.nonzero((self._values[queries][:, keys] != 0.0).any(0)).squeeze(1)
            blind = ~open_.any(1, keepdim=True)
            n_free = int(masked[0]) if len(masked) else len(seen) or n
            self._places.append((queries, keys, n_free, blind if blind.any() else None))

    def blocks(self, dtype: Any) -> Iterator[Block]:
        """Yield the blocks in their order."""
        for queries, keys, n_free, blind in self._places:
            yield Block(queries, keys, self._values[queries][:, keys][:, n_free:].to(dtype), blind)


@dataclass(frozen=True)
class Nearby:
    """How rotated queries and keys turn, for the derivative of pairs that count only nearby."""

    layer: int
    pairs: Pairs
    bands: tuple[Band, ...]
    of_queries: Tensor
    """Positions, shape (queries,)."""
    of_keys: Tensor


@dataclass(frozen=True)
class Scores:
    """How scores come from products: of FLASH_ATTN_EXT and SOFT_MAX."""

    scale: float
    cap: float = 0.0
    """Scores go through ``cap * tanh(score / cap)`` unless 0."""
    max_bias: float = 0.0
    """Of ALiBi: the mask is multiplied by a slope for each head."""

    def slopes(self, n_heads: int) -> list[float]:
        """Return what each head's mask is multiplied with."""
        if not self.max_bias:
            return [1.0] * n_heads
        n = 1 << int(math.log2(n_heads))
        m0, m1 = (2.0 ** (-bias / n) for bias in (self.max_bias, self.max_bias / 2.0))
        return [m0 ** (h + 1) if h < n else m1 ** (2 * (h - n) + 1) for h in range(n_heads)]


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """Softmax attention of one stream.

    q (heads, n, d), k (KV heads, m, d), v (KV heads, m, e), sinks (heads,) or None, log_factor (KV heads,) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        log_factor: Tensor | None,
        mask: Mask,
        how: Scores,
        nearby: Nearby | None,
    ) -> Tensor:
        n_kv, n_heads = len(k), len(q)
        q = q.reshape(n_kv, n_heads // n_kv, *q.shape[1:]) * how.scale
        out = q.new_empty(*q.shape[:3], v.shape[2])
        for block in mask.blocks(q.dtype):
            p, _ = _probabilities(q, k, sinks, block, how)
            out[:, :, block.queries] = _product(p, v[:, block.keys])
        ctx.save_for_backward(q, k, v, sinks, out, log_factor)
        ctx.mask, ctx.how, ctx.nearby = mask, how, nearby
        return out.reshape(n_heads, *out.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, log_factor = ctx.saved_tensors
        how: Scores = ctx.how
        do = grads[0].reshape(out.shape)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        turned = None
        if ctx.nearby is not None and ctx.needs_input_grad[4]:
            turned = torch.zeros(len(k), len(ctx.nearby.pairs.speed), dtype=torch.float64, device=q.device)
        inner = (do * out).sum(-1)
        for block in ctx.mask.blocks(q.dtype):
            rows, keys = block.queries, block.keys
            p, capped = _probabilities(q, k, sinks, block, how)
            d = do[:, :, rows]
            ds = _product(d, v[:, keys].transpose(1, 2)).sub_(inner[:, :, rows, None]).mul_(p)
            if capped is not None:
                ds.mul_(1.0 - (capped / how.cap).square_())
            dq[:, :, rows] = _product(ds, k[:, keys]).mul_(how.scale)
            flat, flat_p = ds.flatten(1, 2).transpose(1, 2), p.flatten(1, 2).transpose(1, 2)
            _add(dk, keys, flat @ q[:, :, rows].flatten(1, 2))
            _add(dv, keys, flat_p @ d.flatten(1, 2))
            if turned is not None:
                _turn_nearby(turned, ds, q[:, :, rows], k, block, ctx.nearby)
        dlog = None
        if turned is not None:
            dlog = -(turned * ctx.nearby.pairs.speed).sum(1) * torch.exp(-log_factor.double())
        return dq.flatten(0, 1), dk, dv, None, dlog, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (KV heads, heads of each, n, m) by (KV heads, m, d)."""
    return (a.flatten(1, 2) @ b).reshape(*a.shape[:3], b.shape[2])


def _add(total: Tensor, keys: Any, part: Tensor) -> None:
    if isinstance(keys, slice):
        total[:, keys] += part
    else:
        total.index_add_(1, keys, part)


def _probabilities(
    q: Tensor, k: Tensor, sinks: Tensor | None, block: Block, how: Scores
) -> tuple[Tensor, Tensor | None]:
    """Return what a block of scaled queries pays to each key, and scores before the mask if they are capped."""
    s = _product(q[:, :, block.queries], k[:, block.keys].transpose(1, 2))
    capped = None
    if how.cap:
        capped = torch.tanh(s / how.cap) * how.cap
        s = capped.clone()
    n_masked = block.mask.shape[1]
    if n_masked:
        mask = block.mask
        if how.max_bias:
            slopes = torch.tensor(how.slopes(s.shape[0] * s.shape[1]), dtype=s.dtype, device=s.device)
            mask = torch.where(mask == -math.inf, mask, mask * slopes.reshape(*s.shape[:2], 1, 1))
        s[..., s.shape[-1] - n_masked :] += mask
    if sinks is None:
        p = torch.softmax(s, -1)  # of one piece: several times as fast as exp_, which is slow at -inf
    else:
        of_heads = sinks.reshape(*s.shape[:2], 1, 1).expand(*s.shape[:3], 1)
        p = torch.softmax(torch.cat((s, of_heads), -1), -1)[..., :-1].contiguous()
    return p if block.blind is None else p.masked_fill(block.blind, 0.0), capped


def _turn_nearby(turned: Tensor, ds: Tensor, q: Tensor, k: Tensor, block: Block, nearby: Nearby) -> None:
    """Add to (KV heads, pairs) how the scores change with the angle between query and key, times their distance.

    Keys that a band has within its distance of every query of the block need no mask. They are taken in rings, from one
    band's distance to the next, each for the pairs of all bands that reach it: so the scores are read once.
    """
    of_queries, of_keys = nearby.of_queries[block.queries], nearby.of_keys[block.keys]
    places = torch.arange(len(nearby.of_keys), device=k.device)[block.keys]
    low, high = of_queries.min(), of_queries.max()
    centre = (low + high) // 2
    from_centre = (of_queries - centre).to(q.dtype)[:, None]
    to_centre = (centre - of_keys).to(q.dtype)[:, None]

    def add(members: Tensor, weight: Tensor, columns: Any, centred: bool) -> None:
        first, second = nearby.pairs.first[members], nearby.pairs.second[members]
        near = k[:, _run(places[columns])][..., torch.cat((second, first))]
        both = _product(weight, torch.cat((near, near * to_centre[columns]), -1) if centred else near)
        if centred:
            both = both[..., : 2 * len(first)] * from_centre + both[..., 2 * len(first) :]
        turn = q[..., first] * both[..., : len(first)] - q[..., second] * both[..., len(first) :]
        turned[:, members] += turn.sum((1, 2), dtype=torch.float64)

    inside = torch.zeros_like(of_keys, dtype=torch.bool)
    for i, band in enumerate(nearby.bands):  # from the shortest distance on
        within = (of_keys >= high - band.distance) & (of_keys <= low + band.distance)
        ring = _run(torch.nonzero(within & ~inside).squeeze(1))
        if _any(ring):
            add(torch.cat([wider.members for wider in nearby.bands[i:]]), ds[..., ring], ring, True)
        inside = within
        close = (of_keys >= low - band.distance) & (of_keys <= high + band.distance)
        edge = _run(torch.nonzero(close & ~within).squeeze(1))
        if _any(edge):
            distance = (of_queries[:, None] - of_keys[edge]).to(q.dtype)
            add(band.members, ds[..., edge] * distance.masked_fill_(distance.abs() > band.distance, 0.0), edge, False)


def _run(indices: Tensor) -> Any:
    """Rising indices as a slice, which is read in place, if there is none missing between them."""
    if not len(indices):
        return indices
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first == len(indices) - 1 else indices


def _any(columns: Any) -> bool:
    return isinstance(columns, slice) or len(columns) > 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    how: Scores,
    *,
    sinks: Tensor | None = None,
    log_factor: Tensor | None = None,
    nearby: Nearby | None = None,
) -> Tensor:
    """Return the attention's output, shape (heads, queries, e).

    Args:
        q: Shape (heads, queries, d), rotated.
        k: Shape (KV heads, keys, d), rotated.
        v: Shape (KV heads, keys, e).
        mask: Who sees whom.
        how: Scale, cap, bias.
        sinks: A score for each head that takes probability and gives nothing.
        log_factor: Of the KV heads; its derivative is that of ``nearby`` alone.
        nearby: The pairs that count only nearby; None: none.
    """
    return _Attention.apply(q, k, v, sinks, log_factor, mask, how, nearby)
