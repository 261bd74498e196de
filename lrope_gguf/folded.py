"""What a file holds of query scales that were folded into its tensors: `lrope.folded` and `lrope.folded.before`.

The first is JSON in ASCII, `{"format":"lrope-folded","version":1,"by":...,"source":...,"query_scales":[[...],...],
"tensors":[...]}`: the program, the curve file, float32 scales of each layer's heads, and tensors with the fields of
`Kept`. The second is their corrections in base64, one tensor's after the other's: what `remove` needs to get the old
scales of their blocks back. Each is zlib's: a code of two bits for each scale of a block, block after block, the lowest
bits of a byte first, 0, 1 and 2 for 0, 1 and -1, and 3 for the others, which follow as numbers of 32 bits, zigzag, in
four planes of bytes, the lowest first. The old bits of a scale are those of what is nearest to the new one over q in
float64, plus its correction.

Both stand in a model's first file and name tensors, so that they hold for tensors in other files of it too; and since
each has a checksum for both states, a write that was interrupted between two files can be told.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import dataclass
from typing import Any, NamedTuple

from lrope_gguf.curve import Rows, head_rows
from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import STRING, GGUFFile
from lrope_gguf.layout import BEFORE_KEY, FOLDED_KEY
from lrope_gguf.rope_scaling import shortest_rows, single

_FORMAT, _VERSION = "lrope-folded", 1
_MAX_BYTES = 1 << 23
_DIGEST = re.compile("[0-9a-f]{64}")
_MAX_COUNT = 1 << 40


class Kept(NamedTuple):
    """A tensor whose queries were scaled.

    Attributes:
        name, kind: the tensor and its ggml type.
        layer: whose scales it has.
        heads: into how many equal parts its rows were divided: the layer's heads, or 1 where these agree.
        rows, row: number of rows, and bytes of one.
        before, after: SHA-256 of these rows.
        packed: bytes of its corrections (`blocks.Packer`).
    """

    name: str
    kind: int
    layer: int
    heads: int
    rows: int
    row: int
    before: str
    after: str
    packed: int


@dataclass(frozen=True)
class Folded:
    """What was folded: `scales` by which program and from which curve file (`source`), and into which tensors."""

    by: str
    source: str
    scales: Rows
    tensors: tuple[Kept, ...]

    def dumps(self) -> bytes:
        """The text to store."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "by": self.by,
            "source": self.source,
            "query_scales": shortest_rows(self.scales),
            "tensors": [kept._asdict() for kept in self.tensors],
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def changed(self, gguf: GGUFFile) -> str | None:
        """A tensor of this file that has another type or shape than after folding, if any: another program's work."""
        for kept in self.tensors:
            tensor = gguf.queries.get(kept.name)
            if tensor is not None and tensor.kind != kept.kind:
                return kept.name
        return None

    def before(self, gguf: GGUFFile) -> dict[str, bytes]:
        """The packed corrections by tensor. Raises `LropeError`: the file does not hold them."""
        entry = gguf.entries.get(BEFORE_KEY)
        if entry is None or entry.kind != STRING:
            raise LropeError(
                f"{gguf.path}: has no {BEFORE_KEY}, so the old scales are lost; get a new copy of the model"
            )
        try:
            data = b64decode(gguf.read(entry.value, entry.end).rstrip(b" "), validate=True)
        except ValueError:
            data = b""
        if len(data) != sum(kept.packed for kept in self.tensors):
            raise damaged(gguf, BEFORE_KEY)
        result, at = {}, 0
        for kept in self.tensors:
            result[kept.name], at = data[at : at + kept.packed], at + kept.packed
        return result


def folded_of(gguf: GGUFFile) -> Folded | None:
    """What was folded into a model, by its first file. Raises `LropeError`: its text is not what `dumps` gives."""
    entry = gguf.entries.get(FOLDED_KEY)
    if entry is None:
        return None
    try:
        if entry.kind != STRING or entry.end - entry.value > _MAX_BYTES:
            raise ValueError
        return _loads(json.loads(gguf.read(entry.value, entry.end).decode("ascii")))
    except (LropeError, ValueError, TypeError, LookupError, RecursionError):
        raise damaged(gguf, FOLDED_KEY) from None


def damaged(gguf: GGUFFile, key: str) -> LropeError:
    """One of the two texts is not what was written."""
    return LropeError(
        f"{gguf.path}: {key} at byte {gguf.entries[key].start} is damaged, so the old scales are lost; get a new copy "
        "of the model"
    )


def _loads(document: Any) -> Folded:
    if document["format"] != _FORMAT or document["version"] != _VERSION or isinstance(document["version"], bool):
        raise ValueError
    scales = tuple(tuple(map(single, row)) for row in head_rows(document["query_scales"], "query_scales"))
    tensors = tuple(Kept(**item) for item in document["tensors"])
    right = all(isinstance(document[key], str) for key in ("by", "source"))
    right &= bool(tensors) and len({kept.name for kept in tensors}) == len(tensors)
    for kept in tensors:
        counts = (kept.kind, kept.layer, kept.heads, kept.rows, kept.row, kept.packed)
        right &= isinstance(kept.name, str) and all(type(n) is int and 0 <= n < _MAX_COUNT for n in counts)
        right &= all(_DIGEST.fullmatch(text) is not None for text in (kept.before, kept.after))
        right &= kept.layer < len(scales) and kept.heads in (1, len(scales[kept.layer])) and kept.heads > 0
        right &= kept.rows > 0 and kept.rows % kept.heads == 0 and kept.row > 0
        if not right:  # before the next is looked at
            break
    if not right:
        raise ValueError
    return Folded(document["by"], document["source"], scales, tensors)
