"""Setting and getting the factors of a context at run time."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from numpy.typing import NDArray
from support.llama_direct import Context
from support.rope_models import (
    FACTORS,
    GEMMA3,
    LLAMA,
    LONGROPE_LONG,
    MROPE,
    N_LAYER,
    TOKENS,
    YARN,
    TinyModel,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, relative_error

pytestmark = pytest.mark.native

ONES = [1.0] * N_LAYER
OTHER = FACTORS[::-1]


@pytest.mark.parametrize("model", [LLAMA, GEMMA3, YARN, LONGROPE_LONG, MROPE], ids=by_name)
def test_change_is_exact_and_forgets_nothing(model: TinyModel) -> None:
    """Same batch shape each time, so that the graph of the step before would be reused if nothing forbade it."""
    with Context(file_of(model, FACTORS), model.n_ctx) as context:
        first = context.decode(TOKENS)
        results = []
        for factors in (OTHER, ONES, None, OTHER):
            context.clear()
            assert context.set_factors(factors) == 0
            assert context.get_factors(N_LAYER) == pytest.approx(factors or FACTORS)
            results.append(context.decode(TOKENS))
    for factors, got in zip((OTHER, ONES, FACTORS, OTHER), results, strict=True):
        assert relative_error(got, expected(model, factors)) < TOLERANCE
    np.testing.assert_array_equal(results[2], first)
    np.testing.assert_array_equal(results[3], results[0])


def test_change_between_single_tokens_rebuilds_the_graph() -> None:
    with Context(file_of(LLAMA)) as context:
        for factors in (ONES, FACTORS, [1.5] * N_LAYER, None):
            context.clear()
            assert context.set_factors(factors) == 0
            got = np.concatenate([context.decode([t]) for t in TOKENS[:40]])
            assert relative_error(got, expected(LLAMA, factors)[:40]) < TOLERANCE


def test_refusals_leave_the_factors_alone() -> None:
    with Context(file_of(LLAMA, FACTORS)) as context:
        for wrong in ([], FACTORS[:-1], [*FACTORS, 1.0]):
            length = len(wrong)
            assert (
                context.lib._lib.llama_set_rope_layer_factors(
                    context.context, (ctypes.c_float * max(1, length))(*wrong), length
                )
                == -1
            )
        for bad in (0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e30, 1e-40):
            for layer in (0, N_LAYER - 1):
                assert context.set_factors([bad if il == layer else 1.5 for il in range(N_LAYER)]) == -2, bad
        assert context.get_factors(N_LAYER) == pytest.approx(FACTORS)
        assert relative_error(context.decode(TOKENS[:30]), expected(LLAMA, FACTORS)[:30]) < TOLERANCE


@pytest.mark.parametrize("model", [LLAMA, GEMMA3, MROPE], ids=by_name)
def test_memory_must_be_empty_in_all_sequences(model: TinyModel) -> None:
    with Context(file_of(model), n_seq_max=3) as context:
        for sequence in range(3):
            context.decode(TOKENS[:4], sequence, start=0)
        for sequence in (0, 2, 1):
            assert context.set_factors(FACTORS) == -3
            assert context.set_factors(None) == -3
            assert context.lib.llama_memory_seq_rm(context.memory, sequence, -1, -1)
        assert context.get_factors(N_LAYER) == ONES
        assert context.set_factors(FACTORS) == 0
        assert relative_error(context.decode(TOKENS[:30], 1, start=0), expected(model, FACTORS)[:30]) < TOLERANCE


def test_a_shift_that_waits_does_not_outlive_its_keys() -> None:
    with Context(file_of(LLAMA)) as context:
        context.decode(TOKENS[:60])
        context.shift(5, 20)
        context.lib.llama_memory_seq_rm(context.memory, 0, -1, -1)
        assert context.set_factors(FACTORS) == 0
        assert relative_error(context.decode(TOKENS, start=0), expected(LLAMA, FACTORS)) < TOLERANCE


def test_getting_writes_all_or_nothing() -> None:
    with Context(file_of(LLAMA, FACTORS)) as context:
        functions = context.lib._lib.llama_get_rope_layer_factors, context.lib._lib.llama_model_rope_layer_factors
        for n in (0, 1, N_LAYER - 1, N_LAYER, N_LAYER + 1):
            context_out, model_out = ((ctypes.c_float * (N_LAYER + 2))(*[-7.0] * (N_LAYER + 2)) for _ in range(2))
            assert functions[0](context.context, context_out, n) == N_LAYER
            written = FACTORS if n >= N_LAYER else [-7.0] * N_LAYER
            assert list(context_out) == pytest.approx([*written, -7.0, -7.0])
            # of the model, exactly the block count
            assert functions[1](context.model, model_out, n) == (n == N_LAYER)
            assert list(model_out) == pytest.approx([*(FACTORS if n == N_LAYER else [-7.0] * N_LAYER), -7.0, -7.0])


def test_contexts_in_two_threads() -> None:
    """Both decode and change their factors at the same time."""
    start = Barrier(2)

    def decode(context: Context, orders: list[list[float]]) -> list[NDArray[np.float32]]:
        results = []
        for factors in orders:
            context.clear()
            start.wait(timeout=60)
            assert context.set_factors(factors) == 0
            results.append(np.concatenate([context.decode(TOKENS[i : i + 10]) for i in range(0, 60, 10)]))
        return results

    orders = [FACTORS, OTHER, ONES, [2.0] * N_LAYER]
    with Context(file_of(LLAMA, FACTORS)) as first, Context(first) as second, ThreadPoolExecutor(2) as pool:
        there = pool.submit(decode, first, orders)
        back = pool.submit(decode, second, orders[::-1])
        for factors, one, other in zip(orders, there.result(), back.result()[::-1], strict=True):
            np.testing.assert_array_equal(one, other)
            assert relative_error(one, expected(LLAMA, factors)[:60]) < TOLERANCE
        assert first.model_factors(N_LAYER) == pytest.approx(FACTORS)
