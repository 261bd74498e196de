"""Factors that the patched library refuses: the worst of a search and never its end, and refused by `write` alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.llama_direct import Context
from support.rope_models import LINEAR, LLAMA, LLAMA3_YARN, N_LAYER, YARN, YARN_1, YARN_2, YARN_8, TinyModel, by_name
from support.rope_models import file_of as model_file
from support.synthetic import Landscape
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import plan_write
from lrope_gguf.model_info import read_model
from lrope_search import ModelConfig, SearchConfig, WorkersConfig, optimizer_config, task_config
from lrope_search.evaluation.divergence import Guard, GuardTexts
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import FactorsRefusedError, Model
from lrope_search.launch import search
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study, parse_evaluations
from lrope_search.tasks import KeyValueTask
from lrope_search.workers.protocol import LocalExecutor

native = pytest.mark.native
ONES = (1.0,) * N_LAYER
SINGULAR = (0.5, *ONES[1:])  # the frequency scale of YARN_2


def near(scale: float) -> Iterator[float]:
    """Factors around all limits, the float32 steps at each included."""
    steep = (1.0 - scale) / 32.0
    for limit in (1.0 / 1024.0, 1024.0, scale - steep, scale + steep, scale, scale / math.e**10, 1.0):
        value = float(np.float32(max(limit, 1e-6)))
        for _ in range(3):
            value = float(np.nextafter(np.float32(value), np.float32(0.0)))
        for _ in range(7):
            yield value
            value = float(np.nextafter(np.float32(value), np.float32(np.inf)))
        yield from (limit * wide for wide in (0.9, 0.999, 1.001, 1.1))


@native
@pytest.mark.parametrize("model", [LLAMA, LINEAR, YARN, YARN_1, YARN_2, YARN_8, LLAMA3_YARN], ids=by_name)
@pytest.mark.parametrize("options", [{}, {"rope_freq_scale": 0.3}, {"rope_freq_scale": 40.0}], ids=str)
def test_what_is_refused_is_known_without_the_library(model: TinyModel, options: dict[str, float]) -> None:
    path = model_file(model)
    rope = read_model(path).rope.under(options)
    seen = set()
    with Context(path, model.n_ctx, **options) as context:
        for factor in near(rope.freq_scale):
            code = context.set_factors([1.0, factor, *ONES[2:]])
            assert (rope.refusal(factor) is not None) == (code == -2), factor
            seen.add(code)
            if not options:  # and `write` says the same
                try:
                    plan_write(path, [1.0, factor, *ONES[2:]])
                    assert code == 0, factor
                except LropeError as error:
                    assert code == -2 and "the factor of layer 1 is" in str(error)
    assert seen == {0, -2}


@pytest.mark.parametrize("bounds", ["0.0009,4", "0.5,1025", "0.0009765,1024"])
def test_bounds_that_llama_cpp_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], bounds: str) -> None:
    assert main(["search", str(write_readable(tmp_path / "m.gguf")), "--set", f"bounds={bounds}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lrope-gguf: --set bounds={bounds}: give two numbers around 1")
    assert SearchConfig(bounds=(1 / 1024, 1024.0)).bounds == (0.0009765625, 1024.0)


@native
def test_refused_factors_score_worst_and_leave_no_trace(tmp_path: Path) -> None:
    with Model(write_readable(tmp_path / "yarn.gguf", YARN_2), n_threads=1) as model:
        guard = Guard(model, GuardTexts(((1, 2, 3),), tuple(range(1, 90))))
        evaluator = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4), guard=guard)
        before = evaluator.evaluate((1.2,) * N_LAYER, "test", 0)
        for refused in (SINGULAR, (2000.0, *ONES[1:]), (1e-4, *ONES[1:])):
            with pytest.raises(FactorsRefusedError, match="refused by llama"):
                model.clear()
                model.set_factors(refused)
            scores = [evaluator.evaluate(refused, "test", index) for index in (0, 1)]
            assert [(score.split, score.index, score.n_tokens) for score in scores] == [("test", 0, 0), ("test", 1, 0)]
            probes = [probe for score in scores for probe in score.probes]
            assert {(probe.log_probability, probe.correct) for probe in probes} == {(-math.inf, False)}
            assert [p.depth for p in scores[0].probes] == [p.depth for p in before.probes]
            divergence = evaluator.divergence(refused)
            assert (divergence.short, divergence.long) == (math.inf, math.inf)
            with pytest.raises(LropeError, match="refused"):
                evaluator.generate(refused, "test", 0)
        assert evaluator.evaluate((1.2,) * N_LAYER, "test", 0).probes == before.probes
        with pytest.raises(LropeError, match="refused") as caught:
            model.clear()
            model.set_factors((1.0,) * 9)
        assert not isinstance(caught.value, FactorsRefusedError)


SETTINGS = SearchConfig(
    max_evaluations=14, algorithm=optimizer_config("ga", population=8, width=0.3),
    search_contexts=2, validation_contexts=2, test_contexts=6, finalists=2,
    uniform_factors=(0.5, 1.1), max_kl=100.0,
)  # fmt: skip
TASK = task_config("kv", keys=6, probes=3, identifiers="number")


@native
@pytest.mark.parametrize("algorithm", ["ga", "random"])
def test_a_search_goes_on_and_resumes(tmp_path: Path, algorithm: str) -> None:
    """The default lower bound, 0.5, is this model's frequency scale."""
    population = {"population": 8} if algorithm == "ga" else {"population": None}
    settings = SearchConfig.from_json(SETTINGS.to_json() | {"algorithm": algorithm} | population)
    model = ModelConfig(str(write_readable(tmp_path / "yarn.gguf", YARN_2)), n_threads=1)
    outcome = search(model, TASK, settings, tmp_path / "a")
    worst = [(c.factors, score) for c, score in outcome.candidates if score[1] == -math.inf]
    assert (0.5,) * N_LAYER in [factors for factors, _ in worst]
    assert outcome.winner is None or outcome.winner.factors not in [factors for factors, _ in worst]
    assert outcome.uniform is not None and outcome.uniform.factors == (1.1,) * N_LAYER
    path = tmp_path / "a" / "evaluations.jsonl"
    results = dict(parse_evaluations(path.read_bytes(), path)[0])
    assert sum(score.n_tokens == 0 for score in results.values()) >= 2

    lines = path.read_bytes().splitlines(keepends=True)
    whole = (tmp_path / "a" / "best.json").read_bytes()
    for kept in (7, len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        search(model, TASK, settings, tmp_path / "a")
        assert (tmp_path / "a" / "best.json").read_bytes() == whole
    search(model, TASK, settings, tmp_path / "b", workers=WorkersConfig(n_workers=2))
    assert (tmp_path / "b" / "best.json").read_bytes() == whole


@native
def test_a_model_without_rope_is_no_model_that_refuses_everything(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "granite.gguf", TinyModel(
        "granite", "granite", LLAMA.config, (("rope.scaling.finetuned", False),)
    ))  # fmt: skip
    with pytest.raises(LropeError, match="the model has no RoPE"):
        search(ModelConfig(str(path)), TASK, SETTINGS, tmp_path / "a")


def test_no_uniform_factor_that_is_refused_goes_to_the_test(tmp_path: Path) -> None:
    class Refusing(Landscape):
        def log_probability(self, factors: tuple[float, ...], context: object) -> float:
            return -math.inf if len(set(factors)) == 1 != factors[0] else super().log_probability(factors, context)

    settings = SearchConfig(max_evaluations=20, search_contexts=2, validation_contexts=2, test_contexts=6)
    with Study(tmp_path / "s", {"search": settings.identity()}) as study:
        outcome = run_search(LocalExecutor(Refusing()), study, settings, Progress(study.log, quiet=True))
    assert outcome.uniform is None and outcome.summary.table is not None
    assert not any(name.startswith("uniform") for name in outcome.summary.table.totals)
    json.loads((tmp_path / "s" / "best.json").read_text())
