"""The user's own questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..sample import SPLITS
from ..settings import setting
from .records import read_records, split_groups, too_few
from .settings import TaskConfig
from .sizing import Count
from .task import Context, Probe

DEFAULT_TEMPLATE = "{context}\n\nQuestion: {question}\nAnswer:"
_MARKS = ("{context}", "{question}")
_N_CALIBRATION = 8  # questions of the calibration context
_EXCERPT = 600  # characters of a context that stand in it, on either side of the answer


@dataclass(frozen=True, kw_only=True)
class JsonlConfig(TaskConfig):
    """Settings of `JsonlTask`."""

    section = "jsonl"
    summary = "your own questions"
    wants = "your file of questions"

    data: str | None = setting(
        None, "JSON lines {context, question, answer: text or list of texts, depth: 0 to 1, optional}; may be gzipped",
        metavar="FILE", unset="required", option=True,
    )  # fmt: skip
    prompt_template: str = setting(
        DEFAULT_TEMPLATE.replace("\n", "\\n"),
        "the prompt with {context} and {question}, \\n a new line",
        metavar="TEXT",
    )

    def make(self, count: Count | None = None) -> JsonlTask:
        """Return the task."""
        assert self.data is not None  # checked when these settings were made
        return JsonlTask(self.data, seed=self.seed, template=self.prompt_template.replace("\\n", "\n"))


@dataclass(frozen=True)
class Record:
    """A line of the file; ``start`` is the answer's place in the context, in characters, None if it is not there."""

    context: str
    question: str
    answers: tuple[str, ...]
    depth: float
    start: int | None


class JsonlTask:
    """Questions about contexts of the user's own, one ``{context, question, answer, depth}`` a line.

    ``answer`` is a text or a list of texts that are all right, of which teacher forcing feeds the first.
    ``depth`` (0 to 1) says where in the context the answer stands; without it, it is where the context first holds
    one of the answers. All lines with the same context become one context with several probes, so that they share
    its prefill; splits share no context.
    """

    name = "jsonl"

    def __init__(self, data: Path | str, *, seed: int = 0, template: str = DEFAULT_TEMPLATE) -> None:
        """Read ``data``, plain or gzipped; ``seed`` shuffles the contexts before they are cut into splits.

        ``template``: the prompt, in which ``{context}`` and ``{question}`` stand once each, in this order. Raises
        `LropeError` for another template, and for a malformed file.
        """
        self._data = data
        if [template.count(mark) for mark in _MARKS] != [1, 1] or template.index(_MARKS[1]) < template.index(_MARKS[0]):
            raise LropeError(
                f"jsonl.prompt_template {template!r}: must hold {{context}} once and {{question}} once, in this order"
            )
        self._head, rest = template.split(_MARKS[0])
        self._middle, self._tail = rest.split(_MARKS[1])
        records = read_records(data, "question with its context", _record)
        by_context: dict[str, list[Record]] = {}
        for record in records:
            by_context.setdefault(record.context, []).append(record)
        groups = [[sorted(group, key=lambda record: record.depth)] for group in by_context.values()]
        self._splits = split_groups(groups, seed, data)

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has."""
        return len(self._splits[split])

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` of ``split``; raises `LropeError` where the file has too few."""
        if index >= len(self._splits[split]):
            raise too_few(self._data, split, index, {s: len(self._splits[s]) for s in SPLITS})
        records = self._splits[split][index]
        return self._made(split, index, records[0].context, records)

    def calibration(self) -> Context:
        """Return a context of excerpts, each with the answer to a question of another search context."""
        records = [group[0] for group in self._splits["search"]][:_N_CALIBRATION]
        return self._made("calibration", 0, "\n\n".join(map(_excerpt, records)), records)

    def _made(self, split: str, index: int, text: str, records: Sequence[Record]) -> Context:
        probes = tuple(
            Probe(r.depth, f"{self._middle}{r.question}{self._tail}", r.answers[0], r.answers[1:]) for r in records
        )
        return Context(split, index, self._head + text, probes, lead=" ")


def _excerpt(record: Record) -> str:
    start = max((record.start or 0) - _EXCERPT, 0)
    return record.context[start : start + 2 * _EXCERPT + len(record.answers[0])]


def _record(where: str, value: Any) -> Record:
    context, question, answer = value["context"], value["question"], value["answer"]
    for name, text in (("context", context), ("question", question)):
        if not isinstance(text, str) or not text.strip():
            raise LropeError(f"{where}: its {name} is not text; give a string")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise LropeError(f"{where}: its answer is not text; give a string or a list of strings")
    answers = tuple(dict.fromkeys(a.strip() for a in answers))
    start, length = _find(context, answers)
    depth = value.get("depth")
    if depth is None:
        if start is None:
            raise LropeError(f'{where}: its context does not hold its answer; say where it stands with "depth", 0 to 1')
        depth = min(start / max(len(context) - length, 1), 1.0)
    elif isinstance(depth, bool) or not isinstance(depth, int | float) or not 0.0 <= depth <= 1.0:
        raise LropeError(f"{where}: its depth is {depth!r}; expected a number from 0 to 1")
    return Record(context, question, answers, float(depth), start)


def _find(context: str, answers: Sequence[str]) -> tuple[int | None, int]:
    """Return where ``context`` first holds one of ``answers``, and its length; the case counts only if it can."""
    for text, wordings in ((context, answers), (context.lower(), [answer.lower() for answer in answers])):
        found = [(start, len(wording)) for wording in wordings if (start := text.find(wording)) >= 0]
        if found:
            return min(found)
    return None, 0
