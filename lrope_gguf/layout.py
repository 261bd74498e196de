"""Our keys in a GGUF file: where they stand, how they are padded, and how the entries that they replace are kept.

Our keys stand together after the last key, in a block of whole pages: a string is padded with spaces until the file's
keys are longer than before by a multiple of the file's alignment and of 4096 bytes. So whatever follows keeps its
alignment, removing the block gives the old file again, file systems can share the tensor data between the old and the
new file, and a later curve fits into the padding and is written in place.

`lrope.original` names the scaling keys that are ours and keeps the entries that they replaced. It is a string, because
every tool that copies keys copies strings: JSON in ASCII. It counts keys instead of bytes and has numbers in
little-endian order, so that it still holds after another tool has lengthened a value or changed the byte order.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import MAX_TEXT, SCALARS, STRING, Changed, Entry, GGUFFile, Value
from lrope_gguf.rope_scaling import DYNAMIC, NAMES

CURVE_KEY = "lrope.curve"
ORIGINAL_KEY = "lrope.original"
_FORMAT, _VERSION = "lrope-original", 1
_MAX_BYTES = 1 << 15  # four of the longest strings, in hexadecimal digits
_MAX_STORED = 1 << 22
_MAX_AT = 1 << 16
_HEX = re.compile("(?:[0-9a-f]{2})*")
PAGE = 4096
_MAX_ENTRY = (1 << 19) + PAGE  # of heads: 2**17 numbers
_SLACK = 1024
_MAX_ROOM = 1 << 22

Pieces = list[bytes | tuple[int, int]]
"""A new file: bytes, and stretches of the old one as offsets of start and end."""


def factors_key(architecture: str) -> str:
    """The key of the layer factors' array."""
    return f"{architecture}.rope.scaling.layer_factors"


def array_keys(architecture: str) -> dict[str, str]:
    """The keys of our arrays by their names in a curve file, in the order in which they are written."""
    return {
        "layer_factors": factors_key(architecture),
        "head_factors": f"{architecture}.rope.scaling.head_factors",
        "query_scales": f"{architecture}.attention.query_scales",
    }


class Kept(NamedTuple):
    """An entry that was taken out: its place among the keys of the original, its name in `NAMES`, and its value."""

    at: int
    name: str
    value: Value


class Originals(NamedTuple):
    """Names of the scaling keys that are ours, and in the order of their places the entries that they replace."""

    written: tuple[str, ...] = ()
    replaced: tuple[Kept, ...] = ()

    def dumps(self, order: str) -> str:
        """The text to store; `order` is the file's."""
        replaced = [
            {"at": at, "name": name, "type": value.kind, "value": _little(value, order).data.hex()}
            for at, name, value in self.replaced
        ]
        document = {"format": _FORMAT, "version": _VERSION, "written": list(self.written), "replaced": replaced}
        return json.dumps(document, separators=(",", ":"))


def originals_of(gguf: GGUFFile) -> Originals:
    """What a file has stored; nothing without the key. Raises `LropeError`: it is not what `Originals.dumps` gives."""
    entry = gguf.entries.get(ORIGINAL_KEY)
    if entry is None:
        return Originals()
    try:
        if entry.kind != STRING or entry.end - entry.value > _MAX_STORED:
            raise ValueError("not a string, or too long")
        return _loads(gguf.read(entry.value, entry.end).rstrip(b" "), gguf.order)
    except (ValueError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else "not JSON"
        raise LropeError(
            f"{gguf.path}: {ORIGINAL_KEY} at byte {entry.start} is damaged ({why}), so the old values are lost; get "
            "a new copy of the model"
        ) from None


def _loads(text: bytes, order: str) -> Originals:
    if len(text) > _MAX_BYTES:
        raise ValueError(f"{len(text)} bytes")
    document = json.loads(text.decode("ascii"))
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError("another format")
    if document.get("version") != _VERSION or isinstance(document["version"], bool):
        raise ValueError("another version")
    written, replaced = document.get("written"), document.get("replaced")
    if not isinstance(written, list) or not all(name in NAMES for name in written) or len({*written}) < len(written):
        raise ValueError("the list of written keys")
    if not isinstance(replaced, list):
        raise ValueError("the list of replaced keys")
    kept = tuple(_kept(item, order) for item in replaced)
    names, places = [item.name for item in kept], [item.at for item in kept]
    # one that is not written anew could come back beside itself; ours was never another's
    if not {*names} <= {*written} - {DYNAMIC} or len({*names}) < len(names) or places != sorted({*places}):
        raise ValueError("the list of replaced keys")
    return Originals(tuple(written), kept)


def _kept(item: Any, order: str) -> Kept:
    if not isinstance(item, dict):
        raise ValueError("the list of replaced keys")
    at, name, kind, value = (item.get(field) for field in ("at", "name", "type", "value"))
    if type(at) is not int or type(kind) is not int or not isinstance(name, str) or not isinstance(value, str):
        raise ValueError("the list of replaced keys")
    if not 0 <= at < _MAX_AT or name not in NAMES or _HEX.fullmatch(value) is None:
        raise ValueError(f"the replaced {name[:80]!r}")
    data = bytes.fromhex(value)
    right = len(data) <= MAX_TEXT if kind == STRING else kind in SCALARS and len(data) == struct.calcsize(SCALARS[kind])
    if not right:
        raise ValueError(f"the replaced {name[:80]!r}")
    return Kept(at, name, _little(Value(kind, data), order))


def _little(value: Value, order: str) -> Value:
    """A value of a file in this order in little-endian order, and the other way round."""
    return value if order == "<" else value.swapped()


class Part(NamedTuple):
    """One of our entries: its key, and all its bytes."""

    key: str
    data: bytes


class Base:
    """A file as it was before we wrote to it: without our keys, and with the entries that these replaced.

    Attributes:
        gguf: the file.
        architecture: what its keys begin with.
        ours: our keys' entries, in the file's order.
        originals: what is stored of the entries that they replace.
        keys: the keys of the file before, in its order: each as an entry of `gguf`, or as bytes where it must return.
        values: what these keys say.

    Raises:
        LropeError: what is stored of the file before is damaged.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.architecture = str(gguf.text("general.architecture"))
        self.originals = originals_of(gguf)
        names = {*array_keys(self.architecture).values(), CURVE_KEY, ORIGINAL_KEY, self.key(DYNAMIC)}
        names.update(map(self.key, self.originals.written))
        self.ours = {key: entry for key, entry in gguf.entries.items() if key in names}
        self.keys: list[tuple[str, Entry | bytes]] = [
            (key, entry) for key, entry in gguf.entries.items() if key not in names
        ]
        values: dict[str, Value | None] = dict.fromkeys(names)
        for at, name, value in self.originals.replaced:
            self.keys.insert(at, (self.key(name), value.entry(gguf.order, self.key(name))))
            values[self.key(name)] = value
        self.values = Changed(gguf, values)

    def key(self, name: str) -> str:
        """The key of a name that the architecture stands before."""
        return f"{self.architecture}.{name}"

    def part(self, key: str) -> Part:
        """One of our entries as it stands in the file."""
        entry = self.ours[key]
        if entry.end - entry.start > _MAX_ENTRY:
            raise LropeError(
                f"{self.gguf.path}: {key} is {entry.end - entry.start} bytes, too many to keep; remove it first"
            )
        return Part(key, self.gguf.read(entry.start, entry.end))

    @property
    def scaling(self) -> list[str]:
        """Our keys that say how RoPE is scaled, in the file's order."""
        others = (*array_keys(self.architecture).values(), CURVE_KEY, ORIGINAL_KEY)
        return [key for key in self.ours if key not in others]

    def pieces(self, added: int = 0, without: Collection[str] = ()) -> Pieces:
        """The header up to its last key, for `added` keys more, less the keys `without`."""
        n_keys = len(self.keys) - len(without) + added
        pieces: Pieces = [self.gguf.read(0, 16) + struct.pack(self.gguf.order + "Q", n_keys)]
        for key, entry in self.keys:
            last = pieces[-1]
            if key in without:
                continue
            if isinstance(entry, bytes):
                pieces.append(entry)
            elif isinstance(last, tuple) and last[1] == entry.start:
                pieces[-1] = (last[0], entry.end)
            else:
                pieces.append((entry.start, entry.end))
        return pieces


@dataclass(frozen=True)
class Block:
    """What is ours in a file.

    Attributes:
        order: the byte order.
        values: entries whose values llama.cpp reads: a change in place should reach all of them or none.
        strings: keys and texts of the other entries; the last one is padded.
    """

    order: str
    values: tuple[Part, ...] = ()
    strings: tuple[tuple[str, bytes], ...] = ()

    def parts(self, room: int, values_first: bool) -> list[Part]:
        """The entries in their order, the last string padded to `room` bytes."""
        strings = [
            Part(key, Value(STRING, text.ljust(room) if key == self.strings[-1][0] else text).entry(self.order, key))
            for key, text in self.strings
        ]
        return [*self.values, *strings] if values_first else [*strings[::-1], *self.values]

    @property
    def text(self) -> bytes:
        """The string that is padded."""
        return self.strings[-1][1] if self.strings else b""

    @property
    def fixed(self) -> int:
        """Bytes of all entries but for that string."""
        return sum(len(part.data) for part in self.parts(0, True)) - len(self.text)

    def __len__(self) -> int:
        return len(self.values) + len(self.strings)


def new_parts(base: Base, block: Block, without: Collection[str], unit: int) -> list[Part]:
    """Our entries for a new file: whole pages, or units where those are larger, with room for a longer document.

    The values come first, or last where they would otherwise lie across a page's edge: inside one page, a change in
    place reaches them whole or not at all.
    """
    if not block.strings:
        return block.parts(0, True)
    before, place = length(base.pieces()), length(base.pieces(0, without))
    key, text = block.strings[-1]
    unit = max(PAGE, base.gguf.alignment, unit)
    needed = block.fixed + len(text) + (max(_SLACK, len(text)) if key == CURVE_KEY else 0)
    room = -(-(needed - (before - place)) // unit) * unit + (before - place) - block.fixed
    span = sum(len(part.data) for part in block.values)
    head = 24 + len(block.values[0].key.encode(errors="surrogateescape")) if block.values else 0
    crosses_first = (place + head) % PAGE + span - head > PAGE
    crosses_last = 0 < (place + block.fixed + room) % PAGE < span - head
    return block.parts(room, not crosses_first or crosses_last)


def parts_in_place(base: Base, block: Block) -> tuple[int, list[Part]] | None:
    """The block as it fits over the one that is there, entry over entry of the same size: its start and its entries."""
    if not base.ours:
        return None
    start, end = min(base.ours.values()).start, max(base.ours.values()).end
    room = end - start - block.fixed
    if len(block) != len(base.ours) or not len(block.text) <= room <= _MAX_ROOM:
        return None
    for values_first in (True, False):
        parts, at = block.parts(room, values_first), start
        for part in parts:
            entry = base.ours.get(part.key)
            if entry is None or (entry.start, entry.end) != (at, at + len(part.data)):
                break
            if base.gguf.read(entry.start, entry.value) != part.data[: entry.value - entry.start]:
                break  # another type
            at = entry.end
        else:
            return start, parts
    return None


def in_one_page(block: Block, start: int, parts: Collection[Part], old: bytes) -> bool:
    """Whether all values that differ from `old`, the bytes from `start` on, lie in one page of the file."""
    values, at, pages = {part.key for part in block.values}, 0, set[int]()
    for part in parts:
        if part.key in values:
            changed = (i for i, byte in enumerate(part.data) if byte != old[at + i])
            pages.update((start + at + i) // PAGE for i in changed)
        at += len(part.data)
    return len(pages) < 2


def pieces_of(base: Base, parts: Collection[Part] = (), without: Collection[str] = ()) -> Pieces:
    """A file with these entries after the last key instead of what is ours: bytes, and stretches of the old."""
    gguf = base.gguf
    before = [*base.pieces(len(parts), without), b"".join(part.data for part in parts)]
    shift = length(before) - gguf.kv_end
    if shift % gguf.alignment == 0 or not gguf.n_tensors:
        return [*before, (gguf.kv_end, gguf.size)]
    # keys that another program wrote: only its padding differs
    padding = bytes(-(gguf.info_end + shift) % gguf.alignment)
    return [*before, (gguf.kv_end, gguf.info_end), padding, (gguf.data_start, gguf.size)]


def length(pieces: Pieces) -> int:
    """Bytes of a new file."""
    return sum(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)


def keeps_blocks(pieces: Pieces, block: int) -> bool:
    """Whether the last piece, the tensor data, keeps its place in the blocks of the disk and has a whole one."""
    *before, last = pieces
    if isinstance(last, bytes):
        return False
    start, end = last
    return (start - length(before)) % block == 0 and start + -start % block < end
