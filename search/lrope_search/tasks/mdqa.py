"""Multi-document question answering."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lrope_gguf.errors import LropeError

from ..sample import SPLITS, default_probes
from ..settings import setting
from .answers import normalize
from .records import read_records, split_groups, too_few
from .settings import AS_NEEDED, POSITIONS, SizedTaskConfig, positions_setting, probes_setting
from .sizing import TokenLimit
from .task import Context, Probe, check_probes, places

DEFAULT_DOCUMENTS = 20
"""Of a context."""
_N_CALIBRATION = 12  # documents of the calibration context
_CONTEXTS = 4  # of the smallest split, at the least, unless probes are given
_COMMON = 0.1  # an alias that stands in more than this share of passages is no answer that one could look for
_KEPT = 64  # contexts: to make one is slow
_SAMPLE = 200  # passages that are looked through to know
_TASK = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


@dataclass(frozen=True)
class Passage:
    """A document of the prompt; ``words`` is its title and text, normalized."""

    title: str
    text: str
    words: str

    def holds(self, aliases: Iterable[str]) -> bool:
        """Whether it contains one of the normalized ``aliases``."""
        return any(alias in self.words for alias in aliases)


@dataclass(frozen=True)
class Record:
    """A question with its answers, the passage that holds one, and the others that a retriever found."""

    question: str
    answers: tuple[str, ...]
    aliases: tuple[str, ...]
    """The answers, normalized."""
    gold: Passage
    others: tuple[Passage, ...]

    def may_stand_beside(self, other: Record) -> bool:
        """Whether neither question could be answered from the other's passage, and the passages differ."""
        alike = self.gold.text == other.gold.text
        return not (alike or self.gold.holds(other.aliases) or other.gold.holds(self.aliases))


class MultiDocumentTask:
    """Multi-document question answering of "Lost in the Middle" (Liu et al., arXiv 2307.03172, section 2).

    Prompt and scoring are the benchmark's, and so is the data. One thing differs: the benchmark asks one question a
    context and moves its document from place to place; here a context holds the documents of several questions, in
    all parts of it, so that all questions share its prefix. Documents are numbered by their places in the prompt.

    The other documents are what the retriever found for these questions, by turns from the best, where the file has it
    (``nq-open-*_total_documents_gold_at_*.jsonl[.gz]``), else passages of other questions of the same split
    (``nq-open-oracle.jsonl[.gz]``). No document but a question's own holds one of its aliases, whatever case,
    punctuation and articles. A question whose alias stands in more than a tenth of all passages ("2") is left out.

    Splits share no question, no passage and no page (title) of a gold passage; each question is asked once.
    """

    name = "mdqa"
    least = 1

    def __init__(
        self,
        data: Path | str,
        n_documents: int | None = None,
        *,
        probes: int | None = None,
        positions: str = POSITIONS[0],
        seed: int = 0,
        limit: TokenLimit | None = None,
    ) -> None:
        """Read ``data``, one ``{question, answers, ctxs: [{title, text, isgold}, ...]}`` a line.

        ``probes``: None gives fewer than `default_probes` where there are few questions. ``limit``, in place of
        ``n_documents``: as many documents as fit. Raises `LropeError`: wrong numbers, a malformed file, or too few
        passages for one context.
        """
        self._data, self._seed, self._positions, self._limit = data, seed, positions, limit
        self._n_documents = DEFAULT_DOCUMENTS if n_documents is None else n_documents
        check_probes(probes)
        if limit is None and probes is not None and self._n_documents < probes:
            raise LropeError(
                f"mdqa.documents {self._n_documents}: too few for {probes} probes; ask for at least {probes} documents"
            )
        records = read_records(data, "question with documents", _record)
        splits = split_groups(_by_page(records), seed, data)
        if probes is None:
            room = self._n_documents if limit is None else _fitting(records, limit)
            probes = min(default_probes(room), max(1, min(map(len, splits.values())) // _CONTEXTS))
        self._owners = _owners(splits)
        self._passages: dict[str, list[Passage]] = {}
        self._contexts: dict[str, list[Sequence[Record]]] = {}
        for split, own in splits.items():
            gold = {record.gold.text: record.gold for record in own}
            others = {p.text: p for record in own for p in record.others if self._owners[p.text] == split}
            self._passages[split] = list((others | gold).values())
            self._contexts[split] = _packed(_selective(own, list(gold.values())), probes)
            if limit is None and len(self._passages[split]) < self._n_documents:
                raise LropeError(
                    f"{data}: {len(self._passages[split])} passages are for {split}, fewer than mdqa.documents "
                    f"{self._n_documents}; ask for fewer or give more data"
                )
        self._calibration = splits["search"]
        self._made = lru_cache(maxsize=_KEPT)(self._make)

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has."""
        return len(self._contexts[split])

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` of ``split``. Raises `LropeError`: too few questions, passages or tokens for it."""
        if index >= len(self._contexts[split]):
            raise too_few(self._data, split, index, {s: len(self._contexts[s]) for s in SPLITS})
        return self._made(split, index)

    def calibration(self) -> Context:
        """Return a context of at most twelve search questions and their documents alone."""
        chosen: list[Record] = []
        for record in self._calibration:
            if len(chosen) < _N_CALIBRATION and all(record.may_stand_beside(other) for other in chosen):
                chosen.append(record)
        return self._with("calibration", 0, chosen, [], "even")

    def _make(self, split: str, index: int) -> Context:
        asked, where = self._contexts[split][index], f"{split} context {index}"
        most = None if self._limit is not None else self._n_documents - len(asked)
        others = list(itertools.islice(self._distractors(split, index, asked), most))
        if self._limit is None:
            if (n := self._n_documents - len(asked)) > len(others):
                raise LropeError(
                    f"{self._data}: {where} has only {len(others)} documents that answer none of its questions, {n} "
                    "are wanted; ask for fewer mdqa.documents"
                )
            return self._with(split, index, asked, others)

        def prompt(n_documents: int) -> str:
            context = self._with(split, index, asked, others[: n_documents - len(asked)])
            return context.prefix + max((probe.question for probe in context.probes), key=len)

        least, most = len(asked), len(asked) + len(others)
        n_documents = self._limit.fitting(
            *(prompt, least, most),
            lambda n: (
                f"the documents of {least} questions alone take {n} in {where}; ask for more tokens or fewer "
                "mdqa.probes"
            ),
            lambda n: (
                f"the {most} documents there are for {where} take only {n}; ask for fewer tokens or give more data"
            ),
        )
        return self._with(split, index, asked, others[: n_documents - len(asked)])

    def _with(
        self, split: str, index: int, asked: Sequence[Record], others: Sequence[Passage], positions: str = ""
    ) -> Context:
        """Put the documents of ``asked`` among ``others``, at the places where questions are to stand."""
        n_places, rest = len(asked) + len(others), iter(others)
        where = places(split, index, n_places, len(asked), self._seed, positions or self._positions)
        gold = {place: record.gold for (place, _), record in zip(where, asked, strict=True)}
        passages = [gold[place] if place in gold else next(rest) for place in range(n_places)]
        documents = "\n".join(f"Document [{i}](Title: {p.title}) {p.text}" for i, p in enumerate(passages, 1))
        probes = tuple(_probe(depth, record) for (_, depth), record in zip(where, asked, strict=True))
        return Context(split, index, f"{_TASK}\n\n{documents}\n\n", probes, lead=" ", n_places=n_places)

    def _distractors(self, split: str, index: int, asked: Sequence[Record]) -> Iterator[Passage]:
        """Yield the documents that may stand beside those of ``asked``, the most fitting first."""
        generator = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(SPLITS.index(split), index)))
        passages = self._passages[split]
        shuffled = (passages[i] for i in generator.permutation(len(passages)))
        aliases = [alias for record in asked for alias in record.aliases]
        seen = {record.gold.text for record in asked}
        by_turns = itertools.chain.from_iterable(itertools.zip_longest(*(record.others for record in asked)))
        for passage in itertools.chain(filter(None, by_turns), shuffled):
            if passage.text not in seen and self._owners[passage.text] == split and not passage.holds(aliases):
                seen.add(passage.text)
                yield passage


def _fitting(records: Sequence[Record], limit: TokenLimit) -> int:
    """Return how many documents fit, carefully estimated: the questions of a context are needed before it is made."""
    few = records[:_N_CALIBRATION]
    tokens = limit.count("\n".join(f"Document [1](Title: {r.gold.title}) {r.gold.text}" for r in few))
    return max(1, limit.tokens * len(few) // (2 * tokens))


def _probe(depth: float, record: Record) -> Probe:
    """Ask for the first alias that the gold document words so: a model can copy it."""
    text = record.gold.text
    answer = next((a for a in record.answers if a in text), None)
    answer = answer or next((a for a in record.answers if a.lower() in text.lower()), record.answers[0])
    aliases = tuple(a for a in record.answers if a != answer)
    return Probe(depth, f"Question: {record.question}\nAnswer:", answer, aliases, normalized=True)


def _packed(records: Sequence[Record], n: int) -> list[Sequence[Record]]:
    """Return groups of ``n`` records that may stand in one context, each record in one group at most."""
    groups: list[Sequence[Record]] = []
    waiting = deque(records)
    while len(waiting) >= n:
        chosen: list[Record] = []
        passed: list[Record] = []
        while waiting and len(chosen) < n:
            record = waiting.popleft()
            fits = all(record.may_stand_beside(other) for other in chosen)
            (chosen if fits else passed).append(record)
        if len(chosen) == n:
            groups.append(chosen)
            waiting.extendleft(reversed(passed))
        else:  # nothing fits the first of them
            waiting = deque([*chosen[1:], *passed])
    return groups


def _selective(records: Sequence[Record], passages: Sequence[Passage]) -> list[Record]:
    """Return the records whose aliases stand in few of ``passages``."""
    sample = passages[:_SAMPLE]
    most = 1 + _COMMON * len(sample)  # its own, and few more
    return [r for r in records if r.aliases and sum(passage.holds(r.aliases) for passage in sample) <= most]


def _owners(splits: dict[str, list[Record]]) -> dict[str, str]:
    """Return the one split that may use a passage's text: a gold one's, else the first whose questions found it."""
    owner = {record.gold.text: split for split, own in splits.items() for record in own}
    for split, own in splits.items():
        for record in own:
            for passage in record.others:
                owner.setdefault(passage.text, split)
    return owner


def _by_page(records: Sequence[Record]) -> list[list[Record]]:
    """Group the records that have a question, a gold passage or its page in common."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for record in records:
        page = "title " + record.gold.title
        for name in ("text " + record.gold.text, "question " + record.question):
            parent[root(name)] = root(page)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(root("title " + record.gold.title), []).append(record)
    return list(groups.values())


def _record(where: str, value: Any) -> Record:
    question, answers, documents = value["question"], value["answers"], value["ctxs"]
    if not isinstance(question, str) or not question.strip():
        raise LropeError(f"{where}: its question is not text; give a string")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise LropeError(f"{where}: its answers are not a list of texts; give one string or more")
    passages = [(_passage(where, document), document.get("isgold", False)) for document in documents]
    gold = [passage for passage, is_gold in passages if is_gold is True]
    if len(gold) != 1:
        raise LropeError(f'{where}: {len(gold)} of its ctxs are gold; expected one with "isgold": true')
    aliases = tuple(dict.fromkeys(filter(None, map(normalize, answers))))
    others = tuple(passage for passage, is_gold in passages if is_gold is not True)
    return Record(question, tuple(dict.fromkeys(answers)), aliases, gold[0], others)


def _passage(where: str, document: Any) -> Passage:
    title, text = document["title"], document["text"]
    if not isinstance(title, str) or not isinstance(text, str) or not text.strip():
        raise LropeError(f"{where}: a document's title or text is not text; give strings")
    return Passage(title, text, normalize(f"{title} {text}"))


@dataclass(frozen=True, kw_only=True)
class MultiDocumentConfig(SizedTaskConfig):
    """Settings of `MultiDocumentTask`."""

    section = "mdqa"
    summary = "multi-document question answering"
    wants = "an nq-open file"
    size = "documents"
    task = MultiDocumentTask

    data: str | None = setting(
        None, "nq-open-*.jsonl[.gz] of the benchmark", metavar="FILE", unset="required", option=True
    )
    documents: int | None = setting(None, "documents per context", metavar="N", least=1, unset=str(DEFAULT_DOCUMENTS))
    probes: int | None = probes_setting("questions per context", AS_NEEDED)
    positions: str = positions_setting()
