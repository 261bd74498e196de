"""The studies' own parts: sparse landscapes, contenders, and a model run that computes nothing twice."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders
import landscapes
import numpy as np
import problems
import pytest
import yardsticks

from lrope_gguf import LropeError
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.optimizers.protocol import Optimizer
from lrope_search.study.racing import Racing

ROOT = Path(__file__).parents[2]


def alone(n_layer: int, layers: Sequence[int], factor: float) -> tuple[float, ...]:
    return tuple(factor if i in layers else 1.0 for i in range(n_layer))


def test_sparse_landscapes_are_as_measured() -> None:
    """Slightly raised gains, 1.4 loses; harmful layers lose either way; the rest is noise; a curve gets half."""
    found = []
    for seed in range(40):
        one = landscapes.SparseLandscape(seed)
        n = one.n_layer
        assert 24 <= n <= 32 and 1 <= len(one.helpful) <= 4 and len(one.harmful) >= 2
        assert len({*one.helpful, *one.harmful}) == len(one.helpful) + len(one.harmful)
        main = one.helpful[0]
        worst = min(one.true_gain(alone(n, [i], factor)) for i in one.harmful for factor in (0.9, 1.2))
        assert (
            max(one.true_gain(alone(n, [i], factor)) for i in one.harmful for factor in (0.9, 1.2)) < 0.003
        )  # at most noise
        assert all(
            abs(one.true_gain(alone(n, [i], 1.2))) < 0.006 for i in range(n) if i not in (*one.helpful, *one.harmful)
        )
        assert one.true_gain((1.0,) * n) == 0.0 and one.gain((1.0,) * n, 3) == 0.0
        optimum = one.true_gain(one.optimum())
        alone_ = [one.true_gain(alone(n, [main], factor)) for factor in (1.1, 1.2, 1.4)]
        assert optimum > max(alone_) > 0.01 and alone_[2] < 0.0
        found.append([alone_[1], worst, one.true_gain((1.25,) * n)])
    assert np.all(np.abs(np.median(found, axis=0) / [0.0285, -0.0563, -1.0] - 1.0) < 0.4)


def test_errors_of_probes_have_the_measured_variance_and_are_alike_for_like_factors() -> None:
    errors: dict[tuple[int, float], list[float]] = {}
    for seed in range(12):
        for probes in (20, 80):
            one = landscapes.SparseLandscape(seed, probes)
            for factor in (1.2, 1.21):
                factors = alone(one.n_layer, one.harmful + one.helpful, factor)
                errors.setdefault((probes, factor), []).extend(
                    one.gain(factors, context) - one.true_gain(factors) for context in range(60)
                )
    for probes in (20, 80):
        assert 0.7 < np.var(errors[probes, 1.2]) / (0.0034 / probes) < 1.2
        assert np.corrcoef(errors[probes, 1.2], errors[probes, 1.21])[0, 1] > 0.9
    again = landscapes.SparseLandscape(0, 20)
    factors = alone(again.n_layer, again.harmful + again.helpful, 1.2)
    assert again.gain(factors, 0) - again.true_gain(factors) == pytest.approx(errors[20, 1.2][0], abs=1e-15)


@pytest.mark.parametrize("method", ["ga", "cma-es", "random", "tpe", "gp", "de", "papers-ga"])
def test_every_contender_begins_with_the_known_factors_and_repeats_itself(method: str) -> None:
    pytest.importorskip("cmaes")
    for package in {"tpe": ["optuna"], "gp": ["optuna", "torch"]}.get(method, []):
        pytest.importorskip(package)
    one = landscapes.SparseLandscape(0)

    def told(name: str) -> list[tuple[float, ...]]:
        optimizer = contenders.make_contender(name, one.n_layer, seed=1, reach=0.25, lack=one.lack)
        seen: list[tuple[float, ...]] = []
        tell = optimizer.tell

        def note(candidate: Any, score: Any) -> None:
            seen.append(candidate.factors)
            tell(candidate, score)

        optimizer.tell = note
        for _ in problems.play(one, optimizer, Racing(1, fraction=1.0), 14):
            pass
        return seen

    known = [(factor,) * one.n_layer for factor in (1.0, 0.95, 1.05, 1.1, 1.25)]
    names = [name for name in contenders.CONTENDERS if name.rsplit("-", 1)[0] == method]
    assert len(names) == (1 if method in ("de", "papers-ga") else 3)
    for name in names:
        seen = told(name)
        np.testing.assert_allclose(seen[:5], known, atol=1e-4, err_msg=name)
        assert len(seen) == 14 and seen == told(name), name


def test_knots_are_linear_between() -> None:
    space = contenders.KnotSpace(7)
    curve, factors = space.express(np.log([1.0, 1.2, 1.1, 0.9]))
    assert curve is None
    np.testing.assert_allclose(factors, [1.0, 1.1, 1.2, 1.15, 1.1, 1.0, 0.9], atol=1e-4)


def test_a_missing_package_or_contender_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("optuna", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert yardsticks.available(["ga-both", "tpe-layers", "gp-layers"]) == ["ga-both"]
    assert "pip install 'lrope-gguf[research]'" in capsys.readouterr().err
    with pytest.raises(LropeError, match="--contenders simulated-annealing: unknown"):
        yardsticks.available(["simulated-annealing"])


def test_kept_runs_are_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [("random-layers", "sparse", seed, 1, 60) for seed in (0, 1)]
    first = yardsticks.Kept(str(tmp_path / "runs")).run(keys, [5, 12], 0.25, 1)
    assert all(-200.0 < worth <= 100.1 for run in first for worth in run)
    monkeypatch.setattr(yardsticks, "landscape_run", builtins.exit)
    assert yardsticks.Kept(str(tmp_path / "runs")).run(keys, [5, 12], 0.25, 1) == first


def test_an_optimizer_that_ends_keeps_its_best() -> None:
    one = landscapes.SparseLandscape(0)
    optimizer: Optimizer = contenders.make_contender("random-layers", one.n_layer, seed=0)
    few = iter([optimizer.ask() for _ in range(3)])
    ended = type("Ended", (), {"lag": 1, "ask": lambda self: next(few, None), "tell": lambda self, *told: None})()
    worths = yardsticks.worths(one, ended, Racing(1, fraction=1.0), [2, 3, 50])
    assert len(worths) == 3 and worths[1] == worths[2]


@pytest.mark.native
def test_a_model_is_asked_once_and_takes_a_study_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    evaluate = TeacherForcedEvaluator.evaluate

    def note(self: TeacherForcedEvaluator, *job: Any) -> Any:
        asked.append(job)
        return evaluate(self, *job)

    monkeypatch.setattr(TeacherForcedEvaluator, "evaluate", note)
    command = ["yardsticks.py", "model", str(ROOT / "models/lrope-kv.gguf"), "--identifiers", "word", "--keys", "20",
               "--probes", "4", "--seeds", "1", "--budgets", "3,8", "--true-contexts", "2", "--threads", "1",
               "--contenders", "ga-both,cma-es-knots,random-layers", "--cache", str(tmp_path / "cache")]  # fmt: skip

    def table(*more: str) -> str:
        asked.clear()
        monkeypatch.setattr(sys, "argv", [*command, *more])
        yardsticks.main()
        return capsys.readouterr().out

    first = table()
    assert len(asked) == len({(factors, *job) for factors, *job in asked}) > 12
    assert table() == first and not asked

    study = tmp_path / "study"
    study.mkdir()
    task = {"name": "kv", "keys": 20, "identifiers": "word", "probes": 4, "positions": "jittered", "data": None,
            "context_tokens": None, "seed": 0, "answer_prefix": "", "chat_template": True}  # fmt: skip
    (study / "config.json").write_text(json.dumps({"task": task}))
    line = {"factors": [1.05] * 4, "split": "search", "index": 0, "probes": [[0.5, -0.5, True], [1.0, -1.5, False]]}
    (study / "evaluations.jsonl").write_text(json.dumps(line))
    assert "1 results of" in table("--study", str(study), "--cache", str(tmp_path / "other"))
    assert asked and ((1.05,) * 4, "search", 0) not in asked
    (study / "config.json").write_text(json.dumps({"task": task | {"probes": 5}}))
    with pytest.raises(SystemExit):
        table("--study", str(study))
    assert "probes is 5 there and 4 here" in capsys.readouterr().err
