"""Where our keys stand in a GGUF file, and how they are padded.

They are inserted together after the last key, in a block of whole pages: the string is padded with spaces until the
block's length is a multiple of the file's alignment and of 4096. So whatever follows moves as it is and stays aligned;
taking the block out gives the old file again; file systems can share the tensor data between old and new file; and
later curves fit into the padding and are written in place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lrope_gguf.gguf_scan import ARRAY, FLOAT32, STRING, Entry, GGUFFile

CURVE_KEY = "lrope.curve"
PAGE = 4096
_SLACK = 1024
_MAX_ROOM = 1 << 22

Pieces = list[bytes | tuple[int, int]]
"""A new file: bytes, and stretches of the old one as offsets of start and end."""


def factors_key(architecture: str) -> str:
    """The key of the layer factors' array."""
    return f"{architecture}.rope.scaling.layer_factors"


def own(gguf: GGUFFile) -> list[Entry]:
    """Our keys' entries, in the file's order."""
    keys = (factors_key(str(gguf.text("general.architecture"))), CURVE_KEY)
    return sorted(gguf.entries[key] for key in keys if key in gguf.entries)


def prefix(gguf: GGUFFile, added: int) -> bytes:
    """The first 24 bytes, with the number of keys less our old ones and plus `added`."""
    n_keys = len(gguf.entries) - len(own(gguf)) + added
    return gguf.read(0, 16) + struct.pack(gguf.order + "Q", n_keys)


def kept(gguf: GGUFFile, end: int) -> list[tuple[int, int]]:
    """The stretches between the prefix and `end` that are not ours."""
    edges = [24, *(edge for entry in own(gguf) for edge in (entry.start, entry.end)), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _string(order: str, data: bytes) -> bytes:
    return struct.pack(order + "Q", len(data)) + data


def entries_for(
    order: str, key: str, factors: Sequence[float], text: bytes, room: int, factors_first: bool = True
) -> bytes:
    """Both keys as they stand in a file, the string padded with spaces to `room` bytes."""
    array = struct.pack(f"{order}IIQ{len(factors)}f", ARRAY, FLOAT32, len(factors), *factors)
    parts = [
        _string(order, key.encode(errors="surrogateescape")) + array,
        _string(order, CURVE_KEY.encode()) + struct.pack(order + "I", STRING) + _string(order, text.ljust(room)),
    ]
    return b"".join(parts if factors_first else reversed(parts))


def new_entries(gguf: GGUFFile, key: str, factors: Sequence[float], text: bytes, block: int) -> bytes:
    """Both keys for a new file: whole pages, or blocks where those are larger, with room for a longer document.

    The array comes first, or last where it would otherwise lie across a page's edge: inside one page, a change in
    place reaches it whole or not at all.
    """
    others = len(entries_for(gguf.order, key, factors, b"", 0))
    unit = max(PAGE, gguf.alignment, block)
    needed = others + len(text) + max(_SLACK, len(text))
    room = -(-needed // unit) * unit - others
    place = gguf.kv_end - sum(entry.end - entry.start for entry in own(gguf))
    start = (place + 24 + len(key.encode(errors="surrogateescape"))) % PAGE
    crosses_first, crosses_last = start + 4 * len(factors) > PAGE, 0 < place % PAGE < 4 * len(factors)
    return entries_for(gguf.order, key, factors, text, room, not crosses_first or crosses_last)


def slot_of(gguf: GGUFFile, key: str, n: int) -> tuple[int, int, int, bool] | None:
    """Where both keys lie side by side, ready to be overwritten: start, end, the string's length, array first."""
    array, curve = gguf.entries.get(key), gguf.entries.get(CURVE_KEY)
    if array is None or curve is None or (array.kind, array.item, array.length) != (ARRAY, FLOAT32, n):
        return None
    if curve.end - curve.value > _MAX_ROOM:
        return None
    if curve.kind != STRING or (array.end != curve.start and curve.end != array.start):
        return None
    return min(array.start, curve.start), max(array.end, curve.end), curve.end - curve.value, array.start < curve.start


def pieces_of(gguf: GGUFFile, new: bytes, added: int) -> Pieces:
    """A file with `new` (`added` keys) after the last key instead of our old ones: bytes, and stretches of the old."""
    shift = len(new) - sum(entry.end - entry.start for entry in own(gguf))
    if shift % gguf.alignment == 0 or not gguf.n_tensors:
        rest: Pieces = [(gguf.kv_end, gguf.size)]
    else:  # keys that another program wrote: only its padding differs
        padding = bytes(-(gguf.info_end + shift) % gguf.alignment)
        rest = [(gguf.kv_end, gguf.info_end), padding, (gguf.data_start, gguf.size)]
    return [prefix(gguf, added), *kept(gguf, gguf.kv_end), new, *rest]


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
