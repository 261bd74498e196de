"""A thin test client of the patched library: low-level binding, explicit positions, F32 cache, no tokenizer."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.native import native_dir

GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 = 0, 1, 8


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
    for name in ("llama_set_rope_layer_factors", "llama_get_rope_layer_factors", "llama_model_rope_layer_factors"):
        function = getattr(llama_cpp._lib, name)
        function.argtypes = [ctypes.c_void_p, floats, ctypes.c_size_t]
        function.restype = ctypes.c_bool if "model" in name else ctypes.c_int32
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    return llama_cpp


# llama.cpp's errors only: its log is long. Kept here because the library stores just the address.
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode())


class Context:
    """One model and one context; positions are explicit."""

    def __init__(
        self, path: Path, n_ctx: int = 512, type_kv: int = GGML_TYPE_F32, flash: bool = False, **extra: Any
    ) -> None:
        self.lib = library()
        params = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise OSError(f"{path}: not loaded")
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = type_kv
        params.flash_attn_type = int(flash)
        params.no_perf = True
        for name, value in extra.items():
            setattr(params, name, value)
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            self.lib.llama_model_free(self.model)
            raise OSError(f"{path}: no context")
        self.memory = self.lib.llama_get_memory(self.context)
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.n_past = 0

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, tokens: list[int], sequence: int = 0, start: int | None = None) -> NDArray[np.float32]:
        """Logits of all tokens, shape (tokens, n_vocab)."""
        start = self.n_past if start is None else start
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = sequence
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        assert status == 0, f"llama_decode: {status}"
        self.n_past = start + len(tokens)
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (len(tokens), self.n_vocab)).copy()

    def shift(self, start: int, stop: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, 0, start, stop)
        self.lib.llama_memory_seq_add(self.memory, 0, stop, -1, start - stop)
        self.n_past -= stop - start

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)
        self.n_past = 0

    def set_factors(self, factors: list[float] | None) -> int:
        array = None if factors is None else (ctypes.c_float * len(factors))(*factors)
        return int(self.lib._lib.llama_set_rope_layer_factors(self.context, array, len(factors or [])))

    def get_factors(self, n: int) -> list[float]:
        assert self.lib._lib.llama_get_rope_layer_factors(self.context, None, 0) == n
        out = (ctypes.c_float * n)()
        assert self.lib._lib.llama_get_rope_layer_factors(self.context, out, n) == n
        return list(out)

    def model_factors(self, n: int) -> list[float] | None:
        out = (ctypes.c_float * n)()
        return list(out) if self.lib._lib.llama_model_rope_layer_factors(self.model, out, n) else None
