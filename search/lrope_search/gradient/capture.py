"""The graph that llama.cpp builds for a batch, and its inputs, as the evaluation callback of a context shows them.

All nodes of a graph are shown before the first of them is computed, and llama.cpp is then told to stop: a capture costs
no prefill. The memory of a context stays empty.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

from ..evaluation.batch import Batch, Part
from ..evaluation.binding import llama_library, log, pointer, set_options

F32, F16, I32, I64, BF16 = 0, 1, 26, 27, 30
"""enum ggml_type, ggml.h"""
_NUMPY = {F32: np.float32, F16: np.float16, I32: np.int32, I64: np.int64}
VIEWS = frozenset(("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"))
"""Operations that compute nothing."""
_INPUT = 1  # GGML_TENSOR_FLAG_INPUT
_ABORTED = 2  # llama_decode
_OUTPUT = "result_output"
_GRID = 1024  # factors 1 + k / _GRID tell layers apart


class UnsupportedGraphError(LropeError):
    """A graph that cannot be replayed: says which operation or input is missing."""


class _GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor``, ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


@dataclass(eq=False, slots=True)
class Node:
    """One tensor of a graph; weights, caches and inputs have the operation NONE."""

    op: str
    """Of UNARY and GLU what they compute, such as SILU."""
    name: str
    type: int
    """enum ggml_type."""
    shape: tuple[int, ...]
    """As NumPy orders it: ggml's ``ne`` backwards."""
    strides: tuple[int, ...]
    """Bytes, in the order of ``shape``."""
    params: bytes = field(repr=False)
    sources: tuple[Node | None, ...] = field(repr=False)
    view_of: Node | None = field(repr=False)
    """What owns the memory of a view, or of what is computed in place; never a view itself."""
    offset: int
    """Bytes from the beginning of that memory."""
    data: NDArray[Any] | None = field(repr=False)
    """Of an input."""

    @property
    def root(self) -> Node:
        """What owns the memory."""
        return self if self.view_of is None else self.view_of

    def floats(self, n: int) -> tuple[float, ...]:
        """The first ``n`` parameters of the operation, as floats."""
        return struct.unpack(f"={n}f", self.params[: 4 * n])

    def ints(self, n: int) -> tuple[int, ...]:
        """The first ``n`` parameters of the operation, as integers."""
        return struct.unpack(f"={n}i", self.params[: 4 * n])


@dataclass(frozen=True)
class Graph:
    """All nodes that one batch computes, in their order, and whose factor each rotation has."""

    nodes: tuple[Node, ...]
    layers: Mapping[int, int]
    """Of each ROPE by its place among ``nodes``: the layer whose factor it has, as the patched llama.cpp says."""
    n_layer: int
    output: Node
    """The logits."""

    def operations(self) -> tuple[str, ...]:
        """The operations that compute something."""
        return tuple(sorted({node.op for node in self.nodes} - VIEWS))


class Capture:
    """A llama.cpp context that is asked for graphs only.

    Args:
        model: A ``llama_model *`` whose weights stand in the CPU's memory.
        n_tokens: The most tokens of a batch.
        n_outputs: The most of them whose logits are wanted; None: all.
        n_seq: The most sequences.
        options: `ModelConfig.llama_options`; cache types are left out, since the replay has one of its own.
        flash: Let attention be one operation, which the replay computes in blocks. What llama.cpp cannot fuse is still
            several.

    Raises:
        LropeError: llama.cpp makes no such context.
    """

    def __init__(
        self,
        model: Any,
        *,
        n_tokens: int,
        n_outputs: int | None = None,
        n_seq: int = 1,
        options: Mapping[str, Any] | None = None,
        flash: bool = True,
        name: str = "model",
    ) -> None:
        self._llama = llama = llama_library()
        self._name = name
        self._nodes: list[Node] = []
        self._known: dict[int, Node] = {}
        self._stop = True
        library = llama._lib
        self._describe, self._get = library.ggml_op_desc, library.ggml_backend_tensor_get
        self._describe.argtypes, self._describe.restype = [ctypes.c_void_p], ctypes.c_char_p
        self._get.argtypes, self._get.restype = (
            [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
            None,
        )
        self._callbacks = (
            llama.ggml_backend_sched_eval_callback(self._seen),
            llama.ggml_abort_callback(lambda _: self._stop),
        )
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = n_tokens
        parameters.n_seq_max = n_seq
        self.n_outputs = parameters.n_outputs_max = max(n_outputs or n_tokens, n_seq)  # llama.cpp aborts below that
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.kv_unified = parameters.swa_full = True
        parameters.offload_kqv = parameters.op_offload = False
        parameters.flash_attn_type = int(flash)
        parameters.cb_eval, parameters.abort_callback = self._callbacks
        set_options(parameters, {k: v for k, v in (options or {}).items() if not k.startswith("cache_type")})
        log.clear()
        self._context = llama.llama_init_from_model(model, parameters)
        if not self._context:
            raise LropeError(f"{name}: no context of {n_tokens} tokens to see its graph in: {log.reason()}")
        self._memory = llama.llama_get_memory(self._context)
        self._n_vocab = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
        self._batch = Batch(llama, n_tokens)
        self.n_tokens = n_tokens
        self.n_layer = int(library.llama_get_rope_layer_factors(self._context, None, 0))
        self._layers: dict[tuple[str, ...], dict[int, int]] = {}

    def __enter__(self) -> Capture:
        """Return it; leaving the block frees the context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the context."""
        self.close()

    def close(self) -> None:
        """Free the context; idempotent."""
        if self._context:
            self._llama.llama_free(self._context)
        self._context = None

    def __call__(self, part: Part) -> Graph:
        """Return the graph of a batch in an empty memory, all factors 1.

        Raises:
            LropeError: more tokens than fit, or llama.cpp shows no graph.
        """
        n, n_wanted = len(part[0]), int(np.count_nonzero(part[3]))
        if n > self.n_tokens or n_wanted > self.n_outputs:
            room = f"{self.n_tokens} and {self.n_outputs} that room was made for"
            raise LropeError(f"{self._name}: {n} tokens with {n_wanted} rows of logits, more than the {room}")
        nodes = self._record(part, [1.0] * self.n_layer)
        kind = tuple(node.op for node in nodes)
        if kind not in self._layers:
            self._layers[kind] = self._find_layers(part, nodes)
        output = self._output(nodes, part)
        assert output is not None
        return Graph(nodes, self._layers[kind], self.n_layer, output)

    def _find_layers(self, part: Part, nodes: tuple[Node, ...]) -> dict[int, int]:
        """Let each layer have another factor and see which one comes back: caches may be shared."""
        marked = self._record(part, [1.0 + (il + 1) / _GRID for il in range(self.n_layer)])
        layers = {}
        for i, (node, other) in enumerate(zip(nodes, marked, strict=True)):
            if node.op == "ROPE":
                ratio = node.floats(7)[6] / other.floats(7)[6]  # of the frequency scales
                layers[i] = round((ratio - 1.0) * _GRID) - 1
        return layers

    def _record(self, part: Part, factors: list[float]) -> tuple[Node, ...]:
        llama, batch = self._llama, self._batch
        tokens, positions, sequences, wanted, n_seq = part
        n = len(tokens)
        batch.token[:n], batch.pos[:n], batch.logits[:n] = tokens, positions, wanted
        batch.set_sequences(sequences, n_seq)
        batch.struct.n_tokens = n
        values = np.array(factors, np.float32)
        for self._stop in (True, False):  # where a batch is computed in several parts, only a whole run shows them all
            if self._memory:
                llama.llama_memory_clear(self._memory, True)
            log.clear()
            if llama.llama_set_rope_layer_factors(self._context, pointer(values, ctypes.c_float), values.size):
                raise LropeError(f"{self._name}: takes no layer factors: {log.reason()}")
            self._nodes, self._known = [], {}
            code = llama.llama_decode(self._context, batch.struct)
            if code not in (0, _ABORTED):
                raise LropeError(f"{self._name}: llama.cpp shows no graph of {n} tokens (code {code}): {log.reason()}")
            if self._output(self._nodes, part) is not None:
                return tuple(self._nodes)
        raise UnsupportedGraphError(f"{self._name}: its graph ends in something else than logits; no gradients")

    def _output(self, nodes: Sequence[Node], part: Part) -> Node | None:
        """The logits of all wanted tokens; None if the last nodes are missing."""
        named = (node for node in reversed(nodes) if node.name == _OUTPUT)
        last = next(named, nodes[-1] if nodes else None)
        wanted = 1, 1, int(np.count_nonzero(part[3])), self._n_vocab
        return last if last is not None and last.shape == wanted else None

    def _seen(self, address: int, ask: bool, _: object) -> bool:
        if ask:
            self._nodes.append(self._read(address))
        return False

    def _read(self, address: int) -> Node:
        """Read a tensor and all that it is computed from, the latter first; not recursive: chains may be long."""
        waiting = [address]
        while waiting:
            t = _GgmlTensor.from_address(waiting[-1])
            before = [a for a in (*t.src, t.view_src) if a and a not in self._known and a != waiting[-1]]
            if before and waiting[-1] not in self._known:
                waiting += before
            else:
                self._keep(waiting.pop(), t)
        return self._known[address]

    def _keep(self, address: int, t: _GgmlTensor) -> None:
        if address in self._known:
            return
        # a cast names itself as its target
        sources = tuple(self._known[source] if source and source != address else None for source in t.src)
        view_of = self._known[t.view_src].root if t.view_src else None
        op = self._describe(address).decode()
        shape, strides = tuple(reversed(t.ne)), tuple(reversed(t.nb))
        data = None
        if op == "NONE" and t.flags & _INPUT and t.type in _NUMPY:
            data = np.empty(shape, _NUMPY[t.type])
            self._get(address, data.ctypes.data, 0, data.nbytes)
        params = bytes(t.op_params)
        self._known[address] = Node(
            op, t.name.decode(), t.type, shape, strides, params, sources, view_of, t.view_offs, data
        )
