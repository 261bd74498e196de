"""Factors with RoPE scaling that the context sets, and equal factors against stock scaling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.llama_direct import Context
from support.rope_models import (
    FACTORS,
    GEMMA3,
    IMROPE,
    LINEAR,
    LLAMA,
    LLAMA3,
    MODELS,
    MROPE,
    MROPE_YARN,
    N_LAYER,
    PARTIAL,
    TOKENS,
    YARN,
    YARNS,
    TinyModel,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, Reference, relative_error

pytestmark = pytest.mark.native

NONE, YARN_TYPE = 0, 2
LINEARS = [m for m in MODELS if m not in (*YARNS, MROPE_YARN) and m.arch != "gemma3"]

# what `llama_context_params` is given, and what it makes of the model's Rope
CONTEXTS: dict[str, tuple[TinyModel, dict[str, Any], dict[str, float]]] = {
    "yarn": (
        LLAMA,
        {"rope_scaling_type": YARN_TYPE, "rope_freq_scale": 0.25, "yarn_orig_ctx": 256},
        {"freq_scale": 0.25, "ext_factor": 1.0, "n_ctx_orig": 256},
    ),
    "yarn-divisors": (
        LLAMA3,
        {"rope_scaling_type": YARN_TYPE, "rope_freq_scale": 0.125, "yarn_orig_ctx": 256},
        {"freq_scale": 0.125, "ext_factor": 1.0, "n_ctx_orig": 256},
    ),
    "other-scale": (YARN, {"rope_freq_scale": 0.2}, {"freq_scale": 0.2}),
    "ext-half": (YARN, {"yarn_ext_factor": 0.5}, {"ext_factor": 0.5}),
    "ext-more": (YARN, {"yarn_ext_factor": 1.5}, {"ext_factor": 1.5}),
    "ext-none": (YARN, {"yarn_ext_factor": 0.0, "yarn_attn_factor": 0.9}, {"ext_factor": 0.0, "attn_factor": 0.9}),
    "betas": (YARN, {"yarn_beta_fast": 16.0, "yarn_beta_slow": 3.0}, {"beta_fast": 16.0, "beta_slow": 3.0}),
    "orig-ctx": (YARN, {"yarn_orig_ctx": 2048}, {"n_ctx_orig": 2048}),
    "attn": (LLAMA, {"yarn_attn_factor": 1.1}, {"attn_factor": 1.1}),
    "attn-longrope": (PARTIAL, {"yarn_attn_factor": 1.1}, {"attn_factor": 1.1}),
    "base": (LLAMA, {"rope_freq_base": 50000.0}, {"base": 50000.0}),
    "none": (LINEAR, {"rope_scaling_type": NONE}, {"freq_scale": 1.0}),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_scaling_of_the_context(name: str) -> None:
    model, parameters, changes = CONTEXTS[name]
    ropes = tuple(replace(rope, **changes) for rope in model.config.ropes)  # type: ignore[arg-type]
    reference = Reference(replace(model.config, ropes=ropes), model.weights(), FACTORS).decode(TOKENS)
    with Context(file_of(model, FACTORS), model.n_ctx, **parameters) as context:
        assert relative_error(context.decode(TOKENS), reference) < TOLERANCE
    assert relative_error(expected(model, FACTORS), reference) > 100 * TOLERANCE, "the parameters must matter"


def equal_factors_and_stock_scale(model: TinyModel, factors: list[float], s: float) -> tuple[Any, Any]:
    # the float32 quotient that a model's own scaling would hold
    scale = float(np.float32(model.config.ropes[-1].freq_scale) / np.float32(s))
    with (
        Context(file_of(model), model.n_ctx, rope_freq_scale=scale) as stock,
        Context(file_of(model), model.n_ctx) as context,
    ):
        assert context.set_factors(factors) == 0
        return context.decode(TOKENS), stock.decode(TOKENS)


@pytest.mark.parametrize("s", [0.5, 0.7, 1.3, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("model", LINEARS, ids=by_name)
def test_equal_factors_are_linear_scaling(model: TinyModel, s: float) -> None:
    """Bit for bit where dividing by the factor rounds nothing."""
    got, stock = equal_factors_and_stock_scale(model, [s] * N_LAYER, s)
    if s in (0.5, 2.0, 4.0):
        np.testing.assert_array_equal(got, stock)
    assert relative_error(got, stock.astype(np.float64)) < TOLERANCE
    assert relative_error(expected(model), stock.astype(np.float64)) > 0.1


def test_factors_of_the_global_layers_are_linear_scaling_of_gemma3() -> None:
    """Stock scaling leaves the layers with a window alone, factors reach every layer."""
    factors = [1.0 if window else 2.0 for window in GEMMA3.config.windows]
    got, stock = equal_factors_and_stock_scale(GEMMA3, factors, 2.0)
    np.testing.assert_array_equal(got, stock)


@pytest.mark.parametrize("s", [2, 4])
@pytest.mark.parametrize("model", [MROPE, IMROPE], ids=by_name)
def test_positions_times_the_factor_are_stock_positions_bit_for_bit(model: TinyModel, s: int) -> None:
    """Only M-RoPE lets the positions of a sequence leave gaps; the other modes are in `test_rope_angles`."""
    with Context(file_of(model)) as context:
        stock = context.decode_at(TOKENS, range(len(TOKENS)))
        context.clear()
        wide = context.decode_at(TOKENS, range(0, s * len(TOKENS), s))
        context.clear()
        assert context.set_factors([float(s)] * N_LAYER) == 0
        np.testing.assert_array_equal(context.decode_at(TOKENS, range(0, s * len(TOKENS), s)), stock)
    assert relative_error(wide, stock.astype(np.float64)) > 0.1


@pytest.mark.parametrize("s", [1.5, 2.0, 3.0])
def test_positions_times_the_factor_are_stock_positions_with_yarn(s: float) -> None:
    tokens = TOKENS[::2]
    with Context(file_of(MROPE_YARN)) as context:
        stock = context.decode_at(tokens, range(0, 2 * len(tokens), 2))
        context.clear()
        assert context.set_factors([s] * N_LAYER) == 0
        got = context.decode_at(tokens, [int(2 * i * s) for i in range(len(tokens))])
    assert relative_error(got, stock.astype(np.float64)) < TOLERANCE
