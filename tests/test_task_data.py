"""Tasks of data files, mdqa and jsonl: prompts, no leaks between documents or splits, depths, sizes, bad files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.task_files import words, write

from lrope_gguf.errors import LropeError
from lrope_search.sample import SPLITS
from lrope_search.tasks import JsonlTask, MultiDocumentTask, TokenLimit, mdqa
from lrope_search.tasks.answers import holds
from lrope_search.tasks.task import Context


def qa_line(n: int, others: int = 0, **changes: Any) -> dict[str, Any]:
    """A question with one gold passage, at a place of its own, and ``others`` that its retriever found."""
    gold = {"title": f"Page {n}", "text": f"Thing number{n}x is called name{n}x here.", "isgold": True}
    found = [
        {"title": f"Other {n} {i}", "text": f"Of thing number{n}x nothing {i} is known.", "isgold": False}
        for i in range(others)
    ]
    documents = [*found[: n % 3], gold, *found[n % 3 :]]
    question, answers = f"what is thing number{n}x", [f"Name{n}x", f"name {n} X"]
    return {"question": question, "answers": answers, "ctxs": documents} | changes


def documents_of(context: Context) -> list[tuple[str, str]]:
    found = re.findall(r"^Document \[(\d+)\]\(Title: (.*?)\) (.*)$", context.prefix, re.M)
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1))
    return [(title, text) for _, title, text in found]


def contexts_of(task: MultiDocumentTask, split: str) -> list[Context]:
    return [task.context(split, i) for i in range(task.size(split) or 0)]


def test_the_prompt_is_the_benchmarks(tmp_path: Path) -> None:
    task = MultiDocumentTask(write(tmp_path / "qa.jsonl", [qa_line(n) for n in range(9)]), 2, probes=2)
    context = task.context("test", 0)
    first, second = (re.findall(r"\d+", probe.question)[0] for probe in context.probes)
    assert context.prefix + context.probes[1].question == (
        "Write a high-quality answer for the given question using only the provided search results "
        "(some of which might be irrelevant).\n\n"
        f"Document [1](Title: Page {first}) Thing number{first}x is called name{first}x here.\n"
        f"Document [2](Title: Page {second}) Thing number{second}x is called name{second}x here.\n\n"
        f"Question: what is thing number{second}x\nAnswer:"
    )
    assert context.probes[0].answer == f"Name{first}x"
    assert context.probes[0].answered_by(f"It is the NAME {first} x.")


@pytest.mark.parametrize("others", [0, 9])
@pytest.mark.parametrize("name", ["qa.jsonl", "qa.jsonl.gz"])
@pytest.mark.parametrize("positions", ["even", "jittered"])
def test_gold_documents_stand_at_their_depths(tmp_path: Path, others: int, name: str, positions: str) -> None:
    data = write(tmp_path / name, [qa_line(n, others) for n in range(80)])
    task = MultiDocumentTask(data, 15, probes=4, positions=positions, seed=1)
    seen = set()
    for split in SPLITS:
        for context in contexts_of(task, split):
            documents = documents_of(context)
            assert len(documents) == 15
            depths = tuple(probe.depth for probe in context.probes)
            seen.add(depths)
            if positions == "even":
                assert depths == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
            strata = zip(range(0, 60, 15), depths, range(15, 75, 15), strict=True)
            assert all(low // 4 <= round(depth * 14) < high // 4 for low, depth, high in strata)
            for probe in context.probes:
                place = round(probe.depth * 14)
                holding = [i for i, (_, text) in enumerate(documents) if probe.answered_by(text)]
                assert holding == [place]
    assert (len(seen) > 1) == (positions == "jittered")


def test_contexts_are_kept_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = MultiDocumentTask._make
    monkeypatch.setattr(mdqa, "_KEPT", 2)
    monkeypatch.setattr(MultiDocumentTask, "_make", lambda self, s, i: made.append(i) or make(self, s, i))
    task = MultiDocumentTask(write(tmp_path / "qa.jsonl", [qa_line(n) for n in range(40)]), 4, probes=2)
    for index in (0, 1, 0, 2, 0, 1):  # whichever was used longest ago goes
        task.context("search", index)
    assert made == [0, 1, 2, 1]


SPEC = st.tuples(  # page, passage, numbers of aliases, first of what the retriever found
    st.integers(0, 25), st.integers(0, 30), st.lists(st.integers(0, 31), min_size=1, max_size=2), st.integers(0, 40)
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(SPEC, min_size=25, max_size=60), st.integers(0, 2**32))
def test_no_document_answers_another_question_and_no_split_sees_anothers(
    tmp_path_factory: pytest.TempPathFactory, spec: list[tuple[int, int, list[int], int]], seed: int
) -> None:
    """Pages, passages and finds that questions share, passages that hold others' aliases and not their own."""
    lines = []
    for n, (page, passage, aliases, found) in enumerate(spec):
        text = f"Passage {passage} holds alias{passage}x and alias{passage + 1}x."
        gold = {"title": f"Page {page}", "text": text, "isgold": True}
        others = [{"title": f"Found by {n}", "text": f"Found {i}: alias{i % 8}x."} for i in range(found, found + 5)]
        answers = [f"Alias{alias}x" for alias in aliases]
        lines.append({"question": f"question {n}", "answers": answers, "ctxs": [*others, gold]})
    path = write(tmp_path_factory.mktemp("qa") / "qa.jsonl", lines)
    try:
        task = MultiDocumentTask(path, 4, probes=2, seed=seed)
        contexts = {split: contexts_of(task, split) for split in SPLITS}
    except LropeError as error:
        assert re.search("passages are for|search, validation and test need|only .* documents", str(error))
        return
    seen: dict[str, set[str]] = {}
    for split, own in contexts.items():
        questions = [probe.question for context in own for probe in context.probes]
        assert len(questions) == len(set(questions))
        for context in own:
            documents = documents_of(context)
            assert len({text for _, text in documents}) == len(documents) == 4
            for probe in context.probes:
                place, wordings = round(probe.depth * 3), (probe.answer, *probe.aliases)
                others = documents[:place] + documents[place + 1 :]
                assert not any(holds(" ".join(d), wordings, normalized=True) for d in others)
        gold_pages = {documents_of(c)[round(p.depth * 3)][0] for c in own for p in c.probes}
        seen[split] = {*questions, *(text for c in own for _, text in documents_of(c)), *gold_pages}
    assert not seen["search"] & seen["validation"]
    assert not seen["search"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    shown = {text for _, text in documents_of(task.calibration())}
    assert shown and not shown & (seen["validation"] | seen["test"])


def test_the_seed_decides(tmp_path: Path) -> None:
    data = write(tmp_path / "qa.jsonl", [qa_line(n) for n in range(60)])
    late = MultiDocumentTask(data, 6, probes=3, seed=1)
    late.context("test", 1)
    again = MultiDocumentTask(data, 6, probes=3, seed=1)
    assert late.context("test", 0) == again.context("test", 0)
    assert late.calibration() == again.calibration()
    assert late.context("test", 0) != MultiDocumentTask(data, 6, probes=3, seed=2).context("test", 0)


def test_the_retrievers_finds_come_first_by_turns(tmp_path: Path) -> None:
    data = write(tmp_path / "qa.jsonl", [qa_line(n, 9) for n in range(40)])
    context = MultiDocumentTask(data, 9, probes=3).context("search", 0)
    asked = [re.findall(r"\d+", probe.question)[0] for probe in context.probes]
    others = [title for title, _ in documents_of(context) if title.startswith("Other")]
    assert sorted(others) == sorted(f"Other {n} {i}" for n in asked for i in range(2))


def test_a_question_whose_alias_is_everywhere_is_left_out(tmp_path: Path) -> None:
    lines = [qa_line(n) for n in range(40)]
    lines[7] = qa_line(7, answers=["is", "name7x"])
    lines[8] = qa_line(8, answers=["The"])
    task = MultiDocumentTask(write(tmp_path / "qa.jsonl", lines), 4, probes=2)
    questions = {probe.question for split in SPLITS for c in contexts_of(task, split) for probe in c.probes}
    assert len(questions) >= 34
    assert not any(re.search("number[78]x", question) for question in questions)


def test_the_answer_is_worded_as_in_its_document(tmp_path: Path) -> None:
    lines = [qa_line(n, answers=[f"elsewhere {n}", f"NAME{n}X", f"name{n}x"]) for n in range(9)]
    task = MultiDocumentTask(write(tmp_path / "qa.jsonl", lines), 2, probes=2)
    probe = task.context("search", 0).probes[0]
    n = re.findall(r"\d+", probe.question)[0]
    assert (probe.answer, probe.aliases) == (f"name{n}x", (f"elsewhere {n}", f"NAME{n}X"))


@pytest.mark.parametrize("tokens", [100, 150, 237])
def test_as_many_documents_as_fit_into_the_tokens(tmp_path: Path, tokens: int) -> None:
    lines = [qa_line(n) for n in range(90)]
    for n, item in enumerate(lines):
        item["ctxs"][0]["text"] += " more" * (n % 7)
    data = write(tmp_path / "qa.jsonl", lines)
    task = MultiDocumentTask(data, probes=3, limit=TokenLimit(tokens, words))
    for index in range(3):
        context = task.context("test", index)
        sizes = [words(context.prefix + probe.question) for probe in context.probes]
        n = len(documents_of(context))
        more = MultiDocumentTask(data, n + 1, probes=3).context("test", index)
        assert max(sizes) <= tokens < max(words(more.prefix + probe.question) for probe in more.probes)
        assert context == MultiDocumentTask(data, n, probes=3).context("test", index)


def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    data = write(tmp_path / "qa.jsonl", [qa_line(n) for n in range(30)])
    for documents, probes, message in (
        (10, 11, r"mdqa\.documents 10: too few for 11 probes"),
        (None, 0, "probes 0"),
        (7, 2, r"qa\.jsonl: 6 passages are for validation, fewer than mdqa\.documents 7"),
    ):
        with pytest.raises(LropeError, match=message):
            MultiDocumentTask(data, documents, probes=probes)
    for tokens, message in ((30, "the documents of 2 questions alone take"), (900, "the 9 documents .* take only")):
        with pytest.raises(LropeError, match=f"--context-tokens {tokens}: {message}"):
            MultiDocumentTask(data, probes=2, limit=TokenLimit(tokens, words)).context("test", 0)
    task = MultiDocumentTask(data, 5, probes=3)
    assert [task.size(split) for split in SPLITS] == [5, 2, 3]
    with pytest.raises(LropeError, match="4 test contexts asked for, but of its 10 contexts 3 are for test"):
        task.context("test", 3)


def own_line(n: int, **changes: Any) -> dict[str, Any]:
    context = "".join(f"Item {n}-{i} costs {n}0{i}. " for i in range(10))
    return {"context": context, "question": f"What does {n}-5 cost?", "answer": f"{n}05"} | changes


def test_own_questions_prompt_and_the_depth_of_a_found_answer(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "my.jsonl", [own_line(n) for n in range(10)]))
    context = task.context("test", 0)
    (probe,) = context.probes
    n = int(probe.question.split("does ")[1].split("-")[0])
    text = own_line(n)["context"]
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
    lines = [own_line(n, question=f"{n}-{i}?", answer=[f"{n}0{i}", f"{n} 0 {i}"]) for i in (7, 1, 4) for n in range(10)]
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
    lines = [own_line(n, context=f"{'x ' * 40_000} {n}05 {'y ' * 40_000}") for n in range(30)]
    calibration = JsonlTask(write(tmp_path / "my.jsonl", lines)).calibration()
    assert len(calibration.prefix) < 10_000
    assert all(probe.answer in calibration.prefix for probe in calibration.probes)


def test_templates(tmp_path: Path) -> None:
    data = write(tmp_path / "my.jsonl", [own_line(n) for n in range(9)])
    context = JsonlTask(data, template="Read {this}:\n{context}\n--\n{question} ->").context("search", 0)
    assert context.prefix.startswith("Read {this}:\nItem ")
    assert context.probes[0].question.startswith("\n--\nWhat does") and context.probes[0].question.endswith("cost? ->")
    for template in ("{context}", "{question}{context}", "{context}{context}{question}", ""):
        with pytest.raises(LropeError, match=r"jsonl\.prompt_template .*once"):
            JsonlTask(data, template=template)


def test_a_given_depth_needs_no_answer_in_the_context(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "my.jsonl", [own_line(n, answer="yes", depth=0.25) for n in range(9)]))
    assert task.context("search", 1).probes[0].depth == 0.25
    assert task.calibration().probes


QA_MISTAKES: list[tuple[Any, str]] = [
    ("{", "not a question with documents"),
    ({"question": "q", "answers": ["a"]}, "not a question with documents .it has no 'ctxs'"),
    (qa_line(1, question=" "), "its question is not text"),
    (qa_line(1, question=3), "its question is not text"),
    (qa_line(1, answers="name1x"), "its answers are not a list of texts"),
    (qa_line(1, answers=[]), "its answers are not a list of texts"),
    (qa_line(1, answers=["a", ""]), "its answers are not a list of texts"),
    (qa_line(1, ctxs=[]), "0 of its ctxs are gold"),
    (qa_line(1, ctxs=["a"]), "not a question with documents"),
    (qa_line(1, ctxs=[{"title": "a", "text": "b"}]), "0 of its ctxs are gold"),
    (qa_line(1, ctxs=[{"title": "a", "text": "b", "isgold": True}] * 2), "2 of its ctxs are gold"),
    (qa_line(1, ctxs=[{"title": None, "text": "b", "isgold": True}]), "title or text is not text"),
    (qa_line(1, ctxs=[{"text": "b", "isgold": True}]), "it has no 'title'"),
]
OWN_MISTAKES: list[tuple[Any, str]] = [
    ("[", "not a question with its context"),
    ("7", "not a question with its context"),
    ({"context": "a", "question": "b"}, "it has no 'answer'"),
    (own_line(1, context=""), "its context is not text"),
    (own_line(1, question=None), "its question is not text"),
    (own_line(1, answer=5), "its answer is not text"),
    (own_line(1, answer=[]), "its answer is not text"),
    (own_line(1, answer=["105", " "]), "its answer is not text"),
    (own_line(1, answer="yes"), "does not hold its answer; say where it stands"),
    (own_line(1, depth=1.5), "its depth is 1.5"),
    (own_line(1, depth=True), "its depth is True"),
    (own_line(1, depth="0.5"), "its depth is '0.5'"),
    ('{"context": "a", "question": "b", "answer": "a", "depth": NaN}', "its depth is nan"),
]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [*(("qa", *mistake) for mistake in QA_MISTAKES), *(("own", *mistake) for mistake in OWN_MISTAKES)],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, bad: Any, message: str) -> None:
    line = qa_line if name == "qa" else own_line
    path = write(tmp_path / f"{name}.jsonl", [line(0), bad, line(2)])
    with pytest.raises(LropeError, match=rf"{name}\.jsonl:2: .*{message}") as caught:
        MultiDocumentTask(path, 2, probes=2) if name == "qa" else JsonlTask(path)
    assert "\n" not in str(caught.value)
