"""Records the RoPE nodes of the graphs that the library really computes, and checks the parameters of each one.

The layer of a node is found in the graph itself, not by asking the patch: backwards, the nearest weight that the
rotated tensor was computed from; forwards, the key cache that it is written to or multiplied with.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_DIMS, MAX_OP_PARAMS, MAX_SRC, MAX_NAME = 4, 16, 10, 64


class GgmlTensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS), ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * MAX_OP_PARAMS),
        ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * MAX_SRC), ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * MAX_NAME),
        ("extra", ctypes.c_void_p), ("padding", ctypes.c_char * 8),
    )  # fmt: skip


class RopeParams(NamedTuple):
    n_dims: int
    mode: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    sections: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, raw: bytes) -> RopeParams:
        _, n_dims, mode, _, n_ctx_orig, *floats = struct.unpack("=5i6f", raw[:44])
        *sections, offset = struct.unpack("=5i", raw[44:])
        base, scale, ext, attn, fast, slow = floats
        return cls(n_dims, mode, n_ctx_orig, base, scale, ext, attn, fast, slow, tuple(sections), offset)


@dataclass(eq=False, slots=True)
class Node:
    """One tensor of a graph; leaves (weights, caches, inputs) have the operation NONE."""

    op: str
    name: str
    op_params: bytes = field(repr=False)
    raw: bytes = field(repr=False)
    sources: list[Node] = field(repr=False)
    view_of: Node | None = field(repr=False)


@dataclass(frozen=True)
class RopeNode:
    """A rotation and the layer that it belongs to."""

    op: str
    name: str
    params: RopeParams
    weights: int | None  # layer of the nearest weight that the rotated tensor was computed from
    cache: int | None  # layer of the key cache that it is written to or multiplied with
    shift: bool  # rotates cached keys in place: a context shift


_WEIGHT = re.compile(r"blk\.(\d+)\.")
_CACHE = re.compile(r"cache_\w*?k_l(\d+)$")
_VIEWS = frozenset(("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "CONT", "CPY"))
_ATTENTION_ENDS = frozenset(("SOFT_MAX", "FLASH_ATTN_EXT"))


@dataclass(frozen=True)
class Graph:
    """All nodes of the graphs that one call computed."""

    nodes: tuple[Node, ...]

    def ropes(self) -> tuple[RopeNode, ...]:
        users: dict[Node, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for source in node.sources:
                users[source].append(node)
        return tuple(_rope_node(node, users) for node in self.nodes if node.op in ("ROPE", "ROPE_BACK"))


def _rope_node(node: Node, users: dict[Node, list[Node]]) -> RopeNode:
    weights, cached = origin(node)
    shift = weights is None and cached is not None
    cache = cached if shift else _cache_in_use(node, users)
    return RopeNode(node.op, node.name, RopeParams.of(node.op_params), weights, cache, shift)


def origin(node: Node) -> tuple[int | None, int | None]:
    """Layers of the nearest weight and, if there is no weight at all, of the nearest key cache, before ``node``."""
    cached: set[int] = set()
    level, seen = [node.sources[0]], {node.sources[0]}
    while level:
        layers = {int(m[1]) for n in level if n.op == "NONE" and (m := _WEIGHT.match(n.name))}
        if layers:
            if len(layers) > 1:
                raise ValueError(f"{node.name}: weights of several layers {sorted(layers)} are equally near")
            return layers.pop(), None
        if not cached:
            cached = {int(m[1]) for n in level if n.op == "NONE" and (m := _CACHE.match(n.name))}
        level = _next_level(level, seen, lambda n: n.sources)
    if len(cached) > 1:
        raise ValueError(f"{node.name}: caches of several layers {sorted(cached)} are equally near")
    return None, cached.pop() if cached else None


def _cache_in_use(node: Node, users: dict[Node, list[Node]]) -> int | None:
    """The layer of the first key cache that ``node`` meets on its way to the attention scores."""
    level, seen = [node], {node}
    while level:
        for user in (u for n in level for u in users[n]):
            for other in (*user.sources, user.view_of):
                leaf = viewed(other)
                if leaf is not None and (match := _CACHE.match(leaf.name)):
                    return int(match[1])
        level = [n for n in _next_level(level, seen, lambda n: users[n]) if not _leaves_attention(n)]
    return None


def _next_level(level: list[Node], seen: set[Node], step: Callable[[Node], Iterable[Node]]) -> list[Node]:
    following = list(dict.fromkeys(n for node in level for n in step(node) if n not in seen))
    seen.update(following)
    return following


def _leaves_attention(node: Node) -> bool:
    """Whether what follows is no longer a rotated query or key: scores, or the product with another weight."""
    projection = node.op in ("MUL_MAT", "MUL_MAT_ID") and _WEIGHT.match(node.sources[0].name) is not None
    return node.op in _ATTENTION_ENDS or projection


def viewed(node: Node | None) -> Node | None:
    while node is not None and node.op in _VIEWS:
        node = node.sources[0]
    return node


class Recorder:
    """Keeps the nodes that the scheduler is about to compute: ``callback`` is a ``cb_eval`` of a context."""

    def __init__(self, ggml: Any, callback_type: Any) -> None:
        ggml.ggml_op_name.restype = ctypes.c_char_p
        ggml.ggml_op_name.argtypes = [ctypes.c_int]
        self._op_name: Callable[[int], bytes] = ggml.ggml_op_name
        self._op_names: dict[int, str] = {}
        self._known: dict[int, Node] = {}
        self._nodes: list[Node] = []
        self.callback = callback_type(self._visit)

    def take(self) -> Graph:
        graph = Graph(tuple(self._nodes))
        self._nodes, self._known = [], {}
        return graph

    def _visit(self, address: int, ask: bool, _: object) -> bool:
        # read at once: a later graph of the same call may reuse the memory
        self._known.pop(address, None)
        self._nodes.append(self._read(address))
        return False  # never asks for the data, so that nothing is computed differently

    def _read(self, address: int) -> Node:
        raw = ctypes.string_at(address, ctypes.sizeof(GgmlTensor))
        known = self._known.get(address)
        if known is not None and known.raw == raw:
            return known
        t = GgmlTensor.from_buffer_copy(raw)
        if t.op not in self._op_names:
            self._op_names[t.op] = self._op_name(t.op).decode()
        node = Node(self._op_names[t.op], t.name.decode(), bytes(t.op_params), raw, [], None)
        self._known[address] = node
        node.sources = [self._read(source) for source in t.src if source]
        node.view_of = self._read(t.view_src) if t.view_src else None
        return node


def demanded(base: RopeParams, factor: float) -> RopeParams:
    """The parameters with which a token at position p is rotated as if it stood at ``p / factor``, in float64."""
    s, fs, e = factor, base.freq_scale, base.ext_factor
    if s == 1.0:
        return base
    if e == 0.0:
        return base._replace(freq_scale=fs / s)
    ext = e * (1.0 - fs) / (s - fs)
    attn = base.attn_factor * (1.0 + 0.1 * math.log(1.0 / fs))
    if ext != 0.0:
        attn /= 1.0 + 0.1 * math.log(s / fs)
    return base._replace(freq_scale=fs / s, ext_factor=ext, attn_factor=attn)


ROUNDING = 4e-7  # a few roundings to float32


def differences(got: RopeParams, expected: RopeParams, tolerance: float = ROUNDING) -> Iterator[str]:
    """The fields that differ: those that no factor may touch must be equal to the bit."""
    for name in RopeParams._fields:
        value, wanted = getattr(got, name), getattr(expected, name)
        scaled = name in ("freq_scale", "ext_factor", "attn_factor")
        if not (math.isclose(value, wanted, rel_tol=tolerance) if scaled else value == wanted):
            yield f"{name} is {value}, not {wanted}"


LayerRule = Callable[[RopeNode], int]  # the index of the factor that a rotation demands


def compare(
    base: Graph, scaled: Graph, factors: Sequence[float], layer_of: LayerRule, *, exact: bool = False
) -> list[str]:
    """What is wrong with the rotations of ``scaled``; with ``exact`` even a rounding is."""
    problems = []
    if len(base.nodes) != len(scaled.nodes):
        problems.append(f"{len(scaled.nodes)} nodes instead of {len(base.nodes)}")
    return problems + compare_ropes(base.ropes(), scaled.ropes(), factors, layer_of, exact=exact)


def compare_ropes(
    base: Sequence[RopeNode], scaled: Sequence[RopeNode], factors: Sequence[float], layer_of: LayerRule, *,
    exact: bool = False,
) -> list[str]:  # fmt: skip
    """What is wrong with rotations that were computed with factors."""
    if [_place(n) for n in base] != [_place(n) for n in scaled]:
        return ["other rotations, or in another order"]
    problems = []
    for old, new in zip(base, scaled, strict=True):
        layer = layer_of(old)
        factor = struct.unpack("f", struct.pack("f", factors[layer]))[0]  # as the library stores it
        expected = demanded(old.params, factor)
        wrong = list(differences(new.params, expected, 0.0 if exact else ROUNDING))
        problems += [f"{new.op} {new.name!r} of layer {layer}: {text}" for text in wrong]
    return problems


def _place(node: RopeNode) -> tuple[str, str, int | None, int | None]:
    return node.op, node.name, node.weights, node.cache


def by_weights(node: RopeNode) -> int:
    """The layer whose weights the rotated tensor comes from; its keys must be in the same layer's cache."""
    layer = node.cache if node.shift else node.weights
    if layer is None or node.cache not in (None, layer):
        raise ValueError(f"{node.name}: weights of layer {node.weights}, cache of layer {node.cache}")
    return layer


def by_cache(node: RopeNode) -> int:
    """The layer whose cached keys are written or attended to, where weights or caches are shared."""
    if node.cache is None:
        raise ValueError(f"{node.name}: meets no key cache")
    return node.cache
