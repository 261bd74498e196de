"""Predicted memory against what llama.cpp says that it allocates."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
from support.rope_models import (
    GEMMA3,
    LLAMA,
    LONGROPE_SHORT,
    MROPE,
    QWEN2,
    QWEN3,
    WIDE_32,
    WIDE_64,
    TinyModel,
    by_name,
    file_of,
)
from support.tiny_models import write_readable

from lrope_gguf.errors import LropeError
from lrope_search.evaluation import binding as binding_module
from lrope_search.evaluation import model as model_module
from lrope_search.evaluation.memory import MemoryNeeded, check_cache_types, memory_needed
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.settings import CACHE_TYPES

native = pytest.mark.native
_BUFFER = re.compile(r"(KV|compute|output) buffer size = +([\d.]+) MiB")


F16 = ("f16", "f16")


def allocated(
    path: Path, n_ctx: int, n_seq: int, n_batch: int, flash: bool, types: tuple[str, str], patch: pytest.MonkeyPatch
) -> dict[str, int]:
    """Bytes by kind of buffer, from llama.cpp's log."""
    lines: list[str] = []
    log = binding_module.Log.__call__

    def keep(self: binding_module.Log, level: int, text: bytes, data: object) -> None:
        lines.append(text.decode())
        log(self, level, text, data)

    patch.setattr(binding_module.Log, "__call__", keep)
    options = {"cache_type_k": types[0], "cache_type_v": types[1]}
    with Model(path, n_threads=1, chat=False, n_batch=n_batch, flash_attention=flash, llama_options=options) as model:
        model.reserve(n_ctx, n_seq)
        # the buffer for logits that are read grows to so many rows when they are first asked for, unlogged
        logits = 4 * model.n_vocab * min(max(model_module.MAX_OUTPUTS, n_seq), n_batch)
    sizes = dict.fromkeys(("KV", "compute", "output"), 0)
    for kind, size in _BUFFER.findall("".join(lines)):
        sizes[kind] += round(float(size) * 2**20)
    sizes["output"] = max(sizes["output"], logits)
    return sizes


def check(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_ctx: int,
    n_seq: int,
    n_batch: int,
    flash: bool,
    types: tuple[str, str] = F16,
) -> None:
    found = allocated(path, n_ctx, n_seq, n_batch, flash, types, monkeypatch)
    predicted = memory_needed(path, n_ctx, n_seq=n_seq, n_batch=n_batch, flash_attention=flash, cache_types=types)
    assert predicted.kv_cache == pytest.approx(found["KV"], abs=2**14)  # the log's rounding
    assert found["KV"] > 0
    computing = found["compute"] + found["output"]
    assert computing <= predicted.compute <= 2 * computing + 2**20, (computing, predicted.compute)


@native
@pytest.mark.parametrize("model", [LLAMA, QWEN2, QWEN3, GEMMA3, WIDE_64, LONGROPE_SHORT, MROPE], ids=by_name)
@pytest.mark.parametrize(
    ("n_ctx", "n_seq", "n_batch", "flash"), [(300, 5, 64, False), (1500, 12, 512, True), (4000, 40, 512, False)]
)
def test_prediction_covers_what_is_allocated(
    model: TinyModel, n_ctx: int, n_seq: int, n_batch: int, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(file_of(model), monkeypatch, n_ctx, n_seq, n_batch, flash)


@native
@pytest.mark.parametrize("model", [WIDE_32, WIDE_64], ids=by_name)
@pytest.mark.parametrize("of_v", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("of_k", CACHE_TYPES)
def test_prediction_follows_the_types_of_the_cache(
    model: TinyModel, of_k: str, of_v: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 64 are quantized through a rotation, heads of 32 as they are."""
    check(file_of(model), monkeypatch, 300, 5, 64, True, (of_k, of_v))
    if CACHE_TYPES[of_v][0] == 1:
        check(file_of(model), monkeypatch, 4000, 40, 512, False, (of_k, of_v))
    else:
        check(file_of(model), monkeypatch, 4000, 40, 512, True, (of_k, of_v))


def test_types_of_the_cache_that_a_model_cannot_have(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "m.gguf", LLAMA)
    check_cache_types(path, ("bf16", "f32"))
    with pytest.raises(LropeError, match=r"^--cache-type-v q8_0: has blocks of 32 .* m?.*\.gguf have 16; give f16"):
        check_cache_types(path, ("f16", "q8_0"))
    latent = {"attention__key_length": 64, "attention__key_length_mla": 32, "attention__value_length": 64}
    path = header(tmp_path / "latent.gguf", "deepseek2", **COMMON, **latent, attention__head_count=2)
    check_cache_types(path, ("q8_0", "q8_0"))
    with pytest.raises(LropeError, match=r"--cache-type-k q8_0: .*keeps values in its keys"):
        check_cache_types(path, ("q8_0", "f16"))
    path = header(tmp_path / "grok.gguf", "grok", **COMMON, attention__head_count=2)
    check_cache_types(path, ("q8_0", "f16"))
    with pytest.raises(LropeError, match="--cache-type-v q4_0: needs flash attention"):
        check_cache_types(path, ("f16", "q4_0"))


def test_the_cache_counts_layers_heads_and_cells(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "m.gguf", LLAMA)
    c = LLAMA.config
    for n_ctx, cells in ((1, 256), (256, 256), (257, 512)):
        assert memory_needed(path, n_ctx).kv_cache == cells * c.n_layer * 2 * c.n_head_kv * c.head_dim * 2
    needed = memory_needed(path, 1)
    assert needed.weights == path.stat().st_size - gguf.GGUFReader(path).data_offset
    assert needed.total == needed.weights + needed.kv_cache + needed.compute
    assert needed.of_workers(3) == needed.weights + 3 * needed.per_worker
    assert needed.of_workers(3, shared_weights=False) == 3 * needed.total


def header(path: Path, arch: str, **keys: int | list[int]) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = f"{arch}.{key.replace('__', '.')}"
        writer.add_array(name, value) if isinstance(value, list) else writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


COMMON = {"block_count": 4, "embedding_length": 64, "feed_forward_length": 128, "vocab_size": 1000}


def cache(path: Path, n_ctx: int = 256, n_seq: int = 1) -> int:
    return memory_needed(path, n_ctx, n_seq=n_seq).kv_cache


def test_layers_that_differ(tmp_path: Path) -> None:
    """Facts of llama.cpp's caches that the tiny models do not show."""
    name = tmp_path / "m.gguf"
    per_head = 256 * 2 * 16 * 2  # cells, keys and values, length of a head, bytes
    path = header(name, "llama", **COMMON, attention__head_count=4)
    assert cache(path) == 4 * 4 * per_head
    path = header(name, "openelm", **COMMON, attention__head_count=4, attention__head_count_kv=[1, 2, 2, 4])
    assert cache(path) == 9 * per_head
    path = header(name, "gemma4", **COMMON, attention__head_count=4, attention__shared_kv_layers=1)
    assert cache(path) == 3 * 4 * per_head
    # hybrid: one layer of two attends, the other keeps a state for each sequence
    hybrid = {"ssm__inner_size": 128, "ssm__state_size": 16, "ssm__conv_kernel": 4, "ssm__group_count": 2}
    state = 3 * (128 + 2 * 2 * 16) + 128 * 16
    path = header(name, "qwen3next", **COMMON, **hybrid, attention__head_count=4, full_attention_interval=2)
    assert cache(path, n_seq=5) == 2 * 4 * per_head + 2 * 5 * state * 4
    path = header(name, "jamba", **COMMON, **hybrid, attention__head_count=4, attention__head_count_kv=[0, 4, 0, 4])
    assert cache(path, n_seq=5) == 2 * 4 * per_head + 2 * 5 * state * 4
    # latent attention: one row of 48 for keys, which holds the values too
    latent = {"attention__key_length": 48, "attention__key_length_mla": 24, "attention__head_count_kv": 1}
    path = header(name, "deepseek2", **COMMON, **latent, attention__head_count=4)
    assert cache(path) == 4 * 256 * 48 * 2


def test_shards_count_together_and_must_be_there(tmp_path: Path) -> None:
    first = header(tmp_path / "m-00001-of-00002.gguf", "llama", **COMMON)
    writer = gguf.GGUFWriter(first, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LropeError, match=r"m-00002-of-00002\.gguf: no such file, but .* of 2 shards"):
        memory_needed(first, 256)
    before = 12345
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"x" * before)
    assert memory_needed(first, 256).weights >= before


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(LropeError, match=r"magic|GGUF"):
        memory_needed(tmp_path / "text.gguf", 256)
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LropeError, match="no number of layers"):
        memory_needed(tmp_path / "empty.gguf", 256)
    assert MemoryNeeded(1, 2, 3).total == 6
