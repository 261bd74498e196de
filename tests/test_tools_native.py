"""llama.cpp's own ways of making one model file of another: the factors stay, or the result is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.llama_direct import Context, errors
from support.rope_models import FACTORS, GEMMA3, LLAMA, N_LAYER
from support.tiny_models import write_readable

from lrope_gguf.metadata import read_factors, read_model, write_factors
from lrope_gguf.native import tool_path

pytestmark = pytest.mark.native


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_readable(tmp_path / "tiny.gguf")
    write_factors(path, FACTORS)
    return path


def run(tool: str, *arguments: str | Path) -> str:
    result = subprocess.run(
        [str(tool_path(tool)), *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def refusal(path: Path) -> str:
    with errors() as logged, pytest.raises(OSError, match="not loaded"):
        Context(path)
    return "".join(logged)


@pytest.mark.parametrize("source", [LLAMA, GEMMA3], ids=lambda m: m.name)
@pytest.mark.parametrize("factors", [None, FACTORS, [1.5] * N_LAYER], ids=["none", "distinct", "equal"])
def test_the_saver_keeps_the_array(source: object, factors: list[float] | None, tmp_path: Path) -> None:
    model, saved = write_readable(tmp_path / "a.gguf", source, factors=factors), tmp_path / "saved.gguf"
    with Context(model) as context:
        context.lib.llama_model_save_to_file(context.model, str(saved).encode())
    assert read_factors(saved) == (None if factors is None else pytest.approx(factors))
    with Context(saved) as context:
        assert context.get_factors(N_LAYER) == pytest.approx(factors or [1.0] * N_LAYER)


def test_quantizing_keeps_the_array(model: Path, tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_0"):
        quantized = tmp_path / f"{kind}.gguf"
        run("llama-quantize", "--allow-requantize", model, quantized, kind, "1")
        assert read_factors(quantized) == pytest.approx(FACTORS)
        with Context(quantized) as context:
            assert context.get_factors(N_LAYER) == pytest.approx(FACTORS)


def test_splitting_and_merging_keep_the_array(model: Path, tmp_path: Path) -> None:
    run("llama-gguf-split", "--split", "--split-max-tensors", "20", model, tmp_path / "part")
    (first, *others) = sorted(tmp_path.glob("part-*.gguf"))
    assert others
    with Context(first) as context:
        assert context.get_factors(N_LAYER) == pytest.approx(FACTORS)
    run("llama-gguf-split", "--merge", first, tmp_path / "merged.gguf")
    assert read_factors(tmp_path / "merged.gguf") == pytest.approx(FACTORS)


def test_a_pruned_model_says_that_its_factors_do_not_fit(model: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned.gguf"
    run("llama-quantize", "--allow-requantize", "--prune-layers", "2,3", model, pruned, "Q8_0", "1")
    assert read_model(pruned).block_count == N_LAYER - 2
    message = refusal(pruned)
    assert "llama.rope.scaling.layer_factors has 6 factors, but the model has 4 layers" in message
