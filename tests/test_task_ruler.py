"""RULER's tasks that need no data: prompts, answers of several parts, sizes, mistakes, and runs."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import write_readable
from test_task_options import evaluate, parse, sets, words

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search import task_config
from lrope_search.evaluation.encoding import MAX_NEW_TOKENS, Encoder
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.generation import Generation
from lrope_search.evaluation.lead import Frame
from lrope_search.evaluation.make import task_for
from lrope_search.evaluation.model import Model
from lrope_search.sample import default_probes
from lrope_search.tasks import (
    SPLITS,
    CommonWordsTask,
    FrequentWordsTask,
    KeyValueTask,
    MultiKeyTask,
    Task,
    TokenLimit,
    VariableTask,
    task_identity,
)
from lrope_search.tasks.answers import share
from lrope_search.tasks.task import Context, Probe

native = pytest.mark.native
SMALL = {
    "multikey": "--keys 6 --set multikey.probes=3",
    "vt": "--set vt.lines=12",
    "cwe": "--set cwe.words=70",
    "fwe": "--set fwe.words=80",
}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

TASKS: dict[str, Callable[..., Task]] = {
    "multikey": MultiKeyTask, "vt": VariableTask, "cwe": CommonWordsTask, "fwe": FrequentWordsTask,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readable(tmp_path_factory.mktemp("ruler") / "model.gguf", context_length=8192)


def particulars(context: Context) -> set[str]:
    """The keys, values, names and words of a context: what no other split may have."""
    text = context.prefix + "".join(probe.question for probe in context.probes)
    kinds = (UUID, r"\b[A-Z]{5}\b", r"\b[1-9][0-9]{4}\b", r"\b(?:[bdfgklmnprstvz][aeiou]){3}\b")
    return {found for kind in kinds for found in re.findall(kind, text)} - {"remove"}


@pytest.mark.parametrize("name", [*TASKS, "kv"])
def test_seed_split_and_index_decide_and_no_splits_share_anything(name: str) -> None:
    make = {**TASKS, "kv": KeyValueTask}[name]
    late = make(seed=5)
    for index in range(3):
        late.context("search", index)
    assert late.context("test", 7) == make(seed=5).context("test", 7)
    assert late.size("test") is None
    assert late.name == name
    seen = set()
    found: dict[str, set[str]] = {}
    for seed in (5, 6):
        task = make(seed=seed)
        for split in SPLITS:
            for index in range(4):
                context = task.context(split, index)
                assert (context.split, context.index) == (split, index)
                seen.add(context.prefix)
                found.setdefault(split, set()).update(particulars(context))
        found.setdefault("calibration", set()).update(particulars(task.calibration()))
    assert len(seen) == 2 * len(SPLITS) * 4
    assert all(len(names) > 10 for names in found.values())
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


@given(st.integers(1, 60), st.integers(0, 2**32), st.sampled_from(SPLITS), st.integers(0, 50))
def test_a_needle_among_needles(n: int, seed: int, split: str, index: int) -> None:
    context = MultiKeyTask(n, seed=seed).context(split, index)
    needles = re.findall(f"^The secret code of ({UUID}) is ({UUID})\\.$", context.prefix, re.MULTILINE)
    assert len(needles) == len(dict(needles)) == n == context.n_places
    assert len(context.probes) == default_probes(n)
    for probe in context.probes:
        place = round(probe.depth * max(n - 1, 1))
        key, value = needles[place]
        assert (probe.question, probe.answer) == (f"Complete this sentence: The secret code of {key} is", value)
        assert not probe.references and probe.share(f"It is {probe.answer.upper()}.") == 1.0


def test_needles_are_not_those_of_kv_and_stand_where_they_stand_there() -> None:
    ours, kv = MultiKeyTask(30, probes=5).context("test", 0), KeyValueTask(30, probes=5).context("test", 0)
    assert [p.depth for p in ours.probes] == [p.depth for p in kv.probes]
    assert not {p.answer for p in ours.probes} & {p.answer for p in kv.probes}
    even = MultiKeyTask(30, probes=5, positions="even").context("test", 0)
    assert [p.depth for p in even.probes] == [0.0, 0.25, 0.5, 0.75, 1.0]


def solved(lines: list[str], value: str) -> list[str]:
    """The variables that have the value, as a machine finds them."""
    values: dict[str, str] = {}
    for line in lines:
        if line.startswith("VAR "):
            name, right = line.removeprefix("VAR ").split(" = ")
            values[name] = values[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
    return [name for name, own in values.items() if own == value]


@given(
    st.integers(1, 6), st.integers(0, 60), st.integers(0, 2**32), st.sampled_from(SPLITS),
    st.sampled_from(["jittered", "even"]),
)  # fmt: skip
def test_variables_have_the_value_asked_for(chains: int, more: int, seed: int, split: str, positions: str) -> None:
    n = 5 * chains + more
    context = VariableTask(n, probes=chains, positions=positions, seed=seed).context(split, 3)
    _, example, asked, body, end = context.prefix.split("\n\n")
    lines = body.split("\n")
    assert len(lines) == n and end == "" and len(context.probes) == chains and context.n_places == n // 5
    assert sum(line.startswith("VAR ") for line in lines) == 5 * chains
    assert all(re.fullmatch(r"The [a-z]+ [a-z]+ is [a-z]+\.", line) for line in lines if line[:3] != "VAR")
    values = set()
    for probe in context.probes:
        found = re.fullmatch(r"Question: Which variables have the value (\d{5})\?\nAnswer:", probe.question)
        assert found and solved(lines, found[1]) == list(probe.references) and len(probe.references) == 5
        values.add(found[1])
        assert probe.answer == ", ".join(probe.references)
        places = [i for n in probe.references for i, line in enumerate(lines) if line.startswith(f"VAR {n} ")]
        rounded = 0.5 / (n - 1) if positions == "even" else 0.0  # an even depth stands for the nearest place
        assert probe.depth == pytest.approx(sum(places) / 5 / (n - 1), abs=rounded + 1e-9)
        if positions == "jittered":
            assert all(5 * place // n in (k, k - 1, k + 1) for k, place in enumerate(places))  # a fifth each, nearly
    assert len(values) == chains
    shown = re.fullmatch(r"Question: Which variables have the value (\d{5})\?\nAnswer: (.*)", asked)
    assert shown and ", ".join(solved(example.split("\n"), shown[1])) == shown[2]
    assert not set(shown[2].split(", ")) & {name for probe in context.probes for name in probe.references}


def counted(text: str) -> Counter[str]:
    """Words of a numbered list."""
    found = re.findall(r"(\d+)\. ([a-z]{6})", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return Counter(word for _, word in found)


@given(st.integers(61, 1200), st.integers(0, 2**32), st.sampled_from(SPLITS))
def test_the_ten_common_words(n: int, seed: int, split: str) -> None:
    context = CommonWordsTask(n, seed=seed).context(split, 1)
    _, example, body, *_ = context.prefix.split("\n\n")
    counts = counted(body)
    (probe,) = context.probes
    common, other = (30, 3) if n >= 1000 else (6, 1)
    assert counts.total() == n
    assert {counts[word] for word in probe.references} == {common} and len(probe.references) == 10
    assert list(probe.references) == [word for word in counts if counts[word] == common]  # by their first places
    rest = sorted((counts[word] for word in counts if word not in probe.references), reverse=True)
    assert set(rest[:-1]) <= {other} and 0 < rest[-1] <= other
    listed, shown = example.split("\nQuestion: Which ten words occur most often in this list?\nAnswer: ")
    counts = counted(listed)
    assert [word for word in counts if counts[word] == 3] == shown.split(", ") and counts.total() == 40
    assert not set(counts) & set(counted(body))


@given(st.integers(74, 3000), st.integers(0, 2**32), st.sampled_from(SPLITS))
def test_the_three_frequent_words(n: int, seed: int, split: str) -> None:
    context = FrequentWordsTask(n, seed=seed).context(split, 1)
    _, body, *_ = context.prefix.split("\n\n")
    counts = Counter(body.split(" "))
    assert counts.total() == n
    dots = counts.pop("...")
    ranked = counts.most_common()
    (probe,) = context.probes
    assert [word for word, _ in ranked[:3]] == list(probe.references)
    assert all(a > b for (_, a), (_, b) in pairwise(ranked[:4]))
    assert [count for _, count in ranked] == [int(n * 6 / math.pi**2 / k**2) for k in range(2, len(ranked) + 2)]
    assert dots >= n * 6 / math.pi**2 - 1


def test_letters_are_alike_in_all_splits() -> None:
    """No split has only half of them at a place."""
    for name, wanted in (("vt", [20] * 5), ("cwe", [14, 5] * 3)):
        for split in SPLITS:
            contexts = [TASKS[name]().context(split, i) for i in range(30)]
            found = [word for context in contexts for probe in context.probes for word in probe.references]
            for place, least in enumerate(wanted):
                assert len({word[place] for word in found}) >= least, (split, place)


def test_shares_of_references() -> None:
    assert share("abcde, FGHIJ and KL", ["ABCDE", "fghij", "MNOPQ", "KL"]) == 0.75
    assert share("", ["a"]) == 0.0
    probe = Probe(0.5, "?", "ABCDE, FGHIJ, KLMNO", references=("ABCDE", "FGHIJ", "KLMNO"))
    assert probe.share("klmno; nothing else") == pytest.approx(1 / 3) and not probe.answered_by("klmno")
    assert probe.answered_by("KLMNO abcde\nFghij") and probe.share("KLMNO abcde\nFghij") == 1.0  # in any order
    assert Probe(0.5, "?", "Yes", ("yeah",)).share("oh yeah") == 1.0
    partly = Generation(0.5, "abcde fghij", probe.share("abcde fghij"))
    assert partly.share == pytest.approx(2 / 3) and not partly.correct
    assert Generation(0.5, "", 1.0).correct


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [400, 1500, 6000])
def test_contexts_fill_the_tokens_asked_for(name: str, tokens: int) -> None:
    task = TASKS[name](limit=TokenLimit(tokens, words))
    for split in SPLITS:
        context = task.context(split, 1)
        n = max(words(context.prefix + probe.question) for probe in context.probes)
        assert tokens - 12 <= n <= tokens  # a sentence more would be too many
        assert context == TASKS[name](limit=TokenLimit(tokens, words)).context(split, 1)


def test_tokens_that_hold_no_context() -> None:
    for name, message in (
        ("vt", r"^--context-tokens 60: a chain of 5 lines takes \d+ tokens already; ask for more$"),
        ("cwe", r"^--context-tokens 60: a list with 10 common words takes"),
        ("fwe", r"^--context-tokens 60: a text in which 3 words are the most frequent takes"),
        ("multikey", r"^--context-tokens 20: one pair alone takes"),
    ):
        with pytest.raises(LropeError, match=message):
            TASKS[name](limit=TokenLimit(int(re.findall(r"\d+", message)[0]), words)).context("test", 0)


def test_all_that_decides_the_prompts_is_in_a_studys_configuration() -> None:
    assert task_identity(parse("--task", "vt")) == {
        "name": "vt", "lines": None, "context_tokens": None, "probes": 1, "positions": "jittered", "seed": 0,
        "answer_prefix": "", "data": None,
    }  # fmt: skip
    assert task_identity(parse("--task", "multikey", "--keys", "9"))["probes"] == default_probes(9)
    assert "probes" not in task_identity(parse("--task", "cwe"))


@native
@pytest.mark.parametrize("name", TASKS)
def test_eval(name: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(path, capsys, "--task", name, *SMALL[name].split(), "--generate", "--uniform", "1.1")
    assert found["task"]["name"] == name
    assert found["probes"] == found["generated"]["probes"] == (6 if name == "multikey" else 2)
    assert found["base"]["log_probability"] != found["uniform 1.1"]["log_probability"]
    assert found["generated"]["base"]["accuracy"] == 0.0  # its weights are random


@native
@pytest.mark.parametrize("name", [*TASKS, "kv"])
def test_contexts_sized_by_a_models_tokens(name: str, path: Path) -> None:
    with Model(path, n_threads=1) as model:
        context = task_for(model, task_config(name, context_tokens=3000)).context("test", 1)
        sizes = [len(model.tokenize_prompt(context.prefix + probe.question)) for probe in context.probes]
    assert 2880 < max(sizes) <= 3000


@native
def test_what_is_written_is_scored_by_its_share(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that could write: half the words give half the score, in the table of written answers too."""
    with Model(path, n_threads=1) as model:
        task = CommonWordsTask(70)
        evaluator = TeacherForcedEvaluator(model, task)
        (probe,) = task.context("test", 0).probes
        half = list(model.tokenize("; ".join(probe.references[:5]).upper()))
        monkeypatch.setattr("lrope_search.evaluation.evaluator.write_answers", lambda *_: [half])
        (written,) = evaluator.generate((1.0,) * model.n_layer, "test", 0)
        assert written.share == 0.5 and not written.correct


@native
def test_a_table_of_shares(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(_: Any, factors: Any, split: str, index: int) -> tuple[Generation, ...]:
        return (Generation(0.5, "", 0.2 + 0.6 * index),)

    monkeypatch.setattr(TeacherForcedEvaluator, "generate", generate)
    found = evaluate(path, capsys, "--task", "vt", *sets("vt.lines=12"), "--generate")
    assert found["generated"]["base"]["accuracy"] == pytest.approx(0.5)
    assert found["base"]["accuracy"] == 0.0 and found["generated"]["agreement"] == 1.0  # none is wholly right
    command = ["eval", str(path), "--threads", "1", "--contexts", "2", "--task", "vt", *sets("vt.lines=12")]
    assert main([*command, "--generate"]) == 0
    shown = capsys.readouterr()
    assert "base: 50.0 %" in shown.out and "answers none of" not in shown.err


@native
def test_answers_of_several_parts_have_room(path: Path) -> None:
    with Model(path, n_threads=1) as model:
        for context, times in ((CommonWordsTask(70).context("test", 0), 3), (MultiKeyTask(3).context("test", 0), 0)):
            encoding = Encoder(model, "", Frame()).encode(context)
            n_answer = max(len(model.tokenize(probe.answer)) for probe in context.probes)
            assert encoding.n_new == max(MAX_NEW_TOKENS, times * n_answer)
            assert encoding.n_cells == encoding.n_tokens + encoding.n_new * len(context.probes)


@native
def test_a_search_with_needles_and_variables(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = tmp_path / "best.json"
    how = ("--threads", "1", "--max-evaluations", "3",
           *sets("validation_contexts=2", "test_contexts=2", "finalists=1", "search_contexts=2"),
           "--output", str(best))  # fmt: skip
    tasks = ("--task", "multikey", "--keys", "6", *sets("multikey.probes=3"), "--task", "vt", *sets("vt.lines=12"))
    assert main(["search", str(path), *tasks, *how]) == 0
    study = json.loads((tmp_path / "best.study" / "config.json").read_text())
    assert study["task"]["name"] == "multikey+vt" and study["task"]["parts"]["vt"]["weight"] == 1.0
    lines = map(json.loads, (tmp_path / "best.study" / "evaluations.jsonl").read_text().splitlines())
    turns = {(r["index"] % 2, r["task"]) for r in lines if r["split"] != "guard"}
    assert turns == {(0, "multikey"), (1, "vt")}
    assert main(["report", str(tmp_path / "best.study")]) == 0
    said = capsys.readouterr()
    assert "task multikey+vt" in said.out
    assert "answers none of 3 questions right, so that no gain can show" in said.err
    assert "writes none of 1 lists exactly, so that accuracy shows no gain without eval --generate" in said.err
