"""Search of layer factors for a GGUF model: `search` runs one into a directory, `measure` compares factors without.

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.settings import ModelConfig
    from .launch import estimate, search
    from .measurement import Measurement, measure
    from .optimizers.settings import optimizer_config
    from .study.conclude import SearchOutcome
    from .study.run import run_search
    from .study.settings import SearchConfig
    from .study.store import Study
    from .tasks.settings import TaskConfig, TaskMix, task_config
    from .workers.settings import WorkersConfig

__all__ = [
    "Measurement", "ModelConfig", "SearchConfig", "SearchOutcome", "Study", "TaskConfig", "TaskMix", "WorkersConfig",
    "estimate", "measure", "optimizer_config", "run_search", "search", "task_config",
]  # fmt: skip

_WHERE = {
    "evaluation.settings": ("ModelConfig",),
    "launch": ("estimate", "search"),
    "measurement": ("Measurement", "measure"),
    "optimizers.settings": ("optimizer_config",),
    "study.conclude": ("SearchOutcome",),
    "study.run": ("run_search",),
    "study.settings": ("SearchConfig",),
    "study.store": ("Study",),
    "tasks.settings": ("TaskConfig", "TaskMix", "task_config"),
    "workers.settings": ("WorkersConfig",),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
