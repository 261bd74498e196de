"""Base classes of the optimizers' settings, and the registry of optimizers.

An optimizer is one file, which declares its settings beside the algorithm that they make, and one entry of
`OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..settings import Registry, SettingError, Settings, setting

if TYPE_CHECKING:
    from .layers import LayerSpace
    from .protocol import Optimizer
    from .space import CurveSpace, Start

UNIFORM_FACTORS = (0.95, 1.05, 1.1, 1.25)
"""Uniform scalings (position interpolation) that every search tries first."""
PARAMETRIZATIONS = ("both", "bezier", "layers")
"""What candidates are: a Bézier curve over all layers with own factors of a few, the curve alone (the papers' way), or
own factors alone; the first is the default."""
LAG = 8
"""Candidates that may be out before the first of them is told; it decides the result, so workers do not decide it."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """An optimizer. `optimizer_config` makes one by its name, which is the ``section`` of its class."""

    summary: ClassVar[str] = ""
    algorithm: ClassVar[Callable[..., Any]]
    """Its class, which takes the settings that are not None, and has defaults of its own for the others."""

    width: float = setting(
        0.05, "initial spread of the candidates: standard deviation of the log factors", metavar="W", above=0.0,
        most=1.0,
    )  # fmt: skip

    @property
    def name(self) -> str:
        """The optimizer's name."""
        return self.section

    def make(self, space: CurveSpace | LayerSpace, start: Sequence[Start] | None, seed: int, **more: Any) -> Optimizer:
        """Return the optimizer, fresh: over ``space``, with what it begins with."""
        own = {one.name: getattr(self, one.name) for one in self.settings() if one.name != "scan"}
        given = {name: value for name, value in own.items() if value is not None}
        optimizer: Optimizer = self.algorithm(space, start, seed=seed, **given, **more)
        return optimizer


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(OptimizerConfig):
    """An optimizer to compare with, which knows nothing of layers; a scan can go before it."""

    scan: bool = setting(False, "scan the layers first, and search among those that matter")

    def to_json(self) -> dict[str, Any]:
        """Return all fields; ``scan`` only if there is one."""
        return {key: value for key, value in super().to_json().items() if value is not False}


def population_setting(unset: str, text: str = "candidates per generation") -> Any:
    """Declare ``population``."""
    return setting(None, text, metavar="N", least=1, unset=unset)


def parents_setting(unset: str) -> Any:
    """Declare ``parents``."""
    return setting(None, "best candidates kept as parents", metavar="N", least=1, unset=unset)


def lag_setting() -> Any:
    """Declare ``lag``."""
    text = "candidates evaluated at once; a larger lag keeps more workers busy, but changes the result"
    return setting(LAG, text, metavar="N", least=1)


OPTIMIZERS: Registry[OptimizerConfig] = Registry(
    "algorithm",
    {
        "ga": "lrope_search.optimizers.genetic:GeneticConfig",
        "cma-es": "lrope_search.optimizers.cma_es:CmaEsConfig",
        "de": "lrope_search.optimizers.differential_evolution:DifferentialEvolutionConfig",
        "random": "lrope_search.optimizers.random_search:RandomConfig",
        "papers-ga": "lrope_search.optimizers.longrope:LongRopeConfig",
    },
)
"""The optimizers by their names."""


def optimizer_config(name: str = "ga", **values: Any) -> OptimizerConfig:
    """Return the settings of the optimizer ``name``; a value of None is the default.

    Raises `LropeError`: no such optimizer, a setting that it does not have, or a wrong value.
    """
    kind = OPTIMIZERS[name]
    given = {key: value for key, value in values.items() if value is not None}
    for key in given:
        if key not in (one.name for one in kind.settings()):
            known = ", ".join(one.name for one in kind.settings())
            raise SettingError((f"{name}.{key}",), f"{name}.{key}", f"no such setting; algorithm {name} has {known}")
    return kind(**given)
