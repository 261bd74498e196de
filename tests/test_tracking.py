"""The hook for MLflow, on a module that takes its place."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.study_fixtures import SETTINGS, make_study

from lrope_gguf.cli import main
from lrope_search.report.page import write_report
from lrope_search.report.reading import read_study
from lrope_search.report.tracking import log_study


class MlflowException(Exception):  # noqa: N818
    pass


def install(monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> dict[str, Any]:
    """Let there be the part of mlflow that is used, with its limits; returns what will be logged."""
    logged: dict[str, Any] = {"metrics": [], "artifacts": []}

    @contextmanager
    def start_run(run_name: str) -> Any:
        if broken:
            raise MlflowException("server: no answer\nand much more")
        logged["name"] = run_name
        yield SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(run_id: str, metrics: list[Any]) -> None:
        assert run_id == "r1" and len(metrics) <= 1000
        logged["metrics"] += metrics

    parts = {
        "start_run": start_run, "exceptions": SimpleNamespace(MlflowException=MlflowException),
        "log_params": lambda params: logged.update(params=params), "set_tags": lambda tags: logged.update(tags=tags),
        "MlflowClient": lambda: SimpleNamespace(log_batch=log_batch),
        "log_artifact": lambda path: logged["artifacts"].append(Path(path).name),
    }  # fmt: skip
    entities = {"Metric": lambda key, value, timestamp, step: (key, value, timestamp, step)}
    for name, content in (("mlflow", parts), ("mlflow.entities", entities)):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return logged


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tracked") / "best.study"
    make_study(directory, dataclasses.replace(SETTINGS, max_evaluations=20, search_contexts=2, test_contexts=8))
    write_report(read_study(directory))
    return directory


def test_a_study_is_one_run(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = install(monkeypatch)
    assert log_study(read_study(study)) == "r1"
    summary = read_study(study)
    assert logged["name"] == "best.study" and logged["params"]["search.seed"] == "3"
    assert logged["tags"] == {"verdict": summary.verdict, "recommended": summary.recommended}
    fitness = [(value, step) for key, value, _, step in logged["metrics"] if key == "fitness"]
    assert fitness == [(trial.fitness, i) for i, trial in enumerate(summary.trials)] and len(fitness) == 20
    assert summary.table is not None
    totals = {key: value for key, value, _, _ in logged["metrics"] if key.startswith("test_accuracy")}
    assert totals["test_accuracy_base"] == summary.table.totals["base"].accuracy
    assert {"best.json", "report.html", "report-factors.png"} <= set(logged["artifacts"])


def test_the_command(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch)
    assert main(["report", str(study), "--json", "--mlflow"]) == 0
    assert "mlflow: run r1" in capsys.readouterr().err
    install(monkeypatch, broken=True)
    assert main(["report", str(study), "--json", "--mlflow"]) == 1
    assert capsys.readouterr().err == "lrope-gguf: --mlflow: server: no answer\n"
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main(["report", str(study), "--json", "--mlflow"]) == 1
    assert "pip install mlflow-skinny" in capsys.readouterr().err
