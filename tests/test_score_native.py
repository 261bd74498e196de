"""Scores that the device computes, against log-softmax in float64 of the logits that the same model returns."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import arch_models, llama_direct
from support.rope_models import GEMMA3, LLAMA, MROPE, QWEN3, TOKENS, TinyModel, by_name, file_of

pytestmark = pytest.mark.native

# logits capped, scaled, of a mixture; outputs in another order than the batch's where layers keep a state
ARCHITECTURES = ("gemma2", "command-r", "granite", "qwen2moe", "mamba", "jamba", "lfm2", "falcon-h1")
N_CTX = 256


@dataclass
class Tokens:
    """A batch: tokens of several sequences in turn, of which some are to have outputs."""

    tokens: list[int]
    positions: list[int]
    sequences: list[int]
    wanted: NDArray[np.bool_]

    @classmethod
    def packed(cls, n: int, n_vocab: int, n_seq: int, seed: int, share: float = 0.5) -> Tokens:
        rng = np.random.default_rng(seed)
        sequences = [int(s) for s in rng.integers(0, n_seq, n)]
        positions = [sequences[:i].count(s) for i, s in enumerate(sequences)]
        wanted = rng.random(n) < share
        wanted[-1] = True
        return cls([t % n_vocab for t in TOKENS[:n]], positions, sequences, wanted)

    def after(self, other: Tokens) -> Tokens:
        """The same tokens behind those of another batch."""
        past = [other.sequences.count(s) for s in self.sequences]
        positions = [p + n for p, n in zip(self.positions, past, strict=True)]
        return Tokens(self.tokens, positions, self.sequences, self.wanted)


class Scorer:
    """A context on a loaded model: the least that decodes and scores."""

    def __init__(self, model: Any, n_vocab: int, **extra: Any) -> None:
        self.lib = llama_direct.library()
        self.raw = self.lib._lib
        self.n_vocab = n_vocab
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = N_CTX, N_CTX, N_CTX, 3
        params.n_threads = params.n_threads_batch = 1
        params.kv_unified = True
        params.flash_attn_type = 0
        for name, value in extra.items():
            setattr(params, name, value)
        self.context = self.lib.llama_init_from_model(model, params)
        assert self.context
        self.raw.llama_set_score_targets.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.raw.llama_get_scores.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_size_t]

    def decode(self, batch: Tokens) -> int:
        n = len(batch.tokens)
        token, wanted = (ctypes.c_int32 * n)(*batch.tokens), list(map(int, batch.wanted))
        given = llama_direct.batch_of(n, batch.positions, batch.sequences, wanted, token=token)
        return int(self.lib.llama_decode(self.context, given))

    def logits(self, batch: Tokens) -> NDArray[np.float32]:
        assert self.decode(batch) == 0
        rows = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(rows, (np.count_nonzero(batch.wanted), self.n_vocab)).copy()

    def target(self, targets: NDArray[np.int32] | None) -> int:
        if targets is None:
            return int(self.raw.llama_set_score_targets(self.context, None, 0))
        return int(self.raw.llama_set_score_targets(self.context, targets.ctypes.data, len(targets)))

    def scores(self, batch: Tokens, gold: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Log-probability, and whether it is the largest, of a gold token for each wanted one."""
        targets = np.zeros(len(batch.tokens), np.int32)
        targets[batch.wanted] = gold
        assert self.target(targets) == 0
        assert self.decode(batch) == 0
        assert not self.lib.llama_get_logits(self.context)
        n = len(gold)
        log_p, top = np.full(n, np.inf, np.float32), np.zeros(n, np.bool_)
        assert self.raw.llama_get_scores(self.context, log_p.ctypes.data, top.ctypes.data, n - 1) == n
        assert np.isposinf(log_p).all()  # too little room: nothing is written
        assert self.raw.llama_get_scores(self.context, log_p.ctypes.data, top.ctypes.data, n) == n
        return log_p, top

    def n_reused(self) -> int:
        return int(self.lib.llama_perf_context(self.context).n_reused)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama_free(self.context)


@contextmanager
def loaded(path: Path) -> Iterator[tuple[Any, int]]:
    """A model of a file with the size of its vocabulary."""
    with llama_direct.Context(path) as context:
        yield context.model, context.n_vocab


@contextmanager
def scorers(model: TinyModel) -> Iterator[tuple[int, Scorer, Scorer]]:
    """The size of the vocabulary, a context for logits and one for scores."""
    with loaded(file_of(model)) as (handle, n), Scorer(handle, n) as plain, Scorer(handle, n) as scorer:
        yield n, plain, scorer


@contextmanager
def of_architecture(name: str) -> Iterator[tuple[Any, int]]:
    with arch_models.Model(arch_models.FIXTURES[name]) as model:
        yield model.handle, arch_models.N_VOCAB


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def gold_of(logits: NDArray[np.float32], seed: int) -> NDArray[np.int32]:
    """For some rows the most likely token, for the others any."""
    rng = np.random.default_rng(seed)
    best = logits.argmax(1)
    return np.where(rng.random(len(best)) < 0.4, best, rng.integers(0, logits.shape[1], len(best))).astype(np.int32)


def check(
    got: tuple[NDArray[np.float32], NDArray[np.bool_]], logits: NDArray[np.float32], gold: NDArray[np.int32]
) -> None:
    expected = log_softmax(logits)[np.arange(len(gold)), gold]
    # float32: of the logits' differences, and of the largest probability
    np.testing.assert_allclose(got[0], expected, rtol=3e-7, atol=2e-6)
    assert got[1].tolist() == (logits.argmax(1) == gold).tolist()


def compare(model: Any, n_vocab: int, batches: Sequence[Tokens], **extra: Any) -> None:
    """Score the batches one after the other, and once more in another run of the same context."""
    with Scorer(model, n_vocab, **extra) as plain, Scorer(model, n_vocab, **extra) as scorer:
        for seed, batch in enumerate(batches):
            logits = plain.logits(batch)
            gold = gold_of(logits, seed)
            got = scorer.scores(batch, gold)
            check(got, logits, gold)
            assert 0 < np.count_nonzero(got[1]) < len(gold) or len(gold) < 8


@pytest.mark.parametrize("n_ubatch", [1, 3, 7, N_CTX])
@pytest.mark.parametrize("n_seq", [1, 3])
@pytest.mark.parametrize("model", [LLAMA, QWEN3, GEMMA3, MROPE], ids=by_name)
def test_scores_are_those_of_the_logits(model: TinyModel, n_seq: int, n_ubatch: int) -> None:
    """Outputs differ in number from micro-batch to micro-batch, some of which have none."""
    with loaded(file_of(model)) as (handle, n_vocab):
        first, second = (Tokens.packed(n, n_vocab, n_seq, seed, share) for seed, n, share in ((1, 60, 0.3), (2, 41, 1)))
        compare(handle, n_vocab, [first, second.after(first)], n_ubatch=n_ubatch)


@pytest.mark.parametrize("n_ubatch", [4, 32])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_of_other_architectures(name: str, n_ubatch: int) -> None:
    with of_architecture(name) as (handle, n_vocab):
        first, second = (Tokens.packed(n, n_vocab, 3, seed) for seed, n in ((3, 40), (4, 25)))
        compare(handle, n_vocab, [first, second.after(first)], n_ubatch=n_ubatch)


def test_a_graph_is_used_again_with_other_targets() -> None:
    with scorers(LLAMA) as (_, plain, scorer):
        for position in range(20):
            one = Tokens([TOKENS[position]], [position], [0], np.ones(1, np.bool_))
            logits = plain.logits(one)
            gold = np.array([logits[0].argmax() if position % 2 else position], np.int32)
            check(scorer.scores(one, gold), logits, gold)
        assert scorer.n_reused() >= 15


def test_off_again_is_as_never_on() -> None:
    first, second, third = (Tokens.packed(30, 96, 2, seed) for seed in (5, 6, 7))
    second, third = second.after(first), third.after(first).after(second)
    with scorers(LLAMA) as (_, plain, scorer):
        before = plain.logits(first)
        assert np.array_equal(scorer.logits(first), before)
        logits = plain.logits(second)
        gold = gold_of(logits, 5)
        check(scorer.scores(second, gold), logits, gold)
        assert scorer.target(None) == 0
        assert scorer.raw.llama_get_scores(scorer.context, None, None, 0) == 0
        assert np.array_equal(scorer.logits(third), plain.logits(third))


def test_a_prefill_without_outputs_comes_between() -> None:
    first, second = (Tokens.packed(30, 96, 1, seed) for seed in (8, 9))
    nothing = Tokens(first.tokens, first.positions, first.sequences, np.zeros(30, np.bool_))
    second = second.after(first)
    with scorers(QWEN3) as (_, plain, scorer):
        plain.decode(nothing)
        logits = plain.logits(second)
        gold = gold_of(logits, 9)
        assert scorer.target(np.zeros(N_CTX, np.int32)) == 0
        assert scorer.decode(nothing) == 0
        assert scorer.raw.llama_get_scores(scorer.context, None, None, 0) == 0
        check(scorer.scores(second, gold), logits, gold)


@pytest.mark.parametrize("gain", [1.0, 30.0, 1000.0])
def test_the_most_unlikely_token_has_a_finite_score(gain: float, tmp_path: Path) -> None:
    """Its probability alone would vanish in float32 below exp(-104)."""
    weights = LLAMA.weights()
    weights["output.weight"] *= np.float32(gain)
    with loaded(LLAMA.write(tmp_path / "wide.gguf", weights=weights)) as (handle, n_vocab):
        batch = Tokens.packed(40, n_vocab, 1, 10)
        with Scorer(handle, n_vocab) as plain:
            logits = plain.logits(batch)
        gold = logits.argmin(1).astype(np.int32)
        with Scorer(handle, n_vocab) as scorer:
            check(scorer.scores(batch, gold), logits, gold)
        assert gain == 1.0 or log_softmax(logits).min() < -104.0


@pytest.mark.parametrize("rows", [slice(None), slice(5, 6)])
def test_logits_that_are_no_numbers_have_no_score(rows: slice, tmp_path: Path) -> None:
    weights = LLAMA.weights()
    weights["output.weight"][rows] = np.nan
    with loaded(LLAMA.write(tmp_path / "nan.gguf", weights=weights)) as (handle, n_vocab):
        batch = Tokens.packed(20, n_vocab, 1, 11)
        with Scorer(handle, n_vocab) as scorer:
            log_p, top = scorer.scores(batch, np.full(np.count_nonzero(batch.wanted), 3, np.int32))
    assert np.isnan(log_p).all() and not top.any()


def test_targets_that_cannot_be() -> None:
    batch = Tokens.packed(20, 96, 1, 12)
    with loaded(file_of(LLAMA)) as (handle, n_vocab), Scorer(handle, n_vocab) as scorer:
        for wrong in (-1, n_vocab):
            with llama_direct.errors() as errors:
                assert scorer.target(np.array([0, wrong], np.int32)) == -1
            assert "not a token" in "".join(errors)
        logits = scorer.logits(batch)  # nothing was turned on
        assert np.isfinite(logits).all()
        assert scorer.target(np.zeros(19, np.int32)) == 0
        with llama_direct.errors() as errors:
            assert scorer.decode(batch.after(batch)) == -1
        assert "fewer than 20 tokens" in "".join(errors)
