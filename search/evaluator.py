"""Scores layer factors on a task: shared prefix, teacher forcing, and real generation to check it by."""

from __future__ import annotations

import itertools
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

from .model import Logits, Model, Tokens
from .tasks import SPLITS, Task
from .types import Context, ContextScore, Probe, ProbeScore

_logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 100  # of a generated answer, as in the benchmark's scripts
_KEY = "\0"  # in a lead: stands for what is particular to the question


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
    def n_cells(self) -> int:
        """Cells of the KV cache that scoring or generating takes."""
        return self.n_tokens + MAX_NEW_TOKENS * len(self.questions)


class TeacherForcedEvaluator:
    """A model and a task.

    The prefix of a context is computed once; every probe continues a copy of it, as a sequence of its own in one
    KV cache. The gold answer is fed, so that one pass gives its log-probability and whether greedy decoding would
    write it.
    """

    def __init__(self, model: Model, task: Task, *, answer_prefix: str = "") -> None:
        """Hold ``model``, whose context is made here and whose lifetime stays the caller's concern.

        ``answer_prefix``: text that begins the answer and is given to the model as part of the prompt, for base
        models that would not answer in the wanted form by themselves.
        """
        self._model = model
        self._task = task
        self._answer_prefix = answer_prefix
        self._base = (1.0,) * model.n_layer
        self._encodings: dict[tuple[str, int], _Encoding] = {}
        self._n_seq = 0
        self._warned = False
        self._prefilled: tuple[tuple[float, ...], str, int] | None = None
        self._lead = self._calibrate(task.calibration())
        # From the task alone, never from what was asked for first: the size of a cache can sway rounding.
        first = (self._encode(split, i) for split in SPLITS for i in range(2) if self._has(split, i))
        self._reserve(max(first, key=lambda encoding: encoding.n_cells))

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

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors``.

        The log-probability is that of the value, after its lead; ``correct`` asks for the lead's tokens too.
        Raises `LropeError` if the factors are refused or the model computes something else than numbers.
        """
        start = time.perf_counter()
        encoding = self._encode(split, index)
        self._prefill(encoding, factors)
        log_p = np.empty(len(encoding.gold))
        hit = np.empty(len(encoding.gold), np.bool_)
        rows_of_tokens = self._model.decode(encoding.tokens, encoding.positions, encoding.sequences, encoding.wanted)
        for rows, logits in rows_of_tokens:
            log_p[rows], hit[rows] = _score(logits, encoding.gold[rows])
        if not np.isfinite(log_p).all():
            self._fail(factors)
        self._prefilled = (factors, split, index)
        owner, scored = encoding.owner, encoding.scored
        means = np.bincount(owner, log_p * scored) / np.bincount(owner, scored)
        correct = np.bincount(owner, ~hit) == 0
        depths = (probe.depth for probe in self._task.context(split, index).probes)
        scores = tuple(map(ProbeScore, depths, means.tolist(), correct.tolist()))
        return ContextScore(split, index, scores, encoding.n_tokens, time.perf_counter() - start)

    def generate(self, factors: tuple[float, ...], split: str, index: int) -> tuple[Generation, ...]:
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

    def _prefill(self, encoding: _Encoding, factors: tuple[float, ...]) -> None:
        """Compute the shared prefix under ``factors`` and give each probe's sequence a copy of it."""
        self._prefilled = None
        if encoding.length > self._model.n_ctx_train and not self._warned:
            self._warned = True
            message = "%s: a prompt of %d tokens, longer than the %d that the model was trained on"
            _logger.warning(message, self._model.path, encoding.length, self._model.n_ctx_train)
        if encoding.n_cells > self._model.n_ctx or len(encoding.questions) >= self._n_seq:
            self._reserve(encoding)
        self._model.clear()
        self._model.set_factors(factors)
        self._model.prefill(encoding.prefix)
        self._fork(encoding)

    def _fork(self, encoding: _Encoding) -> None:
        for sequence in range(1, len(encoding.questions) + 1):
            self._model.copy_sequence(0, sequence)

    def _reserve(self, largest: _Encoding) -> None:
        """Make room for contexts like ``largest``, and a tenth more: identifiers differ in their tokens."""
        self._n_seq = len(largest.questions) + 1
        self._model.reserve(largest.n_cells * 11 // 10, self._n_seq)

    def _write(self, encoding: _Encoding, probes: Sequence[Probe], factors: tuple[float, ...]) -> list[list[int]]:
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

    def _fail(self, factors: tuple[float, ...]) -> NoReturn:
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


def _score(logits: Logits, gold: Tokens) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the gold tokens' log-probabilities and whether they are the most likely; overwrites ``logits``.

    Row by row, so that a large vocabulary's row stays in the processor's cache.
    """
    log_p = np.empty(len(gold))
    hit = np.empty(len(gold), np.bool_)
    for i, (row, token) in enumerate(zip(logits, gold.tolist(), strict=True)):
        best = int(row.argmax())
        hit[i] = best == token
        np.subtract(row, row[best], out=row)
        own = float(row[token])
        np.exp(row, out=row)
        log_p[i] = own - math.log(row.sum(dtype=np.float64))
    return log_p, hit


def _contains(text: str, probe: Probe) -> bool:
    return probe.answered_by(text)
