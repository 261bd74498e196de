"""The weights of a GGUF file as numbers."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import GGUFFile

Tensor = Any

_EXACT = ("F32", "F16", "BF16")
_BLOCKS_OF_256 = re.compile(r"Q\d_K|I?Q\d_[XMSN]+|IQ4_XS|TQ\d_0")


class _Stored(NamedTuple):
    """A tensor of a file."""

    path: Path
    begin: int
    """Of its data, in the file."""
    kind: int
    """enum ggml_type."""
    shape: tuple[int, ...]
    """As NumPy orders it."""


class Weights:
    """Tensors by name, dequantized when they are first asked for and kept.

    Args:
        path: The file; of a split model its first shard.
        dtype: Of torch, in which the weights are kept.
        device: Of torch.

    Attributes:
        n_bytes_of_files: What the files take.

    Raises:
        LropeError: a file that cannot be read, or a type of numbers that nobody here can read.
    """

    def __init__(self, path: Path | str, *, dtype: Any = torch.float32, device: Any = "cpu") -> None:
        self._path, self.dtype, self.device = Path(path), dtype, torch.device(device)
        shards = _shards(self._path)
        self._tensors = {name: tensor for shard in shards for name, tensor in _stored(shard)}
        self.n_bytes_of_files = sum(shard.stat().st_size for shard in shards)
        self._values: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return the values, shape (1, 1, rows, columns) or with more of the first axes."""
        if name not in self._values:
            tensor = self._tensors[name]
            try:
                kind = GGMLQuantizationType(tensor.kind)
                n_items, n_bytes = GGML_QUANT_SIZES[kind]
                *rows, columns = tensor.shape
                shape = *rows, columns // n_items * n_bytes
                data = np.memmap(tensor.path, np.uint8, "r", tensor.begin, shape)
                values = dequantize(data, kind)
            except (NotImplementedError, ValueError, KeyError, OSError) as error:
                raise LropeError(
                    f"{self._path}: {name} is of type {tensor.kind}, which gguf cannot dequantize: {error}"
                ) from error
            array = np.array(values, np.float32, order="C").reshape(
                (1,) * (4 - values.ndim) + values.shape
            )  # a copy: the file's own is read-only
            self._values[name] = torch.from_numpy(array).to(self.device, self.dtype)
        return self._values[name]

    @property
    def n_bytes(self) -> int:
        """Memory that all of them take, from the header alone."""
        return sum(map(self._size, self._tensors))

    @property
    def n_bytes_missing(self) -> int:
        """What of it is not taken yet."""
        return sum(self._size(name) for name in self._tensors if name not in self._values)

    def _size(self, name: str) -> int:
        return math.prod(self._tensors[name].shape) * int(self.dtype.itemsize)

    def activation_block(self, name: str) -> int | None:
        """Return how many activations share a scale when llama.cpp multiplies them by this tensor in 8 bits.

        None where it does not round them: its numbers are no integers.
        """
        kind = GGMLQuantizationType(self._tensors[name].kind)
        if kind.name in _EXACT:
            return None
        return 256 if _BLOCKS_OF_256.fullmatch(kind.name) else 32


def _stored(path: Path) -> Iterator[tuple[str, _Stored]]:
    """Read the tensors' descriptions; gguf's own reader takes a minute for a large vocabulary."""
    with GGUFFile(path) as file:
        data, place = file.read(file.kv_end, file.info_end), 0

        def take(code: str) -> tuple[Any, ...]:
            nonlocal place
            values = struct.unpack_from(file.order + code, data, place)
            place += struct.calcsize(file.order + code)
            return values

        for _ in range(file.n_tensors):
            (length,) = take("Q")
            (name,) = take(f"{length}s")
            (n_dims,) = take("I")
            *dims, kind, offset = take(f"{n_dims}QIQ")
            yield (
                name.decode(errors="surrogateescape"),
                _Stored(path, file.data_start + offset, kind, (*reversed(dims),)),
            )


def _shards(path: Path) -> list[Path]:
    match = re.search(r"-00001-of-(\d{5})\.gguf$", path.name)
    if match is None:
        return [path]
    return [
        path.with_name(f"{path.name[: match.start()]}-{i:05d}-of-{match[1]}.gguf") for i in range(1, int(match[1]) + 1)
    ]
