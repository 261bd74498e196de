"""Embedding and reranking models: pooled hidden states and scores against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support.llama_direct import Context
from support.rope_models import (
    EUROBERT,
    FACTORS,
    GEMMA3,
    LLAMA,
    N_EMBD,
    N_LAYER,
    NEOBERT,
    QWEN3,
    TOKENS,
    YARN,
    TinyModel,
    by_name,
    file_of,
)
from support.rope_reference import TOLERANCE, Array, relative_error

pytestmark = pytest.mark.native

MEAN, CLS, LAST, RANK = 1, 2, 3, 4


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))


SCORES = 4
_LABELS = ("classifier.output_labels", [f"label {i}" for i in range(SCORES)])
_OUTPUT = {"cls.output.weight": random(1, SCORES, N_EMBD)}
NEOBERT_RANK = replace(
    NEOBERT,
    name="neo-bert-rank",
    metadata=(*NEOBERT.metadata, _LABELS),
    tensors={
        "cls.weight": random(2, N_EMBD, N_EMBD),
        "cls.bias": random(3, N_EMBD),
        "cls.output.bias": random(4, SCORES),
        **_OUTPUT,
    },
)
QWEN3_RANK = replace(QWEN3, name="qwen3-rank", metadata=(_LABELS,), tensors=_OUTPUT)


def neobert_scores(model: TinyModel, hidden: Array) -> Array:
    w = {name: value.astype(np.float64) for name, value in model.tensors.items()}
    dense = np.tanh(hidden[0] @ w["cls.weight"].T + w["cls.bias"])
    return np.asarray(dense @ w["cls.output.weight"].T + w["cls.output.bias"])


def qwen3_scores(model: TinyModel, hidden: Array) -> Array:
    score = np.exp(hidden[-1] @ model.tensors["cls.output.weight"].T.astype(np.float64))
    return np.asarray(score / score.sum())


Pool = Callable[[TinyModel, Array], Array]
KINDS: dict[str, tuple[TinyModel, int, int, Pool]] = {
    "encoder-mean": (EUROBERT, MEAN, N_EMBD, lambda _, hidden: hidden.mean(axis=0)),
    "encoder-cls": (NEOBERT, CLS, N_EMBD, lambda _, hidden: hidden[0]),
    "encoder-rank": (NEOBERT_RANK, RANK, SCORES, neobert_scores),
    "decoder-mean": (LLAMA, MEAN, N_EMBD, lambda _, hidden: hidden.mean(axis=0)),
    "decoder-last": (YARN, LAST, N_EMBD, lambda _, hidden: hidden[-1]),
    "decoder-window": (GEMMA3, MEAN, N_EMBD, lambda _, hidden: hidden.mean(axis=0)),
    "decoder-rank": (QWEN3_RANK, RANK, SCORES, qwen3_scores),
}
LENGTHS = (40, 25, 33)


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_sequences_equal_the_reference(kind: str, from_file: bool) -> None:
    model, pooling, width, pool = KINDS[kind]
    texts = [TOKENS[20 * s : 20 * s + n] for s, n in enumerate(LENGTHS)]
    tokens = [token for text in texts for token in text]
    sequences = [s for s, text in enumerate(texts) for _ in text]

    def pooled(factors: list[float]) -> Array:
        return np.stack([pool(model, model.reference(factors).hidden(text)) for text in texts])

    path = file_of(model, FACTORS) if from_file else file_of(model)
    # llama.cpp pools within a micro-batch, so that texts of several lengths must share one, and it averages only where
    # the number of sequences divides the batch
    with Context(path, embeddings=True, pooling_type=pooling, n_seq_max=4, kv_unified=True) as context:
        if not from_file:
            assert context.set_factors(FACTORS) == 0
        got = context.embed(tokens, sequences, width)
    assert relative_error(got, pooled(FACTORS)) < TOLERANCE
    assert relative_error(pooled([1.0] * N_LAYER), pooled(FACTORS)) > 100 * TOLERANCE


@pytest.mark.parametrize("model", [EUROBERT, NEOBERT], ids=by_name)
def test_encoders_keep_nothing_so_factors_may_change_at_any_time(model: TinyModel) -> None:
    tokens = TOKENS[:30]
    with Context(file_of(model, FACTORS), embeddings=True, pooling_type=MEAN) as context:
        for factors in (FACTORS, FACTORS[::-1], [1.0] * N_LAYER):
            assert context.set_factors(factors) == 0
            got = context.embed(tokens, [0] * len(tokens), N_EMBD)
            mean = model.reference(factors).hidden(tokens).mean(axis=0, keepdims=True)
            assert relative_error(got, mean) < TOLERANCE
