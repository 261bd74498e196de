"""The patched library against a float64 reference: every claim about rotation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_direct import GGML_TYPE_F16, Context
from rope_models import FACTORS, GEMMA3, LLAMA, MODELS, N_LAYER, N_VOCAB, QWEN2, SHIFTABLE, YARN, TinyModel
from rope_reference import Reference

pytestmark = pytest.mark.native

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, N_VOCAB, 150)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def file_of(model: TinyModel, folder: Path, factors: list[float] | None = None) -> Path:
    path = folder / f"{model.name}{'' if factors is None else '-' + '-'.join(map(str, factors))}.gguf"
    return path if path.exists() else model.write(path, factors)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation of a logit, relative to the spread of that token's logits."""
    return float(np.max(np.abs(got - expected) / np.std(expected, axis=-1, keepdims=True)))


def by_name(model: TinyModel) -> str:
    return model.name


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_factors_of_the_file_equal_the_reference(model: TinyModel, folder: Path) -> None:
    expected = Reference(model.config, model.weights(), FACTORS).decode(TOKENS)
    with Context(file_of(model, folder, FACTORS)) as context:
        assert context.model_factors(N_LAYER) == pytest.approx(FACTORS)
        assert context.get_factors(N_LAYER) == pytest.approx(FACTORS)
        got = context.decode(TOKENS)
    assert relative_error(got, expected) < 1e-4
    base = Reference(model.config, model.weights()).decode(TOKENS)
    assert relative_error(base, expected) > 0.1, "the factors must matter, or the test proves nothing"


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_base_equals_the_reference(model: TinyModel, folder: Path) -> None:
    with Context(file_of(model, folder)) as context:
        assert context.model_factors(N_LAYER) is None
        assert context.get_factors(N_LAYER) == [1.0] * N_LAYER
        assert relative_error(context.decode(TOKENS), Reference(model.config, model.weights()).decode(TOKENS)) < 1e-4


@pytest.mark.parametrize("model", MODELS, ids=by_name)
@pytest.mark.parametrize("layer", [0, 2, N_LAYER - 1])
def test_one_layer_alone(model: TinyModel, layer: int, folder: Path) -> None:
    factors = [1.7 if il == layer else 1.0 for il in range(N_LAYER)]
    with Context(file_of(model, folder)) as context:
        assert context.set_factors(factors) == 0
        got = context.decode(TOKENS[:60])
    assert relative_error(got, Reference(model.config, model.weights(), factors).decode(TOKENS[:60])) < 1e-4


@pytest.mark.parametrize("model", SHIFTABLE, ids=by_name)
@pytest.mark.parametrize("flash", [False, True])
def test_context_shift_equals_the_reference(model: TinyModel, flash: bool, folder: Path) -> None:
    n, start, stop = 90, 5, 37
    # the first tokens must still be cached when they are removed; a sliding window forgets them otherwise
    reference = Reference(model.config, model.weights(), FACTORS)
    reference.decode(TOKENS[:n])
    reference.remove(start, stop)
    expected = reference.decode(TOKENS[n : n + 20])
    with Context(file_of(model, folder, FACTORS), flash=flash, swa_full=True) as context:
        context.decode(TOKENS[:n])
        context.shift(start, stop)
        got = context.decode(TOKENS[n : n + 20])
    # ggml's flash attention computes in float16 on the CPU
    assert relative_error(got, expected) < (3e-2 if flash else 1e-4)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_factors_of_one_change_no_bit(model: TinyModel, folder: Path) -> None:
    with Context(file_of(model, folder)) as base, Context(file_of(model, folder, [1.0] * N_LAYER)) as ones:
        np.testing.assert_array_equal(base.decode(TOKENS), ones.decode(TOKENS))


@pytest.mark.parametrize("model", [LLAMA, QWEN2], ids=by_name)
def test_uniform_power_of_two_equals_stock_linear_scaling_bit_for_bit(model: TinyModel, folder: Path) -> None:
    with Context(file_of(model, folder), rope_freq_scale=0.5) as stock, Context(file_of(model, folder)) as context:
        assert context.set_factors([2.0] * N_LAYER) == 0
        np.testing.assert_array_equal(context.decode(TOKENS), stock.decode(TOKENS))


@pytest.mark.parametrize("model", [LLAMA, GEMMA3], ids=by_name)
def test_runtime_change_is_exact_and_forgets_nothing(model: TinyModel, folder: Path) -> None:
    """Same batch shape each time, so that the graph of the step before would be reused if nothing forbade it."""
    other = FACTORS[::-1]
    with Context(file_of(model, folder, FACTORS)) as context:
        first = context.decode(TOKENS)
        results = []
        for factors in (other, [1.0] * N_LAYER, None, other):
            context.clear()
            assert context.set_factors(factors) == 0
            results.append(context.decode(TOKENS))
    for factors, got in zip((other, [1.0] * N_LAYER, FACTORS, other), results, strict=True):
        assert relative_error(got, Reference(model.config, model.weights(), factors).decode(TOKENS)) < 1e-4
    np.testing.assert_array_equal(results[2], first)
    np.testing.assert_array_equal(results[1 - 2], results[0])


def test_runtime_change_between_single_tokens_rebuilds_the_graph(folder: Path) -> None:
    with Context(file_of(LLAMA, folder)) as context:
        for factors in ([1.0] * N_LAYER, FACTORS, [1.5] * N_LAYER):
            context.clear()
            assert context.set_factors(factors) == 0
            got = np.concatenate([context.decode([t]) for t in TOKENS[:40]])
            assert relative_error(got, Reference(LLAMA.config, LLAMA.weights(), factors).decode(TOKENS[:40])) < 1e-4


def test_runtime_refusals(folder: Path) -> None:
    with Context(file_of(LLAMA, folder)) as context:
        assert context.set_factors(FACTORS[:-1]) == -1
        for bad in (0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-40):
            assert context.set_factors([*FACTORS[:-1], bad]) == -2, bad
        assert context.get_factors(N_LAYER) == [1.0] * N_LAYER
        context.decode(TOKENS[:4])
        assert context.set_factors(FACTORS) == -3
        context.clear()
        assert context.set_factors(FACTORS) == 0


def test_yarn_refuses_a_factor_at_its_frequency_scale(folder: Path) -> None:
    with Context(file_of(YARN, folder)) as context:
        assert context.set_factors([0.25, *FACTORS[1:]]) == -2
        assert context.set_factors([0.3, *FACTORS[1:]]) == 0


@pytest.mark.parametrize("model", [LLAMA, GEMMA3, YARN], ids=by_name)
def test_sequence_copy_and_cut_batches(model: TinyModel, folder: Path) -> None:
    expected = Reference(model.config, model.weights(), FACTORS).decode(TOKENS[:60])
    with Context(file_of(model, folder, FACTORS), n_seq_max=3, kv_unified=True, swa_full=True) as context:
        for start in range(0, 40, 7):
            context.decode(TOKENS[start : min(start + 7, 40)], start=start)
        for sequence in (1, 2):
            context.lib.llama_memory_seq_cp(context.memory, 0, sequence, -1, -1)
            got = context.decode(TOKENS[40:60], sequence, start=40)
            assert relative_error(got, expected[40:]) < 1e-4


@pytest.mark.parametrize("model", [LLAMA, GEMMA3], ids=by_name)
def test_f16_cache_and_flash_attention_stay_close(model: TinyModel, folder: Path) -> None:
    expected = Reference(model.config, model.weights(), FACTORS).decode(TOKENS)
    with Context(file_of(model, folder, FACTORS), type_kv=GGML_TYPE_F16, flash=True) as context:
        assert relative_error(context.decode(TOKENS), expected) < 3e-2


def bad_file(folder: Path, name: str, add: object) -> Path:
    """The llama model with something else under the key."""
    source = gguf.GGUFReader(file_of(LLAMA, folder))
    path = folder / f"bad-{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        writer.add_key_value(field.name, field.contents(), field.types[0])
    add(writer)  # type: ignore[operator]
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEY = "llama.rope.scaling.layer_factors"
BAD = {
    "short": (
        lambda w: w.add_array(KEY, [1.5] * (N_LAYER - 1)),
        f"has {N_LAYER - 1} factors, but the model has {N_LAYER}",
    ),
    "long": (lambda w: w.add_array(KEY, [1.5] * (N_LAYER + 1)), f"has {N_LAYER + 1} factors"),
    "scalar": (lambda w: w.add_float32(KEY, 1.5), "must be an array of float32"),
    "integers": (lambda w: w.add_array(KEY, [1] * N_LAYER), "must be an array of float32"),
    "nan": (lambda w: w.add_array(KEY, [1.5, 1.5, float("nan"), 1.5, 1.5, 1.5]), "layer 2"),
    "zero": (lambda w: w.add_array(KEY, [0.0] + [1.5] * (N_LAYER - 1)), "layer 0"),
    "negative": (lambda w: w.add_array(KEY, [1.5] * (N_LAYER - 1) + [-1.5]), "layer 5"),
    "huge": (lambda w: w.add_array(KEY, [1.5] * (N_LAYER - 1) + [1e30]), "layer 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_refused_with_the_key_and_the_layer(name: str, folder: Path) -> None:
    add, message = BAD[name]
    path = bad_file(folder, name, add)
    # a process of its own: llama.cpp writes its errors to the standard error stream
    code = f"import llama_direct, pathlib; llama_direct.Context(pathlib.Path({str(path)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "not loaded" in result.stderr
    assert KEY in result.stderr and message in result.stderr
