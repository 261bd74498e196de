"""Dynamic RoPE scaling against a float64 reference: levels, keys that turn with them, sequences, shifts, states."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.dynamic_rope import DynamicReference, Scaling, level_of, rope_n_ctx
from support.llama_direct import GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, Context, errors
from support.rope_models import (
    FACTORS,
    GEMMA3,
    LINEAR,
    LLAMA,
    LLAMA3,
    N_LAYER,
    QWEN2,
    QWEN3,
    TOKENS,
    WIDE_32,
    WIDE_64,
    YARN_PARTIAL,
    TinyModel,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, Array, no_noisier, relative_error, rms_error

pytestmark = pytest.mark.native

N_TRAIN = 32
NTK, YARN = Scaling(N_TRAIN), Scaling(N_TRAIN, yarn=True)
SCALINGS = {"ntk": NTK, "yarn": YARN, "ntk-factor-2": Scaling(N_TRAIN, factor=2.0)}
MODELS = (LLAMA, QWEN2, QWEN3, GEMMA3, LLAMA3)
ONES = [1.0] * N_LAYER
# 150 tokens need 4.7 times the length: level 5
LAST_LEVEL = 5
PIECES: dict[str, Sequence[int]] = {
    "at once": [len(TOKENS)],
    "in pieces": [7, 25, 1, 30, 50, 37],
    "token by token": [1] * len(TOKENS),
}


def reference(model: TinyModel, scaling: Scaling, factors: Sequence[float] | None = None) -> Array:
    return DynamicReference(model, scaling, factors).decode(TOKENS)


def in_pieces(context: Context, sizes: Sequence[int]) -> NDArray[np.float32]:
    logits = []
    for size in sizes:
        start = context.n_past
        logits.append(context.decode(TOKENS[start : start + size]))
    return np.concatenate(logits)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("factors", [None, FACTORS], ids=["", "layer-factors"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_logits_are_those_of_the_reference(
    model: TinyModel, scaling: str, factors: list[float] | None, pieces: str
) -> None:
    wanted = SCALINGS[scaling]
    with Context(file_of(model), **wanted.parameters()) as context:
        if factors is not None:
            assert context.set_factors(factors) == 0
        got = in_pieces(context, PIECES[pieces])
        assert level_of(context) == LAST_LEVEL
    assert relative_error(got, reference(model, wanted, factors)) < TOLERANCE
    assert relative_error(expected(model, factors)[N_TRAIN:], reference(model, wanted, factors)[N_TRAIN:]) > 0.1


@pytest.mark.parametrize("size", [3, 16, 100])
def test_batches_of_any_size(size: int) -> None:
    with Context(file_of(LLAMA), n_ubatch=size, **NTK.parameters()) as context:
        assert relative_error(context.decode(TOKENS), reference(LLAMA, NTK)) < TOLERANCE


def test_below_the_trained_length_nothing_differs_bit_for_bit() -> None:
    with Context(file_of(LLAMA), **YARN.parameters()) as dynamic, Context(file_of(LLAMA)) as stock:
        for n in (N_TRAIN - 1, 1):
            np.testing.assert_array_equal(dynamic.decode(TOKENS[:n]), stock.decode(TOKENS[:n]))
        assert level_of(dynamic) == 0
        assert level_of(stock) == -1


def test_a_linear_factor_of_the_file_is_the_factor_of_the_formula() -> None:
    model, scaling = LINEAR, Scaling(N_TRAIN, factor=2.0)
    with Context(file_of(model), **scaling.parameters() | {"rope_freq_scale": 0.0}) as context:
        assert relative_error(context.decode(TOKENS), reference(LLAMA, scaling)) < TOLERANCE


def test_the_factor_of_yarn_is_the_largest() -> None:
    scaling = Scaling(N_TRAIN, yarn=True, factor=2.5)
    with Context(file_of(LLAMA), **scaling.parameters()) as context:
        assert relative_error(in_pieces(context, PIECES["in pieces"]), reference(LLAMA, scaling)) < TOLERANCE
    assert relative_error(reference(LLAMA, YARN), reference(LLAMA, scaling)) > 0.1


CACHES: dict[str, tuple[TinyModel, dict[str, Any], int]] = {
    "f16": (LLAMA, {"type_kv": GGML_TYPE_F16}, 2),
    "f16-flash": (LLAMA, {"type_kv": GGML_TYPE_F16, "flash": True}, 2),
    "f16-window": (GEMMA3, {"type_kv": GGML_TYPE_F16}, 2),
    "q8": (WIDE_64, {"type_k": GGML_TYPE_Q8_0}, 1),
    "q8-flash": (WIDE_64, {"type_kv": GGML_TYPE_Q8_0, "flash": True}, 1),
    "q8-narrow": (WIDE_32, {"type_k": GGML_TYPE_Q8_0}, 1),
    "q4": (WIDE_64, {"type_k": GGML_TYPE_Q4_0}, 1),
}


@pytest.mark.parametrize("yarn", [False, True], ids=["ntk", "yarn"])
@pytest.mark.parametrize("name", CACHES)
def test_rounding_stays_that_of_the_cache(name: str, yarn: bool) -> None:
    """Each level rounds the keys once more; one that is never reached tells what the cache costs anyway."""
    model, parameters, per_octave = CACHES[name]
    scaling = Scaling(N_TRAIN, yarn=yarn, per_octave=per_octave)
    with Context(file_of(model), **scaling.parameters(), **parameters) as context:
        noise = rms_error(context.decode(TOKENS), reference(model, scaling))
    with Context(file_of(model), **parameters) as context:
        stock = rms_error(context.decode(TOKENS), expected(model))
    assert no_noisier(noise, 2.0 * stock)
    assert rms_error(expected(model), reference(model, scaling)) > 3 * noise, "scaling must stand out of the noise"


def test_the_longest_sequence_decides_for_all() -> None:
    """The cells of a cache may belong to several sequences: there is one rotation for all."""
    long, short = TOKENS[:100], TOKENS[60:90]
    with Context(file_of(LLAMA), n_seq_max=2, kv_unified=True, **NTK.parameters()) as context:
        context.decode(short[:20], 1, 0)
        context.decode(long, 0, 0)
        assert level_of(context) == NTK.level(99)
        together = context.decode(short[20:], 1, 20)
        assert level_of(context) == NTK.level(99)
        context.lib.llama_memory_seq_rm(context.memory, 0, -1, -1)
        context.lib.llama_memory_seq_rm(context.memory, 1, 20, -1)
        alone = context.decode(short[20:], 1, 20)
        assert level_of(context) == 0
    known = DynamicReference(LLAMA, NTK)
    known.decode(short[:20])
    known._set(NTK.level(99))
    assert relative_error(together, known.reference.decode(short[20:])) < TOLERANCE
    assert relative_error(alone, LLAMA.reference().decode(short)[20:]) < TOLERANCE


@pytest.mark.parametrize("unified", [True, False])
def test_sequences_of_different_length_in_one_batch(unified: bool) -> None:
    """A batch is cut where one of its sequences needs another level: the other one's tokens go with it."""
    with Context(file_of(QWEN2), n_seq_max=2, kv_unified=unified, **NTK.parameters()) as context:
        context.decode(TOKENS[:60], 0, 0)
        context.decode(TOKENS[:10], 1, 0)
        tokens = [TOKENS[60], TOKENS[10], TOKENS[61], TOKENS[11]]
        got = context.decode_at(tokens, [60, 10, 61, 11], [0, 1, 0, 1])
        assert level_of(context) == NTK.level(61)
    first, second = DynamicReference(QWEN2, NTK), DynamicReference(QWEN2, NTK)
    first.decode(TOKENS[:60])
    # its keys were made while the other sequence was long already
    second._set(NTK.level(59))
    second.reference.decode(TOKENS[:10])
    assert relative_error(got[::2], first.decode(TOKENS[60:62])) < TOLERANCE
    assert relative_error(got[1::2], second.reference.decode(TOKENS[10:12])) < TOLERANCE


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model", [LLAMA, QWEN2, LLAMA3], ids=by_name)
def test_a_context_shift_goes_back_down(model: TinyModel, scaling: str) -> None:
    wanted = SCALINGS[scaling]
    known = DynamicReference(model, wanted, FACTORS)
    with Context(file_of(model), **wanted.parameters()) as context:
        assert context.set_factors(FACTORS) == 0
        for stop, tokens in ((90, TOKENS[:100]), (20, TOKENS[100:120]), (25, TOKENS[120:150])):
            context.decode(tokens)
            known.decode(tokens)
            context.shift(5, stop)
            known.reference.remove(5, stop)
        assert relative_error(context.decode(TOKENS[:40]), known.decode(TOKENS[:40])) < TOLERANCE


def marked(data: Any) -> bool:
    return b"lrop" in bytes(data)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("model", [LLAMA, GEMMA3], ids=by_name)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_state_brings_its_level(model: TinyModel, scaling: str, whole: bool) -> None:
    wanted, sequence = SCALINGS[scaling], None if whole else 0
    want = reference(model, wanted, FACTORS)
    with (
        Context(file_of(model, FACTORS), **wanted.parameters()) as first,
        Context(first, **wanted.parameters()) as second,
    ):
        first.decode(TOKENS[:70])
        state = first.save(sequence)
        assert marked(state)
        second.decode(TOKENS[:140])  # of another level, and gone after the load
        second.lib.llama_memory_seq_rm(second.memory, 0, -1, -1)
        second.load(state, sequence)
        assert level_of(second) == wanted.level(69)
        got = second.decode(TOKENS[70:], start=70)
    assert relative_error(got, want[70:]) < TOLERANCE


def test_a_state_joins_a_longer_sequence() -> None:
    with Context(file_of(LLAMA), n_seq_max=2, kv_unified=True, **NTK.parameters()) as context:
        context.decode(TOKENS[:50], 0, 0)
        state = context.save(0)
        context.decode(TOKENS[50:130], 0, 50)
        context.load(state, 1)
        got = context.decode(TOKENS[130:150], 0, 130)
        # it is at the level of the longest from then on
        known = DynamicReference(LLAMA, NTK)
        known.decode(TOKENS[:50])
        known._set(LAST_LEVEL)
        other = context.decode(TOKENS[50:60], 1, 50)
        assert relative_error(other, known.reference.decode(TOKENS[50:60])) < TOLERANCE
    assert relative_error(got, reference(LLAMA, NTK)[130:]) < TOLERANCE


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_without_scaling_is_that_of_stock(whole: bool) -> None:
    sequence = None if whole else 0
    with Context(file_of(LLAMA)) as stock, Context(stock, **NTK.parameters()) as dynamic:
        for context in (stock, dynamic):
            context.decode(TOKENS[:N_TRAIN])
        state = stock.save(sequence)
        assert bytes(state) == bytes(dynamic.save(sequence))
        assert not marked(state)
        dynamic.decode(TOKENS[:100])
        dynamic.clear()
        dynamic.load(state, sequence)
        got = dynamic.decode(TOKENS[N_TRAIN:], start=N_TRAIN)
    assert relative_error(got, reference(LLAMA, NTK)[N_TRAIN:]) < TOLERANCE


Parameters = dict[str, Any]
STRANGERS: dict[str, tuple[Parameters, list[float], Parameters, list[float], str]] = {
    "factors": ({}, FACTORS, {}, FACTORS[::-1], "with a RoPE factor of 1 in layer 0, those of this context with 3.1"),
    "factors, none here": ({}, FACTORS, {}, ONES, "with a RoPE factor of 1.3 in layer 1"),
    "no factors, some here": ({}, ONES, {}, FACTORS, "with a RoPE factor of 1 in layer 1"),
    "a level, not dynamic here": (NTK.parameters(), ONES, {}, ONES, "with another RoPE scaling"),
    "another kind": (NTK.parameters(), ONES, YARN.parameters(), ONES, "with another RoPE scaling"),
    "another length": (YARN.parameters(), ONES, Scaling(24, yarn=True).parameters(), ONES, "with another RoPE scaling"),
    "factors on another base": ({}, FACTORS, {"rope_freq_base": 20000.0}, FACTORS, "with another RoPE scaling"),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", STRANGERS)
def test_keys_that_turned_otherwise_are_refused(name: str, whole: bool) -> None:
    """Nothing of such a state is used: what is in the memory stays."""
    made, factors, here, own, words = STRANGERS[name]
    sequence = None if whole else 0
    with Context(file_of(LLAMA), **made) as first, Context(first, **here) as second:
        assert first.set_factors(factors) == 0
        assert second.set_factors(own) == 0
        first.decode(TOKENS[:60])
        state = first.save(sequence)
        assert marked(state) == (factors is not ONES or "rope_scaling_type" in made)
        second.decode(TOKENS[:40])
        before = second.save(sequence)
        with errors() as logged, pytest.raises(AssertionError):
            second.load(state, sequence)
        assert words in "".join(logged)
        assert bytes(second.save(sequence)) == bytes(before)


REFUSED: dict[str, tuple[Parameters, str]] = {
    "factor below 1": ({"rope_freq_scale": 2.0}, "the factor is 0.5 (must be from 1 to 1024, see --rope-scale)"),
    "factor is no number": ({"rope_freq_scale": float("nan")}, "the factor is nan"),
    "fixed base": ({"rope_freq_base": 5000.0}, "it sets the frequency base itself (remove --rope-freq-base)"),
    "YaRN's factors": ({"yarn_ext_factor": 0.5}, "it sets the YaRN factors itself (remove --yarn-ext"),
}


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_refused_in_words(name: str, yarn: bool) -> None:
    parameters, words = REFUSED[name]
    with errors() as logged, pytest.raises(OSError, match="no context"):
        Context(file_of(LLAMA), **Scaling(N_TRAIN, yarn=yarn).parameters() | parameters)
    assert f"dynamic RoPE scaling: {words}" in "".join(logged)


def test_partial_rotation() -> None:
    """Eight of the sixteen dimensions turn; the file asks for static YaRN, which the context replaces."""
    scaling = Scaling(N_TRAIN, yarn=True, factor=8.0)
    plain = YARN_PARTIAL.config.ropes[0]
    stock = [rope.__class__(plain.n_rot, base=plain.base, neox=True) for rope in YARN_PARTIAL.config.ropes]
    known = DynamicReference(YARN_PARTIAL, scaling)
    known._stock = known._stock.__class__(**{**vars(known._stock), "ropes": tuple(stock)})
    with Context(file_of(YARN_PARTIAL), **scaling.parameters()) as context:
        assert relative_error(context.decode(TOKENS), known.decode(TOKENS)) < TOLERANCE


def test_layer_factors_that_some_level_cannot_have_are_refused() -> None:
    """YaRN has no finite parameters where a factor is its frequency scale: 1/2 at the second level."""
    factors = [1.0, 0.5, *ONES[2:]]
    with Context(file_of(LLAMA), **YARN.parameters()) as context, errors() as logged:
        assert context.set_factors(factors) == -2
    assert "too close to the YaRN frequency scale of 0.5" in "".join(logged)
    with Context(file_of(LLAMA), **NTK.parameters()) as context:
        assert context.set_factors(factors) == 0


def test_the_model_that_contexts_share_stays_as_it_is() -> None:
    """A plain context made after a scaled one is as long as the model was trained for."""
    with Context(file_of(LLAMA), 64) as plain:
        lib, model = plain.lib, plain.model
        trained = lib.llama_model_n_ctx_train(model)
        assert rope_n_ctx(plain) == trained < 6400
        with Context(plain, 8192, n_batch=64, n_ubatch=64, **NTK.parameters()) as scaled:
            assert (lib.llama_model_n_ctx_train(model), rope_n_ctx(scaled)) == (trained, 8192)
        yarn = Scaling(N_TRAIN, yarn=True, factor=200.0).parameters()
        with Context(plain, 8192, n_batch=64, n_ubatch=64, **yarn) as scaled:
            assert (lib.llama_model_n_ctx_train(model), rope_n_ctx(scaled)) == (trained, 6400)
        with Context(plain, 0, n_batch=64, n_ubatch=64) as later:
            assert lib.llama_n_ctx(later.context) == trained


def test_contexts_made_at_the_same_time_do_not_meddle() -> None:
    barrier = Barrier(2, timeout=60)

    def made(n_ctx: int) -> tuple[int, int]:
        barrier.wait()
        with Context(plain, n_ctx, n_batch=64, n_ubatch=64, **NTK.parameters()) as context:
            return rope_n_ctx(context), context.lib.llama_model_n_ctx_train(plain.model)

    with Context(file_of(LLAMA), 64) as plain, ThreadPoolExecutor(2) as pool:
        trained = plain.lib.llama_model_n_ctx_train(plain.model)
        for _ in range(5):
            assert list(pool.map(made, (8192, 16384))) == [(8192, trained), (16384, trained)]
