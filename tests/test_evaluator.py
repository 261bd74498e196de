"""The evaluator on tiny real models: every shortcut against the long way round."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from support.rope_models import GEMMA3, LLAMA
from support.tiny_models import BOS, CHAT_TEMPLATE, EOS, TOKENS, USER, readable, write_readable, write_without_rope
from test_guard import CURVE, ONES
from test_guard import reference as logits_of

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search.evaluation import binding as binding_module
from lrope_search.evaluation import evaluator as evaluator_module
from lrope_search.evaluation import model as model_module
from lrope_search.evaluation.divergence import Guard, GuardTexts
from lrope_search.evaluation.encoding import Encoder
from lrope_search.evaluation.evaluator import KEPT_BYTES, TeacherForcedEvaluator
from lrope_search.evaluation.generation import write_answers
from lrope_search.evaluation.lead import Frame, Lead
from lrope_search.evaluation.memory import memory_needed
from lrope_search.evaluation.model import Model
from lrope_search.results.table import depth_table
from lrope_search.scores import ContextScore, ProbeScore
from lrope_search.tasks import KeyValueTask
from lrope_search.tasks.task import Context, Probe

native = pytest.mark.native
ARCHITECTURES = {"llama": LLAMA, "gemma3": GEMMA3}


@dataclass
class OneContext:
    """A task whose every context is the same, with any answers."""

    probes: tuple[Probe, ...]
    prefix: str = "Some words to begin with, then numbers: 3141592653589793.\n"
    name: str = "one"

    def size(self, split: str) -> int | None:
        return 1

    def context(self, split: str, index: int) -> Context:
        return Context(split, index, self.prefix, self.probes)

    def calibration(self) -> Context:
        return self.context("calibration", 0)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    # flash attention rounds by batch shape, about 1e-3 in these models
    with Model(write_readable(path, ARCHITECTURES[request.param]), n_threads=1, flash_attention=False) as model:
        yield model


@pytest.fixture
def evaluator(model: Model) -> TeacherForcedEvaluator:
    return TeacherForcedEvaluator(model, KeyValueTask(6, probes=4, seed=3))


def log_ps(score: ContextScore) -> list[float]:
    return [probe.log_probability for probe in score.probes]


def reference(model: Model, lead: str, context: Context, factors: tuple[float, ...]) -> list[tuple[float, bool]]:
    """Log-probability and correctness of each probe, each with a prompt of its own and all its logits."""
    result = []
    for probe in context.probes:
        prompt = model.tokenize_prompt(context.prefix + probe.question)
        tokens = model.tokenize_prompt(context.prefix + probe.question + lead + probe.answer)
        n_lead = len(model.tokenize_prompt(context.prefix + probe.question + lead)) - len(prompt)
        logits = logits_of(model, tokens, factors)
        gold = tokens[len(prompt) :]
        rows = log_softmax(logits, axis=1)[len(prompt) - 1 : -1]
        own = rows[np.arange(len(gold)), gold][n_lead:]
        result.append((float(own.mean()), bool((rows.argmax(1) == gold)[n_lead:].all())))
    return result


@native
@pytest.mark.parametrize("factors", [ONES, CURVE])
@pytest.mark.parametrize(("n_batch", "max_outputs"), [(512, 128), (48, 9)])
def test_a_shared_prefix_scores_as_prompts_of_their_own(
    model: Model, factors: tuple[float, ...], n_batch: int, max_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "MAX_OUTPUTS", max_outputs)
    task = KeyValueTask(6, probes=4, seed=3)
    with Model(model.path, n_threads=1, n_batch=n_batch, flash_attention=False) as other:
        evaluator = TeacherForcedEvaluator(other, task)
        score = evaluator.evaluate(factors, "test", 1)
    assert evaluator._encoders[0].lead == Lead(' "', own_tokens=True)  # the default: random weights retrieve nothing
    expected = reference(model, ' "', task.context("test", 1), factors)
    assert log_ps(score) == pytest.approx([log_p for log_p, _ in expected], abs=5e-5)
    assert [p.correct for p in score.probes] == [correct for _, correct in expected]
    assert [p.depth for p in score.probes] == [p.depth for p in task.context("test", 1).probes]


@native
def test_a_full_sliding_window_cache_changes_no_score(evaluator: TeacherForcedEvaluator, model: Model) -> None:
    full = evaluator.evaluate(CURVE, "test", 0)
    model.reserve(model.n_ctx, 40, swa_full=False)  # so many sequences that the window cache has room for all
    small = evaluator.evaluate(CURVE, "test", 0)
    assert log_ps(small) == pytest.approx(log_ps(full), abs=1e-5)


@native
def test_a_score_depends_on_nothing_that_went_before(evaluator: TeacherForcedEvaluator, model: Model) -> None:
    first = evaluator.evaluate(CURVE, "validation", 1)
    evaluator.evaluate(ONES, "search", 0)
    evaluator.generate(CURVE, "validation", 1)
    again = evaluator.evaluate(CURVE, "validation", 1)
    fresh = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4, seed=3)).evaluate(CURVE, "validation", 1)
    assert first.probes == again.probes == fresh.probes
    assert first.probes != evaluator.evaluate(ONES, "validation", 1).probes
    assert first.n_tokens == evaluator.n_tokens("validation", 1) > 0
    assert first.seconds > 0


def continuation(model: Model) -> tuple[Probe, ...]:
    """Three questions, each with the beginning of what the model writes after it, in the text's own tokens."""
    asked = tuple(Probe(i / 20, f"Question {i}:", "impossible") for i in range(20))
    evaluator = TeacherForcedEvaluator(model, OneContext(asked))
    encoding = evaluator._encode("test", 0)
    evaluator._prefill(encoding, CURVE)
    found = []
    for probe, tokens in zip(asked, write_answers(model, encoding, asked), strict=True):
        text = model.text(tokens[:12])
        if model.tokenize(probe.question + text).tolist() == [*model.tokenize(probe.question).tolist(), *tokens[:12]]:
            found.append(replace(probe, answer=text))
    return tuple(found[:3])


@native
def test_what_greedy_decoding_writes_is_correct_and_nothing_else(model: Model) -> None:
    probes = continuation(model)
    assert len(probes) == 3
    task = OneContext(probes)
    evaluator = TeacherForcedEvaluator(model, task)
    evaluator._encoders[0].lead = Lead("", own_tokens=True)
    evaluator._encodings.clear()
    assert [probe.correct for probe in evaluator.evaluate(CURVE, "test", 0).probes] == [True] * 3
    assert [answer.correct for answer in evaluator.generate(CURVE, "test", 0)] == [True] * 3
    assert [answer.text for answer in evaluator.generate(CURVE, "test", 0)] == [probe.answer for probe in probes]

    changed = replace(probes[1], answer=probes[1].answer[:5] + "~" + probes[1].answer[6:])
    task.probes = (probes[0], changed, probes[2])
    evaluator._encodings.clear()
    assert [probe.correct for probe in evaluator.evaluate(CURVE, "test", 0).probes] == [True, False, True]
    assert [answer.correct for answer in evaluator.generate(CURVE, "test", 0)] == [True, False, True]


@native
def test_the_lead_is_what_the_base_model_writes_before_the_value(model: Model) -> None:
    asked = (Probe(0.5, "Question 5:", "impossible"),)
    text = TeacherForcedEvaluator(model, OneContext(asked)).generate(ONES, "test", 0)[0].text
    value = text[7:12]
    n = text.lower().index(value.lower())
    evaluator = TeacherForcedEvaluator(model, OneContext((replace(asked[0], answer=value),)))
    assert evaluator._encoders[0].lead == Lead(text[:n], own_tokens=True)
    score = evaluator.evaluate(ONES, "test", 0)
    assert score.probes[0].correct
    encoding = evaluator._encode("test", 0)
    assert model.text(encoding.tokens).endswith(text[: n + 5 - len(model.text(encoding.gold[-1:]))])
    assert model.text(encoding.gold) == value


@native
def test_a_given_beginning_of_the_answer_belongs_to_the_prompt(model: Model) -> None:
    task = KeyValueTask(6, probes=4, seed=3)
    given = TeacherForcedEvaluator(model, task, answer_prefix=' "')
    assert [str(lead) for lead in given.leads] == [""]
    plain = TeacherForcedEvaluator(model, task)
    assert given.n_tokens("test", 0) == plain.n_tokens("test", 0)
    mine, other = (e.evaluate(CURVE, "test", 0).log_probability for e in (given, plain))
    assert mine == pytest.approx(other, abs=1e-4)


@native
def test_a_value_that_merges_with_its_lead(model: Model) -> None:
    encoder = Encoder(model, "", Frame())

    def pieces(lead: str, own_tokens: bool) -> tuple[int, list[str]]:
        encoder.lead = Lead(lead, own_tokens)
        _, n_lead, answer = encoder.encode_probe("", Probe(0.5, "Value", "a1"))
        return n_lead, [TOKENS[token] for token in answer]

    assert pieces('"', own_tokens=True) == (1, ['"', "a", "1"])
    assert pieces('"', own_tokens=False) == (0, ['"a', "1"])
    assert pieces(' "', own_tokens=True) == (1, ['Ġ"', "a", "1"])
    # a prompt that ends in what the answer would merge with: the model can only write the rest
    encoder.lead = Lead("", own_tokens=True)
    prompt, _, answer = encoder.encode_probe("", Probe(0.5, 'Value: "', "a1"))
    assert [TOKENS[token] for token in (*prompt[-1:], *answer)] == ['Ġ"', "a", "1"]
    prompt, _, answer = encoder.encode_probe("", Probe(0.5, '"', "a1"))
    assert [TOKENS[token] for token in (*prompt[-1:], *answer)] == ['"', "a", "1"]


KEYS = st.lists(st.text("abc019-", min_size=1, max_size=8), min_size=2, max_size=5, unique=True)


@given(KEYS, st.sampled_from(['Key: "', "Who is ", ""]), st.sampled_from(['"\nCorresponding value:', "?\nAnswer:", ""]))
def test_the_key_is_what_differs_between_questions(keys: list[str], head: str, tail: str) -> None:
    frame = Frame.of([head + key + tail for key in keys])
    for key in keys:
        assert frame.key(Probe(0.5, head + key + tail, "")) in key
    # keys of one word are found whole
    words = [key.replace("-", "x") for key in keys]
    if len(set(words)) > 1:
        assert Frame.of([head + word + tail for word in words]) == Frame(len(head), len(tail))


@native
def test_a_lead_can_hold_the_key(model: Model) -> None:
    evaluator = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4, seed=3))
    evaluator._encoders[0].lead = Lead(' The value of "\0" is "', own_tokens=True)
    assert str(evaluator.leads[0]) == ' The value of "{key}" is "'
    evaluator._encodings.clear()
    context = KeyValueTask(6, probes=4, seed=3).context("test", 0)
    encoding = evaluator._encode("test", 0)
    for i, probe in enumerate(context.probes):
        key = probe.question.split('"')[1]
        mine, gold = encoding.sequences == i + 1, encoding.gold[encoding.owner == i]
        assert model.text(gold) == probe.answer
        fed = model.text(np.append(encoding.tokens[mine], gold[-1]))
        assert fed.endswith(f' The value of "{key}" is "{probe.answer}')


@native
def test_chat_templates_are_rendered_without_a_second_bos_or_the_date(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "chat.gguf", chat_template=CHAT_TEMPLATE)
    with Model(path, n_threads=1) as chat:
        assert chat.is_chat
        tokens = chat.tokenize_prompt("Hi", ' "').tolist()
        assert tokens[:2] == [BOS, USER]
        assert tokens.count(BOS) == 1
        assert chat.text(tokens) == 'Hi\n2024\nA: "'
        assert [chat.is_end(token) for token in (EOS, BOS, 5)] == [True, False, False]
        evaluator = TeacherForcedEvaluator(chat, KeyValueTask(6, probes=4))
        assert np.isfinite(evaluator.evaluate(CURVE, "test", 0).log_probability)
    with Model(path, n_threads=1, chat=False) as raw:
        assert raw.text(raw.tokenize_prompt("Hi <user>")) == "Hi <user>"
        assert USER not in raw.tokenize_prompt("Hi <user>")
    with (
        pytest.raises(LropeError, match=r"chat template fails .*no system.*--set chat_template=false"),
        Model(write_readable(tmp_path / "bad.gguf", chat_template="{{ raise_exception('no system') }}")) as bad,
    ):
        bad.tokenize_prompt("Hi")


@native
def test_factors_at_run_time(tmp_path: Path) -> None:
    stored = [1.5, 1.0, 0.75, 1.25, 1.0, 2.0]
    with Model(write_readable(tmp_path / "with.gguf", factors=stored), n_threads=1) as model:
        model.reserve(64)
        assert model.get_factors() == tuple(stored)
        model.set_factors(ONES)
        assert model.get_factors() == ONES
        model.set_factors([float(np.float32(x)) for x in CURVE])
        assert model.get_factors() == pytest.approx(CURVE)
        for bad in ((1.0,) * 7, (0.0, *ONES[1:]), (float("nan"), *ONES[1:]), (-1.0, *ONES[1:])):
            with pytest.raises(LropeError, match="refused by llama") as caught:
                model.set_factors(bad)
            assert "\n" not in str(caught.value)
        assert model.get_factors() == pytest.approx(CURVE)
        model.prefill(np.array([BOS, 5, 6], np.int32))
        with pytest.raises(LropeError, match="memory is not empty"):
            model.set_factors(ONES)
    with Model(write_readable(tmp_path / "without.gguf"), n_threads=1) as model:
        model.reserve(64)
        assert model.get_factors() == ONES


@native
def test_the_base_model_is_that_of_a_file_with_factors(tmp_path: Path) -> None:
    task = KeyValueTask(6, probes=4)
    scores = []
    for name, stored in (("with", list(CURVE)), ("without", None)):
        with Model(write_readable(tmp_path / f"{name}.gguf", factors=stored), n_threads=1) as model:
            evaluator = TeacherForcedEvaluator(model, task)
            scores.append([evaluator.evaluate(factors, "test", 0).probes for factors in (ONES, CURVE)])
    assert scores[0] == scores[1]
    assert scores[0][0] != scores[0][1]


@native
def test_nan_is_an_error_that_names_the_factors_and_leaves_the_rest_usable(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "nan.gguf", poison="blk.3.ffn_down.weight")
    with Model(path, n_threads=1) as model, pytest.raises(LropeError, match="NaN with factors 1,1,1,1,1,1; "):
        TeacherForcedEvaluator(model, KeyValueTask(6, probes=4))


class TildeTask(OneContext):
    """Context 1 has a tilde in its prefix, context 2 in one question."""

    def size(self, split: str) -> int | None:
        return 3

    def context(self, split: str, index: int) -> Context:
        first, *others = self.probes
        marked = replace(first, question="~" + first.question) if index == 2 else first
        return Context(split, index, self.prefix + "~" * (index == 1), (marked, *others))


@native
def test_nan_is_the_worst_of_scores_and_reaches_no_other(tmp_path: Path) -> None:
    tensors = {name: readable(LLAMA).weights()[name] for name in ("token_embd.weight", "output.weight")}
    for tensor, value in zip(tensors.values(), (np.nan, 0.0), strict=True):  # never the likeliest: it writes none
        tensor[TOKENS.index("~")] = value
    path = write_readable(tmp_path / "tilde.gguf", replace(LLAMA, tensors=tensors))
    task = TildeTask(tuple(Probe(i / 2, f"Question {i}:", f"answer{i}") for i in range(3)))
    with Model(path, n_threads=1, flash_attention=False) as model:
        evaluator = TeacherForcedEvaluator(model, task)
        clean, lost, partly = (evaluator.evaluate(CURVE, "test", i) for i in range(3))
        again = evaluator.evaluate(CURVE, "test", 0)
    assert again.probes == clean.probes
    assert math.isfinite(clean.log_probability)
    for score in (lost, partly):
        assert [(p.log_probability, p.correct) for p in score.probes] == [(-math.inf, False)] * 3
        assert [p.depth for p in score.probes] == [0.0, 0.5, 1.0]
        assert score.log_probability == -math.inf


@native
def test_contexts_in_tokens_are_kept_up_to_a_size(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4))
    made: list[int] = []
    monkeypatch.setattr(
        evaluator, "_task", SimpleNamespace(context=lambda *key: made.append(key[1]) or KeyValueTask(6).context(*key))
    )
    evaluator._encodings.clear()
    size = evaluator._encode("test", 0).n_bytes
    assert size > 1000
    monkeypatch.setattr(evaluator_module, "KEPT_BYTES", 3 * size + size // 2)
    for index in (0, 1, 2, 0, 3, 0, 2, 1):  # whichever was used longest ago goes
        evaluator._encode("test", index)
    assert made == [0, 1, 2, 3, 1]
    assert sum(kept.n_bytes for kept in evaluator._encodings.values()) <= 3.5 * size
    monkeypatch.setattr(evaluator_module, "KEPT_BYTES", 1)  # one is kept however large it is
    evaluator._encode("test", 9)
    assert list(evaluator._encodings) == [("test", 9)]


@pytest.fixture
def sizes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each batch that is decoded."""
    sizes: list[int] = []
    decode = model._llama.llama_decode
    monkeypatch.setattr(model._llama, "llama_decode", lambda c, batch: sizes.append(batch.n_tokens) or decode(c, batch))
    return sizes


@native
def test_a_context_takes_as_few_batches_as_its_tokens_fill(model: Model, sizes: list[int]) -> None:
    evaluator = TeacherForcedEvaluator(model, KeyValueTask(30, probes=11))
    sizes.clear()
    n_tokens = evaluator.evaluate(CURVE, "test", 0).n_tokens
    n_full = n_tokens // model.n_batch
    assert n_full > 2
    assert sum(sizes) == n_tokens
    assert sizes[: n_full - 2] == [model.n_batch] * (n_full - 2)  # later ones may be cut by the rows of logits
    assert len(sizes) <= n_full + 1 + len(evaluator.encoding("test", 0).gold) // model_module.MAX_OUTPUTS


@native
def test_states_that_cannot_be_shared_are_copied_and_score_the_same(
    evaluator: TeacherForcedEvaluator, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.shares_tokens
    shared = evaluator.evaluate(CURVE, "test", 0)
    monkeypatch.setattr(model, "shares_tokens", False)
    copied = evaluator.evaluate(CURVE, "test", 0)
    assert [p.correct for p in copied.probes] == [p.correct for p in shared.probes]
    assert log_ps(copied) == pytest.approx(log_ps(shared), abs=5e-5)


@native
def test_eleven_depths_cost_an_eighth_of_a_prompt_each(model: Model) -> None:
    """With 40 pairs of UUIDs, as the benchmark has; counted against the tokens of the whole prompts."""
    task = KeyValueTask(40, probes=11)
    evaluator = TeacherForcedEvaluator(model, task, answer_prefix=' "')
    context = task.context("search", 0)
    alone = sum(
        len(model.tokenize_prompt(context.prefix + probe.question + ' "' + probe.answer)) - 1
        for probe in context.probes
    )
    assert evaluator.evaluate(ONES, "search", 0).n_tokens * 8 <= alone


@native
def test_the_evaluator_foresees_its_memory(model: Model) -> None:
    plain = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4))
    alone = plain.memory_needed()
    with model.without_weights() as empty:
        needed = memory_needed(empty, model.n_ctx, 5)
    assert alone == replace(needed, compute=needed.compute + KEPT_BYTES)
    guard = Guard(model, GuardTexts(((1, 2, 3),), tuple(range(1, 90)) * 10))
    both = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4), guard=guard).memory_needed()
    assert (both.weights, both.kv_cache > alone.kv_cache, both.compute > alone.compute) == (alone.weights, True, True)


@native
def test_no_token_is_left_to_a_batch_of_its_own(model: Model, sizes: list[int]) -> None:
    model.reserve(2048)
    for n in (model.n_batch + 1, 2 * model.n_batch + 1, 1, 2, model.n_batch):
        model.clear()
        model.prefill(np.full(n, 5, np.int32))
    assert sizes == [511, 2, 512, 511, 2, 1, 2, 512]


@native
def test_a_model_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    good = write_readable(tmp_path / "good.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough to look like one\n")
    write_without_rope(tmp_path / "mpt.gguf")
    write_readable(tmp_path / "factors.gguf", factors=[1.0, 1.0, -3.0, 1.0, 1.0, 1.0])
    for name, message in {
        "none.gguf": "no such file",
        "cut.gguf": "not within the file bounds",
        "text.gguf": "magic",
        "mpt.gguf": "no RoPE",
        "factors.gguf": "bad factor for layer 2",
    }.items():
        with pytest.raises(LropeError, match=message) as caught:
            Model(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@native
def test_a_context_larger_than_foreseen_makes_room(evaluator: TeacherForcedEvaluator, model: Model) -> None:
    before = model.n_ctx
    evaluator._task = KeyValueTask(12, probes=8, seed=3)
    score = evaluator.evaluate(CURVE, "test", 5)
    assert model.n_ctx > before
    expected = reference(model, ' "', evaluator._task.context("test", 5), CURVE)
    assert log_ps(score) == pytest.approx([log_p for log_p, _ in expected], abs=5e-5)


def test_a_stock_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = ModuleType("llama_cpp")
    stock.llama_cpp = SimpleNamespace(_lib=SimpleNamespace(_name="/somewhere/libllama.so"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", stock)
    with pytest.raises(LropeError, match=r"this llama\.cpp is not patched: /somewhere/libllama\.so; "):
        binding_module.llama_library.__wrapped__()


def test_a_missing_library_or_binding_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from lrope_search.evaluation.model import Model\nModel('x.gguf')"
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"lrope_gguf.errors.LropeError: {tmp_path}: no usable llama.cpp library")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(LropeError, match=r"pip install 'lrope-gguf\[search\]'"):
        binding_module.llama_library.__wrapped__()


def scores(*contexts: list[tuple[float, float, bool]]) -> list[ContextScore]:
    return [
        ContextScore("test", i, tuple(ProbeScore(*p) for p in probes), 10, 1.0) for i, probes in enumerate(contexts)
    ]


def test_the_table_holds_means_by_depth_and_gains() -> None:
    base = scores([(0.0, -1.0, True), (1.0, -2.0, False)], [(0.0, -3.0, False), (1.0, -4.0, False)])
    curve = scores([(0.0, -1.0, True), (1.0, -1.0, True)], [(0.0, -2.0, True), (1.0, -4.0, False)])
    table = depth_table({"base": base, "curve": curve})
    first, last = table.json()["by_depth"]
    assert (first["depth"], last["depth"]) == (0.0, 1.0)
    assert first["base"] == {"accuracy": 0.5, "log_probability": -2.0}
    assert last["curve"] == {"accuracy": 0.5, "log_probability": -2.5}
    assert table.json()["curve"] == {"accuracy": 0.75, "log_probability": -2.0}
    assert table.json()["difference"]["curve"]["accuracy"]["mean"] == 0.5
    row = str(table).splitlines()[5]
    assert row.split() == ["all", "25.0", "75.0", "+50.0", "-2.5000", "-2.0000", "+0.5000"]
    assert str(table).endswith("+50.0 points, log-probability +0.5000 (too few contexts for an interval)")


def test_a_table_of_numbers_that_are_not_finite_is_valid_json() -> None:
    table = depth_table({"base": scores([(0.5, -1.0, True)]), "curve": scores([(0.5, -math.inf, False)])})
    document = json.loads(json.dumps(table.json(), allow_nan=False))
    assert document["curve"] == {"accuracy": 0.0, "log_probability": None}
    assert "-inf" in str(table)


@native
def test_eval_compares_base_and_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_readable(tmp_path / "model.gguf", factors=list(CURVE))
    command = ["eval", str(path), "--keys", "6", "--set", "kv.probes=3", "--set", "kv.positions=even"]
    command += ["--contexts", "2", "--threads", "1", "--seed", "4"]
    assert main([*command, "--generate", "--json"]) == 0
    out, err = capsys.readouterr()
    assert any(line.startswith("test context 1: 4/4 evaluations") for line in err.splitlines())
    document = json.loads(out)
    assert document["factors"]["base"] == list(ONES)
    assert document["factors"]["file"] == pytest.approx(CURVE)
    assert [row["depth"] for row in document["by_depth"]] == [0.0, 0.5, 1.0]
    assert document["generated"]["agreement"] == 1.0
    with Model(path, n_threads=1) as model:
        evaluator = TeacherForcedEvaluator(model, KeyValueTask(6, probes=3, positions="even", seed=4))
        expected = [evaluator.evaluate(ONES, "test", i).log_probability for i in range(2)]
    assert document["base"]["log_probability"] == pytest.approx(sum(expected) / 2)

    assert main([*command, "--factors", ",".join(map(str, CURVE)), "--json"]) == 0
    given = json.loads(capsys.readouterr().out)["given"]
    assert given["log_probability"] == pytest.approx(document["file"]["log_probability"], abs=1e-6)
