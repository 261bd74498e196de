"""Computes a captured graph in torch, with derivatives by position factors of KV heads and by scales of query heads.

ggml's tensors are regions of memory: a value belongs to the node that owns the memory; views, operations in place, and
writes of rows into a cache read and replace it. Values are never changed in place, so that torch finds its way back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from .attention import BLOCK_NUMBERS, Mask, Nearby, Scores, attention
from .capture import BF16, F16, F32, I32, I64, VIEWS, Graph, Node, UnsupportedGraphError
from .operations import OPERATIONS
from .rotation import Band, Coherence, Pairs, pairs_of, rotate, text_positions

Tensor = Any

_SIZE = {F32: 4, F16: 2, BF16: 2, I32: 4, I64: 8}
_ROUNDED = {F16: torch.float16, BF16: torch.bfloat16}
_INTEGERS = (I32, I64)
_COPIES = frozenset(("CPY", "CONT", "DUP"))
_KEEPS_TURNS = _COPIES | {"RESHAPE", "PERMUTE", "TRANSPOSE", "SCALE"}
"""What rotated queries and keys may go through and still be such."""


class WeightSource(Protocol):
    """Who has the weights: `Weights`."""

    dtype: Any
    device: Any

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def __getitem__(self, name: str) -> Tensor:
        """Return it with four axes."""
        ...

    def activation_block(self, name: str) -> int | None:
        """See `Weights.activation_block`."""
        ...


class Heads(NamedTuple):
    """Heads that have variables, by layer."""

    kv: Mapping[int, int]
    """KV heads, of the layers that rotate."""
    queries: Mapping[int, int]
    """Of the layers whose attention is one operation."""
    keys: Mapping[int, int]
    """KV heads of those, whether they rotate or not."""

    @classmethod
    def of(cls, graph: Graph) -> Heads:
        """Read them off the graph."""
        kv: dict[int, int] = {}
        for i, layer in graph.layers.items():
            n = graph.nodes[i].shape[2]
            kv[layer] = min(n, kv.get(layer, n))
        fused = _fused_attention(graph).items()
        keys = {layer: node.sources[1].shape[1] for node, layer in fused if node.sources[1] is not None}
        return cls(kv, {layer: node.shape[2] for node, layer in fused}, keys)


@dataclass(frozen=True)
class Variables:
    """What is differentiated by: natural logarithms, 0 for the model as it is."""

    factors: Tensor
    """Of positions, shape (layers, most KV heads of a layer)."""
    scales: Tensor
    """Of queries (`Replay`), shape (layers, most heads of a layer)."""

    @classmethod
    def zeros(cls, graph: Graph, *, dtype: Any = torch.float32, device: Any = "cpu") -> Variables:
        """Return those of the model as it is, ready for derivatives."""
        kv, queries, _ = (max(counts.values(), default=1) for counts in Heads.of(graph))
        return cls(
            *(torch.zeros(graph.n_layer, n, dtype=dtype, device=device, requires_grad=True) for n in (kv, queries))
        )


class Answers(NamedTuple):
    """How likely the given tokens are, one for each row of logits."""

    log_p: Tensor
    """Natural logarithm, shape (rows,)."""
    hit: Tensor
    """Whether no other token is more likely."""


def answers(logits: Tensor, gold: Tensor) -> Answers:
    """Score the tokens ``gold``, shape (rows,), by logits of shape (rows, n_vocab)."""
    return Answers(_LogP.apply(logits, gold), logits.argmax(-1) == gold)


class _LogP(torch.autograd.Function):  # type: ignore[misc]
    """Log-probabilities of one token a row; rows of a large vocabulary are held twice, not five times."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gold: Tensor) -> Tensor:
        total = torch.cat([part.logsumexp(-1) for part in logits.split(64)])
        ctx.save_for_backward(logits, gold, total)
        return logits.gather(1, gold[:, None]).squeeze(1) - total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, gold, total = ctx.saved_tensors
        grad = (logits - total[:, None]).exp_().mul_(-grads[0][:, None])
        return grad.scatter_add_(1, gold[:, None], grads[0][:, None]), None


class _Rope(NamedTuple):
    """A rotation of the graph."""

    layer: int
    pairs: Pairs
    everywhere: Tensor
    bands: tuple[Band, ...]
    kind: tuple[bytes, Node | None]
    """The same for two that turn alike."""


class _Turned(NamedTuple):
    """By which rotation the rows of a tensor have been turned, and at which positions they stand."""

    rope: _Rope
    positions: Tensor


@dataclass(frozen=True)
class _Memory:
    """What the nodes that own memory hold at some point of the graph."""

    values: dict[Node, Tensor]
    turned: dict[Node, _Turned]


class _Segment(NamedTuple):
    """Nodes that are computed again together."""

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    """Owners of memory that segments before have written."""
    writes: tuple[Node, ...]
    """And those that segments after it read."""


class Replay:
    """A graph, ready to be computed.

    Args:
        graph: What llama.cpp would compute.
        weights: Of the model; their precision is the replay's.
        coherence: Which derivative; see `Coherence`.
        imitate: Round as llama.cpp does: activations to 8 bits before a product with quantized weights, caches to their
            type.
        remat: Compute each layer again on the way back instead of keeping what it computed.
        scaled: What `Variables.scales` multiply of a head: its ``"queries"``, or its ``"outputs"``.

    Attributes:
        n_bytes: What the way back needs of activations, about; weights and the graph's inputs come on top.

    Raises:
        UnsupportedGraphError: names the first operation or input that is missing.
    """

    def __init__(
        self,
        graph: Graph,
        weights: WeightSource,
        *,
        coherence: Coherence | None = None,
        imitate: bool = False,
        remat: bool = False,
        scaled: str = "queries",
    ) -> None:
        self._graph, self._weights, self._imitate, self._scaled = graph, weights, imitate, scaled
        self._dtype, self._device = weights.dtype, weights.device
        self._coherence = coherence or Coherence()
        self.heads = Heads.of(graph)
        self._special: dict[str, Callable[[_Memory, Node, Variables], Tensor]] = {
            "ROPE": self._rope, "FLASH_ATTN_EXT": self._attention, "SET_ROWS": self._set_rows, "SET": self._set,
        }  # fmt: skip
        known = OPERATIONS.keys() | self._special.keys() | VIEWS | _COPIES
        for node in graph.nodes:
            if node.op not in known:
                raise UnsupportedGraphError(f"{node.name}: operation {node.op}, of which no derivative is known here")
        self._attending = _fused_attention(graph)
        self._leaves: dict[Node, Tensor] = {}
        self._masks: dict[tuple[Node, int], Mask] = {}
        positions = [self._leaf(node.sources[1].root) for node in graph.nodes if node.op == "ROPE" and node.sources[1]]
        self._longest = max((int(p.max()) + 1 for p in positions), default=1)
        self._ropes = {graph.nodes[i]: self._known_rope(graph.nodes[i], layer) for i, layer in graph.layers.items()}
        self._segments = _segments(graph) if remat else ()
        self.n_bytes = self._dtype.itemsize * _kept_numbers(graph, self._segments)

    def __call__(self, variables: Variables) -> Tensor:
        """Return the logits, shape (rows, n_vocab), ready to be differentiated."""
        memory = _Memory({}, {})
        if not self._segments:
            self._run(memory, self._graph.nodes, variables)
        for segment in self._segments:
            inputs = [memory.values[node] for node in segment.reads]
            outputs = checkpoint(self._run_segment, segment, memory.turned, variables, *inputs, use_reentrant=False)
            memory.values.update(zip(segment.writes, outputs, strict=True))
        logits = self._value(memory, self._graph.output)
        return logits.reshape(-1, logits.shape[-1])

    def _run_segment(
        self, segment: _Segment, turned: dict[Node, _Turned], variables: Variables, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        memory = _Memory(dict(zip(segment.reads, inputs, strict=True)), turned)
        self._run(memory, segment.nodes, variables)
        return tuple(memory.values[node] for node in segment.writes)

    def _run(self, memory: _Memory, nodes: tuple[Node, ...], variables: Variables) -> None:
        for node in nodes:
            if node.op in VIEWS:
                continue
            if node.op in self._special:
                value = self._special[node.op](memory, node, variables)
            else:
                sources: list[Tensor] = [None if s is None else self._value(memory, s) for s in node.sources]
                while sources and sources[-1] is None:
                    sources.pop()
                if node.op in _COPIES:
                    value = sources[0].reshape(node.shape)
                else:
                    if self._imitate and node.op in ("MUL_MAT", "MUL_MAT_ID"):
                        sources[1] = self._rounded(node, sources[1])
                    value = OPERATIONS[node.op](node, *sources)
            self._store(memory, node, value)

    # Memory

    def _leaf(self, node: Node) -> Tensor:
        """An input, a weight, or an empty cache."""
        if node not in self._leaves:
            if node.data is not None:
                value = torch.from_numpy(node.data).to(self._device)
                self._leaves[node] = value if value.is_floating_point() else value.long()
            elif node.name in self._weights:
                return self._weights[node.name]  # kept there
            else:  # an empty cache, or memory that the graph overwrites
                self._leaves[node] = torch.zeros(node.shape, dtype=self._dtype, device=self._device)
        return self._leaves[node]

    def _value(self, memory: _Memory, node: Node) -> Tensor:
        if node.view_of is None:
            value = memory.values.get(node)
            if value is None:
                if node.op != "NONE":
                    raise UnsupportedGraphError(f"{node.name}: read before it is computed")
                value = self._leaf(node)
            return value
        source = node.sources[0]
        if node.op in VIEWS and source is not None:
            if node.op == "RESHAPE":
                return self._value(memory, source).reshape(node.shape)
            if node.op == "TRANSPOSE":
                return self._value(memory, source).transpose(-1, -2)
            if node.op == "PERMUTE":
                axes = [0, 0, 0, 0]
                for i, to in enumerate(node.ints(4)):
                    axes[3 - to] = 3 - i
                return self._value(memory, source).permute(axes)
        owner = self._value(memory, node.view_of)
        if _whole(node, node.view_of):
            return owner.reshape(node.shape)
        strides, offset = _elements(node, node.view_of)
        return torch.as_strided(owner.reshape(-1), node.shape, strides, offset)

    def _store(self, memory: _Memory, node: Node, value: Tensor) -> None:
        if node.type in _INTEGERS:
            value = value.to(self._device, torch.int64)
        else:
            value = value.to(self._device, self._dtype)
            if self._imitate and node.type in _ROUNDED:
                value = _through(value, value.to(_ROUNDED[node.type]).to(self._dtype))
        owner = node.root
        if _whole(node, owner):
            memory.values[owner] = value.reshape(owner.shape)
        else:
            strides, offset = _elements(node, owner)
            flat = self._value(memory, owner).reshape(-1)
            memory.values[owner] = _overwritten(flat, value, node.shape, strides, offset).reshape(owner.shape)

    # Operations that need more than their sources

    def _rope(self, memory: _Memory, node: Node, variables: Variables) -> Tensor:
        rope = self._ropes[node]
        x, where = _two(node)
        positions = text_positions(self._value(memory, where), x.shape[1])
        if positions is None:
            raise UnsupportedGraphError(f"{node.name}: positions of something else than text")
        memory.turned[node.root] = _Turned(rope, positions)
        log_factor = variables.factors[rope.layer, : self.heads.kv[rope.layer]]
        return rotate(self._value(memory, x), log_factor, positions, rope.pairs, rope.everywhere)

    def _attention(self, memory: _Memory, node: Node, variables: Variables) -> Tensor:
        sources: list[Tensor] = [None if s is None else self._value(memory, s) for s in node.sources[:5]]
        q, k, v, mask, sinks = sources
        scale, max_bias, cap = node.floats(3)
        scales: Tensor | None = None
        if (layer := self._attending.get(node)) is not None:
            scales = torch.exp(variables.scales[layer, : q.shape[1]])[:, None, None]
        if scales is not None and self._scaled == "queries":
            q = q * scales
        nearby = self._nearby(memory, node, q, k)
        log_factor = None
        if nearby is not None:
            layer = nearby.layer
            log_factor = variables.factors[layer, : self.heads.kv[layer]].expand(k.shape[1])
        how = Scores(scale, cap, max_bias)
        streams = []
        for i in range(len(q)):
            seen = self._mask(node, i, mask, q, k)
            parts = q[i], k[i], v[i]
            streams.append(attention(*parts, seen, how, sinks=sinks, log_factor=log_factor, nearby=nearby))
        out = torch.stack(streams)
        if scales is not None and self._scaled == "outputs":
            out = out * scales
        return out.transpose(1, 2)

    def _nearby(self, memory: _Memory, node: Node, q: Tensor, k: Tensor) -> Nearby | None:
        """What pairs count only nearby, where queries and keys are known to be turned alike."""
        of_queries, of_keys = (self._turns(memory, source) for source in _two(node))
        if of_queries is None or of_keys is None or len(q) > 1:
            return None
        rope, positions = of_queries.rope, of_keys.positions[: k.shape[2]]
        alike = rope.kind == of_keys.rope.kind and rope.layer == of_keys.rope.layer
        if not (alike and rope.bands and len(of_queries.positions) == q.shape[2] and len(positions) == k.shape[2]):
            return None
        return Nearby(rope.layer, rope.pairs, rope.bands, of_queries.positions, positions)

    def _mask(self, node: Node, stream: int, mask: Tensor | None, q: Tensor, k: Tensor) -> Mask:
        """The mask of a stream, cut into blocks once for all layers that share it."""
        source = node.sources[3]
        key = (node if source is None else source.root, stream)
        if key not in self._masks:
            if mask is None:
                values = torch.zeros(q.shape[2], k.shape[2], dtype=torch.float16, device=q.device)
            else:
                values = mask[stream % len(mask), 0].detach().half()
            self._masks[key] = Mask(values, q.shape[2], q.shape[1])
        return self._masks[key]

    def _set_rows(self, memory: _Memory, node: Node, variables: Variables) -> Tensor:
        rows, ids = _two(node)
        target = node.sources[2]
        if target is None or target.shape[:2] != (1, 1) or rows.shape[:2] != (1, 1):
            raise UnsupportedGraphError(f"{node.name}: SET_ROWS of more than one matrix")
        index = self._value(memory, ids).reshape(-1)
        turned = self._turns(memory, rows)
        if turned is not None and len(turned.positions) == len(index):
            positions = turned.positions.new_zeros(target.shape[2])
            positions[index] = turned.positions
            memory.turned[node.root] = _Turned(turned.rope, positions)
        values = self._value(memory, rows)[0, 0]
        if self._imitate and node.type in _ROUNDED:
            values = _through(values, values.to(_ROUNDED[node.type]).to(self._dtype))
        return self._value(memory, target)[0, 0].index_copy(0, index, values)[None, None]

    def _set(self, memory: _Memory, node: Node, variables: Variables) -> Tensor:
        target, part = _two(node)
        *rows, offset, _ = node.ints(5)
        size = _SIZE[target.type]
        strides = *(n // size for n in reversed(rows)), 1
        flat = self._value(memory, target).reshape(-1)
        return _overwritten(flat, self._value(memory, part), part.shape, strides, offset // size)

    def _known_rope(self, node: Node, layer: int) -> _Rope:
        freq_factors = node.sources[2]
        pairs = pairs_of(node, None if freq_factors is None else self._leaf(freq_factors.root), self._device)
        if pairs is None:
            raise UnsupportedGraphError(
                f"{node.name}: RoPE of mode {node.ints(3)[2]}, of which no derivative is known here"
            )
        everywhere, bands = self._coherence.split(pairs.speed, self._longest)
        return _Rope(layer, pairs, everywhere, bands, (node.params[4:], freq_factors and freq_factors.root))

    def _turns(self, memory: _Memory, node: Node) -> _Turned | None:
        """How the rows of a tensor are turned, if all that happened to them since leaves them so."""
        while node not in memory.turned:
            if node.op == "VIEW":
                if node.offset or node.view_of is None:
                    return None
                node = node.view_of
            elif node.op in _KEEPS_TURNS and node.sources[0] is not None:
                node = node.sources[0]
            else:
                return None
        return memory.turned[node]

    def _rounded(self, node: Node, x: Tensor) -> Tensor:
        """Activations as llama.cpp rounds them for a product with these weights."""
        weight = _two(node)[0].root
        if weight.type in _ROUNDED:
            return _through(x, x.to(_ROUNDED[weight.type]).to(x.dtype))
        block = self._weights.activation_block(weight.name) if weight.name in self._weights else None
        if block is None or x.shape[-1] % block:
            return x
        y = x.detach().reshape(*x.shape[:-1], -1, block)
        scale = y.abs().amax(-1, keepdim=True) / 127.0
        integers = torch.round(y / torch.where(scale == 0.0, 1.0, scale))
        # blocks of 32 keep their scale in float16, blocks of 256 in float32
        rounded = integers * (scale.half().to(x.dtype) if block == 32 else scale)
        return _through(x, rounded.reshape(x.shape))


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded``, differentiated as if it were ``x``."""
    return x + (rounded - x).detach()


def _overwritten(flat: Tensor, part: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """Return a memory with part of it replaced (``torch.as_strided_scatter`` 2.13 has derivatives of 0)."""
    places = torch.arange(len(flat), device=flat.device).as_strided(shape, strides, offset)
    return flat.index_copy(0, places.reshape(-1), part.reshape(-1))


def _two(node: Node) -> tuple[Node, Node]:
    first, second = node.sources[:2]
    if first is None or second is None:
        raise UnsupportedGraphError(f"{node.name}: {node.op} lacks a source")
    return first, second


def _layer_in_name(node: Node) -> int | None:
    """The number at the end of the name that llama.cpp gives to what belongs to a layer."""
    match = re.search(r"-(\d+)$", node.name)
    return int(match[1]) if match else None


def _fused_attention(graph: Graph) -> dict[Node, int]:
    """Attention that is one operation, and its layer: the node has no name, but what follows it does."""
    found = {}
    for i, node in enumerate(graph.nodes):
        if node.op == "FLASH_ATTN_EXT":
            named = (_layer_in_name(later) for later in graph.nodes[i:])
            layer = next((layer for layer in named if layer is not None), None)
            if layer is not None and layer < graph.n_layer:
                found[node] = layer
    return found


def _elements(node: Node, owner: Node) -> tuple[tuple[int, ...], int]:
    """Strides and offset of a view, in numbers."""
    size = _SIZE.get(owner.type)
    if size is None:
        raise UnsupportedGraphError(f"{node.name}: a view of quantized numbers")
    return tuple(stride // size for stride in node.strides), node.offset // size


def _whole(node: Node, owner: Node) -> bool:
    """Whether a node is all of its memory, in its order."""
    if node is owner:
        return True
    size = _SIZE.get(owner.type, 0)
    if node.offset:
        return False
    for n, stride in zip(reversed(node.shape), reversed(node.strides), strict=True):
        if n > 1 and stride != size:
            return False
        size *= n
    return size == _SIZE.get(owner.type, 0) * owner.shape[0] * owner.shape[1] * owner.shape[2] * owner.shape[3]


def _segments(graph: Graph) -> tuple[_Segment, ...]:
    """Cut a graph before the first node of each layer."""
    cuts, current = [0], -1
    for i, node in enumerate(graph.nodes):
        layer = _layer_in_name(node)
        if layer is not None and layer > current:
            if current >= 0:
                cuts.append(i)
            current = layer
    parts = [graph.nodes[a:b] for a, b in zip(cuts, [*cuts[1:], len(graph.nodes)], strict=True)]
    computed = [[node for node in part if node.op not in VIEWS] for part in parts]
    # a write into part of a memory reads the rest of it
    read = [dict.fromkeys(s.root for node in part for s in (*node.sources, node) if s is not None) for part in computed]
    written = [dict.fromkeys(node.root for node in part) for part in computed]
    segments = []
    before: set[Node] = set()
    for i, part in enumerate(parts):
        after = {owner for later in read[i + 1 :] for owner in later} | {graph.output.root}
        reads = tuple(owner for owner in read[i] if owner in before)
        segments.append(_Segment(part, reads, tuple(owner for owner in written[i] if owner in after)))
        before |= set(written[i])
    return tuple(segments)


def _kept_numbers(graph: Graph, segments: tuple[_Segment, ...]) -> int:
    """Numbers held at once: all that is computed, or what one segment computes and what passes between them.

    On the way back what a segment computes has a derivative beside it, and so have the logits.
    """

    def computed(nodes: Iterable[Node]) -> int:
        return sum(math.prod(node.shape) for node in nodes if node.op not in VIEWS)

    blocks = 4 * BLOCK_NUMBERS
    if not segments:
        return computed(graph.nodes) + math.prod(graph.output.shape) + blocks
    passed = sum(math.prod(owner.shape) for segment in segments for owner in segment.writes)
    return 2 * max(computed(segment.nodes) for segment in segments) + passed + blocks
