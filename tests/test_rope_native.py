"""The patched library against a float64 reference: every RoPE scaling type and mode, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
from support.llama_direct import Context
from support.rope_models import FACTORS, MODELS, N_LAYER, TOKENS, TinyModel, by_name, expected, file_of
from support.rope_reference import TOLERANCE, relative_error

pytestmark = pytest.mark.native


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_factors_of_the_file_equal_the_reference(model: TinyModel) -> None:
    with Context(file_of(model, FACTORS), model.n_ctx) as context:
        assert context.model_factors(N_LAYER) == pytest.approx(FACTORS)
        assert context.get_factors(N_LAYER) == pytest.approx(FACTORS)
        got = context.decode(TOKENS)
    assert relative_error(got, expected(model, FACTORS)) < TOLERANCE
    effect = relative_error(expected(model), expected(model, FACTORS))
    assert effect > 0.1, "the factors must matter, or the test proves nothing"


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_base_equals_the_reference_and_factors_of_one_change_no_bit(model: TinyModel) -> None:
    ones = file_of(model, [1.0] * N_LAYER)
    with Context(file_of(model), model.n_ctx) as base, Context(ones, model.n_ctx) as context:
        assert base.model_factors(N_LAYER) is None and base.get_factors(N_LAYER) == [1.0] * N_LAYER
        got = base.decode(TOKENS)
        np.testing.assert_array_equal(got, context.decode(TOKENS))
    assert relative_error(got, expected(model)) < TOLERANCE
