"""The optimizer that settings ask for, and the number of evaluations that they take."""

from __future__ import annotations

from collections.abc import Sequence

from ..optimizers.make import make_algorithm
from ..optimizers.protocol import Optimizer
from ..scores import SCALES, Factors
from .settings import SearchConfig

NEARER = (0.75, 0.5)
"""Parts of the best gain on search contexts; the candidates nearest to the base model that reach one are validated too
where a guard looks at KL divergence, for a choice between gain and that."""

SPARSE = (0.9, 0.75)
"""As `NEARER`, of the candidates that change the fewest numbers, where heads have their own."""

N_PROPOSALS = 5
"""Of derivatives, at most; see `study.ascend.proposals`."""

PRUNED = (0.5, 0.25, 0.125)
"""Shares of the heads that move which are tried alone."""


def make_optimizer(
    settings: SearchConfig, n_layer: int, layers: Sequence[int] | None = None, proposals: Sequence[Factors] = ()
) -> Optimizer:
    """Return the optimizer of these settings, fresh; ``proposals`` are those of derivatives. See `make_algorithm`."""
    return make_algorithm(
        settings.optimizer,
        n_layer,
        layers=layers,
        parametrization=settings.parametrization,
        seed=settings.seed,
        degree=settings.degree,
        bounds=settings.bounds,
        uniform_factors=settings.uniform_factors,
        curves=[settings.started(start) for start in settings.start],
        proposals=proposals,
        alone=settings.method == "gradient",
    )


def most_candidates(settings: SearchConfig) -> int:
    """Return how many candidates there will be at most, where derivatives propose some."""
    proposals = N_PROPOSALS + (0 if settings.scale == SCALES[0] else len(PRUNED))
    few = 1 + len(settings.uniform_factors) + len(settings.start) + settings.gradient_starts * proposals
    return min(settings.max_evaluations, few) if settings.method == "gradient" else settings.max_evaluations


def planned_evaluations(settings: SearchConfig, *, guard: bool = False, n_tasks: int = 1) -> dict[str, int]:
    """Return about how many context evaluations (one prefill each) the search takes, by split.

    With a ``guard``, it looks at every finalist, and `NEARER` adds some; so does `SPARSE`.
    """
    sides = 2 + bool(settings.uniform_factors)
    others = most_candidates(settings) - 1
    validated = min(settings.finalists, others) + sides - 2 + (len(NEARER) if guard else 0)
    validated += 0 if settings.scale == SCALES[0] else len(SPARSE)
    candidates = settings.racing(n_tasks).expected_evaluations(others)
    planned = {
        "search": settings.n_contexts("search") + candidates,
        "validation": (1 + validated) * settings.n_contexts("validation"),
        "test": sides * settings.n_contexts("test"),
    }
    return planned | ({"guard": validated} if guard else {})
