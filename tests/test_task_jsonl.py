"""The user's own questions: depths, shared contexts, templates, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.task_files import write

from lrope_gguf.errors import LropeError
from lrope_search.sample import SPLITS
from lrope_search.tasks import JsonlTask


def line(n: int, **changes: Any) -> dict[str, Any]:
    context = "".join(f"Item {n}-{i} costs {n}0{i}. " for i in range(10))
    return {"context": context, "question": f"What does {n}-5 cost?", "answer": f"{n}05"} | changes


def test_the_prompt_and_the_depth_of_a_found_answer(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "my.jsonl", [line(n) for n in range(10)]))
    context = task.context("test", 0)
    (probe,) = context.probes
    n = int(probe.question.split("does ")[1].split("-")[0])
    text = line(n)["context"]
    assert context.prefix + probe.question == f"{text}\n\nQuestion: What does {n}-5 cost?\nAnswer:"
    assert context.prefix == text
    assert probe.depth == pytest.approx(text.index(f"{n}05") / (len(text) - 3))
    assert (probe.answer, probe.aliases, probe.normalized) == (f"{n}05", (), False)


@given(st.integers(0, 50), st.integers(0, 50), st.sampled_from(["answer", ["ANSWER"], ["other", "Answer"]]))
def test_depth_is_where_the_answer_stands(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int, answer: Any
) -> None:
    lines = [{"context": f"{n}{'.' * before}answer{'.' * after}", "question": "q", "answer": answer} for n in range(3)]
    task = JsonlTask(write(tmp_path_factory.mktemp("my") / "my.jsonl", lines))
    depth = task.context("search", 0).probes[0].depth
    assert depth == pytest.approx((before + 1) / (before + 1 + after))


def test_lines_of_one_context_share_it(tmp_path: Path) -> None:
    lines = [line(n, question=f"{n}-{i}?", answer=[f"{n}0{i}", f"{n} 0 {i}"]) for i in (7, 1, 4) for n in range(10)]
    task = JsonlTask(write(tmp_path / "my.jsonl.gz", lines), seed=3)
    assert [task.size(split) for split in SPLITS] == [5, 2, 3]
    contexts = {s: [task.context(s, i) for i in range(task.size(s) or 0)] for s in SPLITS}
    prefixes = [context.prefix for own in contexts.values() for context in own]
    assert len(set(prefixes)) == 10
    for own in contexts.values():
        for context in own:
            assert [probe.question[-10:-8] for probe in context.probes] == ["1?", "4?", "7?"]  # by depth
            assert all(probe.aliases == (" ".join(probe.answer),) for probe in context.probes)
    assert contexts["test"] != [JsonlTask(tmp_path / "my.jsonl.gz", seed=4).context("test", i) for i in range(3)]
    calibration = task.calibration()
    for context in (*contexts["validation"], *contexts["test"]):
        assert not any(probe.answer in calibration.prefix.split() for probe in context.probes)
    assert len(calibration.probes) == 5
    assert all(f"costs {probe.answer}." in calibration.prefix for probe in calibration.probes)


def test_a_calibration_context_is_short(tmp_path: Path) -> None:
    lines = [line(n, context=f"{'x ' * 40_000} {n}05 {'y ' * 40_000}") for n in range(30)]
    calibration = JsonlTask(write(tmp_path / "my.jsonl", lines)).calibration()
    assert len(calibration.prefix) < 10_000
    assert all(probe.answer in calibration.prefix for probe in calibration.probes)


def test_templates(tmp_path: Path) -> None:
    data = write(tmp_path / "my.jsonl", [line(n) for n in range(9)])
    context = JsonlTask(data, template="Read {this}:\n{context}\n--\n{question} ->").context("search", 0)
    assert context.prefix.startswith("Read {this}:\nItem ")
    assert context.probes[0].question.startswith("\n--\nWhat does") and context.probes[0].question.endswith("cost? ->")
    for template in ("{context}", "{question}{context}", "{context}{context}{question}", ""):
        with pytest.raises(LropeError, match=r"jsonl\.prompt_template .*once"):
            JsonlTask(data, template=template)


def test_a_given_depth_needs_no_answer_in_the_context(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "my.jsonl", [line(n, answer="yes", depth=0.25) for n in range(9)]))
    assert task.context("search", 1).probes[0].depth == 0.25
    assert task.calibration().probes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("[", "not a question with its context"),
        ("7", "not a question with its context"),
        ({"context": "a", "question": "b"}, "it has no 'answer'"),
        (line(1, context=""), "its context is not text"),
        (line(1, question=None), "its question is not text"),
        (line(1, answer=5), "its answer is not text"),
        (line(1, answer=[]), "its answer is not text"),
        (line(1, answer=["105", " "]), "its answer is not text"),
        (line(1, answer="yes"), "does not hold its answer; say where it stands"),
        (line(1, depth=1.5), "its depth is 1.5"),
        (line(1, depth=True), "its depth is True"),
        (line(1, depth="0.5"), "its depth is '0.5'"),
        ('{"context": "a", "question": "b", "answer": "a", "depth": NaN}', "its depth is nan"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "my.jsonl", [line(0), bad, line(2)])
    with pytest.raises(LropeError, match=rf"my\.jsonl:2: .*{message}") as caught:
        JsonlTask(path)
    assert "\n" not in str(caught.value)
