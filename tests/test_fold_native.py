"""Folded files in llama.cpp: logits of the same model with its queries' rows, or its keys', multiplied by code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from numpy.typing import NDArray
from support.commands import lrope_gguf
from support.llama_direct import Context
from support.rope_models import (
    GEMMA3,
    HEAD_DIM,
    LLAMA,
    LONGROPE_SHORT,
    N_HEAD,
    N_HEAD_KV,
    N_LAYER,
    QWEN2,
    QWEN3,
    TOKENS,
    TinyModel,
    Weights,
    by_name,
)  # fmt: skip

from lrope_gguf import LropeError, remove_factors, write_factors
from lrope_gguf.fold import Wanted
from lrope_gguf.native import tool_path

pytestmark = pytest.mark.native

GROUP = N_HEAD // N_HEAD_KV
MODELS = (LLAMA, QWEN2, LONGROPE_SHORT, QWEN3, GEMMA3)


def scales(model: TinyModel, groups: bool) -> NDArray[np.float32]:
    """Shape (layers, heads); alike in a layer where queries are normalized, in a KV head's group where `groups`."""
    rng = np.random.default_rng(5)
    n = 1 if model in (QWEN3, GEMMA3) else N_HEAD_KV if groups else N_HEAD
    return np.repeat(rng.uniform(0.4, 2.0, (N_LAYER, n)), N_HEAD // n, 1).astype(np.float32)


def multiplied(model: TinyModel, q: NDArray[np.float32], of: str) -> Weights:
    """The weights with the rows of queries ("q"), or of the KV heads ("k"), times the scales of their heads."""
    weights = {name: value.astype(np.float64) for name, value in model.weights().items()}
    for layer in range(N_LAYER):
        factors = np.repeat(q[layer] if of == "q" else q[layer, ::GROUP], HEAD_DIM).astype(np.float64)
        for part in ("weight", "bias"):
            own, fused = f"blk.{layer}.attn_{of}.{part}", f"blk.{layer}.attn_qkv.{part}"
            norm = f"blk.{layer}.attn_{of}_norm.weight"
            if norm in weights and part == "weight":
                weights[norm] *= factors[0]
            elif own in weights and norm not in weights:
                weights[own] = (weights[own].T * factors).T
            elif fused in weights:
                first = 0 if of == "q" else N_HEAD * HEAD_DIM
                weights[fused][first : first + len(factors)] *= factors[:, None]
    return {name: value.astype(np.float32) for name, value in weights.items()}


def fold(path: Path, q: NDArray[np.float32]) -> None:
    write_factors(path, fold=Wanted(tuple(tuple(map(float, row)) for row in q), "best.json"))


def logits(path: Path, model: TinyModel) -> NDArray[Any]:
    with Context(path, model.n_ctx) as context:
        return np.array(context.decode(TOKENS))


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_folded_is_multiplied(model: TinyModel, tmp_path: Path) -> None:
    q = scales(model, groups=False)
    path = model.write(tmp_path / "m.gguf")
    base = logits(path, model)
    fold(path, q)
    got = logits(path, model)
    wanted = logits(model.write(tmp_path / "q.gguf", weights=multiplied(model, q, "q")), model)
    assert (got == wanted).all() and np.abs(got - base).max() > 0.1
    remove_factors(path)
    assert (logits(path, model) == base).all()


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_queries_of_a_group_are_as_good_as_its_keys(model: TinyModel, tmp_path: Path) -> None:
    """Nothing of where queries stand is taken for granted here: keys are other rows, and other tensors."""
    q = scales(model, groups=True)
    path = model.write(tmp_path / "m.gguf")
    base = logits(path, model)
    fold(path, q)
    wanted = logits(model.write(tmp_path / "k.gguf", weights=multiplied(model, q, "k")), model)
    assert np.abs(logits(path, model) - wanted).max() < 2e-3 * np.abs(wanted - base).max()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
def test_quantized_weights(kind: str, tmp_path: Path) -> None:
    """As near to the multiplied weights as the quantized model is to its own."""
    q, member = scales(LLAMA, groups=False), GGMLQuantizationType[kind]

    def quantized(weights: Weights) -> Weights:
        result: dict[str, Any] = dict(weights)
        for name in weights:
            if ".attn_q." in name:
                result[name] = quants.dequantize(quants.quantize(weights[name], member), member)
        return result

    plain = LLAMA.write(tmp_path / "plain.gguf", weights=quantized(LLAMA.weights()))
    path = _with_types(plain, tmp_path / "m.gguf", member)
    fold(path, q)
    multiplied_ = {
        name: (value.T.astype(np.float64) * np.repeat(q[int(name.split(".")[1])], HEAD_DIM)).T.astype(np.float32)
        if ".attn_q." in name
        else value
        for name, value in quantized(LLAMA.weights()).items()
    }
    wanted = logits(LLAMA.write(tmp_path / "w.gguf", weights=multiplied_), LLAMA)
    got, base = logits(path, LLAMA), logits(plain, LLAMA)
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted - base).max()


def tool(name: str, *arguments: object) -> None:
    subprocess.run([tool_path(name), *map(str, arguments)], check=True, capture_output=True)


def test_copies_by_llama_cpp(tmp_path: Path) -> None:
    """gguf-split leaves the keys in the first file and puts tensors into others; llama-quantize changes weights."""
    q = scales(QWEN2, groups=False)
    path = QWEN2.write(tmp_path / "m.gguf")
    original = {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}
    fold(path, q)
    wanted = logits(path, QWEN2)
    tool("llama-gguf-split", "--split", "--split-max-tensors", 7, path, tmp_path / "s")
    shards = sorted(tmp_path.glob("s-*.gguf"))
    assert len(shards) > 5 and (logits(shards[0], QWEN2) == wanted).all()
    tool("llama-gguf-split", "--merge", shards[0], tmp_path / "merged.gguf")
    for first, files in ((shards[0], shards), (tmp_path / "merged.gguf", [tmp_path / "merged.gguf"])):
        remove_factors(first)
        found = {tensor.name: tensor.data.tobytes() for file in files for tensor in GGUFReader(file).tensors}
        assert found == original
    small = tmp_path / "small.gguf"
    tool("llama-quantize", path, small, "Q8_0")
    assert "for good: blk.0.attn_q.weight has another type now" in lrope_gguf("show", small).stdout
    assert np.abs(logits(small, QWEN2) - wanted).max() < 0.2 * np.abs(wanted).max()
    with pytest.raises(LropeError, match=r"blk\.0\.attn_q\.weight was changed after query scales were folded"):
        remove_factors(small)


def _with_types(source: Path, target: Path, member: GGMLQuantizationType) -> Path:
    """A copy with `attn_q` in another type."""
    import gguf

    reader = GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        data = tensor.data
        if ".attn_q." in tensor.name:
            writer.add_tensor(tensor.name, quants.quantize(np.array(data), member), raw_dtype=member)
        else:
            writer.add_tensor(tensor.name, np.array(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
