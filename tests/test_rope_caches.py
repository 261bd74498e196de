"""Keys that are turned in the cache: context shift and division, in every type of cache; state and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.llama_direct import GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, Context
from support.rope_models import (
    FACTORS,
    GEMMA3,
    LLAMA,
    MULTI,
    N_LAYER,
    PARTIAL,
    QWEN2,
    SHIFTABLE,
    TOKENS,
    WIDE_32,
    WIDE_64,
    YARN,
    YARN_LOG,
    YARN_LOG_HALF,
    YARN_UNIT,
    TinyModel,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, Array, no_noisier, relative_error, rms_error

pytestmark = pytest.mark.native

N, START, STOP, MORE = 90, 5, 37, 20
AFTER = TOKENS[N : N + MORE]
ONES = [1.0] * N_LAYER


def shifted(model: TinyModel, factors: list[float], **parameters: Any) -> tuple[NDArray[np.float32], Array]:
    """Logits after a context shift, and those of the reference."""
    reference = model.reference(factors)
    reference.decode(TOKENS[:N])
    reference.remove(START, STOP)
    # the first tokens must still be cached when they are removed; a sliding window forgets them otherwise
    with Context(file_of(model), model.n_ctx, swa_full=True, **parameters) as context:
        assert context.set_factors(factors) == 0
        context.decode(TOKENS[:N])
        context.shift(START, STOP)
        return context.decode(AFTER), reference.decode(AFTER)


def directly(model: TinyModel, factors: list[float], **parameters: Any) -> tuple[NDArray[np.float32], Array]:
    with Context(file_of(model), model.n_ctx, **parameters) as context:
        assert context.set_factors(factors) == 0
        return context.decode(TOKENS), expected(model, factors)


@pytest.mark.parametrize("model", SHIFTABLE, ids=by_name)
def test_context_shift_equals_the_reference(model: TinyModel) -> None:
    got, reference = shifted(model, FACTORS)
    assert relative_error(got, reference) < TOLERANCE
    assert relative_error(shifted(model, ONES)[1], reference) > 0.1
    # without the shift, the keys would stand where they stood
    assert relative_error(expected(model, FACTORS)[N : N + MORE], reference) > 0.1


Run = Callable[..., tuple[NDArray[np.float32], Array]]
CACHES: dict[str, tuple[TinyModel, dict[str, Any]]] = {
    "f16": (LLAMA, {"type_kv": GGML_TYPE_F16}),
    "f16-window": (GEMMA3, {"type_kv": GGML_TYPE_F16}),
    "f16-partial": (PARTIAL, {"type_kv": GGML_TYPE_F16}),
    "f16-yarn": (YARN_LOG, {"type_kv": GGML_TYPE_F16}),
    "flash": (LLAMA, {"flash": True}),
    "flash-f16": (YARN_UNIT, {"type_kv": GGML_TYPE_F16, "flash": True}),
    "q8": (WIDE_64, {"type_k": GGML_TYPE_Q8_0}),
    "q8-flash": (WIDE_64, {"type_kv": GGML_TYPE_Q8_0, "flash": True}),
    "q4": (WIDE_64, {"type_k": GGML_TYPE_Q4_0}),
    "q8-narrow": (WIDE_32, {"type_k": GGML_TYPE_Q8_0}),  # without a Hadamard rotation; llama.cpp cannot shift those
}


RUNS = [(run, name) for run in (directly, shifted) for name in CACHES if (run, name) != (shifted, "q8-narrow")]


@pytest.mark.parametrize(("run", "name"), RUNS)
def test_cache_is_no_noisier_than_stock(run: Run, name: str) -> None:
    """The same decode without factors tells what the cache loses, whatever its type."""
    model, parameters = CACHES[name]
    stock = rms_error(*run(model, ONES, **parameters))
    noise = np.mean([rms_error(*run(model, f, **parameters)) for f in (FACTORS, FACTORS[::-1])])
    assert no_noisier(float(noise), stock)
    assert rms_error(expected(model), expected(model, FACTORS)) > 3 * noise, "factors must stand out of the noise"


@pytest.mark.parametrize("model", [YARN, YARN_LOG_HALF], ids=by_name)
def test_shift_repeats_the_magnitude_as_stock_does(model: TinyModel) -> None:
    """Stock multiplies the keys by the magnitude with every shift: factors change nothing about that."""
    for factors in (ONES, FACTORS):
        got, unharmed = shifted(model, factors)
        reference = model.reference(factors)
        reference.decode(TOKENS[:N])
        reference.remove(START, STOP)
        reference.magnify_keys()
        assert relative_error(got, reference.decode(AFTER)) < TOLERANCE
        assert relative_error(got, unharmed) > 0.1


def test_two_shifts_and_other_factors_between() -> None:
    """Each shift turns by the factors in force, also those that wait for the next decode together."""
    with Context(file_of(LLAMA)) as context:
        for factors in (FACTORS, FACTORS[::-1]):
            context.clear()
            assert context.set_factors(factors) == 0
            reference = LLAMA.reference(factors)
            for start, n in ((0, 60), (60, 20)):
                reference.decode(TOKENS[start : start + n])
                context.decode(TOKENS[start : start + n])
                for _ in range(2):
                    reference.remove(3, 14)
                    context.shift(3, 14)
            assert relative_error(context.decode(AFTER), reference.decode(AFTER)) < TOLERANCE


@pytest.mark.parametrize("model", [LLAMA, QWEN2, PARTIAL, YARN_UNIT], ids=by_name)
def test_self_extend_by_moving_single_tokens(model: TinyModel) -> None:
    """Grouped positions, four tokens on each."""
    reference = model.reference(FACTORS)
    reference.decode(TOKENS[:N])
    reference.divide(0, 32, 4)
    reference.add(32, None, -24)
    with Context(file_of(model, FACTORS), model.n_ctx) as context:
        context.decode(TOKENS[:N])
        for p in range(1, 32):
            context.add(p, p + 1, p // 4 - p)
        context.add(32, -1, -24)
        got = context.decode(AFTER, start=N - 24)
    want = reference.decode(AFTER)
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(expected(model, FACTORS)[N : N + MORE], want) > 0.1


@pytest.mark.parametrize("model", [LLAMA, QWEN2, PARTIAL, YARN_UNIT], ids=by_name)
def test_division_turns_the_keys_by_the_factors(model: TinyModel) -> None:
    """llama_memory_seq_div, which in some versions of llama.cpp turns the keys the wrong way.

    Which way, a context without factors tells; with factors, keys must turn the same way, each layer by its own.
    """

    def divided(factors: list[float], direction: int) -> float:
        reference = model.reference(factors)
        reference.decode(TOKENS[:N])
        reference.divide(0, 32, 4, direction)
        reference.add(32, None, -24)
        with Context(file_of(model), model.n_ctx) as context:
            assert context.set_factors(factors) == 0
            context.decode(TOKENS[:N])
            context.divide(0, 32, 4)
            context.add(32, -1, -24)
            return relative_error(context.decode(AFTER, start=N - 24), reference.decode(AFTER))

    direction = min((1, -1), key=lambda d: divided(ONES, d))
    assert divided(ONES, direction) < TOLERANCE
    assert divided(FACTORS, direction) < TOLERANCE
    assert divided(FACTORS, -direction) > 0.1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("model", [LLAMA, GEMMA3, YARN, *MULTI], ids=by_name)
def test_state_continues_in_another_context(model: TinyModel, whole: bool) -> None:
    sequence = None if whole else 0
    with Context(file_of(model)) as first, Context(first) as second:
        for context in (first, second):
            assert context.set_factors(FACTORS) == 0
        first.decode(TOKENS[:N])
        state = first.save(sequence)
        direct = first.decode(AFTER)
        second.load(state, sequence)
        assert second.set_factors(ONES) == -3, "the keys that came are turned"
        got = second.decode(AFTER, start=N)
    if model is not GEMMA3:  # of a sliding window, only what is still needed is saved: its sums have fewer terms
        np.testing.assert_array_equal(got, direct)
    for logits in (direct, got):
        assert relative_error(logits, expected(model, FACTORS)[N : N + MORE]) < TOLERANCE


def test_state_moves_to_another_sequence_and_shifts_there() -> None:
    reference = LLAMA.reference(FACTORS)
    reference.decode(TOKENS[:N])
    reference.remove(START, STOP)
    want = reference.decode(AFTER)
    with Context(file_of(LLAMA, FACTORS), n_seq_max=2, kv_unified=True) as context:
        context.decode(TOKENS[:N])
        context.load(context.save(0), 1)
        assert relative_error(context.decode(AFTER, 1, N), expected(LLAMA, FACTORS)[N : N + MORE]) < TOLERANCE
        context.lib.llama_memory_seq_rm(context.memory, 0, -1, -1)
        context.copy(1, 0)
        context.lib.llama_memory_seq_rm(context.memory, 1, -1, -1)
        context.lib.llama_memory_seq_rm(context.memory, 0, N, -1)
        context.n_past = N
        context.shift(START, STOP)
        assert relative_error(context.decode(AFTER), want) < TOLERANCE
