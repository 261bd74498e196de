"""Search of layer factors for a GGUF model: `search` runs one into a directory, `measure` compares factors without.

Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig, SearchConfig, TaskConfig, TaskMix, WorkersConfig
    from .launch import estimate, search
    from .measurement import Measurement, measure
    from .study.run import SearchOutcome, run_search
    from .study.store import Study

__all__ = [
    "Measurement",
    "ModelConfig",
    "SearchConfig",
    "SearchOutcome",
    "Study",
    "TaskConfig",
    "TaskMix",
    "WorkersConfig",
    "estimate",
    "measure",
    "run_search",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    for module in ("config", "study.store", "study.run", "launch", "measurement"):
        value = getattr(import_module(f"{__name__}.{module}"), name, None)
        if value is not None:
            globals()[name] = value
            return value
    raise AttributeError(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
