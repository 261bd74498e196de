"""Layer factors in a GGUF file's metadata: read, write and remove them, every other byte kept.

Two keys are ours: `{architecture}.rope.scaling.layer_factors`, an array of `{architecture}.block_count` float32 that
the patched llama.cpp reads, and `lrope.curve`, the curve file's JSON. They are inserted together after the last key,
in a block of whole pages: the string is padded with spaces until the block's length is a multiple of the file's
alignment and of 4096. So whatever follows moves as it is and stays aligned; taking the block out gives the old file
again; file systems can share the tensor data between old and new file; and later curves fit into the padding and are
written in place.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Literal

from lrope_gguf.curve import MAX_BYTES, CurveFile, positive
from lrope_gguf.errors import LropeError
from lrope_gguf.files import (
    append_range,
    block_size,
    can_share_blocks,
    check_replaceable,
    locked,
    mapped_by,
    may_share_blocks,
    replacing,
    write_all,
    write_error,
)
from lrope_gguf.gguf_scan import ARRAY, FLOAT32, STRING, Entry, GGUFFile

CURVE_KEY = "lrope.curve"
MAX_LAYERS = 4096
MAX_FACTOR = 1024  # and its inverse: the limits of the patch, src/llama-rope-layer.cpp

# Architectures whose graphs never rotate: LLAMA_ROPE_TYPE_NONE in llama_model_rope_type() (llama.cpp 0c1e570,
# src/llama-model.cpp; names from src/llama-arch.cpp), and two with learned positions that it gives a rope type
# nevertheless, though src/models/bert.cpp and starcoder.cpp apply none.
WITHOUT_ROPE = frozenset(
    (
        *("arwkv7", "bloom", "clip", "glm5-next", "gpt2", "gptj", "jais", "jamba", "jina-bert-v2", "kimi-k3"),
        *("kimi-linear", "mamba", "mamba2", "mpt", "nemotron_h", "nemotron_h_moe", "refact", "rwkv6", "rwkv6qwen2"),
        *("rwkv7", "t5", "t5encoder", "wavtokenizer-dec", "bert", "starcoder"),
    )
)
# These take rope.scaling.finetuned as a switch for RoPE (src/models/granite*.cpp).
_ROPE_SWITCH = frozenset(("granite", "granitehybrid", "graniteswitch"))

_PAGE = 4096
_SLACK = 1024
_MAX_ROOM = 1 << 22
_BUFFER = 1 << 20
_SAMPLES = 64
_LINKS = "{path} had {links} names (hard links); only this one has the new content, the others keep the old"
Progress = Callable[[int, int], None]
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def factors_key(architecture: str) -> str:
    """The key of the layer factors' array."""
    return f"{architecture}.rope.scaling.layer_factors"


def shortest(value: float) -> float:
    """The float64 with the fewest decimal digits that is `value` in float32."""
    single = struct.pack("<f", value)
    for digits in range(1, 9):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == single:
            return candidate
    return float(f"{value:.9g}")


@dataclass(frozen=True)
class ModelInfo:
    """What a model's header says; None where it says nothing.

    Attributes:
        block_count: layers, those of a multi-token-prediction head included.
        nextn_predict_layers: layers of that head, the last ones.
        context_length: trained length in tokens.
        rope_freq_base, rope_dimension_count, rope_scaling_type, rope_scaling_factor: of the base model's RoPE.
        factors: `s_l` of all `block_count` layers, float32 values; None where absent or not usable.
        factors_error: why a stored array is not usable, as a sentence's end.
        curve_json: the curve's document as stored, without its padding.
        shards: number of files of a split model, of which this is the first; 1 for a whole one.
    """

    path: Path
    file_size: int
    version: int
    n_tensors: int
    name: str | None
    kind: str | None
    architecture: str | None
    block_count: int | None
    nextn_predict_layers: int
    context_length: int | None
    rope_freq_base: float | None
    rope_dimension_count: int | None
    rope_scaling_type: str | None
    rope_scaling_factor: float | None
    rope_switched_off: bool
    factors: tuple[float, ...] | None
    factors_error: str | None
    curve_json: str | None
    shards: int

    @property
    def n_layer(self) -> int | None:
        """The layers that a curve shapes: all but those of a multi-token-prediction head."""
        return None if self.block_count is None else self.block_count - self.nextn_predict_layers

    @property
    def has_rope(self) -> bool:
        """Whether the model uses RoPE, as far as its metadata tells; an unknown architecture is taken to."""
        # src/models/baichuan.cpp: only the model of 32 layers has RoPE, the larger one has ALiBi
        alibi = self.architecture == "baichuan" and self.block_count != 32
        return (
            self.architecture not in WITHOUT_ROPE
            and self.rope_dimension_count != 0
            and not self.rope_switched_off
            and not alibi
        )

    def fingerprint(self) -> str:
        """Identity of the base model: SHA-256 in hex, the same before and after `write_factors`.

        Covers the header without our two keys, and of the tensor data 64 blocks of 4 KiB, evenly spaced, the first
        and the last included.
        """
        import hashlib  # loads OpenSSL

        with GGUFFile(self.path) as gguf:
            digest = hashlib.sha256(_prefix(gguf, 0))
            for start, end in _kept(gguf, gguf.info_end):
                for at in range(start, end, _BUFFER):
                    digest.update(gguf.read(at, min(end, at + _BUFFER)))
            last = max(gguf.data_start, gguf.size - _PAGE)
            for i in range(_SAMPLES):
                at = gguf.data_start + (last - gguf.data_start) * i // (_SAMPLES - 1)
                digest.update(gguf.read(at, min(gguf.size, at + _PAGE)))
            return digest.hexdigest()


@dataclass(frozen=True)
class WriteResult:
    """What a write or removal did.

    Attributes:
        path: the file that now holds the result.
        how: `"in place"`, `"rewritten"` (a whole new file) or `"unchanged"` (it was so already).
        bytes_written: bytes changed in place, or the new file's size.
        factors: the factors now stored, one a layer; empty after a removal.
        bytes_shared: of a new file, the bytes that it shares with the old one on the disk instead of a copy.
        notes: what the user should know besides, such as other names that keep the old content.
    """

    path: Path
    how: Literal["in place", "rewritten", "unchanged"]
    bytes_written: int
    factors: tuple[float, ...]
    bytes_shared: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WritePlan:
    """What `write_factors` would do.

    Attributes:
        path: the file that would hold the result.
        how: as in `WriteResult`.
        bytes_written: as in `WriteResult`.
        factors: the factors that would be stored, one a layer.
        shares: whether a new file would share the tensor data with the old one on the disk; None where only
            writing tells.
        notes: as in `WriteResult`.
        removed: the keys that a removal would take out.
    """

    path: Path
    how: Literal["in place", "rewritten", "unchanged"]
    bytes_written: int
    factors: tuple[float, ...]
    shares: bool | None
    notes: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def read_model(path: str | os.PathLike[str]) -> ModelInfo:
    """What the header of the GGUF file `path` says.

    Raises:
        LropeError: where it is missing, not GGUF, damaged or truncated, or a later shard of a split model.
    """
    with GGUFFile(path) as gguf:
        return _info(gguf)


def read_factors(path: str | os.PathLike[str]) -> tuple[float, ...] | None:
    """The stored factors, one for each of `block_count` layers as float32 values; None where there are none.

    Raises:
        LropeError: as `read_model`, and where the stored array is not usable.
    """
    info = read_model(path)
    if info.factors_error:
        raise LropeError(f"{path}: {info.factors_error}; write the factors again or remove them")
    return info.factors


def write_factors(
    path: str | os.PathLike[str],
    factors: Iterable[float],
    *,
    curve_json: str | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    mapped_ok: bool = False,
) -> WriteResult:
    """Store layer factors in a model, or with `output` in a copy of it.

    In place where the file has both keys, room for `curve_json` and only one name; else through a new file that is
    moved over the old one when it is whole and on the disk. A symbolic link stays and its target is rewritten; of
    several hard links only the given name gets the new file. The model is locked meanwhile.

    Args:
        path: the model; of a split one the first shard.
        factors: one positive float a layer: `n_layer` of them, or `block_count` with 1 for the layers of a
            multi-token-prediction head.
        curve_json: the document to store beside them; by default one that lists the factors.
        output: where to write instead; an existing file is replaced.
        progress: called while a new file is written, with the bytes that are done and those in all.
        mapped_ok: change the file in place even while a running process maps it.

    Raises:
        LropeError: where the model has no RoPE or no layers, a factor is unusable, a file cannot be read or written,
            another writer is at work, or the file would be changed under a process that maps it. Nothing is changed
            then.
    """
    with _opened(path, output) as gguf:
        plan, change = _plan_write(gguf, factors, curve_json, output, mapped_ok)
        if plan.how == "rewritten":
            return _rewrite(gguf, plan, change.new, 2, progress)
        if plan.how == "in place":
            _patch(gguf, change)
        return WriteResult(plan.path, plan.how, plan.bytes_written, plan.factors)


def plan_write(
    path: str | os.PathLike[str],
    factors: Iterable[float],
    *,
    curve_json: str | None = None,
    output: str | os.PathLike[str] | None = None,
    mapped_ok: bool = False,
) -> WritePlan:
    """What `write_factors` would do, after all its checks and without writing anything.

    Raises:
        LropeError: as `write_factors`.
    """
    with _opened(path, output) as gguf:
        return _plan_write(gguf, factors, curve_json, output, mapped_ok)[0]


def remove_factors(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    mapped_ok: bool = False,
) -> WriteResult:
    """Remove both keys from a model, or from a copy of it: the inverse of `write_factors`, byte for byte.

    Always through a new file, which leaves a process that maps the old one alone: `mapped_ok` changes nothing.

    Raises:
        LropeError: where a file cannot be read or written, or another writer is at work. Nothing is changed then.
    """
    del mapped_ok
    with _opened(path, output) as gguf:
        target = _target(_info(gguf), output)
        if target is None and not _own(gguf):
            return WriteResult(Path(path), "unchanged", 0, ())
        return _rewrite(gguf, _plan_rewrite(gguf, target, b"", ()), b"", 0, progress)


def plan_remove(path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> WritePlan:
    """What `remove_factors` would do, after all its checks and without writing anything.

    Raises:
        LropeError: as `remove_factors`.
    """
    with _opened(path, output) as gguf:
        target = _target(_info(gguf), output)
        own = _own(gguf)
        if target is None and not own:
            return WritePlan(Path(path), "unchanged", 0, (), None)
        keys = tuple(key for key, entry in gguf.entries.items() if entry in own)
        return replace(_plan_rewrite(gguf, target, b"", ()), removed=keys)


@contextmanager
def _opened(path: str | os.PathLike[str], output: str | os.PathLike[str] | None) -> Iterator[GGUFFile]:
    """The model, locked against other writers together with the file that is to be replaced."""
    other = None
    with ExitStack() as stack, _as_lrope_error(path if output is None else output):
        if output is not None and not (Path(output).exists() and Path(path).exists() and Path(path).samefile(output)):
            other = output
        stack.enter_context(locked(path, shared=other is not None))
        gguf = stack.enter_context(GGUFFile(path))
        if other is not None:
            stack.enter_context(locked(other))
        yield gguf


@contextmanager
def _as_lrope_error(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(Path(path), error, "nothing was changed") from error


@dataclass(frozen=True)
class _Change:
    """New bytes for our keys; to overwrite in place, those that differ from `start` on, and the `old` ones there."""

    new: bytes
    start: int = 0
    old: bytes = b""


def _plan_write(
    gguf: GGUFFile,
    factors: Iterable[float],
    curve_json: str | None,
    output: str | os.PathLike[str] | None,
    mapped_ok: bool,
) -> tuple[WritePlan, _Change]:
    path = gguf.path
    info = _info(gguf)
    architecture, stored = _storable(info, factors)
    if curve_json is None:
        document = CurveFile(layer_factors=tuple(map(shortest, stored)), architecture=architecture)
    else:
        document = CurveFile.loads(curve_json, "curve_json")
    text = document.dumps(compact=True).encode()
    if len(text) > MAX_BYTES:
        raise LropeError(f"{path}: the curve's document is above 1 MiB; shorten its provenance")
    target = _target(info, output)
    key = factors_key(architecture)
    slot = _slot(gguf, key, len(stored)) if target is None else None
    if slot is not None and len(text) <= slot[2]:
        start, end, room, factors_first = slot
        old, new = gguf.read(start, end), _entries(gguf.order, key, stored, text, room, factors_first)
        if old == new:
            return WritePlan(path, "unchanged", 0, stored, None), _Change(b"")
        if os.fstat(gguf.file.fileno()).st_nlink == 1:
            first = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
            last = next(i for i in range(len(new), 0, -1) if old[i - 1] != new[i - 1])
            _check_permission(path)
            if not mapped_ok:
                _check_unmapped(gguf)
            return (
                WritePlan(path, "in place", last - first, stored, None),
                _Change(new[first:last], start + first, old[first:last]),
            )
    new = _new_entries(gguf, key, stored, text, block_size(path if target is None else target))
    return _plan_rewrite(gguf, target, new, stored), _Change(new)


def _plan_rewrite(gguf: GGUFFile, target: Path | None, new: bytes, factors: tuple[float, ...]) -> WritePlan:
    path = gguf.path if target is None else target
    pieces = _pieces(gguf, new, 0)
    size = _length(pieces)
    place = Path(os.path.realpath(path))
    _check_permission(path)
    if not place.parent.is_dir():
        raise LropeError(f"{path}: its directory does not exist; make it first")
    check_replaceable(path)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise LropeError(f"{path}: its directory is read-only; make it writable or give --output")
    shares = may_share_blocks(gguf.path, place.parent)
    if shares is not False:
        shares = _keeps_blocks(pieces, block_size(place)) and can_share_blocks(gguf.file, place.parent)
    free = shutil.disk_usage(place.parent).free
    if free < size and not shares:
        raise LropeError(
            f"{path}: needs {size} bytes beside it, {free} are free; free some space, or write to another disk with "
            "--output"
        )
    links = place.stat().st_nlink if place.exists() else 1
    notes = (_LINKS.format(links=links, path=path),) if links > 1 else ()
    return WritePlan(path, "rewritten", size, factors, shares, notes)


def _check_permission(path: Path) -> None:
    """Refuse early what could only fail late, or would replace a file that is write-protected."""
    if path.exists() and not os.access(path, os.W_OK):
        raise LropeError(f"{path}: is read-only; make it writable or give --output")


def _check_unmapped(gguf: GGUFFile) -> None:
    users = mapped_by(gguf.path)
    if users:
        name, process = users[0]
        others = f" and {len(users) - 1} more" if len(users) > 1 else ""
        raise LropeError(
            f"{gguf.path}: is mapped by {name} (process {process}){others}: a change in place would change the memory "
            "of a running program; stop it, write a copy with --output, or allow it with --mapped-ok"
        )


def _info(gguf: GGUFFile) -> ModelInfo:
    shards = _shards(gguf)
    architecture = gguf.text("general.architecture")

    def of(key: str) -> str:
        return f"{architecture}.{key}"

    def real(key: str) -> float | None:
        value = gguf.scalar(of(key))
        return None if value is None else float(value)

    block_count = gguf.integer(of("block_count"))
    if block_count is not None and not 0 < block_count <= MAX_LAYERS:
        at = gguf.entries[of("block_count")].value
        raise LropeError(f"{gguf.path}: {of('block_count')} is {block_count} (byte {at}); the file is damaged")
    nextn = gguf.integer(of("nextn_predict_layers")) or 0
    if not 0 <= nextn < (block_count or MAX_LAYERS):
        at = gguf.entries[of("nextn_predict_layers")].value
        raise LropeError(f"{gguf.path}: {of('nextn_predict_layers')} is {nextn} (byte {at}); the file is damaged")
    factor = real("rope.scaling.factor")
    factors, factors_error = _stored_factors(gguf, factors_key(str(architecture)), block_count)
    curve = gguf.text(CURVE_KEY, 4 * MAX_BYTES)
    return ModelInfo(
        path=gguf.path,
        file_size=gguf.size,
        version=gguf.version,
        n_tensors=gguf.n_tensors,
        name=gguf.text("general.name"),
        kind=gguf.text("general.type"),
        architecture=architecture,
        block_count=block_count,
        nextn_predict_layers=nextn,
        context_length=gguf.integer(of("context_length")),
        rope_freq_base=real("rope.freq_base"),
        rope_dimension_count=gguf.integer(of("rope.dimension_count")),
        rope_scaling_type=gguf.text(of("rope.scaling.type")),
        rope_scaling_factor=real("rope.scale_linear") if factor is None else factor,
        rope_switched_off=architecture in _ROPE_SWITCH and gguf.scalar(of("rope.scaling.finetuned")) is False,
        factors=factors,
        factors_error=factors_error,
        curve_json=None if curve is None else curve.rstrip(" "),
        shards=shards,
    )


def _shards(gguf: GGUFFile) -> int:
    """The number of shards, where this file is the first of them."""
    number, count = gguf.integer("split.no") or 0, gguf.integer("split.count") or 1
    match = _SHARD.fullmatch(gguf.path.name)
    if match and count == 1:
        number, count = int(match[2]) - 1, int(match[3])
    if number > 0:
        first = gguf.path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else "the file -00001-of-..."
        raise LropeError(
            f"{gguf.path}: is shard {number + 1} of {count} of a split model; its metadata are in {first}, give that"
        )
    return max(count, 1)


def _stored_factors(gguf: GGUFFile, key: str, n: int | None) -> tuple[tuple[float, ...] | None, str | None]:
    """The array of `key` and None, or None and what is wrong with it; None and None where it is absent."""
    entry = gguf.entries.get(key)
    if entry is None:
        return None, None
    if (entry.kind, entry.item) != (ARRAY, FLOAT32):
        return None, f"{key} is no array of float32"
    if entry.length != n:
        return None, f"{key} has {entry.length} values for {n or 'an unknown number of'} layers"
    values = struct.unpack(f"{gguf.order}{n}f", gguf.read(entry.value, entry.end))
    for layer, value in enumerate(values):
        if not (math.isfinite(value) and value > 0):
            return None, f"{key} is {value} in layer {layer}"
    return values, None


def _storable(info: ModelInfo, factors: Iterable[float]) -> tuple[str, tuple[float, ...]]:
    """The architecture and the float32 values to store, checked against the model."""
    path, n_layer = info.path, info.n_layer
    if info.architecture is None:
        raise LropeError(f"{path}: names no architecture; give a model")
    if not info.has_rope:
        raise LropeError(
            f"{path}: models of architecture {info.architecture!r} like this use no RoPE; give one that does"
        )
    if info.kind == "adapter":
        raise LropeError(f"{path}: is a LoRA adapter; write the factors into its base model")
    if info.block_count is None or n_layer is None:
        raise LropeError(f"{path}: has no {info.architecture}.block_count (no layers); give a whole model")
    values = [positive(value, f"{path}: the factor of layer {layer}") for layer, value in enumerate(factors)]
    if len(values) == n_layer:
        values += [1.0] * info.nextn_predict_layers
    if len(values) != info.block_count:
        raise LropeError(f"{path}: {len(values)} factors for a model of {n_layer} layers; give one a layer")
    stored = []
    for layer, value in enumerate(values):
        if layer >= n_layer and value != 1:
            raise LropeError(f"{path}: layer {layer} is of a multi-token-prediction head and keeps factor 1")
        if not 1 / MAX_FACTOR <= value <= MAX_FACTOR:
            raise LropeError(
                f"{path}: the factor of layer {layer} is {value:g}, but llama.cpp takes 1/{MAX_FACTOR} to "
                f"{MAX_FACTOR}; give one near 1"
            )
        stored.append(struct.unpack("<f", struct.pack("<f", value))[0])
    return info.architecture, tuple(stored)


def _target(info: ModelInfo, output: str | os.PathLike[str] | None) -> Path | None:
    """The other file to write; None where that is the model itself."""
    if output is None or os.path.realpath(output) == os.path.realpath(info.path):
        return None
    if Path(output).exists() and info.path.samefile(output) and info.path.stat().st_nlink == 1:
        return None
    match = _SHARD.fullmatch(Path(output).name)
    if info.shards > 1 and not (match and int(match[2]) == 1 and int(match[3]) == info.shards):
        raise LropeError(
            f"{output}: a split model's first shard is found by its name; end it in -00001-of-{info.shards:05}.gguf "
            "and put the other shards beside it"
        )
    return Path(output)


def _own(gguf: GGUFFile) -> list[Entry]:
    """Our keys' entries, in the file's order."""
    keys = (factors_key(str(gguf.text("general.architecture"))), CURVE_KEY)
    return sorted(gguf.entries[key] for key in keys if key in gguf.entries)


def _prefix(gguf: GGUFFile, added: int) -> bytes:
    """The first 24 bytes, with the number of keys less our old ones and plus `added`."""
    n_keys = len(gguf.entries) - len(_own(gguf)) + added
    return gguf.read(0, 16) + struct.pack(gguf.order + "Q", n_keys)


def _kept(gguf: GGUFFile, end: int) -> list[tuple[int, int]]:
    """The stretches between the prefix and `end` that are not ours."""
    edges = [24, *(edge for entry in _own(gguf) for edge in (entry.start, entry.end)), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _string(order: str, data: bytes) -> bytes:
    return struct.pack(order + "Q", len(data)) + data


def _entries(
    order: str, key: str, factors: Sequence[float], text: bytes, room: int, factors_first: bool = True
) -> bytes:
    """Both keys as they stand in a file, the string padded with spaces to `room` bytes."""
    array = struct.pack(f"{order}IIQ{len(factors)}f", ARRAY, FLOAT32, len(factors), *factors)
    parts = [
        _string(order, key.encode(errors="surrogateescape")) + array,
        _string(order, CURVE_KEY.encode()) + struct.pack(order + "I", STRING) + _string(order, text.ljust(room)),
    ]
    return b"".join(parts if factors_first else reversed(parts))


def _new_entries(gguf: GGUFFile, key: str, factors: Sequence[float], text: bytes, block: int) -> bytes:
    """Both keys for a new file: whole pages, or blocks where those are larger, with room for a longer document.

    The array comes first, or last where it would otherwise lie across a page's edge: inside one page, a change in
    place reaches it whole or not at all.
    """
    others = len(_entries(gguf.order, key, factors, b"", 0))
    unit = max(_PAGE, gguf.alignment, block)
    needed = others + len(text) + max(_SLACK, len(text))
    room = -(-needed // unit) * unit - others
    place = gguf.kv_end - sum(entry.end - entry.start for entry in _own(gguf))
    start = (place + 24 + len(key.encode(errors="surrogateescape"))) % _PAGE
    crosses_first, crosses_last = start + 4 * len(factors) > _PAGE, 0 < place % _PAGE < 4 * len(factors)
    return _entries(gguf.order, key, factors, text, room, not crosses_first or crosses_last)


def _slot(gguf: GGUFFile, key: str, n: int) -> tuple[int, int, int, bool] | None:
    """Where both keys lie side by side, ready to be overwritten: start, end, the string's length, array first."""
    array, curve = gguf.entries.get(key), gguf.entries.get(CURVE_KEY)
    if array is None or curve is None or (array.kind, array.item, array.length) != (ARRAY, FLOAT32, n):
        return None
    if curve.end - curve.value > _MAX_ROOM:
        return None
    if curve.kind != STRING or (array.end != curve.start and curve.end != array.start):
        return None
    return min(array.start, curve.start), max(array.end, curve.end), curve.end - curve.value, array.start < curve.start


def _patch(gguf: GGUFFile, change: _Change) -> None:
    """Overwrite bytes in place, in one write; put the old ones back where that fails."""
    consequence = "nothing was changed"
    try:
        with gguf.path.open("r+b", buffering=0) as file:
            try:
                _overwrite(file, change.start, change.new)
            except BaseException:
                consequence = "its layer factors may be half changed, write them again"
                if _take_back(file, change):
                    consequence = "nothing was changed"
                raise
    except OSError as error:
        raise write_error(gguf.path, error, consequence) from error


def _take_back(file: FileIO, change: _Change) -> bool:
    """Write the old bytes again; whether they stand there."""
    file.seek(change.start)
    try:
        write_all(file, change.old)
    except OSError:  # no block is free for these either: then most likely nothing has been written
        file.seek(change.start)
        if file.read(len(change.old)) != change.old:
            return False
    os.fsync(file.fileno())
    return True


def _overwrite(file: FileIO, at: int, data: bytes) -> None:
    file.seek(at)
    write_all(file, data)
    os.fsync(file.fileno())


_Pieces = list[bytes | tuple[int, int]]


def _pieces(gguf: GGUFFile, new: bytes, added: int) -> _Pieces:
    """A file with `new` (`added` keys) after the last key instead of our old ones: bytes, and stretches of the old."""
    shift = len(new) - sum(entry.end - entry.start for entry in _own(gguf))
    if shift % gguf.alignment == 0 or not gguf.n_tensors:
        rest: _Pieces = [(gguf.kv_end, gguf.size)]
    else:  # keys that another program wrote: only its padding differs
        padding = bytes(-(gguf.info_end + shift) % gguf.alignment)
        rest = [(gguf.kv_end, gguf.info_end), padding, (gguf.data_start, gguf.size)]
    return [_prefix(gguf, added), *_kept(gguf, gguf.kv_end), new, *rest]


def _length(pieces: _Pieces) -> int:
    return sum(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)


def _keeps_blocks(pieces: _Pieces, block: int) -> bool:
    """Whether the last piece, the tensor data, keeps its place in the blocks of the disk and has a whole one."""
    *before, last = pieces
    if isinstance(last, bytes):
        return False
    start, end = last
    return (start - _length(before)) % block == 0 and start + -start % block < end


def _rewrite(gguf: GGUFFile, plan: WritePlan, new: bytes, added: int, progress: Progress | None) -> WriteResult:
    """Write the new file that `plan` describes."""
    pieces, shared, done = _pieces(gguf, new, added), 0, 0
    notes = list(plan.notes)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, plan.bytes_written)

    mode = stat.S_IMODE(os.fstat(gguf.file.fileno()).st_mode) & 0o777  # a new copy is as private as its model
    with replacing(plan.path, notes, mode=mode) as file:
        for piece in pieces:
            if isinstance(piece, bytes):
                write_all(file, piece)
                advance(len(piece))
            else:
                shared += append_range(gguf.file, file, *piece, advance)
    return WriteResult(plan.path, "rewritten", plan.bytes_written, plan.factors, shared, tuple(notes))
