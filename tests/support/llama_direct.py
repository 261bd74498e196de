"""A thin test client of the patched library: low-level binding, explicit positions, F32 cache, no tokenizer."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.native import native_dir

GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 = 0, 1, 2, 8


@functools.cache  # once: whoever sets llama.cpp's log callback later keeps it
def library() -> Any:
    """The binding on the patched library, or None where there is none."""
    own = native_dir()
    if own is not None:
        os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(own))
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    if not hasattr(llama_cpp._lib, "llama_set_rope_layer_factors"):
        return None
    floats = ctypes.POINTER(ctypes.c_float)
    kinds = ("rope_layer_factors", "rope_head_factors", "query_scales")
    for name in (f"llama_{verb}_{kind}" for kind in kinds for verb in ("set", "get", "model")):
        function = getattr(llama_cpp._lib, name)
        function.argtypes = [ctypes.c_void_p, floats, ctypes.c_size_t]
        function.restype = ctypes.c_bool if "model" in name else ctypes.c_int32
    for name, result in (
        ("llama_rope_dynamic_level", ctypes.c_int32),
        ("llama_rope_n_ctx", ctypes.c_int32),
        ("ggml_op_desc", ctypes.c_char_p),
        ("ggml_get_name", ctypes.c_char_p),
        ("ggml_nelements", ctypes.c_int64),
    ):
        function = getattr(llama_cpp._lib, name)
        function.argtypes, function.restype = [ctypes.c_void_p], result
    llama_cpp._lib.llama_model_n_head_layer.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    llama_cpp._lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
    llama_cpp._lib.ggml_backend_tensor_get.restype = None
    llama_cpp.llama_log_set(log_errors, ctypes.c_void_p(0))
    return llama_cpp


# llama.cpp's errors only: its log is long
def _write_error(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


# kept here because the library stores just the address
log_errors = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_write_error)


@contextlib.contextmanager
def errors() -> Iterator[list[str]]:
    """Keep the errors that the library logs instead of printing them."""
    kept: list[str] = []

    def keep(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            kept.append(text.decode())

    lib, log = library(), type(log_errors)(keep)
    lib.llama_log_set(log, ctypes.c_void_p(0))
    try:
        yield kept
    finally:
        # back to whoever had it: lrope_search.model, where that was loaded
        lib.llama_log_set(getattr(lib, "lrope_log_callback", log_errors), ctypes.c_void_p(0))


def batch_of(
    n: int, positions: Sequence[int], sequences: Sequence[int] | None = None, wanted: Sequence[int] | None = None,
    **inputs: Any,
) -> Any:  # fmt: skip
    """A batch of ``n`` tokens, with outputs where ``wanted``; ``inputs`` are C arrays of tokens, of embeddings."""
    batch = library().llama_batch()
    batch.n_tokens = n
    for name, values in inputs.items():
        setattr(batch, name, values)
    ids: list[Any] = [(ctypes.c_int32 * 1)(sequence) for sequence in sequences or [0] * n]
    batch.pos = (ctypes.c_int32 * len(positions))(*positions)
    batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
    batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*ids)
    batch.logits = (ctypes.c_int8 * n)(*(wanted or [1] * n))
    return batch


class RopeTrace:
    """What the RoPE operations of a decode computed, by name ("Qcur-0"): a context takes it as ``trace``."""

    def __init__(self) -> None:
        self.lib = library()
        self.callback = self.lib.ggml_backend_sched_eval_callback(self._visit)
        self.outputs: dict[str, NDArray[np.float32]] = {}

    def _visit(self, tensor: int, ask: bool, _: object) -> bool:
        lib = self.lib._lib
        if lib.ggml_op_desc(tensor) != b"ROPE":
            return not ask
        if not ask:
            out = np.empty(lib.ggml_nelements(tensor), np.float32)
            lib.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
            self.outputs[lib.ggml_get_name(tensor).decode()] = out
        return True


class Context:
    """One model and one context; positions are explicit.

    With another context as ``path``, both have one model; the other one must be closed last.
    """

    def __init__(
        self, path: Path | Context, n_ctx: int = 512, type_kv: int = GGML_TYPE_F32, flash: bool = False,
        trace: RopeTrace | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        self.lib = library()
        self._owner = not isinstance(path, Context)
        self.model: Any = path.model if isinstance(path, Context) else self._load(path)
        self._trace = trace
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = type_kv
        params.flash_attn_type = int(flash)
        params.no_perf = True
        if trace is not None:
            params.cb_eval = trace.callback
        for name, value in extra.items():
            setattr(params, name, value)
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            self._unload()
            raise OSError(f"{path}: no context")
        self.memory = self.lib.llama_get_memory(self.context)
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.n_embd = self.lib.llama_model_n_embd(self.model)
        self.n_past = 0

    def _load(self, path: Path) -> Any:
        params = self.lib.llama_model_default_params()
        # none, unless the tests are to run on a device: proofs/backends.py
        params.n_gpu_layers = int(os.environ.get("LROPE_TEST_GPU_LAYERS", "0"))
        model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise OSError(f"{path}: not loaded")
        return model

    def _unload(self) -> None:
        if self._owner:
            self.lib.llama_model_free(self.model)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self._unload()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, tokens: list[int], sequence: int = 0, start: int | None = None) -> NDArray[np.float32]:
        """Logits of all tokens, shape (tokens, n_vocab)."""
        start = self.n_past if start is None else start
        self.n_past = start + len(tokens)
        return self.decode_at(tokens, range(start, self.n_past), [sequence] * len(tokens))

    def decode_at(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """As :meth:`decode`, each token with its own position and sequence."""
        values = (ctypes.c_int32 * len(tokens))(*tokens)
        self._decode(len(tokens), list(positions), sequences, token=values)
        return self._logits(len(tokens))

    def decode_embeddings(self, rows: NDArray[np.float32], positions: NDArray[Any]) -> NDArray[np.float32]:
        """Logits of input embeddings at the positions of M-RoPE, shape (tokens, 4)."""
        values = (ctypes.c_float * rows.size)(*rows.ravel().tolist())
        self._decode(len(rows), [int(p) for p in positions.T.ravel()], None, embd=values)
        return self._logits(len(rows))

    def embed(self, tokens: Sequence[int], sequences: Sequence[int], width: int) -> NDArray[np.float32]:
        """The pooled embedding, or the rank scores, of each sequence, shape (sequences, width)."""
        positions = [list(sequences[:i]).count(sequence) for i, sequence in enumerate(sequences)]
        self._decode(len(tokens), positions, sequences, token=(ctypes.c_int32 * len(tokens))(*tokens))
        pointers = (self.lib.llama_get_embeddings_seq(self.context, s) for s in sorted(set(sequences)))
        return np.stack([np.ctypeslib.as_array(pointer, (width,)).copy() for pointer in pointers])

    def _decode(self, n: int, positions: list[int], sequences: Sequence[int] | None, **inputs: Any) -> None:
        status = self.lib.llama_decode(self.context, batch_of(n, positions, sequences, **inputs))
        assert status == 0, f"llama_decode: {status}"

    def _logits(self, n: int) -> NDArray[np.float32]:
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (n, self.n_vocab)).copy()

    def shift(self, start: int, stop: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, 0, start, stop)
        self.add(stop, -1, start - stop)
        self.n_past -= stop - start

    def add(self, start: int, stop: int, delta: int) -> None:
        self.lib.llama_memory_seq_add(self.memory, 0, start, stop, delta)

    def divide(self, start: int, stop: int, divisor: int) -> None:
        self.lib.llama_memory_seq_div(self.memory, 0, start, stop, divisor)

    def copy(self, source: int, target: int) -> None:
        self.lib.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)
        self.n_past = 0

    def save(self, sequence: int | None = None) -> Any:
        lib, whole = self.lib, sequence is None
        which = () if whole else (sequence,)
        size = (lib.llama_state_get_size if whole else lib.llama_state_seq_get_size)(self.context, *which)
        data = (ctypes.c_uint8 * size)()
        get = lib.llama_state_get_data if whole else lib.llama_state_seq_get_data
        assert get(self.context, data, size, *which) == size
        return data

    def load(self, data: Any, sequence: int | None = None) -> None:
        if sequence is None:
            used = self.lib.llama_state_set_data(self.context, data, len(data))
        else:
            used = self.lib.llama_state_seq_set_data(self.context, data, len(data), sequence)
        assert used == len(data)

    def set_factors(self, factors: list[float] | None) -> int:
        array = None if factors is None else (ctypes.c_float * len(factors))(*factors)
        return int(self.lib._lib.llama_set_rope_layer_factors(self.context, array, len(factors or [])))

    def get_factors(self, n: int) -> list[float]:
        assert self.lib._lib.llama_get_rope_layer_factors(self.context, None, 0) == n
        out = (ctypes.c_float * n)()
        assert self.lib._lib.llama_get_rope_layer_factors(self.context, out, n) == n
        return list(out)

    def set_head_factors(self, rows: Sequence[Sequence[float]] | None) -> int:
        flat = [factor for row in rows or [] for factor in row]
        array = None if rows is None else (ctypes.c_float * len(flat))(*flat)
        return int(self.lib._lib.llama_set_rope_head_factors(self.context, array, len(flat)))

    def get_head_factors(self) -> list[float]:
        n = self.lib._lib.llama_get_rope_head_factors(self.context, None, 0)
        out = (ctypes.c_float * n)()
        assert self.lib._lib.llama_get_rope_head_factors(self.context, out, n) == n
        return list(out)

    def model_factors(self, n: int) -> list[float] | None:
        out = (ctypes.c_float * n)()
        return list(out) if self.lib._lib.llama_model_rope_layer_factors(self.model, out, n) else None

    def model_head_factors(self, n: int) -> list[float] | None:
        out = (ctypes.c_float * n)()
        return list(out) if self.lib._lib.llama_model_rope_head_factors(self.model, out, n) else None

    def set_scales(self, scales: Sequence[float] | None) -> int:
        array = None if scales is None else (ctypes.c_float * len(scales))(*scales)
        return int(self.lib._lib.llama_set_query_scales(self.context, array, len(scales or [])))

    def get_scales(self) -> list[float]:
        out = (ctypes.c_float * self.lib._lib.llama_get_query_scales(self.context, None, 0))()
        assert self.lib._lib.llama_get_query_scales(self.context, out, len(out)) == len(out)
        return list(out)

    def model_scales(self, n: int) -> list[float] | None:
        out = (ctypes.c_float * n)()
        return list(out) if self.lib._lib.llama_model_query_scales(self.model, out, n) else None
