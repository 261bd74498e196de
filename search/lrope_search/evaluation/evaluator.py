"""Scores layer factors on a task: shared prefix, teacher forcing, and real generation to check it by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrope_gguf.errors import LropeError

from ..sample import SPLITS
from ..scores import ContextScore, DivergenceScore, Factors, ProbeScore
from ..tasks.mix import AnyTask, parts_of
from ..tasks.task import Context, Task
from .batch import Part
from .divergence import Guard, GuardTexts
from .encoding import Encoder, Encoding
from .generation import Generation, write_answers
from .lead import Frame, Lead, most_frequent_lead
from .logits import RowWorkers, gold_scores
from .memory import MemoryNeeded, memory_needed
from .model import FactorsRefusedError, Model
from .parallel import Rates
from .sample_answer import Sample
from .tuning import Tuner

KEPT_BYTES = 32 << 20
"""Of contexts in tokens that an evaluator keeps: to make one takes as long as many an evaluation."""

SCORINGS = ("host", "device")
"""Who takes log-probabilities from logits: NumPy, or nodes of llama.cpp's graph where the model is computed."""


def default_scoring(model: Model) -> str:
    """Return the faster one of `SCORINGS`: on a CPU no logits travel, and NumPy is (research/evaluator.md)."""
    return "device" if model.can_score and model.logits_on_gpu else "host"


@dataclass(frozen=True)
class Facts:
    """What only a loaded model can say, and all workers must agree on."""

    leads: tuple[Lead, ...]
    """What the base model writes before a value, in each task."""
    guard_texts: GuardTexts | None
    """None where there is no guard."""
    memory: MemoryNeeded
    longest: int
    """Tokens of the longest prompt."""
    layers: tuple[int, ...]
    """Layers that rotate over the whole of it."""
    samples: tuple[Sample, ...]
    """The base model's answer to an easy question of each task."""
    n_probes: int
    """Questions of the first search context."""
    n_places: int
    """And how many it has room for."""
    batch_size: int
    """Tokens that are computed at once."""
    scoring: str
    """Who takes log-probabilities from logits."""
    n_tokens: int
    """That the first search context of each task takes, on average."""
    n_ctx_train: int
    """Tokens of the longest prompt that the model was trained on."""
    n_threads: int
    """Of this worker."""
    rates: Rates
    """Tokens per second of each division of the cores that was measured."""


class TeacherForcedEvaluator:
    """A model and a task.

    The prefix of a context is computed once; every probe continues a copy of it, as a sequence of its own in one
    KV cache. The gold answer is fed, so that one pass gives the value's log-probability and whether greedy decoding
    would write it.

    Attributes:
        guard: Measures the `divergence`; None: nothing does.
        scoring: One of `SCORINGS`.
        rates: Of the divisions of the cores, if they were measured on the model.
    """

    def __init__(
        self,
        model: Model,
        task: AnyTask,
        *,
        answer_prefix: str | tuple[str, ...] = "",
        guard: Guard | None = None,
        scoring: str | None = None,
        leads: Sequence[Lead] | None = None,
    ) -> None:
        """Hold ``model``, whose context is made here and whose lifetime stays the caller's concern.

        ``answer_prefix``: text that begins the answer and is given to the model as part of the prompt, for base
        models that would not answer in the wanted form by themselves; of a mix, for all tasks or one for each of them.
        ``scoring``: None is the faster one here; they agree but for rounding. ``leads``: what the base model writes
        before a value, a task each; None: it is let write. Raises `LropeError`: the library cannot score on the device.
        """
        self._model, self._tune = model, Tuner(model.path)
        self.scoring = scoring or default_scoring(model)
        if self.scoring == "device" and not model.can_score:
            raise LropeError(
                "the study's scores were computed on the device, which this llama.cpp library cannot do; use one "
                "with all of lrope-gguf's patches"
            )
        self._task, self.guard = task, guard
        self.rates: Rates = {}
        self._workers = RowWorkers(model.n_threads)
        self._base = (1.0,) * model.n_layer
        self._encodings: dict[tuple[str, int], Encoding] = {}
        self._samples: list[Sample] = []
        self._n_cells = self._n_seq = 0
        self._prefilled: tuple[Factors, str, int] | None = None
        parts = parts_of(task)
        prefixes = (answer_prefix,) * len(parts) if isinstance(answer_prefix, str) else answer_prefix
        given = (None,) * len(parts) if leads is None else leads
        self._encoders = [self._encoder(*of_part) for of_part in zip(parts, prefixes, given, strict=True)]
        # From the task alone, never from what was asked for first: the size of a cache can sway rounding.
        sizes = {split: task.size(split) or 2 * len(parts) for split in SPLITS}
        first = [self._encode(split, i) for split in SPLITS for i in range(min(sizes[split], 2 * len(parts)))]
        self._longest = max(encoding.length for encoding in first)
        largest = max(first, key=lambda encoding: encoding.n_cells)
        self._reserve(largest.n_cells, largest.n_seq)

    @property
    def leads(self) -> tuple[Lead, ...]:
        """What the base model writes before a value, in each task."""
        return tuple(encoder.lead for encoder in self._encoders)

    @property
    def n_layer(self) -> int:
        """Number of layers of the model, the length of ``factors``."""
        return self._model.n_layer

    def use_threads(self, n_threads: int) -> None:
        """Compute with so many CPU threads from now on."""
        self._model.set_threads(n_threads)
        self._workers = RowWorkers(n_threads)

    def encoding(self, split: str, index: int) -> Encoding:
        """Return a context in tokens."""
        return self._encode(split, index)

    def n_tokens(self, split: str, index: int) -> int:
        """Return how many tokens scoring this context computes."""
        return self._encode(split, index).n_tokens

    def facts(self) -> Facts:
        """Return what all workers must agree on, and what to say of the model before a search."""
        first = [self._task.context("search", i) for i in range(len(self._encoders))]
        n_probes, n_places = min((len(one.probes), max(one.n_places, len(one.probes))) for one in first)
        return Facts(
            leads=self.leads,
            guard_texts=None if self.guard is None else self.guard.texts,
            memory=self.memory_needed(),
            longest=self._longest,
            layers=self._model.rope_layers(self._longest),
            samples=tuple(self._samples),
            n_probes=n_probes,
            n_places=n_places,
            batch_size=self._model.n_batch,
            scoring=self.scoring,
            n_tokens=sum(self.n_tokens("search", i) for i in range(len(first))) // len(first),
            n_ctx_train=self._model.n_ctx_train,
            n_threads=self._model.n_threads,
            rates=self.rates,
        )

    def memory_needed(self) -> MemoryNeeded:
        """Predict the memory of the model, its context as it is, the guard's two while it looks, and what is kept."""
        with self._model.without_weights() as empty:
            needed = memory_needed(empty, self._model.n_ctx, self._n_seq, score_on_device=self.scoring == "device")
            needed = replace(needed, compute=needed.compute + KEPT_BYTES)
            if self.guard is None:
                return needed
            one = memory_needed(empty, self.guard.n_cells, self.guard.n_seq)
        return replace(needed, kv_cache=needed.kv_cache + 2 * one.kv_cache, compute=needed.compute + 2 * one.compute)

    def check(self, factors: Factors) -> None:
        """Raise `LropeError` if llama.cpp refuses ``factors``, which `evaluate` would only score as the worst."""
        self._prefilled = None
        self._model.clear()
        self._tune(self._model, factors)

    def evaluate(self, factors: Factors, split: str, index: int) -> ContextScore:
        """Score context ``index`` of ``split`` under ``factors``.

        Log-probability and ``correct`` are those of the value, after its lead. Where the model computes something else
        than numbers, or llama.cpp refuses the factors (then no token is computed), all log-probabilities are -inf: a
        search must go on, and its record must say so.
        """
        start = time.perf_counter()
        encoding = self._encode(split, index)
        n_tokens = encoding.n_tokens
        log_p = np.full(len(encoding.gold), -np.inf)
        hit = np.zeros(len(encoding.gold), np.bool_)
        try:
            laid_out = self._lay_out(encoding, factors)
        except FactorsRefusedError:
            n_tokens = 0
        else:
            if self.scoring == "device":
                for rows, of_rows, hits in self._model.score(laid_out, encoding.gold):
                    log_p[rows], hit[rows] = of_rows, hits
            else:
                for rows, logits in self._model.decode(*laid_out):
                    log_p[rows], hit[rows] = gold_scores(logits, encoding.gold[rows], self._workers)
            if np.isfinite(log_p).all():
                self._prefilled = (factors, split, index)
            else:  # a NaN outlives the token that it belongs to, and may have reached any other probe
                self._model.clear(data=True)
                log_p[:], hit[:] = -np.inf, False
        owner = encoding.owner
        means = (np.bincount(owner, log_p) / np.bincount(owner)).tolist()
        correct = (np.bincount(owner, ~hit) == 0).tolist()
        probes = tuple(map(ProbeScore, encoding.depths, means, correct))
        return ContextScore(split, index, probes, n_tokens, time.perf_counter() - start, encoding.task)

    def divergence(self, factors: Factors) -> DivergenceScore:
        """Hold ``factors`` against the base model on ordinary text: see `Guard`.

        Inf where llama.cpp refuses the factors. Raises `LropeError` if the evaluator has no guard, or the base model
        gives NaN.
        """
        if self.guard is None:
            raise LropeError("the evaluator was made without a guard; give it one to score ordinary text")
        return self.guard.score(factors)

    def generate(self, factors: Factors, split: str, index: int) -> tuple[Generation, ...]:
        """Answer all probes of a context by greedy decoding, side by side, as `write_answers` says.

        Uses the prefix again if the call before was `evaluate` with the same arguments. Raises `LropeError` if the
        factors are refused.
        """
        encoding = self._encode(split, index)
        if self._prefilled != (factors, split, index):
            self._prefill(encoding, factors)
        self._prefilled = None
        context = self._task.context(split, index)
        texts = map(self._model.text, write_answers(self._model, encoding, context.probes))
        return tuple(Generation(p.depth, t, p.share(t)) for p, t in zip(context.probes, texts, strict=True))

    def _lay_out(self, encoding: Encoding, factors: Factors) -> Part:
        """Set ``factors`` and return the context as `Model.decode` takes it.

        Prefix and probes go in one row, so that only the last batch is not full; the prefix's tokens belong to the
        sequences of all probes.
        """
        self._begin(encoding, factors)
        head, tail = encoding.head(), encoding.tail()
        if self._model.shares_tokens:
            both: Part = tuple(map(np.concatenate, zip(head, tail, strict=True)))  # type: ignore[assignment]
            return both
        self._model.prefill(encoding.prefix)
        for sequence in range(1, encoding.n_seq):
            self._model.copy_sequence(0, sequence)
        return tail

    def _prefill(self, encoding: Encoding, factors: Factors) -> None:
        """Compute the prefix under ``factors``; whoever writes answers gives each probe a copy of it."""
        self._begin(encoding, factors)
        self._model.prefill(encoding.prefix)

    def _begin(self, encoding: Encoding, factors: Factors) -> None:
        """Make room for a context and set the factors."""
        self._prefilled = None
        if encoding.n_cells > self._model.n_ctx or encoding.n_seq > self._n_seq:
            self._reserve(max(encoding.n_cells, self._n_cells), max(encoding.n_seq, self._n_seq))
        self._model.clear()
        self._tune(self._model, factors)

    def _reserve(self, n_cells: int, n_seq: int) -> None:
        """Make room for contexts that need so much, and a tenth more: identifiers differ in their tokens."""
        self._n_cells, self._n_seq = n_cells, n_seq
        self._model.reserve(n_cells * 11 // 10, n_seq)

    def _encoder(self, task: Task, answer_prefix: str, lead: Lead | None) -> Encoder:
        """Return what puts a task's contexts into tokens; ``lead``: None lets the base model write one."""
        easy = task.calibration()
        encoder = Encoder(self._model, answer_prefix, Frame.of([probe.question for probe in easy.probes]))
        likely = easy.lead.lstrip() if self._model.is_chat else easy.lead  # the task's, as the tokenizer will want it
        default = Lead("" if answer_prefix else likely, own_tokens=likely != " ")
        encoder.lead = lead or self._written_lead(encoder, easy) or default
        return encoder

    def _written_lead(self, encoder: Encoder, easy: Context) -> Lead | None:
        """Return the lead that the base model writes most often in an easy context; None if there is none such."""
        encoding = encoder.encode(easy)
        self._prefill(encoding, self._base)
        written = write_answers(self._model, encoding, easy.probes)
        sample, text = easy.probes[0], self._model.text(written[0])
        end, chat = self._model.prompt_end(easy.prefix + sample.question), self._model.is_chat
        self._samples.append(Sample(end, sample.answer, text, chat, bool(sample.references)))
        return most_frequent_lead(easy.probes, written, encoder.frame, self._model.text)

    def _encode(self, split: str, index: int) -> Encoding:
        """Return a context in tokens; those used last are kept, up to `KEPT_BYTES`."""
        key = (split, index)
        encoding = self._encodings.pop(key, None)
        if encoding is None:
            encoder = self._encoders[index % len(self._encoders)]
            encoding = encoder.encode(self._task.context(split, index))
            room = KEPT_BYTES - encoding.n_bytes
            while self._encodings and sum(kept.n_bytes for kept in self._encodings.values()) > room:
                del self._encodings[next(iter(self._encodings))]
        self._encodings[key] = encoding
        return encoding
