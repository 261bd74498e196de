"""Single values of a GGUF file apart from where they stand, and a header as it would be with some of them changed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from lrope_gguf.gguf_scan import FLOAT32, INTEGERS, SCALARS, STRING, UINT32, GGUFFile

MAX_TEXT = 4096


class Values(Protocol):
    """A header's values, as `GGUFFile` gives them."""

    def scalar(self, key: str) -> int | float | bool | None:
        """The number of `key`; None where it is absent or no number."""

    def integer(self, key: str) -> int | None:
        """The number of `key` where it has an integer type, else None."""

    def text(self, key: str) -> str | None:
        """The string of `key`; None where it is absent or no string."""

    def has(self, key: str) -> bool:
        """Whether there is such a key, of whatever type."""


class Value(NamedTuple):
    """A number or a string: its GGUF type, and its bytes in the file's order; of a string those of the text alone."""

    kind: int
    data: bytes

    @classmethod
    def of(cls, order: str, value: str | int | float) -> Value:
        """A string, uint32 or float32, as `value` is a str, int or float."""
        if isinstance(value, str):
            return cls(STRING, value.encode())
        if isinstance(value, int):
            return cls(UINT32, struct.pack(order + "I", value))
        return cls(FLOAT32, struct.pack(order + "f", value))

    def python(self, order: str) -> str | int | float | bool:
        """The value; a string with replacement characters where it is not UTF-8."""
        if self.kind == STRING:
            return self.data.decode(errors="replace")
        value: int | float | bool = struct.unpack(order + SCALARS[self.kind], self.data)[0]
        return value

    def swapped(self) -> Value:
        """The same value in the other byte order."""
        return self if self.kind == STRING else Value(self.kind, self.data[::-1])

    def entry(self, order: str, key: str) -> bytes:
        """A key with this value, as it stands in a file."""
        length = struct.pack(order + "Q", len(self.data)) if self.kind == STRING else b""
        return (
            string(order, key.encode(errors="surrogateescape"))
            + struct.pack(order + "I", self.kind)
            + length
            + (self.data)
        )


def string(order: str, data: bytes) -> bytes:
    """A GGUF string."""
    return struct.pack(order + "Q", len(data)) + data


def value_of(gguf: GGUFFile, key: str) -> Value | None:
    """The value of a key that a file has; None where it is an array, or a string of more than `MAX_TEXT` bytes."""
    entry = gguf.entries[key]
    if (entry.kind not in SCALARS and entry.kind != STRING) or entry.end - entry.value > MAX_TEXT:
        return None
    return Value(entry.kind, gguf.read(entry.value, entry.end))


class Changed:
    """The `Values` of a file with other ones for some keys; None: without that key."""

    def __init__(self, gguf: GGUFFile, values: Mapping[str, Value | None]) -> None:
        self._gguf, self._values = gguf, values

    def with_values(self, values: Mapping[str, Value | None]) -> Changed:
        """The same with these values besides."""
        return Changed(self._gguf, {**self._values, **values})

    def _changed(self, key: str) -> str | int | float | bool | None:
        value = self._values[key]
        return None if value is None else value.python(self._gguf.order)

    def scalar(self, key: str) -> int | float | bool | None:
        """As `GGUFFile.scalar`."""
        if key not in self._values:
            return self._gguf.scalar(key)
        value = self._changed(key)
        return None if isinstance(value, str) else value

    def integer(self, key: str) -> int | None:
        """As `GGUFFile.integer`."""
        if key not in self._values:
            return self._gguf.integer(key)
        value = self._values[key]
        return None if value is None or value.kind not in INTEGERS else int(value.python(self._gguf.order))

    def text(self, key: str) -> str | None:
        """As `GGUFFile.text`."""
        if key not in self._values:
            return self._gguf.text(key)
        value = self._changed(key)
        return value if isinstance(value, str) else None

    def has(self, key: str) -> bool:
        """As `GGUFFile.has`."""
        return self._values[key] is not None if key in self._values else self._gguf.has(key)
