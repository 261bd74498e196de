"""`lrope.original`: which scaling keys are ours, and the entries that stood in their place, so that these can return.

A string, because every tool that copies keys copies strings; JSON in ASCII, padded with spaces where it ends a block.
It counts keys instead of bytes, and has numbers in little-endian order: it holds too after another tool has lengthened
some other value or written the file in the other byte order.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any, NamedTuple

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_scan import SCALARS, STRING, GGUFFile
from lrope_gguf.gguf_values import MAX_TEXT, Value
from lrope_gguf.scaling_keys import DYNAMIC, NAMES

ORIGINAL_KEY = "lrope.original"
_FORMAT, _VERSION = "lrope-original", 1
_MAX_BYTES = 1 << 15  # four of the longest strings, in hexadecimal digits
_MAX_STORED = 1 << 22
_MAX_AT = 1 << 16
_HEX = re.compile("(?:[0-9a-f]{2})*")


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
    """What a file has stored; nothing where it has no such key.

    Raises:
        LropeError: it is not what `Originals.dumps` gives.
    """
    entry = gguf.entries.get(ORIGINAL_KEY)
    if entry is None:
        return Originals()
    try:
        if entry.kind != STRING or entry.end - entry.value > _MAX_STORED:
            raise ValueError("no string of this size")
        return _loads(gguf.read(entry.value, entry.end).rstrip(b" "), gguf.order)
    except (ValueError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else "no JSON"
        raise LropeError(
            f"{gguf.path}: {ORIGINAL_KEY} at byte {entry.start} is damaged ({why}), and with it what stood in the file "
            "before; get the model again"
        ) from None


def _loads(text: bytes, order: str) -> Originals:
    if len(text) > _MAX_BYTES:
        raise ValueError(f"{len(text)} bytes")
    document = json.loads(text.decode("ascii"))
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError("of another format")
    if document.get("version") != _VERSION or isinstance(document["version"], bool):
        raise ValueError("of another version")
    written, replaced = document.get("written"), document.get("replaced")
    if not isinstance(written, list) or not all(name in NAMES for name in written) or len({*written}) < len(written):
        raise ValueError("its written keys")
    if not isinstance(replaced, list):
        raise ValueError("its replaced keys")
    kept = tuple(_kept(item, order) for item in replaced)
    names, places = [item.name for item in kept], [item.at for item in kept]
    # one that is not written anew could come back beside itself; ours was never another's
    if not {*names} <= {*written} - {DYNAMIC} or len({*names}) < len(names) or places != sorted({*places}):
        raise ValueError("its replaced keys")
    return Originals(tuple(written), kept)


def _kept(item: Any, order: str) -> Kept:
    if not isinstance(item, dict):
        raise ValueError("its replaced keys")
    at, name, kind, value = (item.get(field) for field in ("at", "name", "type", "value"))
    if type(at) is not int or type(kind) is not int or not isinstance(name, str) or not isinstance(value, str):
        raise ValueError("its replaced keys")
    if not 0 <= at < _MAX_AT or name not in NAMES or _HEX.fullmatch(value) is None:
        raise ValueError(f"its {name[:80]!r}")
    data = bytes.fromhex(value)
    right = len(data) <= MAX_TEXT if kind == STRING else kind in SCALARS and len(data) == struct.calcsize(SCALARS[kind])
    if not right:
        raise ValueError(f"its {name[:80]!r}")
    return Kept(at, name, _little(Value(kind, data), order))


def _little(value: Value, order: str) -> Value:
    """A value of a file in this order in little-endian order, and the other way round."""
    return value if order == "<" else value.swapped()
