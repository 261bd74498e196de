"""Who takes log-probabilities from logits, the host or the device by nodes of the graph; and tokens a batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.rope_models import GEMMA3, LLAMA, TinyModel, by_name
from support.tiny_models import write_readable
from test_guard import CURVE, ONES

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search import ModelConfig, SearchConfig, search, task_config
from lrope_search.evaluation import evaluator as evaluator_module
from lrope_search.evaluation import model as model_module
from lrope_search.evaluation.binding import llama_library
from lrope_search.evaluation.evaluator import KEPT_BYTES, SCORINGS, TeacherForcedEvaluator, default_scoring
from lrope_search.evaluation.make import kept_computing
from lrope_search.evaluation.memory import memory_needed
from lrope_search.evaluation.model import Model
from lrope_search.scores import ContextScore
from lrope_search.tasks import KeyValueTask

native = pytest.mark.native
TASK = task_config("kv", keys=6, probes=4, seed=3)
SEARCH = SearchConfig(max_evaluations=3, search_contexts=1, validation_contexts=1, test_contexts=2, finalists=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readable(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, n_threads=1, flash_attention=False) as model:
        yield model


def evaluator_of(model: Model, scoring: str | None, **options: int) -> TeacherForcedEvaluator:
    return TeacherForcedEvaluator(model, KeyValueTask(6, probes=4, seed=3), scoring=scoring, **options)


def same(a: ContextScore, b: ContextScore) -> bool:
    """Whether two scores agree but for rounding."""
    assert [p.log_probability for p in a.probes] == pytest.approx([p.log_probability for p in b.probes], abs=2e-6)
    return [p.correct for p in a.probes] == [p.correct for p in b.probes]


@native
@pytest.mark.parametrize("kind", [LLAMA, GEMMA3], ids=by_name)
@pytest.mark.parametrize(("n_batch", "max_outputs"), [(512, 128), (48, 9), (512, 1)])
def test_the_device_scores_as_the_host_does(
    kind: TinyModel, n_batch: int, max_outputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "MAX_OUTPUTS", max_outputs)
    path = write_readable(tmp_path / "model.gguf", kind)
    scores = {}
    for scoring in SCORINGS:
        with Model(path, n_threads=1, n_batch=n_batch, flash_attention=False) as model:
            evaluator = evaluator_of(model, scoring)
            scores[scoring] = [evaluator.evaluate(f, "test", i) for f in (ONES, CURVE) for i in (0, 1)]
    assert all(itertools.starmap(same, zip(*scores.values(), strict=True)))


@native
@pytest.mark.parametrize("shares", [True, False])
def test_the_device_scores_copied_states_as_the_host_does(
    model: Model, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "shares_tokens", shares)
    host, device = (evaluator_of(model, scoring).evaluate(CURVE, "test", 1) for scoring in SCORINGS)
    assert same(host, device)


@native
def test_answers_between_scores_change_neither(model: Model) -> None:
    evaluator = evaluator_of(model, "host")
    answers = evaluator.generate(CURVE, "test", 0)
    evaluator = evaluator_of(model, "device")
    first = evaluator.evaluate(CURVE, "test", 0)
    assert evaluator.generate(CURVE, "test", 0) == answers
    second = evaluator.evaluate(CURVE, "test", 0)
    assert second.probes == first.probes


@native
def test_scores_of_the_device_do_not_depend_on_threads_or_history(path: Path) -> None:
    scores = []
    for n_threads in (1, 2):
        with Model(path, n_threads=n_threads) as model:
            evaluator = evaluator_of(model, "device")
            for earlier in ([], [("search", 0), ("validation", 1)]):
                for job in earlier:
                    evaluator.evaluate(ONES, *job)
                scores.append(evaluator.evaluate(CURVE, "test", 1).probes)
    assert scores == scores[:1] * 4


@native
def test_nan_is_the_worst_score_on_the_device_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherForcedEvaluator, "_written_lead", lambda *_: None)  # there is none to write
    with Model(write_readable(tmp_path / "nan.gguf", poison="blk.3.ffn_down.weight"), n_threads=1) as model:
        scores = [evaluator_of(model, scoring).evaluate(ONES, "test", 0).probes for scoring in SCORINGS]
    assert scores[0] == scores[1]
    assert {(p.log_probability, p.correct) for p in scores[0]} == {(-float("inf"), False)}


@native
def test_who_scores_unless_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "logits_on_gpu", False)
    assert default_scoring(model) == "host"
    monkeypatch.setattr(model, "logits_on_gpu", True)
    assert default_scoring(model) == "device"
    assert evaluator_of(model, None).scoring == "device"
    monkeypatch.setattr(model_module, "can_score", lambda library: False)
    assert default_scoring(model) == "host"
    with pytest.raises(LropeError, match=r"cannot do; use one with all of lrope-gguf's patches$"):
        evaluator_of(model, "device")


@native
def test_the_output_layer_is_the_last_on_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(n_gpu_layers: int | None) -> bool:
        with Model(path, n_gpu_layers=n_gpu_layers) as model:
            return model.logits_on_gpu

    with Model(path) as model:
        monkeypatch.setattr(model._llama, "llama_supports_gpu_offload", lambda: True)
    assert [on_gpu(n) for n in (None, -1, 0, 6, 7)] == [True, True, False, False, True]
    monkeypatch.setattr(model._llama, "llama_supports_gpu_offload", lambda: False)
    assert not on_gpu(None)


@native
def test_memory_for_scores_on_the_device(model: Model) -> None:
    needed = {s: evaluator_of(model, s).memory_needed() for s in SCORINGS}
    assert needed["host"].kv_cache == needed["device"].kv_cache
    with model.without_weights() as empty:
        big = {on: memory_needed(empty, 512, 60, score_on_device=on).compute for on in (False, True)}
    assert 0.5 < big[True] / big[False] < 2.0
    # what is foreseen is what is taken once scores were asked for
    evaluator_of(model, "device").evaluate((1.0,) * model.n_layer, "search", 0)
    kept = needed["device"].compute - KEPT_BYTES
    assert model.memory_size(score_on_device=True)[2:] == (needed["device"].kv_cache, kept)


def test_what_an_old_study_says() -> None:
    assert kept_computing(None)[1] is None
    for old in ({}, [], {"computing": None}, {"computing": {"batch_size": 512}}, {"computing": {"scoring": 1}}):
        assert kept_computing(old)[1] == "host"
    assert kept_computing({"computing": {"scoring": "device"}})[1] == "device"


@native
def test_a_study_stays_with_who_scored_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guard.txt").write_text("Some words, and others. " * 25)  # quicker than what the model would write

    def computing(name: str, more: int = 0) -> dict[str, object]:
        settings = replace(SEARCH, max_evaluations=3 + more, guard_text=str(tmp_path / "guard.txt"))
        search(ModelConfig(str(path), n_threads=1), TASK, settings, tmp_path / name)
        found: dict[str, object] = json.loads((tmp_path / name / "config.json").read_text())["computing"]
        return found

    assert computing("old") == {"batch_size": 512, "n_gpu_layers": None}
    monkeypatch.setattr(evaluator_module, "default_scoring", lambda model: "device")
    assert computing("new") == {"batch_size": 512, "n_gpu_layers": None, "scoring": "device"}
    assert "scoring" not in computing("old", more=2)  # by the host still
    monkeypatch.setattr(evaluator_module, "default_scoring", lambda model: "host")
    assert computing("new", more=2)["scoring"] == "device"


SETS = ("kv.identifiers=number", "kv.probes=3", "search_contexts=1", "validation_contexts=1", "test_contexts=1")
SMALL = ["--keys", "6", "--max-evaluations", "3", "--threads", "1", "--max-kl", "100",
          *(f"--set={setting}" for setting in SETS)]  # fmt: skip


def pretend_a_gpu(patch: pytest.MonkeyPatch, there: bool) -> None:
    patch.setattr(llama_library(), "llama_supports_gpu_offload", lambda: there)


@native
def test_the_default_batch_is_what_the_device_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_readable(tmp_path / "m.gguf")
    for gpu, n_gpu_layers, wanted in ((False, None, 512), (True, None, 2048), (True, 3, 2048), (True, 0, 512)):
        pretend_a_gpu(monkeypatch, gpu)
        with Model(path, n_gpu_layers=n_gpu_layers) as model:
            assert model.n_batch == wanted
        with Model(path, n_batch=100, n_gpu_layers=n_gpu_layers) as model:
            assert model.n_batch == 100


@native
def test_a_study_keeps_its_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_readable(tmp_path / "m.gguf"))

    def run(name: str, *options: str) -> int:
        return main(["search", path, *SMALL, "--output", str(tmp_path / f"{name}.json"), *options])

    def computing(name: str) -> dict[str, int | None]:
        document = json.loads((tmp_path / f"{name}.study" / "config.json").read_text())
        computing: dict[str, int | None] = document["computing"]
        return computing

    pretend_a_gpu(monkeypatch, False)
    assert run("cpu") == 0
    assert computing("cpu") == {"batch_size": 512, "n_gpu_layers": None}
    pretend_a_gpu(monkeypatch, True)
    assert run("cpu") == 0  # as studies on GPUs have 512 that are older than this default
    assert computing("cpu")["batch_size"] == 512
    assert run("gpu") == 0 and computing("gpu")["batch_size"] == 2048
    pretend_a_gpu(monkeypatch, False)
    assert run("gpu") == 0 and run("gpu", "--set", "batch_size=2048") == 0
    capsys.readouterr()
    assert run("gpu", "--set", "batch_size=512") == 1
    assert "computing.batch_size was 2048, is 512" in capsys.readouterr().err
