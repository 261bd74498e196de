"""Without factors the patched library computes what the unpatched one of the same source computes, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import off_is_off
from support.rope_models import FACTORS, LLAMA

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def stock() -> Path:
    folder = os.environ.get("LROPE_STOCK_LIB")
    if folder is None:
        message = "LROPE_STOCK_LIB is not set to the folder of an unpatched library (python proofs/native.py stock)"
        if os.environ.get("LROPE_REQUIRE_NATIVE"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(folder)


@pytest.fixture(scope="module")
def patched() -> Path:
    from llama_cpp import llama_cpp

    return Path(llama_cpp._base_path)


@pytest.fixture(scope="module")
def comparisons(stock: Path, patched: Path, tmp_path_factory: pytest.TempPathFactory) -> list[off_is_off.Comparison]:
    models = off_is_off.tiny_models(tmp_path_factory.mktemp("models"))
    return off_is_off.compare(models[::4], stock, patched)


def test_at_least_four_models_and_two_context_lengths(comparisons: list[off_is_off.Comparison]) -> None:
    assert len({c.model for c in comparisons}) >= 4 and len({c.n_ctx for c in comparisons}) >= 2
    for c in comparisons:
        # prompt, single tokens, and the tokens after a context shift
        assert sum(step.tokens for step in c.stock) == c.n_ctx + off_is_off.N_SHIFT
        assert min(step.nodes for step in c.stock) > 50


def test_logits_are_equal_bit_for_bit(comparisons: list[off_is_off.Comparison]) -> None:
    assert not [(c.model, c.n_ctx) for c in comparisons if not c.same_logits]


def test_graphs_are_equal_node_by_node(comparisons: list[off_is_off.Comparison]) -> None:
    assert not [(c.model, c.n_ctx) for c in comparisons if not c.same_graphs]


def test_factors_change_the_logits_and_add_no_node(stock: Path, patched: Path, tmp_path: Path) -> None:
    model = LLAMA.write(tmp_path / "factors.gguf", FACTORS)
    (comparison,) = off_is_off.compare([model], stock, patched, [64])
    assert not comparison.same_logits
    assert comparison.same_graphs
