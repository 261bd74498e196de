"""A GGUF file's header: where keys, values and tensor data stand, and what single keys say.

The layout is ggml's (docs/gguf.md there; `gguf_init_from_reader` in ggml/src/gguf.cpp). Versions 2 and 3 and both byte
orders are read. The scan builds no arrays: it steps over items of fixed size by arithmetic, and over strings in one
pass over their lengths. It reads the file through a window, checks every count against the file's size, and bounds the
work that strings, nested arrays and windows cost. So neither memory nor time depends on what a damaged file claims.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Collection, Mapping
from io import FileIO
from itertools import repeat
from operator import length_hint
from pathlib import Path
from typing import NamedTuple

from lrope_gguf.errors import LropeError

STRING = 8
ARRAY = 9
UINT32 = 4
FLOAT32 = 6
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
INTEGERS = frozenset((0, 1, 2, 3, 4, 5, 10, 11))
MAX_TEXT = 4096
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in SCALARS.items()}

_WINDOW = 1 << 18
_SMALL_WINDOW = 1 << 12
_MAX_KEYS = 1 << 16
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_ALL_KEY_BYTES = 1 << 22
_MAX_TENSORS = 1 << 17
_MAX_NAME_BYTES = 1 << 12
_MAX_DIMS = 4
_MAX_DEPTH = 8
# In strings of arrays, about a second; an array in an array or a read costs as much as _HEAVY, a read more by its size.
_MAX_WORK = 1 << 24
_HEAVY = 32
_MAX_ALIGNMENT = 1 << 20
_LONG = b"rope_factors_long"
_QUERIES = re.compile(rb"blk\.[0-9]{1,4}\.attn_q[a-z_]*\.(?:weight|bias)")
_HEAD = re.compile(rb"blk\.([0-9]{1,4})\.nextn\.eh_proj\.weight")

# Items and bytes of a block by ggml type (ggml_type in ggml.h, block structs in ggml-common.h); other types are new.
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82)},
    **{23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2)},
    **{34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)},
}


class Entry(NamedTuple):
    """A key and its value: `start` of the key, `value` (of an array: its first item) and `end`, as file offsets.

    `kind` is the value's GGUF type; `item` and `length` an array's type of items and their number.
    """

    start: int
    value: int
    end: int
    kind: int
    item: int
    length: int


class Tensor(NamedTuple):
    """A tensor's type, its shape (items of a row first), and the offset of its data from `data_start`."""

    kind: int
    dims: tuple[int, ...]
    offset: int


class Value(NamedTuple):
    """A number or a string: its GGUF type, and its bytes in the file's byte order, without a string's length."""

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
        """The bytes of a key with this value in a file."""
        data = string(order, self.data) if self.kind == STRING else self.data
        return string(order, key.encode(errors="surrogateescape")) + struct.pack(order + "I", self.kind) + data


def string(order: str, data: bytes) -> bytes:
    """A GGUF string."""
    return struct.pack(order + "Q", len(data)) + data


class Values:
    """What a header says, key by key; how, is up to `has` and `value`."""

    order: str

    def has(self, key: str) -> bool:
        """Whether there is such a key, of whatever type."""
        raise NotImplementedError

    def value(self, key: str, limit: int = MAX_TEXT) -> Value | None:
        """The value of `key`, at most `limit` bytes of a string; None where it is absent or an array."""
        raise NotImplementedError

    def scalar(self, key: str) -> int | float | bool | None:
        """The number of `key`; None where it is absent or no number."""
        value = self.value(key)
        number = None if value is None else value.python(self.order)
        return None if isinstance(number, str) else number

    def integer(self, key: str) -> int | None:
        """The number of `key` where it has an integer type, else None."""
        value = self.value(key)
        return None if value is None or value.kind not in INTEGERS else int(value.python(self.order))

    def text(self, key: str, limit: int = MAX_TEXT) -> str | None:
        """The string of `key`, at most `limit` bytes of it; None where it is absent or no string."""
        value = self.value(key, limit)
        return None if value is None or value.kind != STRING else str(value.python(self.order))


class Changed(Values):
    """The values of a file with others for some keys; None stands for a key that is taken away."""

    def __init__(self, gguf: GGUFFile, values: Mapping[str, Value | None]) -> None:
        self.order, self._gguf, self._values = gguf.order, gguf, values

    def with_values(self, values: Mapping[str, Value | None]) -> Changed:
        """The same with these values besides."""
        return Changed(self._gguf, {**self._values, **values})

    def has(self, key: str) -> bool:
        """As in `Values`."""
        return self._values[key] is not None if key in self._values else self._gguf.has(key)

    def value(self, key: str, limit: int = MAX_TEXT) -> Value | None:
        """As in `Values`."""
        return self._values[key] if key in self._values else self._gguf.value(key, limit)


class GGUFFile(Values):
    """An open GGUF file and what its header says. A context manager.

    Attributes:
        path, size: of the file, in bytes.
        order: `"<"` or `">"`, the byte order as `struct` writes it.
        version, n_tensors, alignment: as in the header.
        entries: `Entry` by key, in the file's order. Bytes that are not UTF-8 are kept as surrogates.
        kv_end: offset after the last key's value.
        info_end: offset after the last tensor's description.
        data_start: offset of the tensor data; without tensors the same as `info_end`.
        head_layers: layers with the projection that makes them a multi-token-prediction head.
        has_long_factors: whether there is a tensor of LongRoPE's factors.
        queries: `Tensor` by name, of those that make a layer's queries (`blk.N.attn_q...`).
        overlaps: whether tensors lie over each other, or two have a name of `queries`: llama.cpp refuses such a file.

    Raises:
        LropeError: where the file is missing, not GGUF, damaged or truncated; with the byte where it shows.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not self.path.exists():
                raise LropeError(f"{path}: no such file; check the name")
            if not self.path.is_file():  # opening a pipe would wait
                raise LropeError(f"{path}: is not a regular file; give a model")
            self.file = FileIO(self.path, "rb")
        except OSError as error:
            raise LropeError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self._scan()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    # Values

    def has(self, key: str) -> bool:
        """As in `Values`."""
        return key in self.entries

    def value(self, key: str, limit: int = MAX_TEXT) -> Value | None:
        """As in `Values`."""
        entry = self.entries.get(key)
        if entry is None or entry.kind == ARRAY:
            return None
        return Value(entry.kind, self.read(entry.value, min(entry.end, entry.value + limit)))

    def integers(self, key: str, n: int, kinds: Collection[int] = INTEGERS) -> tuple[int, ...] | None:
        """The first `n` values of the array of `key`; None where it has no array of `kinds` that is so long."""
        entry = self.entries.get(key)
        if entry is None or entry.kind != ARRAY or entry.item not in kinds or entry.length < n:
            return None
        code = f"{self.order}{n}{SCALARS[entry.item]}"
        return struct.unpack(code, self.read(entry.value, entry.value + struct.calcsize(code)))

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, which the scan has found inside the file."""
        data = b""
        try:
            self.file.seek(start)
            while len(data) < end - start:
                part = self.file.read(end - start - len(data))
                if not part:
                    raise LropeError(f"{self.path}: was shortened while being read, to {start + len(data)} bytes")
                data += part
        except OSError as error:
            raise LropeError(
                f"{self.path}: cannot be read at byte {start} ({error.strerror}); check the disk"
            ) from error
        return data

    # Scan

    def _error(self, at: int, what: str) -> LropeError:
        return LropeError(f"{self.path}: {what} at byte {at}; the file is damaged or incomplete, get a new copy")

    def _scan(self) -> None:
        self._position, self._window, self._window_start = 0, b"", 0
        self._window_size, self._work_left = _SMALL_WINDOW, _MAX_WORK
        magic = self.read(0, min(4, self.size))
        if magic != b"GGUF":
            raise LropeError(f"{self.path}: is not a GGUF file (it begins with {magic!r}); give a model in GGUF format")
        for order in "<>":
            self._position, self.order = 4, order
            self._unpack_u32 = struct.Struct(order + "I").unpack_from
            self._unpack_u64 = struct.Struct(order + "Q").unpack_from
            version = self._u32("the version")
            if version & 0xFFFF:  # else a small number read in the wrong byte order
                break
        if version not in (2, 3):
            raise LropeError(f"{self.path}: is GGUF version {version} (byte 4); give one of version 2 or 3")
        self.version = version
        self.n_tensors = self._count("tensors", 24, _MAX_TENSORS)
        n_keys = self._count("keys", 13, _MAX_KEYS)
        self._scan_keys(n_keys)
        self.kv_end = self._position
        self.alignment = self._alignment()
        self._scan_tensors()
        del self._window

    def _count(self, what: str, least: int, most: int) -> int:
        """A number of things of at least `least` bytes each."""
        at = self._position
        count = self._u64(f"the number of {what}")
        if count > most or count * least > self.size - self._position:
            raise self._error(at, f"an impossible number of {what} ({count})")
        return count

    def _scan_keys(self, n_keys: int) -> None:
        self.entries: dict[str, Entry] = {}
        bytes_left = _MAX_ALL_KEY_BYTES
        for _ in range(n_keys):
            start = self._position
            length = self._u64("the length of a key")
            bytes_left -= length
            if not 0 < length <= _MAX_KEY_BYTES or bytes_left < 0:
                raise self._error(start, f"a key of {length} bytes")
            key = self._take(length, "a key").decode(errors="surrogateescape")
            if key in self.entries:
                first = self.entries[key].start
                raise self._error(start, f"the key {key[:80]!r} for the second time (first at byte {first})")
            kind, item, count = self._u32("the type of a value"), -1, 1
            if kind == STRING:
                length = self._u64("the length of a string")
                value = self._position
                self._skip(length, f"the string of {key[:80]!r}")
            elif kind == ARRAY:
                item, count = self._array_head(key)
                value = self._position
                self._skip_items(item, count, key, 0)
            else:
                if kind not in _SIZES:
                    raise self._error(self._position - 4, f"a value of unknown type {kind} for {key[:80]!r}")
                value = self._position
                self._skip(_SIZES[kind], f"the value of {key[:80]!r}")
            self.entries[key] = Entry(start, value, self._position, kind, item, count)

    def _array_head(self, key: str) -> tuple[int, int]:
        item = self._u32("the type of an array's items")
        if item not in _SIZES and item not in (STRING, ARRAY):
            raise self._error(self._position - 4, f"an array of unknown type {item} for {key[:80]!r}")
        return item, self._u64("the length of an array")

    def _skip_items(self, item: int, count: int, key: str, depth: int) -> None:
        """Step over `count` items of an array of `key` that lies `depth` arrays deep."""
        what = f"the array of {key[:80]!r} ({count} items)"
        if item in _SIZES:
            self._skip(count * _SIZES[item], what)
            return
        if count * (8 if item == STRING else 12) > self.size - self._position:
            raise self._error(self._position - 8, f"an impossible length of {what}")
        self._spend(count if item == STRING else count * _HEAVY, what)
        if item == STRING:
            self._skip_strings(count, what)
            return
        if depth == _MAX_DEPTH:
            raise self._error(self._position, f"arrays nested deeper than {_MAX_DEPTH} for {key[:80]!r}")
        for _ in range(count):
            self._skip_items(*self._array_head(key), key, depth + 1)

    def _skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings: the one loop that runs once a vocabulary item, so it does nothing else."""
        unpack = self._unpack_u64
        while count:
            self._fill(8, what)
            window, at = self._window, self._position - self._window_start
            strings = repeat(None, count)
            try:
                for _ in strings:
                    at += 8 + unpack(window, at)[0]
                count = 0
            except (struct.error, OverflowError):  # `at` is behind the window
                count = length_hint(strings) + 1
            if self._window_start + at > self.size:
                raise self._cut_string(what)
            self._position = self._window_start + at

    def _cut_string(self, what: str) -> LropeError:
        """The error for the first string of those at the present position that does not fit into the file."""
        at, end = self._position - self._window_start, self.size - self._window_start
        while True:
            length = self._unpack_u64(self._window, at)[0]
            if at + 8 + length > end:
                at += self._window_start
                return self._error(at, f"the end of the file inside {what}, in a string of {length} bytes")
            at += 8 + length

    def _alignment(self) -> int:
        entry = self.entries.get("general.alignment")
        if entry is None:
            return 32
        alignment = self.scalar("general.alignment") if entry.kind == UINT32 else None
        if not isinstance(alignment, int) or alignment & (alignment - 1) or not 0 < alignment <= _MAX_ALIGNMENT:
            raise self._error(entry.value, f"general.alignment {alignment}, not a power of two up to {_MAX_ALIGNMENT}")
        return alignment

    def _scan_tensors(self) -> None:
        end, last, last_start = 0, b"", 0
        self.head_layers: set[int] = set()
        self.has_long_factors = self.overlaps = False
        self.queries: dict[str, Tensor] = {}
        for _ in range(self.n_tensors):
            start = self._position
            length = self._u64("the length of a tensor's name")
            if length > _MAX_NAME_BYTES:
                raise self._error(start, f"a tensor's name of {length} bytes")
            name = self._take(length, "a tensor's name")
            if b".nextn." in name and (match := _HEAD.fullmatch(name)):
                self.head_layers.add(int(match[1]))
            self.has_long_factors |= _LONG in name
            n_dims = self._u32("a tensor's number of dimensions")
            if n_dims > _MAX_DIMS:
                raise self._error(self._position - 4, f"a tensor of {n_dims} dimensions")
            dims = [self._u64("a tensor's shape") for _ in range(n_dims)]
            kind = self._u32("a tensor's type")
            offset = self._u64("a tensor's offset")
            items, size = _BLOCKS.get(kind, (1, 0))
            needed = offset + math.prod(dims[1:]) * (-(-(dims[0] if dims else 1) // items) * size)
            self.overlaps |= offset < end
            if b".attn_q" in name and _QUERIES.fullmatch(name):
                self.overlaps |= name.decode() in self.queries
                self.queries[name.decode()] = Tensor(kind, tuple(dims), offset)
            if needed > end:
                end, last, last_start = needed, name, start
        self.info_end = self.data_start = self._position
        if self.n_tensors:
            self.data_start += -self.info_end % self.alignment
            if self.data_start + end > self.size:
                raise LropeError(
                    f"{self.path}: is truncated: tensor {last.decode(errors='replace')[:80]!r} ends at byte "
                    f"{self.data_start + end}, the file at byte {self.size} (described at byte {last_start}); get a "
                    "new copy"
                )

    def _fill(self, length: int, what: str) -> None:
        """Have the next `length` bytes in the window."""
        at = self._position
        if length > self.size - at:
            raise self._error(at, f"the end of the file ({self.size} bytes) inside {what}")
        end = self._window_start + len(self._window)
        if at + length > end:
            # more each time while the reading goes on, little after a jump over a value
            self._window_size = min(2 * self._window_size, _WINDOW) if at < end + _SMALL_WINDOW else _SMALL_WINDOW
            size = max(self._window_size, length)
            self._spend(_HEAVY + (size >> 8), what)
            self._window = self.read(at, min(self.size, at + size))
            self._window_start = at

    def _spend(self, work: int, what: str) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise self._error(
                self._position, f"more strings, nested arrays or large values than a model has, in {what}"
            )

    def _take(self, length: int, what: str) -> bytes:
        self._fill(length, what)
        at = self._position - self._window_start
        self._position += length
        return self._window[at : at + length]

    def _skip(self, length: int, what: str) -> None:
        if length > self.size - self._position:
            raise self._error(self._position, f"the end of the file ({self.size} bytes) inside {what}")
        self._position += length

    def _u32(self, what: str) -> int:
        value: int = self._unpack_u32(self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = self._unpack_u64(self._take(8, what))[0]
        return value
