"""The guard: KL divergence on ordinary text against its definition, and the texts it looks at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr
from support.rope_models import GEMMA3, LLAMA
from support.tiny_models import BOS, EOS, write_readable

from lrope_gguf.errors import LropeError
from lrope_search.evaluation import logits as logits_module
from lrope_search.evaluation import model as model_module
from lrope_search.evaluation.divergence import Guard, GuardTexts, read_texts, write_texts
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.logits import RowWorkers, gold_scores, kl_divergences
from lrope_search.evaluation.model import Model
from lrope_search.scores import GUARD, Job
from lrope_search.tasks import KeyValueTask

native = pytest.mark.native
ONES = (1.0,) * 6
CURVE = (0.8, 1.0, 1.3, 1.7, 1.1, 2.5)
ROWS = hnp.arrays(np.float32, (3, 40), elements=st.floats(-60, 60, width=32))


@given(ROWS, ROWS)
def test_divergence_is_its_definition(base: NDArray[np.float32], other: NDArray[np.float32]) -> None:
    p, q = (np.exp(log_softmax(x.astype(np.float64), axis=1)) for x in (base, other))
    found = kl_divergences(base, other, RowWorkers(1))
    assert found == pytest.approx(rel_entr(p, q).sum(1), rel=1e-9, abs=1e-12)
    assert (found >= 0).all()
    assert (kl_divergences(base, base, RowWorkers(1)) == 0).all()


def test_rows_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "_FEW", 10)
    rng = np.random.default_rng(0)
    base, other = rng.standard_normal((2, 37, 501)).astype(np.float32)
    gold = rng.integers(0, 501, 37).astype(np.int32)
    one, four = RowWorkers(1), RowWorkers(4)
    assert (kl_divergences(base, other, one) == kl_divergences(base, other, four)).all()
    (p1, hit1), (p4, hit4) = (gold_scores(base.copy(), gold, some) for some in (one, four))
    assert four._pool is not None and (p1 == p4).all() and (hit1 == hit4).all()
    expected = log_softmax(base.astype(np.float64), axis=1)[np.arange(37), gold]
    assert p1 == pytest.approx(expected, abs=1e-6)
    assert (hit1 == (base.argmax(1) == gold)).all()


def test_excluded_tokens_and_nan() -> None:
    inf, nan = math.inf, math.nan
    base = np.array([[0, 0, -inf], [0, 0, -inf], [0, 1, 2], [nan, 0, 0], [0, 1, 2], [0, 1, nan]], np.float32)
    other = np.array([[0, 0, -inf], [0, 0, 0], [0, 1, -inf], [0, 0, 0], [nan, 1, 2], [0, 1, nan]], np.float32)
    found = kl_divergences(base, other, RowWorkers(1)).tolist()
    assert found[:3] == pytest.approx([0.0, math.log(1.5), inf])
    assert math.isnan(found[3])
    assert found[4] == inf
    assert math.isnan(found[5])
    log_p, hit = gold_scores(base.copy(), np.array([0, 1, 2, 1, 2, 1], np.int32), RowWorkers(1))
    assert np.isnan(log_p).tolist() == [False, False, False, True, False, True]
    assert hit.tolist() == [True, False, True, False, True, False]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    with Model(write_readable(path, LLAMA if request.param == "llama" else GEMMA3), n_threads=1, n_batch=64) as model:
        yield model


def reference(model: Model, text: Sequence[int], factors: tuple[float, ...]) -> NDArray[np.float64]:
    """Logits after every token of one text, in a context of its own."""
    n = len(text)
    with model.another_context() as own:
        own.reserve(n)
        own.set_factors(factors)
        arrays = (np.array(text, np.int32), np.arange(n), np.zeros(n, np.int64), np.ones(n, np.bool_))
        return np.concatenate([part.logits.astype(np.float64) for part in own.decode(*arrays)])


@native
def test_guard_measures_kl_between_base_and_curve(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "MAX_OUTPUTS", 24)
    rng = np.random.default_rng(1)
    short = tuple((BOS, *rng.integers(0, 90, n).tolist()) for n in (40, 30))
    long = (BOS, *rng.integers(0, 90, 150).tolist())
    guard = Guard(model, GuardTexts(short, long))
    result = guard.score(CURVE)

    def divergences(text: tuple[int, ...]) -> NDArray[np.float64]:
        p, q = (np.exp(log_softmax(reference(model, text, factors), axis=1)) for factors in (ONES, CURVE))
        return np.asarray(rel_entr(p, q).sum(1))

    each = np.concatenate([divergences(text) for text in short])
    assert result.short == pytest.approx(each.mean(), rel=2e-3)
    late = divergences(long)[41:]
    assert result.long == pytest.approx(late.mean(), rel=2e-3)
    assert max(result.short, result.long) > 0.01
    assert result.n_tokens == guard.n_tokens == 2 * (41 + 31 + 151)
    none = guard.score(ONES)
    assert none.short == none.long == 0.0


@native
def test_the_evaluator_has_the_guard_and_its_context_is_left_alone(model: Model) -> None:
    texts = write_texts(model, 3, n_short=2, short=24, long=64)
    task = KeyValueTask(6, probes=4)
    evaluator = TeacherForcedEvaluator(model, task, guard=Guard(model, texts))
    before, n_ctx = evaluator.evaluate(CURVE, "test", 0), model.n_ctx
    guarded = Job(CURVE, GUARD, 0).run(evaluator)
    assert replace(guarded, seconds=0.0) == replace(Guard(model, texts).score(CURVE), seconds=0.0)
    assert model.n_ctx == n_ctx
    assert evaluator.evaluate(CURVE, "test", 0).probes == before.probes
    assert replace(evaluator.divergence(CURVE), seconds=0.0) == replace(guarded, seconds=0.0)
    with pytest.raises(LropeError, match="without a guard"):
        TeacherForcedEvaluator(model, task).divergence(CURVE)


@native
def test_the_base_model_writes_its_texts_from_the_seed(model: Model) -> None:
    texts = write_texts(model, 5, n_short=3, short=20, long=90)
    assert texts == write_texts(model, 5, n_short=3, short=20, long=90)
    assert texts != write_texts(model, 6, n_short=3, short=20, long=90)
    assert [len(text) for text in texts.short] == [20] * 3
    assert len(texts.long) == 90
    assert [texts.long[i : i + 20] for i in (0, 30, 60)] == list(texts.short)
    assert all(text[0] == BOS for text in texts.short)
    assert len(set(texts.short)) == 3
    assert EOS not in texts.long


@native
def test_written_texts_follow_the_model(tmp_path: Path) -> None:
    """What it writes is likely to it: near its entropy, far from chance."""
    with Model(write_readable(tmp_path / "m.gguf"), n_threads=1) as model:
        text = write_texts(model, 0, n_short=2, short=300, long=600).short[0]
        log_p = log_softmax(reference(model, text, ONES), axis=1)[:-1]
    own = log_p[np.arange(len(log_p)), text[1:]]
    entropy = -(np.exp(log_p) * log_p).sum(1)
    error = np.sqrt(((np.exp(log_p) * log_p**2).sum(1) - entropy**2).sum()) / len(own)
    assert abs(own.mean() + entropy.mean()) < 4 * error
    assert 4 * error - own.mean() < math.log(model.n_vocab)


@native
def test_the_users_text(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a text.\n" for i in range(30)))
    tokens = model.tokenize(path.read_text()).tolist()
    texts = read_texts(model, path, n_short=3, short=50, long=200)
    assert texts.long == (BOS, *tokens[:199])
    assert [len(text) for text in texts.short] == [50] * 3
    assert texts.short[0] == (BOS, *tokens[:49])
    assert texts.short[2] == (BOS, *tokens[-49:])
    assert read_texts(model, path, short=50, long=10_000).long == (BOS, *tokens)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for message in (r"text\.txt: \d+ tokens, too few; give guard_text at least 2000",
                    r"none\.txt: cannot be read as text", r"binary\.txt: cannot be read as text .*UTF-8"):  # fmt: skip
        with pytest.raises(LropeError, match=message):
            read_texts(model, tmp_path / message.split(":")[0].replace("\\", ""), short=1000)


@native
def test_a_model_of_nan_is_an_error(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "nan.gguf", poison="blk.3.ffn_down.weight")
    with Model(path, n_threads=1) as model:
        with pytest.raises(LropeError, match="NaN on text of its own"):
            write_texts(model, 0, n_short=1, short=4, long=4)
        with pytest.raises(LropeError, match="NaN on ordinary text"):
            Guard(model, GuardTexts(((1, 2, 3),), (1, 2, 3, 4))).score(CURVE)
