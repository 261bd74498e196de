"""llama-cpp-python on the patched library: the only module that imports ``llama_cpp``."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from numpy.typing import NDArray

from lrope_gguf.errors import LropeError
from lrope_gguf.native import native_dir

from .settings import CACHE_TYPES

# enum llama_rope_scaling_type of llama.h, the last two from the patch
_ROPE_SCALINGS: Mapping[str, int] = {"none": 0, "linear": 1, "yarn": 2, "dynamic": 4, "dynamic-yarn": 5}
_SPINS = "1000"
"""How often a thread of GNU OpenMP looks for the others before it sleeps, in place of 300,000 times: on a busy machine
those it waits for need its core. 1000 is what OpenMP itself takes where there are more threads than cores."""

_FLOATS, _BOOLS = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_bool)
_TOKENS, _SIZES = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_size_t)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_set_rope_layer_factors": (ctypes.c_int32, [_FLOATS, ctypes.c_size_t]),
    "llama_get_rope_layer_factors": (ctypes.c_int32, [_FLOATS, ctypes.c_size_t]),
    "llama_model_rope_layer_factors": (ctypes.c_bool, [_FLOATS, ctypes.c_size_t]),
    "llama_set_rope_head_factors": (ctypes.c_int32, [_FLOATS, ctypes.c_size_t]),
    "llama_rope_layers": (ctypes.c_int32, [ctypes.c_uint32, _BOOLS, ctypes.c_size_t]),
    "llama_set_query_scales": (ctypes.c_int32, [_FLOATS, ctypes.c_size_t]),
    "llama_set_score_targets": (ctypes.c_int32, [_TOKENS, ctypes.c_size_t]),
    "llama_get_scores": (ctypes.c_int32, [_FLOATS, _BOOLS, ctypes.c_size_t]),
    "llama_get_memory_size": (None, [_SIZES]),
    "llama_rope_n_ctx": (ctypes.c_int32, []),
}
"""The patches' functions: result, and arguments after the context or the model."""
_NEEDED = ("llama_set_rope_layer_factors", "llama_rope_layers", "llama_get_memory_size")


class Log:
    """Receives llama.cpp's log: keeps the errors, shows everything if asked to."""

    _ERROR, _CONTINUED = 4, 5  # enum ggml_log_level, ggml.h

    def __init__(self) -> None:
        self.verbose = False
        self._level = 0
        self._errors: list[str] = []

    def __call__(self, level: int, text: bytes, _: object) -> None:
        """Take a piece of the log, as ``ggml_log_callback`` gives it."""
        self._level = self._level if level == self._CONTINUED else level
        message = text.decode("utf-8", "replace")
        if self.verbose:
            sys.stderr.write(message)
        if self._level == self._ERROR and message.strip():
            self._errors.append(message.strip())

    def clear(self) -> None:
        """Forget the errors."""
        self._errors.clear()

    def reason(self) -> str:
        """The first error since `clear`, which is the cause of those after it, without where it arose."""
        first = next(iter(self._errors), "no reason given")
        return re.sub(r"^\w+: |error loading model( hyperparameters)?: ", "", first)


log = Log()


@functools.cache
def llama_library() -> Any:
    """Import the binding on our library and add the patches' functions to it.

    Raises `LropeError`: there is no binding, no usable library, or an unpatched one.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read when the library is loaded, by programs begun here too
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    if (own := native_dir()) is not None:
        os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(own))
    where = os.environ.get("LLAMA_CPP_LIB_PATH", "llama-cpp-python")
    try:
        from llama_cpp import llama_cpp
    except ModuleNotFoundError as error:
        raise LropeError(f"{error.name}: not installed; run: pip install 'lrope-gguf[search]'") from error
    except (OSError, RuntimeError, AttributeError) as error:
        raise LropeError(
            f"{where}: no usable llama.cpp library ({error}); reinstall lrope-gguf with its native part, or set "
            "LLAMA_CPP_LIB_PATH to the folder of a patched libllama"
        ) from error
    library = llama_cpp._lib
    lacking = [name for name in _NEEDED if not hasattr(library, name)]
    if lacking:
        older = f"has an older series of patches ({lacking[0]} is missing)"
        state = "is not patched" if len(lacking) == len(_NEEDED) else older
        raise LropeError(
            f"this llama.cpp {state}: {library._name}; unset LLAMA_CPP_LIB_PATH, or set it to the folder of "
            "a library built with lrope-gguf's patches"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        if hasattr(library, name):  # one of an older llama.cpp has the first patches only
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p, *arguments], result
            setattr(llama_cpp, name, function)
    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.lrope_log_callback = callback  # as long as the library: it keeps only the address
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def set_options(parameters: Any, options: Mapping[str, Any]) -> None:
    """Put `ModelConfig.llama_options` into a ``llama_context_params``."""
    enums = {"rope_scaling": ("rope_scaling_type", _ROPE_SCALINGS)}
    enums |= {f"cache_type_{part}": (f"type_{part}", CACHE_TYPES) for part in "kv"}
    for option, value in options.items():
        name, numbers = enums.get(option, (option, {}))
        setattr(parameters, name, numbers.get(value, value))


def can_score(library: Any) -> bool:
    """Whether the library has the patch that scores tokens on the device (an older one has only the factors)."""
    return hasattr(library, "llama_set_score_targets")


def binding_version() -> str:
    """Return the version of llama-cpp-python, which fixes llama.cpp's."""
    return version("llama-cpp-python")


def chat_formatter(template: str, *, eos: str, bos: str) -> Any:
    """Return what puts messages into a chat template in Jinja."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)


def pointer(array: NDArray[Any], kind: Any) -> Any:
    """Return the address of an array's data as a C pointer to ``kind``; the array must outlive it."""
    return array.ctypes.data_as(ctypes.POINTER(kind))
