"""Scores layer factors on a task: shared prefix, teacher forcing, and real generation to check it by."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

from ..sample import SPLITS
from ..scores import ContextScore, DivergenceScore, Factors, ProbeScore
from ..tasks.mix import AnyTask, parts_of
from ..tasks.task import Context, Task
from .batch import MAX_SEQUENCES, Part
from .divergence import Guard
from .encoding import Encoder, Encoding
from .generation import Generation, write_answers
from .lead import Frame, Lead, most_frequent_lead
from .logits import RowWorkers, gold_scores
from .memory import MemoryNeeded, memory_needed
from .model import FactorsRefusedError, Model
from .sample_answer import Sample

_logger = logging.getLogger(__name__)

SCORINGS = ("host", "device")
"""Who takes log-probabilities from logits: NumPy, or nodes of llama.cpp's graph where the model is computed."""


def default_scoring(model: Model) -> str:
    """Return the faster one of `SCORINGS`: on a CPU no logits travel, and NumPy is (docs/evaluator.md)."""
    return "device" if model.can_score and model.logits_on_gpu else "host"


class TeacherForcedEvaluator:
    """A model and a task.

    The prefix of a context is computed once; every probe continues a copy of it, as a sequence of its own in one
    KV cache. The gold answer is fed, so that one pass gives the value's log-probability and whether greedy decoding
    would write it.
    """

    def __init__(
        self,
        model: Model,
        task: AnyTask,
        *,
        answer_prefix: str | tuple[str, ...] = "",
        guard: Guard | None = None,
        pack_tokens: int = 0,
        scoring: str | None = None,
    ) -> None:
        """Hold ``model``, whose context is made here and whose lifetime stays the caller's concern.

        ``answer_prefix``: text that begins the answer and is given to the model as part of the prompt, for base
        models that would not answer in the wanted form by themselves; of a mix, for all tasks or one for each of them.
        ``guard`` measures the `divergence`.
        ``pack_tokens``: `evaluate_many` computes contexts together until they have so many tokens. A GPU that short
        contexts would starve wants some thousands; 0, one after the other, is best for a CPU.
        ``scoring``: one of `SCORINGS`; None: the faster one here. They agree but for rounding.

        Raises `LropeError` if the library cannot score on the device.
        """
        self._model = model
        self.scoring = scoring or default_scoring(model)
        if self.scoring == "device" and not model.can_score:
            raise LropeError(
                "scores were taken on the device so far, which this llama.cpp library cannot do; use one with all of "
                "lrope-gguf's patches"
            )
        self._task = task
        self._guard = guard
        self._pack_tokens = pack_tokens
        self._workers = RowWorkers(model.n_threads)
        self._base = (1.0,) * model.n_layer
        self._encodings: dict[tuple[str, int], Encoding] = {}
        self._samples: list[Sample] = []
        self._n_cells = self._n_seq = 0
        self._warned = False
        self._prefilled: tuple[Factors, str, int] | None = None
        parts = parts_of(task)
        prefixes = (answer_prefix,) * len(parts) if isinstance(answer_prefix, str) else answer_prefix
        self._encoders = [self._encoder(part, prefix) for part, prefix in zip(parts, prefixes, strict=True)]
        # From the task alone, never from what was asked for first: the size of a cache can sway rounding.
        first = [self._encode(split, i) for split in SPLITS for i in range(2 * len(parts)) if self._has(split, i)]
        self._longest = max(encoding.length for encoding in first)
        largest = max(first, key=lambda encoding: encoding.n_cells)
        n_packed = max(1, min(pack_tokens // largest.n_tokens, MAX_SEQUENCES // largest.n_seq))
        self._reserve(n_packed * largest.n_cells, n_packed * largest.n_seq)

    @property
    def lead(self) -> str:
        """What the base model writes before a value; ``{key}`` stands for what is particular to the question.

        Of a mix, that in its first task.
        """
        return self.leads[0]

    @property
    def leads(self) -> tuple[str, ...]:
        """The `lead` of each task of a mix."""
        return tuple(encoder.lead.for_key("{key}") for encoder in self._encoders)

    @property
    def batch_size(self) -> int:
        """Tokens that are computed at once."""
        return self._model.n_batch

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer, of the first contexts."""
        return self._longest

    @property
    def n_probes(self) -> tuple[int, int]:
        """Questions of the first search context, and how many it has room for; of several tasks where it has least."""
        contexts = [self._task.context("search", i) for i in range(len(parts_of(self._task)))]
        return min((len(context.probes), max(context.n_places, len(context.probes))) for context in contexts)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What the base model wrote to an easy question of each task."""
        return tuple(self._samples)

    @property
    def n_layer(self) -> int:
        """Number of layers of the model, the length of ``factors``."""
        return self._model.n_layer

    def encoding(self, split: str, index: int) -> Encoding:
        """Return a context in tokens."""
        return self._encode(split, index)

    def n_tokens(self, split: str, index: int) -> int:
        """Return how many tokens scoring this context computes."""
        return self._encode(split, index).n_tokens

    def n_tokens_alone(self, split: str, index: int) -> int:
        """Return how many tokens it would be with a whole prompt for each probe."""
        encoding = self._encode(split, index)
        return encoding.n_tokens + (len(encoding.questions) - 1) * len(encoding.prefix)

    def n_rows(self, split: str, index: int) -> int:
        """Return how many rows of logits scoring this context takes: one for each token of a value."""
        return len(self._encode(split, index).gold)

    def memory_needed(self) -> MemoryNeeded:
        """Predict the memory of the model, its context as it is now, and the guard's two contexts while it looks."""
        model = self._model
        needed_for = functools.partial(memory_needed, model.path, n_batch=model.n_batch, cache_types=model.cache_types)
        needed = needed_for(model.n_ctx, n_seq=self._n_seq, score_on_device=self.scoring == "device")
        if self._guard is None:
            return needed
        one = needed_for(self._guard.n_cells, n_seq=self._guard.n_seq)
        return replace(needed, kv_cache=needed.kv_cache + 2 * one.kv_cache, compute=needed.compute + 2 * one.compute)

    def check(self, factors: Factors) -> None:
        """Raise `LropeError` if llama.cpp refuses ``factors``, which `evaluate` would only score as the worst."""
        self._prefilled = None
        self._model.clear()
        self._model.set_factors(factors)

    def evaluate(self, factors: Factors, split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors``.

        Log-probability and ``correct`` are those of the value, after its lead. Where the model computes something else
        than numbers, or llama.cpp refuses the factors (then no token is computed), all log-probabilities are -inf: a
        search must go on, and its record must say so.
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

        Inf where llama.cpp refuses the factors. Raises `LropeError` if the evaluator has no guard, or the base model
        gives NaN.
        """
        if self._guard is None:
            raise LropeError("the evaluator was made without a guard; give it one to score ordinary text")
        return self._guard.score(factors)

    def _packs(self, jobs: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
        pack: list[tuple[str, int]] = []
        n_tokens = n_seq = 0
        most = 0 if self._model.scaling_moves else self._pack_tokens  # a longer neighbour would scale the others
        for job in jobs:
            encoding = self._encode(*job)
            n_tokens += encoding.n_tokens
            n_seq += encoding.n_seq
            if pack and (n_tokens > most or n_seq > MAX_SEQUENCES):
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
        try:
            laid_out = self._lay_out(encodings, factors)
        except FactorsRefusedError:
            return [self._refused(job, time.perf_counter() - start) for job in jobs]
        if self.scoring == "device":
            for rows, of_rows, hits in self._model.score(laid_out, gold):
                log_p[rows], hit[rows] = of_rows, hits
        else:
            for rows, logits in self._model.decode(*laid_out):
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
            scores.append(ContextScore(*job, probes, n, seconds * n, self._task.context(*job).task))
        return scores

    def _refused(self, job: tuple[str, int], seconds: float) -> ContextScore:
        """The worst score that there is."""
        probes = self._task.context(*job).probes
        return ContextScore(*job, tuple(ProbeScore(probe.depth, -math.inf, False) for probe in probes), 0, seconds)

    def _probe_scores(
        self, job: tuple[str, int], encoding: Encoding, log_p: NDArray[np.float64], hit: NDArray[np.bool_]
    ) -> tuple[ProbeScore, ...]:
        owner = encoding.owner
        means = np.bincount(owner, log_p) / np.bincount(owner)
        correct = np.bincount(owner, ~hit) == 0
        if not np.isfinite(log_p).all():  # masked, a NaN may still reach the other probes: it depends on the kernel
            means[:], correct[:] = -np.inf, False
        depths = (probe.depth for probe in self._task.context(*job).probes)
        return tuple(map(ProbeScore, depths, means.tolist(), correct.tolist()))

    def generate(self, factors: Factors, split: str, index: int) -> tuple[Generation, ...]:
        """Answer all probes of a context by greedy decoding, side by side.

        An answer ends at the model's end token, after 100 tokens (more where it has many parts), or as soon as it is
        right: later text cannot change its score. Uses the prefix again if the call before was `evaluate` with the same
        arguments. Raises `LropeError` if the factors are refused.
        """
        encoding = self._encode(split, index)
        if self._prefilled != (factors, split, index):
            self._prefill(encoding, factors)
        self._prefilled = None
        context = self._task.context(split, index)
        texts = map(self._model.text, write_answers(self._model, encoding, context.probes))
        return tuple(Generation(p.depth, t, p.share(t)) for p, t in zip(context.probes, texts, strict=True))

    def _lay_out(self, encodings: Sequence[Encoding], factors: Factors) -> Part:
        """Set ``factors`` and return the contexts as `Model.decode` takes them.

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
                for sequence in range(1, encoding.n_seq):
                    self._model.copy_sequence(first, first + sequence)
        tokens, positions, sequences, wanted, n_seq = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return tokens, positions, sequences, wanted, n_seq

    def _prefill(self, encoding: Encoding, factors: Factors) -> None:
        """Compute the prefix under ``factors``; whoever writes answers gives each probe a copy of it."""
        self._model.prefill([encoding.prefix], self._begin([encoding], factors))

    def _begin(self, encodings: Sequence[Encoding], factors: Factors) -> list[int]:
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

    def _reserve(self, n_cells: int, n_seq: int) -> None:
        """Make room for contexts that need so much, and a tenth more: identifiers differ in their tokens."""
        self._n_cells, self._n_seq = n_cells, n_seq
        self._model.reserve(n_cells * 11 // 10, n_seq)

    def _encoder(self, task: Task, answer_prefix: str) -> Encoder:
        """Return what puts a task's contexts into tokens, with the lead that the base model writes in an easy one."""
        easy = task.calibration()
        encoder = Encoder(self._model, answer_prefix, Frame.of([probe.question for probe in easy.probes]))
        encoder.lead = self._written_lead(encoder, easy) or self._likely_lead(easy, answer_prefix)
        return encoder

    def _written_lead(self, encoder: Encoder, easy: Context) -> Lead | None:
        """Return the lead that the base model writes most often in an easy context; None if there is none such."""
        encoding = encoder.encode(easy)
        self._prefill(encoding, self._base)
        written = write_answers(self._model, encoding, easy.probes)
        sample = easy.probes[0]
        self._samples.append(
            Sample(
                self._model.prompt_end(easy.prefix + sample.question),
                sample.answer,
                self._model.text(written[0]),
                self._model.is_chat,
                bool(sample.references),
            )
        )
        return most_frequent_lead(easy.probes, written, encoder.frame, self._model.text)

    def _likely_lead(self, easy: Context, answer_prefix: str) -> Lead:
        """Return the task's own lead, as the tokenizer will want it."""
        default = easy.lead.lstrip() if self._model.is_chat else easy.lead
        return Lead("" if answer_prefix else default, own_tokens=default != " ")

    def _has(self, split: str, index: int) -> bool:
        size = self._task.size(split)
        return size is None or index < size

    def _encode(self, split: str, index: int) -> Encoding:
        key = (split, index)
        if key not in self._encodings:
            encoder = self._encoders[index % len(self._encoders)]
            self._encodings[key] = encoder.encode(self._task.context(split, index))
        return self._encodings[key]
