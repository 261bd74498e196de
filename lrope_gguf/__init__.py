"""Per-layer RoPE position interpolation for GGUF models: curves, metadata and the command line.

`read_factors(path)` gives a model's stored factors `s_l`, one float per layer (layer `l` rotates as at position
`p / s_l`; 1 changes nothing), or None; `write_factors(path, factors)` stores them, with `scaling=Scaling("yarn", 4)` a
RoPE scaling besides, with `head_factors` and `query_scales` a number for each KV head or head. `plan_write` says what
that would do, and `remove_factors(path)` is its inverse, byte for byte. `read_model(path)` gives all that concerns RoPE
in a model's header. Whatever goes wrong with a file or a value raises `LropeError`, and nothing is changed then.

Names are loaded on first use, so that ``import lrope_gguf`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrope_gguf.curve import Curve, CurveFile
    from lrope_gguf.errors import LropeError
    from lrope_gguf.metadata import WritePlan, WriteResult, plan_remove, plan_write, remove_factors, write_factors
    from lrope_gguf.model_info import ModelInfo, read_factors, read_model
    from lrope_gguf.rope_scaling import Scaling

    __version__: str

__all__ = [
    "Curve", "CurveFile", "LropeError", "ModelInfo", "Scaling", "WritePlan", "WriteResult", "__version__",
    "plan_remove", "plan_write", "read_factors", "read_model", "remove_factors", "write_factors",
]  # fmt: skip

_MODULES = ("errors", "curve", "rope_scaling", "model_info", "metadata")  # each imports those before it only


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("lrope-gguf")
        except PackageNotFoundError:
            value = "0+unknown"
    elif name in __all__:
        from importlib import import_module

        modules = (import_module(f"{__name__}.{module}") for module in _MODULES)
        value = next(getattr(module, name) for module in modules if hasattr(module, name))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
