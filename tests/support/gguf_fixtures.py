"""Small GGUF files, written by the `gguf` package: an implementation independent of ours, and so our oracle."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from numpy.typing import NDArray

LAYERS = 4


def write_model(
    path: Path, *, architecture: str = "llama", block_count: int | None = LAYERS, big_endian: bool = False,
    alignment: int | None = None, tensors: int = 3, seed: int = 0, add: Callable[[GGUFWriter], None] | None = None,
    keys: Mapping[str, object] | None = None, shard: int | None = None, context_length: int = 512,
) -> Path:  # fmt: skip
    """A model of random tensors with a small vocabulary; `add` may set more keys, as do `keys`.

    `shard` counts from 0: of two, with a name that says so. Returns where it is.
    """
    if shard is not None:
        path = path.with_name(f"{path.stem}-0000{shard + 1}-of-00002.gguf")
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture, endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
    writer.add_name("Tiny")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    if block_count is not None:
        writer.add_block_count(block_count)
    writer.add_context_length(context_length)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"tok{i}" * (i % 5) for i in range(300)])
    writer.add_token_scores([float(i) for i in range(300)])
    if shard is not None:
        writer.add_uint16("split.no", shard)
        writer.add_uint16("split.count", 2)
    for key, value in (keys or {}).items():
        add_key(writer, key, value)
    if add is not None:
        add(writer)
    return finish(
        writer, {f"blk.{i}.weight": rng.standard_normal((i + 1, 37), dtype=np.float32) for i in range(tensors)}
    )


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """A string, a bool, an int (uint32), a float (float32) or an array."""
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add.get(type(value), writer.add_array)(key, value)


def finish(writer: GGUFWriter, tensors: Mapping[str, NDArray[np.float32]]) -> Path:
    """Add the tensors, write all to the disk, and return the file."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def read_keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def read_tensors(path: Path) -> dict[str, bytes]:
    """All tensors' bytes as the `gguf` package reads them."""
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def u32(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "I", value)


def u64(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "Q", value)


def string(data: bytes, order: str = "<") -> bytes:
    return u64(len(data), order) + data


def header(pairs: bytes, n_keys: int, *, n_tensors: int = 0, version: int = 3, order: str = "<") -> bytes:
    """A file made by hand, for what the package refuses to write."""
    return b"GGUF" + struct.pack(order + "IQQ", version, n_tensors, n_keys) + pairs


def text_pair(key: str, value: str, order: str = "<") -> bytes:
    return string(key.encode(), order) + u32(8, order) + string(value.encode(), order)


def number_pair(key: str, value: int, order: str = "<") -> bytes:
    return string(key.encode(), order) + struct.pack(order + "II", 4, value)
