"""Studies for tests of what reads them, made by the real search on a synthetic model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lrope_search import SearchConfig
from lrope_search.scores import ContextScore
from lrope_search.study.conclude import SearchOutcome
from lrope_search.study.plan import make_optimizer
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study
from lrope_search.workers.protocol import LocalExecutor
from support.synthetic import Landscape, noise

SETTINGS = SearchConfig(
    parametrization="bezier", seed=3, max_evaluations=60, search_contexts=4, racing_fraction=0.5,
    validation_contexts=6, test_contexts=24,
)  # fmt: skip
CONFIG = {
    "model": {"fingerprint": "sha256:0f3c", "architecture": "synthetic", "name": "Landscape 24 layers"},
    "task": {"task": "kv", "keys": 100, "identifiers": "uuid", "depths": 5, "seed": 3, "data": None},
    "versions": {"lrope-gguf": "0.1.0", "llama-cpp-python": "0.3.36"},
}


class Timed(Landscape):
    """A landscape whose evaluations have a cost."""

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        score = super().evaluate(factors, split, index)
        seconds = 26.4 + 0.8 * noise(factors, split, index)
        return dataclasses.replace(score, n_tokens=6800 + 7 * index, seconds=round(seconds, 3))


def make_study(
    directory: Path, settings: SearchConfig = SETTINGS, *, n_layer: int = 24, evaluator: Landscape | None = None,
    config: dict[str, Any] | None = None, test_size: int | None = None, layers: tuple[int, ...] | None = None,
) -> SearchOutcome:  # fmt: skip
    """Run a whole search in ``directory``; ``layers``: those that may have factors of their own."""
    executor = LocalExecutor(evaluator or Timed(n_layer))
    with Study(directory, (CONFIG if config is None else config) | {"search": settings.identity()}) as study:
        progress = Progress(study.log, quiet=True)
        algorithm = make_optimizer(settings, executor.n_layer, layers)
        return run_search(
            executor, study, settings, progress, algorithm=algorithm, architecture="synthetic", test_size=test_size
        )
