"""What stands in a generated key-value context: a kind of keys and values."""

from __future__ import annotations

import uuid
from types import MappingProxyType
from typing import Protocol

import numpy as np


class Identifiers(Protocol):
    """A kind of keys and values."""

    @property
    def most(self) -> int | None:
        """Distinct keys that there are, None if as many as wanted."""
        ...

    @property
    def description(self) -> str:
        """What keys and values look like, in a few words."""
        ...

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of key and value, their keys distinct; only ``generator`` decides."""
        ...


class Uuids:
    """Keys and values are random UUIDs (version 4), as in the benchmark."""

    most = None
    description = "36 characters each"

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of UUIDs."""
        data = generator.bytes(32 * n)
        ids = [str(uuid.UUID(bytes=data[i : i + 16], version=4)) for i in range(0, len(data), 16)]
        return list(zip(ids[::2], ids[1::2], strict=True))


class Numbers:
    """Keys of four digits and values of three, for models too small to copy a UUID."""

    most = 9000
    description = "three and four digits, for small models"

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of numbers, at most `most`."""
        keys = generator.choice(self.most, n, replace=False) + 1000
        values = generator.integers(100, 1000, n)
        return [(str(key), str(value)) for key, value in zip(keys, values, strict=True)]


IDENTIFIERS: MappingProxyType[str, Identifiers] = MappingProxyType({"uuid": Uuids(), "number": Numbers()})
"""The kinds by their names on the command line; the first is the default."""
