"""Small models whose queries can be scaled: blocks of every type of ggml with scales of one's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter, quants
from numpy.typing import NDArray

from support.gguf_fixtures import add_key

Blocks = NDArray[np.uint8]

LAYERS, HEADS, WIDTH, ROWS = 2, 4, 256, 8  # rows of a head
SCALES = ((0.75, 1.0, 1.375, 2.5), (1.0, 1.0, 1.0, 0.0625))

# by name: where a block's scales stand (ggml-common.h); IQ1_M's lies in the highest bits of its last four words
OFFSETS: dict[str, tuple[int, ...]] = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,)},
    **{"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,)},
    **{"IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ1_S": (0,), "IQ1_M": (), "TQ1_0": (52,)},
    **{"TQ2_0": (64,)},
}
PLAIN = ("F16", "BF16", "F32")
HALF = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}


def kind(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


def n_scales(name: str) -> int:
    return len(OFFSETS[name]) or 1


def get_scales(name: str, blocks: Blocks, order: str = "<") -> NDArray[np.float64]:
    """Shape (blocks, scales), of float16 bits in the file's byte order."""
    if name == "IQ1_M":
        words = np.ascontiguousarray(blocks[:, -8:]).view(f"{order}u2").astype(np.uint16)
        bits = words[:, 0] >> 12 | words[:, 1] >> 12 << 4 | words[:, 2] >> 12 << 8 | words[:, 3] >> 12 << 12
        return bits.view(np.float16).astype(np.float64)[:, None]
    found = [np.ascontiguousarray(blocks[:, at : at + 2]).view(f"{order}f2") for at in OFFSETS[name]]
    return np.concatenate(found, 1).astype(np.float64)


def set_scales(name: str, blocks: Blocks, scales: NDArray[Any], order: str = "<") -> None:
    half = np.broadcast_to(scales, (len(blocks), n_scales(name))).astype(np.float16)
    if name == "IQ1_M":
        words, bits = np.ascontiguousarray(blocks[:, -8:]).view(f"{order}u2").astype(np.uint16), half.view(np.uint16)
        for i in range(4):
            words[:, i] = words[:, i] & 0xFFF | (bits[:, 0] >> (4 * i) & 15) << 12
        blocks[:, -8:] = words.astype(f"{order}u2").view(np.uint8)
    for i, at in enumerate(OFFSETS[name]):
        blocks[:, at : at + 2] = np.ascontiguousarray(half[:, i : i + 1]).astype(f"{order}f2").view(np.uint8)


def random_blocks(name: str, n: int, scales: NDArray[Any], seed: int = 0, order: str = "<") -> Blocks:
    """`n` blocks with these scales, broadcast to shape (n, scales of a block); all else is random."""
    size = GGML_QUANT_SIZES[kind(name)][1]
    blocks = np.random.default_rng(seed).integers(0, 256, (n, size), np.uint8)
    set_scales(name, blocks, scales, order)
    return blocks


def parts(name: str, blocks: Blocks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales, shape (blocks, scales), and what each contributes when it is 1, shape (blocks, scales, items).

    Blocks are linear in their scales, so that the sum of the products is what they stand for, in float64.
    """
    units = []
    for i in range(n_scales(name)):
        other = blocks.copy()
        set_scales(name, other, np.eye(n_scales(name))[i])
        units.append(quants.dequantize(other, kind(name)).reshape(len(blocks), -1).astype(np.float64))
    return get_scales(name, blocks), np.stack(units, 1)


def write(
    path: Path, tensors: Mapping[str, tuple[str, NDArray[Any], tuple[int, ...]]], *, architecture: str = "llama",
    layers: int = LAYERS, heads: int | list[int] = HEADS, heads_kv: int | list[int] | None = None,
    keys: Mapping[str, object] | None = None, big_endian: bool = False, shard: tuple[int, int] | None = None,
) -> Path:  # fmt: skip
    """A model of these tensors, of type, data in the file's byte order and shape in items, and one before and after.

    `shard`: its number from 0 on, and of how many.
    """
    if shard is not None:
        path = path.with_name(f"{path.stem}-{shard[0] + 1:05}-of-{shard[1]:05}.gguf")
    writer = GGUFWriter(path, architecture, endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
    if not shard or shard[0] == 0:
        writer.add_block_count(layers)
        writer.add_context_length(512)
        writer.add_embedding_length(WIDTH)
        writer.add_head_count(heads)
        writer.add_head_count_kv(heads if heads_kv is None else heads_kv)
        writer.add_key_length(ROWS)
        writer.add_value_length(ROWS)
        for key, value in (keys or {}).items():
            add_key(writer, key, value)
    if shard:
        writer.add_uint16("split.no", shard[0])
        writer.add_uint16("split.count", shard[1])
    writer.add_tensor(f"first.{shard}", np.arange(37, dtype=np.float32))
    for name, (type_name, data, shape) in tensors.items():
        items, size = GGML_QUANT_SIZES[kind(type_name)]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        raw = raw.reshape(*shape[:-1], shape[-1] // items * size)
        writer.add_tensor(name, raw, raw_dtype=kind(type_name))
    writer.add_tensor(f"last.{shard}", np.arange(41, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def queries(
    name: str = "Q4_0", rows: int = HEADS * ROWS, seed: int = 0, order: str = "<"
) -> tuple[str, NDArray[Any], tuple[int, ...]]:
    """A weight of so many rows."""
    rng = np.random.default_rng(seed)
    if name in PLAIN:
        values = rng.standard_normal((rows, WIDTH), np.float32)
        if name == "BF16":
            return name, (values.view(np.uint32) >> 16).astype(np.uint16), (rows, WIDTH)
        return name, values.astype(np.float16 if name == "F16" else np.float32), (rows, WIDTH)
    n = rows * WIDTH // GGML_QUANT_SIZES[kind(name)][0]
    scales = rng.standard_normal((n, n_scales(name))) * 0.01
    return name, random_blocks(name, n, scales, seed, order), (rows, WIDTH)


def write_queries(path: Path, name: str = "Q4_0", layers: Sequence[int] = range(LAYERS), **options: Any) -> Path:
    """A model with `attn_q.weight` in some layers, and a bias."""
    order = ">" if options.get("big_endian") else "<"
    tensors = {f"blk.{layer}.attn_q.weight": queries(name, seed=layer, order=order) for layer in layers}
    for layer in layers:
        bias = np.random.default_rng(100 + layer).standard_normal(HEADS * ROWS).astype(f"{order}f4")
        tensors[f"blk.{layer}.attn_q.bias"] = ("F32", bias, bias.shape)
    return write(path, tensors, **options)


def raw(path: Path) -> dict[str, Blocks]:
    """All tensors' bytes by name, in rows, as the `gguf` package finds them."""
    return {tensor.name: tensor.data.view(np.uint8).copy() for tensor in GGUFReader(path).tensors}
