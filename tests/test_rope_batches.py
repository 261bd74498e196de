"""The same tokens in other batches: cut anywhere, several sequences, copies, flash attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.llama_direct import GGML_TYPE_F16, GGML_TYPE_F32, Context
from support.rope_models import (
    FACTORS,
    GEMMA3,
    LLAMA,
    MODELS,
    MROPE,
    MULTI,
    N_LAYER,
    PARTIAL,
    TOKENS,
    YARN,
    TinyModel,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, Array, no_noisier, relative_error, rms_error

pytestmark = pytest.mark.native

SOME = (LLAMA, GEMMA3, YARN, PARTIAL, MROPE)
N = 40


def decode_in_parts(context: Context, parts: Sequence[int]) -> Array:
    starts = np.cumsum([0, *parts])
    logits = [context.decode(TOKENS[a:b], start=int(a)) for a, b in itertools.pairwise(starts)]
    return np.concatenate(logits).astype(np.float64)


@pytest.mark.parametrize("model", SOME, ids=by_name)
@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.integers(1, 25), min_size=2, max_size=6) | st.integers(1, 5).map(lambda size: [size] * 8))
def test_batches_cut_anywhere(model: TinyModel, parts: list[int]) -> None:
    with Context(file_of(model, FACTORS), model.n_ctx) as context:
        got = decode_in_parts(context, parts)
    assert relative_error(got, expected(model, FACTORS)[: sum(parts)]) < TOLERANCE


@pytest.mark.parametrize("size", [1, 7, 32])
@pytest.mark.parametrize("model", SOME, ids=by_name)
def test_micro_batches(model: TinyModel, size: int) -> None:
    with Context(file_of(model, FACTORS), model.n_ctx, n_ubatch=size) as context:
        assert relative_error(context.decode(TOKENS), expected(model, FACTORS)) < TOLERANCE


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("model", SOME, ids=by_name)
def test_several_sequences_in_one_batch(model: TinyModel, flash: bool, unified: bool) -> None:
    """Three texts, of which one starts later and one ends earlier; each knows its own tokens only."""
    spans = {0: (0, 50), 1: (20, 60), 2: (0, 25)}
    rows = [(at, s) for at in range(60) for s, (start, stop) in spans.items() if start <= at < stop]
    tokens = [TOKENS[at + 20 * s] for at, s in rows]
    positions = [at - spans[s][0] for at, s in rows]
    sequences = [s for _, s in rows]

    def errors(factors: list[float]) -> tuple[float, float]:
        # LongRoPE counts the context of one sequence
        n_ctx = model.n_ctx if unified else 3 * model.n_ctx
        with Context(file_of(model, factors), n_ctx, flash=flash, kv_unified=unified, n_seq_max=3) as context:
            # two batches: the second attends to what the first left
            cut = 70
            got = np.concatenate(
                [
                    context.decode_at(tokens[part], positions[part], sequences[part])
                    for part in (slice(0, cut), slice(cut, None))
                ]
            )
        of = np.array(sequences)
        reference = np.empty(got.shape)
        for s, (start, stop) in spans.items():
            reference[of == s] = model.reference(factors).decode(TOKENS[start + 20 * s : stop + 20 * s])
        return relative_error(got, reference), rms_error(got, reference)

    largest, noise = errors(FACTORS)
    if flash:
        assert no_noisier(noise, errors([1.0] * N_LAYER)[1])
    else:
        assert largest < TOLERANCE


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("model", SOME, ids=by_name)
def test_copied_sequences(model: TinyModel, unified: bool) -> None:
    n_ctx = model.n_ctx if unified else 3 * model.n_ctx
    with Context(file_of(model, FACTORS), n_ctx, n_seq_max=3, kv_unified=unified, swa_full=True) as context:
        context.decode(TOKENS[:N])
        for sequence in (1, 2):
            context.copy(0, sequence)
            got = context.decode(TOKENS[N : N + 20], sequence, start=N)
            assert relative_error(got, expected(model, FACTORS)[N : N + 20]) < TOLERANCE


@pytest.mark.parametrize("type_kv", [GGML_TYPE_F32, GGML_TYPE_F16])
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_flash_attention_is_no_noisier_than_stock(model: TinyModel, type_kv: int) -> None:
    """On the CPU, it computes in float16."""

    def noise(factors: list[float]) -> float:
        with Context(file_of(model, factors), model.n_ctx, type_kv=type_kv, flash=True) as context:
            return rms_error(context.decode(TOKENS), expected(model, factors))

    got = noise(FACTORS)
    assert no_noisier(got, noise([1.0] * N_LAYER))
    assert rms_error(expected(model), expected(model, FACTORS)) > 20 * got


IMAGE = np.array(
    [(p, p, p, 0) for p in range(10)]
    + [(10, 10 + row, 10 + column, 0) for row in range(4) for column in range(5)]
    + [(p, p, p, 0) for p in range(15, 45)]
)


@pytest.mark.parametrize("cut", [0, 10, 30])
@pytest.mark.parametrize("model", MULTI, ids=by_name)
def test_an_image_between_texts(model: TinyModel, cut: int) -> None:
    """Embeddings with positions in time, height and width, before ``cut`` in a batch of their own; then text."""
    tokens, weights = TOKENS[: len(IMAGE)], model.weights()
    reference = model.reference(FACTORS).decode(tokens, IMAGE)
    rows = weights["token_embd.weight"][tokens]
    with Context(file_of(model, FACTORS)) as context:
        parts = [part for part in (slice(0, cut), slice(cut, 30)) if len(rows[part])]
        logits = [context.decode_embeddings(rows[part], IMAGE[part]) for part in parts]
        logits.append(context.decode_at(tokens[30:], [int(p) for p in IMAGE[30:, 0]]))
    assert relative_error(np.concatenate(logits), reference) < TOLERANCE
    for other in (model.reference().decode(tokens, IMAGE), expected(model, FACTORS)[: len(IMAGE)]):
        assert relative_error(other, reference) > 0.1
