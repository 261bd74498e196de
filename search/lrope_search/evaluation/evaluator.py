"""Scores layer factors on a task: shared prefix, teacher forcing, and real generation to check it by."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

from ..scores import ContextScore, DivergenceScore, Factors, ProbeScore
from ..tasks import SPLITS, Task
from ..tasks.task import Context, Probe
from .divergence import Guard
from .logits import RowWorkers, gold_scores
from .memory import MemoryNeeded, memory_needed
from .model import MAX_SEQUENCES, Model, Rows, Tokens

_logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 100  # of a generated answer, as in the benchmark's scripts
_KEY = "\0"  # in a lead: stands for what is particular to the question

_Part = tuple[Tokens, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]
"""Of what is decoded: tokens, positions, first sequences, which logits are wanted, numbers of sequences."""


@dataclass(frozen=True)
class Generation:
    """A generated answer; ``correct`` if it contains the gold one, whatever the case (the benchmark's score)."""

    depth: float
    text: str
    correct: bool


@dataclass(frozen=True)
class Lead:
    """What a model writes before the value it is asked for.

    Example: ``The value corresponding to the key "..." is "``.
    """

    template: str
    """A NUL stands for what is particular to the question, such as its key."""
    own_tokens: bool
    """Whether the value begins with a token of its own (not so: a blank and the value's first letters in one)."""


@dataclass(frozen=True)
class _Encoding:
    """A context in tokens.

    `tokens` and the arrays of its shape hold all probes' questions and gold answers (lead and value) in one row; an
    answer's last token predicts nothing, so it is not among them. `gold`, `owner` and `scored` have one entry for each
    `wanted` position: the token that it must predict, its probe, and whether that token belongs to the value.
    """

    prefix: Tokens
    questions: tuple[Tokens, ...]
    tokens: Tokens
    positions: NDArray[np.int64]
    sequences: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    gold: Tokens
    owner: NDArray[np.int64]
    scored: NDArray[np.bool_]

    @property
    def n_tokens(self) -> int:
        return len(self.prefix) + len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return int(self.positions.max()) + 2

    @property
    def n_seq(self) -> int:
        """Sequences: one for the prefix, one for each probe."""
        return 1 + len(self.questions)

    @property
    def n_cells(self) -> int:
        """Cells of the KV cache that scoring or generating takes."""
        return self.n_tokens + MAX_NEW_TOKENS * len(self.questions)

    def head(self, first: int) -> _Part:
        """The prefix, shared by all sequences from ``first`` on."""
        n = len(self.prefix)
        return self.prefix, np.arange(n), np.full(n, first), np.zeros(n, np.bool_), np.full(n, self.n_seq)

    def tail(self, first: int) -> _Part:
        """The probes, each of a sequence after ``first``."""
        return self.tokens, self.positions, self.sequences + first, self.wanted, np.ones(len(self.tokens), np.int64)


class TeacherForcedEvaluator:
    """A model and a task.

    The prefix of a context is computed once; every probe continues a copy of it, as a sequence of its own in one
    KV cache. The gold answer is fed, so that one pass gives its log-probability and whether greedy decoding would
    write it.
    """

    def __init__(
        self, model: Model, task: Task, *, answer_prefix: str = "", guard: Guard | None = None, pack_tokens: int = 0
    ) -> None:
        """Hold ``model``, whose context is made here and whose lifetime stays the caller's concern.

        ``answer_prefix``: text that begins the answer and is given to the model as part of the prompt, for base
        models that would not answer in the wanted form by themselves. ``guard`` measures the `divergence`.
        ``pack_tokens``: `evaluate_many` computes contexts together until they have so many tokens. A GPU that short
        contexts would starve wants some thousands; 0, one after the other, is best for a CPU.
        """
        self._model = model
        self._task = task
        self._answer_prefix = answer_prefix
        self._guard = guard
        self._pack_tokens = pack_tokens
        self._workers = RowWorkers(model.n_threads)
        self._base = (1.0,) * model.n_layer
        self._encodings: dict[tuple[str, int], _Encoding] = {}
        self._n_cells = self._n_seq = 0
        self._warned = False
        self._prefilled: tuple[Factors, str, int] | None = None
        self._lead = self._calibrate(task.calibration())
        # From the task alone, never from what was asked for first: the size of a cache can sway rounding.
        first = (self._encode(split, i) for split in SPLITS for i in range(2) if self._has(split, i))
        largest = max(first, key=lambda encoding: encoding.n_cells)
        n_packed = max(1, min(pack_tokens // largest.n_tokens, MAX_SEQUENCES // largest.n_seq))
        self._reserve(n_packed * largest.n_cells, n_packed * largest.n_seq)

    @property
    def lead(self) -> str:
        """What the base model writes before a value; ``{key}`` stands for what is particular to the question."""
        return self._lead.template.replace(_KEY, "{key}")

    @property
    def n_layer(self) -> int:
        """Number of layers of the model, the length of ``factors``."""
        return self._model.n_layer

    def n_tokens(self, split: str, index: int) -> int:
        """Return how many tokens scoring this context computes."""
        return self._encode(split, index).n_tokens

    def n_tokens_alone(self, split: str, index: int) -> int:
        """Return how many tokens it would be with a whole prompt for each probe."""
        encoding = self._encode(split, index)
        return encoding.n_tokens + (len(encoding.questions) - 1) * len(encoding.prefix)

    def n_rows(self, split: str, index: int) -> int:
        """Return how many rows of logits scoring this context takes: one for each token of an answer."""
        return len(self._encode(split, index).gold)

    def memory_needed(self) -> MemoryNeeded:
        """Predict the memory of the model, its context as it is now, and the guard's two contexts while it looks."""
        model = self._model
        needed = memory_needed(model.path, model.n_ctx, n_seq=self._n_seq, n_batch=model.n_batch)
        if self._guard is None:
            return needed
        one = memory_needed(model.path, self._guard.n_cells, n_seq=self._guard.n_seq, n_batch=model.n_batch)
        return replace(needed, kv_cache=needed.kv_cache + 2 * one.kv_cache, compute=needed.compute + 2 * one.compute)

    def evaluate(self, factors: Factors, split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors``.

        The log-probability is that of the value, after its lead; ``correct`` asks for the lead's tokens too. Where
        the model computes something else than numbers, all log-probabilities are -inf.
        Raises `LropeError` if the factors are refused.
        """
        return self.evaluate_many(factors, [(split, index)])[0]

    def evaluate_many(self, factors: Factors, jobs: Sequence[tuple[str, int]]) -> list[ContextScore]:
        """Score contexts, each given as split and index, as `evaluate` does; in their order.

        Consecutive contexts share batches as far as ``pack_tokens`` allows. That changes scores by rounding, so that
        whoever wants the same bits again must ask for the same contexts in the same order. Seconds are shared by
        tokens.
        """
        return [score for pack in self._packs(jobs) for score in self._evaluate_pack(factors, pack)]

    def divergence(self, factors: Factors) -> DivergenceScore:
        """Hold ``factors`` against the base model on ordinary text: see `Guard`.

        Raises `LropeError` if the evaluator has no guard, the factors are refused, or the base model gives NaN.
        """
        if self._guard is None:
            raise LropeError("the evaluator was made without a guard; give it one to score ordinary text")
        return self._guard.score(factors)

    def _packs(self, jobs: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
        pack: list[tuple[str, int]] = []
        n_tokens = n_seq = 0
        for job in jobs:
            encoding = self._encode(*job)
            n_tokens += encoding.n_tokens
            n_seq += encoding.n_seq
            if pack and (n_tokens > self._pack_tokens or n_seq > MAX_SEQUENCES):
                yield pack
                pack, n_tokens, n_seq = [], encoding.n_tokens, encoding.n_seq
            pack.append(job)
        if pack:
            yield pack

    def _evaluate_pack(self, factors: Factors, jobs: Sequence[tuple[str, int]]) -> list[ContextScore]:
        start = time.perf_counter()
        encodings = [self._encode(*job) for job in jobs]
        gold = np.concatenate([encoding.gold for encoding in encodings])
        log_p = np.empty(len(gold))
        hit = np.empty(len(gold), np.bool_)
        for rows, logits in self._decode(encodings, factors):
            log_p[rows], hit[rows] = gold_scores(logits, gold[rows], self._workers)
        broken = not np.isfinite(log_p).all()
        if broken:
            self._model.clear(data=True)  # a NaN outlives the token that it belongs to
            if len(jobs) > 1:  # and reaches its neighbours
                return [score for job in jobs for score in self._evaluate_pack(factors, [job])]
        elif len(jobs) == 1:
            self._prefilled = (factors, *jobs[0])
        seconds = (time.perf_counter() - start) / sum(encoding.n_tokens for encoding in encodings)
        ends = np.cumsum([len(encoding.gold) for encoding in encodings])[:-1]
        scores = []
        for job, encoding, own, right in zip(jobs, encodings, np.split(log_p, ends), np.split(hit, ends), strict=True):
            n, probes = encoding.n_tokens, self._probe_scores(job, encoding, own, right)
            scores.append(ContextScore(*job, probes, n, seconds * n))
        return scores

    def _probe_scores(
        self, job: tuple[str, int], encoding: _Encoding, log_p: NDArray[np.float64], hit: NDArray[np.bool_]
    ) -> tuple[ProbeScore, ...]:
        owner, scored = encoding.owner, encoding.scored
        means = np.bincount(owner, log_p * scored) / np.bincount(owner, scored)
        correct = np.bincount(owner, ~hit) == 0
        if not np.isfinite(log_p).all():  # masked, a NaN may still reach the other probes: it depends on the kernel
            means[:], correct[:] = -np.inf, False
        depths = (probe.depth for probe in self._task.context(*job).probes)
        return tuple(map(ProbeScore, depths, means.tolist(), correct.tolist()))

    def generate(self, factors: Factors, split: str, index: int) -> tuple[Generation, ...]:
        """Answer all probes of a context by greedy decoding, side by side.

        An answer ends at the model's end token, after 100 tokens, or as soon as it is right: later text cannot
        change its score. Uses the prefix again if the call before was `evaluate` with the same arguments.
        """
        encoding = self._encode(split, index)
        if self._prefilled != (factors, split, index):
            self._prefill(encoding, factors)
        context = self._task.context(split, index)
        written = self._write(encoding, context.probes, factors)
        texts = (self._model.text(tokens) for tokens in written)
        return tuple(Generation(p.depth, t, _contains(t, p)) for p, t in zip(context.probes, texts, strict=True))

    def _decode(self, encodings: Sequence[_Encoding], factors: Factors) -> Iterator[Rows]:
        """Compute the contexts under ``factors`` and yield the logits of the wanted positions.

        Prefixes and probes go in one row, so that only the last batch is not full; a prefix's tokens belong to the
        sequences of all its probes.
        """
        firsts = self._begin(encodings, factors)
        both = list(zip(encodings, firsts, strict=True))
        parts = [encoding.tail(first) for encoding, first in both]
        if self._model.shares_tokens:
            parts = [encoding.head(first) for encoding, first in both] + parts
        else:
            self._model.prefill([encoding.prefix for encoding in encodings], firsts)
            for encoding, first in both:
                self._fork(encoding, first)
        tokens, positions, sequences, wanted, n_seq = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return self._model.decode(tokens, positions, sequences, wanted, n_seq)

    def _prefill(self, encoding: _Encoding, factors: Factors) -> None:
        """Compute the prefix under ``factors``; whoever writes answers gives each probe a copy of it."""
        self._model.prefill([encoding.prefix], self._begin([encoding], factors))

    def _begin(self, encodings: Sequence[_Encoding], factors: Factors) -> list[int]:
        """Make room and set the factors. Returns each context's first sequence; those of its probes follow."""
        self._prefilled = None
        longest = max(encoding.length for encoding in encodings)
        if longest > self._model.n_ctx_train and not self._warned:
            self._warned = True
            message = "%s: a prompt of %d tokens, longer than the %d that the model was trained on"
            _logger.warning(message, self._model.path, longest, self._model.n_ctx_train)
        n_cells = sum(encoding.n_cells for encoding in encodings)
        n_seq = sum(encoding.n_seq for encoding in encodings)
        if n_cells > self._model.n_ctx or n_seq > self._n_seq:
            self._reserve(max(n_cells, self._n_cells), max(n_seq, self._n_seq))
        self._model.clear()
        self._model.set_factors(factors)
        return list(itertools.accumulate((encoding.n_seq for encoding in encodings[:-1]), initial=0))

    def _fork(self, encoding: _Encoding, first: int = 0) -> None:
        for sequence in range(1, encoding.n_seq):
            self._model.copy_sequence(first, first + sequence)

    def _reserve(self, n_cells: int, n_seq: int) -> None:
        """Make room for contexts that need so much, and a tenth more: identifiers differ in their tokens."""
        self._n_cells, self._n_seq = n_cells, n_seq
        self._model.reserve(n_cells * 11 // 10, n_seq)

    def _write(self, encoding: _Encoding, probes: Sequence[Probe], factors: Factors) -> list[list[int]]:
        """Return the tokens that greedy decoding writes after each question; the prefix is there already."""
        self._prefilled = None
        self._fork(encoding)
        written: list[list[int]] = [[] for _ in probes]
        lengths = np.array([len(question) for question in encoding.questions])
        tokens = np.concatenate(encoding.questions)
        positions = len(encoding.prefix) + np.concatenate([np.arange(n) for n in lengths])
        sequences = np.repeat(np.arange(1, len(probes) + 1), lengths)
        wanted = np.zeros(len(tokens), np.bool_)
        wanted[np.cumsum(lengths) - 1] = True
        for _ in range(MAX_NEW_TOKENS):
            chosen = np.empty(np.count_nonzero(wanted), np.int32)
            for rows, logits in self._model.decode(tokens, positions, sequences, wanted):
                chosen[rows] = logits.argmax(axis=1)
                if np.isnan(logits.max(axis=1)).any():
                    self._fail(factors)
            tokens, positions, sequences = chosen, positions[wanted] + 1, sequences[wanted]
            going = np.ones(len(tokens), np.bool_)
            for i, (token, sequence) in enumerate(zip(tokens.tolist(), sequences.tolist(), strict=True)):
                answer = written[sequence - 1]
                if self._model.is_end(token):
                    going[i] = False
                    continue
                answer.append(token)
                going[i] = not _contains(self._model.text(answer), probes[sequence - 1])
            tokens, positions, sequences = tokens[going], positions[going], sequences[going]
            if not len(tokens):
                break
            wanted = np.ones(len(tokens), np.bool_)
        return written

    def _calibrate(self, context: Context) -> Lead:
        """Return the lead that the base model writes most often in an easy context, the context's own if none is."""
        self._frame = _frame([probe.question for probe in context.probes])
        encoding = self._encode_context(context, Lead("", own_tokens=True))
        self._prefill(encoding, self._base)
        written = self._write(encoding, context.probes, self._base)
        leads: Counter[Lead] = Counter()
        for probe, tokens in zip(context.probes, written, strict=True):
            text = self._model.text(tokens)
            wordings = (probe.answer.lower(), *(alias.lower() for alias in probe.aliases))
            starts = [start for wording in wordings if (start := text.lower().find(wording)) >= 0]
            if starts:
                lead = text[: min(starts)]
                own = any(self._model.text(tokens[:n]) == lead for n in range(len(tokens)))
                key = self._key(probe)
                leads[Lead(lead.replace(key, _KEY) if key else lead, own)] += 1
        # of free answers each may begin with words of its own, which would fit no other question
        for common, n in leads.most_common(1):
            if 2 * n >= leads.total():
                return common
        default = context.lead.lstrip() if self._model.is_chat else context.lead
        return Lead("" if self._answer_prefix else default, own_tokens=default != " ")

    def _has(self, split: str, index: int) -> bool:
        size = self._task.size(split)
        return size is None or index < size

    def _encode(self, split: str, index: int) -> _Encoding:
        key = (split, index)
        if key not in self._encodings:
            self._encodings[key] = self._encode_context(self._task.context(split, index), self._lead)
        return self._encodings[key]

    def _encode_context(self, context: Context, lead: Lead) -> _Encoding:
        prompts, leads, answers = [], [], []
        for probe in context.probes:
            lead_text = lead.template.replace(_KEY, self._key(probe))
            question = context.prefix + probe.question
            prompt, n_lead, answer = self._encode_probe(question, lead_text, probe.answer, lead.own_tokens)
            prompts.append(prompt)
            leads.append(n_lead)
            answers.append(answer)
        n_shared = min(_common_prefix(prompts), *(len(prompt) - 1 for prompt in prompts))  # each asks for a logit
        questions = tuple(prompt[n_shared:] for prompt in prompts)
        n_tail = np.array([len(q) + len(a) - 1 for q, a in zip(questions, answers, strict=True)])
        n_answer = np.array([len(answer) for answer in answers])
        place = np.concatenate([np.arange(n) for n in n_tail])
        return _Encoding(
            prefix=prompts[0][:n_shared],
            questions=questions,
            tokens=np.concatenate([np.append(q, a[:-1]) for q, a in zip(questions, answers, strict=True)]),
            positions=n_shared + place,
            sequences=np.repeat(np.arange(1, len(prompts) + 1), n_tail),
            wanted=place >= np.repeat(n_tail - n_answer, n_tail),
            gold=np.concatenate(answers),
            owner=np.repeat(np.arange(len(prompts)), n_answer),
            scored=np.concatenate([np.arange(n) >= n_lead for n, n_lead in zip(n_answer, leads, strict=True)]),
        )

    def _key(self, probe: Probe) -> str:
        n_head, n_tail = self._frame
        return probe.question[n_head : len(probe.question) - n_tail]

    def _encode_probe(self, question: str, lead: str, value: str, own_tokens: bool) -> tuple[Tokens, int, Tokens]:
        """Return the prompt's tokens, the number of the lead's, and those of lead and value."""
        prompt = self._model.tokenize_prompt(question, self._answer_prefix)

        def follow(text: str) -> Tokens:
            tokens = self._model.tokenize_prompt(question, self._answer_prefix + text)
            n = len(prompt)  # if prompt and text merge into one token, the model cannot write it
            return tokens[n:] if np.array_equal(tokens[:n], prompt) else self._model.tokenize(text)

        before, answer = follow(lead), follow(lead + value)
        n_lead = _common_prefix([before, answer])
        if own_tokens and n_lead < len(before):
            n_lead, answer = len(before), np.append(before, self._model.tokenize(value))
        return prompt, n_lead, answer

    def _fail(self, factors: Factors) -> NoReturn:
        self._model.clear(data=True)
        listed = ",".join(f"{factor:g}" for factor in factors)
        raise LropeError(f"{self._model.path}: its logits are NaN with factors {listed}; the file may be damaged")


def _frame(questions: Sequence[str]) -> tuple[int, int]:
    """Return the lengths of the words that all questions begin and end with; what is between them is particular."""
    head = re.sub(r"\w+$", "", _common_start(questions))  # whole words: keys may begin alike
    tail = re.sub(r"\w+$", "", _common_start([question[::-1] for question in questions]))
    return len(head), len(tail)


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    n = sum(itertools.takewhile(bool, (a == b for a, b in zip(first, last, strict=False))))
    return first[:n]


def _common_prefix(texts: Sequence[Tokens]) -> int:
    """Length of the longest common prefix of token sequences."""
    n = min(map(len, texts))
    same = np.all([text[:n] == texts[0][:n] for text in texts], axis=0)
    return n if same.all() else int(same.argmin())


def _contains(text: str, probe: Probe) -> bool:
    return probe.answered_by(text)
