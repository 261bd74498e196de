"""The weights of a GGUF file as numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from lrope_gguf.errors import LropeError

Tensor = Any

_EXACT = ("F32", "F16", "BF16")
_BLOCKS_OF_256 = re.compile(r"Q\d_K|I?Q\d_[XMSN]+|IQ4_XS|TQ\d_0")


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
        try:
            shards = _shards(self._path)
            self._tensors = {t.name: t for shard in shards for t in GGUFReader(shard).tensors}
            self.n_bytes_of_files = sum(shard.stat().st_size for shard in shards)
        except (OSError, ValueError, KeyError) as error:
            raise LropeError(f"{path}: its weights cannot be read ({error})") from error
        self._values: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return the values, shape (1, 1, rows, columns) or with more of the first axes."""
        if name not in self._values:
            tensor = self._tensors[name]
            try:
                values = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise LropeError(
                    f"{self._path}: {name} is {kind}, which gguf cannot dequantize; no gradients"
                ) from error
            shape = (1,) * (4 - values.ndim) + values.shape
            array = np.array(values, np.float32, order="C").reshape(shape)  # a copy: the file's own is read-only
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
        return int(self._tensors[name].n_elements) * int(self.dtype.itemsize)

    def activation_block(self, name: str) -> int | None:
        """Return how many activations share a scale when llama.cpp multiplies them by this tensor in 8 bits.

        None where it does not round them: its numbers are no integers.
        """
        kind: GGMLQuantizationType = self._tensors[name].tensor_type
        if kind.name in _EXACT:
            return None
        return 256 if _BLOCKS_OF_256.fullmatch(kind.name) else 32


def _shards(path: Path) -> list[Path]:
    match = re.search(r"-00001-of-(\d{5})\.gguf$", path.name)
    if match is None:
        return [path]
    return [
        path.with_name(f"{path.name[: match.start()]}-{i:05d}-of-{match[1]}.gguf") for i in range(1, int(match[1]) + 1)
    ]
