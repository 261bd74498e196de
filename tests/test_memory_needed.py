"""Memory foreseen without loading a model, against what llama.cpp logs when it allocates it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from support import rope_models as models
from support.arch_models import FIXTURES, HEAD, N_HEAD, LeanModel
from support.rope_models import GEMMA3, LLAMA, WIDE_32, WIDE_64, TinyModel, by_name, file_of
from support.tiny_models import write_readable

from lrope_gguf.errors import LropeError
from lrope_search.evaluation import binding as binding_module
from lrope_search.evaluation import model as model_module
from lrope_search.evaluation.memory import MemoryNeeded, memory_needed
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.settings import CACHE_TYPES, FLOAT_TYPES

native = pytest.mark.native
_BUFFER = re.compile(r"(KV|compute|output) buffer size = +([\d.]+) MiB")


F16 = ("f16", "f16")
SEVERAL = [LLAMA, models.QWEN2, models.QWEN3, GEMMA3, WIDE_64, models.LONGROPE_SHORT, models.MROPE]


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
    path: Path, monkeypatch: pytest.MonkeyPatch, n_ctx: int, n_seq: int, n_batch: int, flash: bool,
    types: tuple[str, str] = F16,
) -> None:  # fmt: skip
    found = allocated(path, n_ctx, n_seq, n_batch, flash, types, monkeypatch)
    predicted = needed(path, n_ctx, n_seq, n_batch=n_batch, flash_attention=flash, types=types)
    assert predicted.kv_cache == pytest.approx(found["KV"], abs=2**14)  # the log's rounding
    assert found["KV"] > 0
    assert predicted.compute == pytest.approx(found["compute"] + found["output"], abs=2**15)


def needed(path: Path, n_ctx: int, n_seq: int = 12, *, types: tuple[str, str] = F16, **settings: Any) -> MemoryNeeded:
    """What is said of a model of which nothing is loaded."""
    options = {"cache_type_k": types[0], "cache_type_v": types[1]}
    with Model(path, n_threads=1, chat=False, llama_options=options, weights=False, **settings) as model:
        return memory_needed(model, n_ctx, n_seq)


@native
@pytest.mark.parametrize("model", SEVERAL, ids=by_name)
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
    check(file_of(model), monkeypatch, 4000, 40, 512, of_v not in FLOAT_TYPES, (of_k, of_v))


@native
@pytest.mark.parametrize(
    ("types", "reason"),
    [
        (("f16", "q8_0"), "V cache type q8_0 with block size 32 does not divide n_embd_head_v=16"),
        (("q4_0", "f16"), "K cache type q4_0 with block size 32 does not divide n_embd_head_k=16"),
    ],
)
def test_types_of_the_cache_that_a_model_cannot_have(tmp_path: Path, types: tuple[str, str], reason: str) -> None:
    path = write_readable(tmp_path / "m.gguf", LLAMA)
    assert needed(path, 256, types=("bf16", "f32")).kv_cache > needed(path, 256).kv_cache
    message = f"{path}: cannot make a context of 256 tokens with cache_type_k={types[0]} and cache_type_v={types[1]}: "
    with pytest.raises(LropeError, match=f"^{re.escape(message + reason)}$"):
        needed(path, 256, types=types, flash_attention=True)


@native
def test_the_cache_counts_layers_heads_and_cells(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "m.gguf", LLAMA)
    c = LLAMA.config
    for n_ctx, cells in ((1, 256), (256, 256), (257, 512)):
        assert needed(path, n_ctx).kv_cache == cells * c.n_layer * 2 * c.n_head_kv * c.head_dim * 2
    one = needed(path, 1)
    tensors = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert one.weights + one.own_weights == pytest.approx(tensors, rel=0.05)  # each is aligned
    assert one.of_workers(3) == one.weights + 3 * one.per_worker


@native
def test_recurrent_layers_keep_a_state_for_each_sequence(tmp_path: Path) -> None:
    """A hybrid: every second layer attends, the others keep what llama.cpp's own log says."""
    with LeanModel(FIXTURES["qwen3next"], tmp_path):
        path = tmp_path / "qwen3next.gguf"
    few, many = (needed(path, 256, n_seq).kv_cache for n_seq in (1, 5))
    cells = 256 * 3 * 2 * N_HEAD * HEAD * 2
    assert few - cells == (many - cells) / 5 > 0


@native
def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(first, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LropeError, match=r"m-00001-of-00002\.gguf: cannot load: "):
        needed(first, 256)
