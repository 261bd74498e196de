"""Log a study to MLflow, which shows many studies side by side. Optional: only where the user asks for it."""

from __future__ import annotations

import math
from importlib import import_module

from lrope_gguf.errors import LropeError

from ..results.summary import StudySummary
from .text import flat

_MOST = 1000  # metrics that an MLflow server takes at once


def log_study(study: StudySummary) -> str:
    """Log settings, fitness, accuracies and files of a study as a run; return its id. Raises `LropeError`: it fails."""
    try:
        mlflow, entities = import_module("mlflow"), import_module("mlflow.entities")
    except ModuleNotFoundError:
        raise LropeError("--mlflow: needs the Python package mlflow; pip install mlflow-skinny") from None
    metrics = [("fitness", trial.fitness, i) for i, trial in enumerate(study.trials)]
    metrics += [("best_fitness", value, i) for i, value in enumerate(study.best_so_far())]
    if study.table is not None:
        name = f"{study.table_split}_accuracy"
        metrics += [(f"{name}_{side.replace(' ', '_')}", cell.accuracy, 0) for side, cell in study.table.totals.items()]
    metrics += [(f"kl_{length}", value, 0) for length, value in study.guard.items()]
    metrics += [("tokens", study.total.tokens, 0), ("seconds", study.total.seconds, 0)]
    try:
        with mlflow.start_run(run_name=study.directory.name) as run:
            mlflow.log_params({key: value[:250] for key, value in flat(study.config)})
            mlflow.set_tags({"verdict": study.verdict, "recommended": study.recommended})
            entries = [
                entities.Metric(name, float(value), 0, step) for name, value, step in metrics if math.isfinite(value)
            ]
            for start in range(0, len(entries), _MOST):
                mlflow.MlflowClient().log_batch(run.info.run_id, metrics=entries[start : start + _MOST])
            for path in sorted({*study.directory.glob("report*"), *study.directory.glob("best.json")}):
                mlflow.log_artifact(str(path))
            return str(run.info.run_id)
    except mlflow.exceptions.MlflowException as error:
        raise LropeError(f"--mlflow: {str(error).splitlines()[0]}") from None
