"""Layer factors in a GGUF file's metadata: written and removed, every other byte kept.

Two keys are ours: `{architecture}.rope.scaling.layer_factors`, an array of `{architecture}.block_count` float32 that
the patched llama.cpp reads, and `lrope.curve`, the curve file's JSON. `layout` says where they stand, `model_info` what
a header holds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
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
    free_bytes,
    locked,
    mapped_by,
    replacing,
    write_all,
    write_error,
)
from lrope_gguf.gguf_scan import GGUFFile
from lrope_gguf.layout import entries_for, factors_key, keeps_blocks, length, new_entries, own, pieces_of, slot_of
from lrope_gguf.model_info import SHARD, ModelInfo, info_of, shortest
from lrope_gguf.model_info import read_factors as read_factors
from lrope_gguf.model_info import read_model as read_model
from lrope_gguf.rope_scaling import single
from lrope_gguf.stores import check_changeable

_LINKS = "{path} had {links} names (hard links); only this one has the new content, the others keep the old"
Progress = Callable[[int, int], None]


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


def storable_factors(info: ModelInfo, factors: Iterable[float]) -> tuple[float, ...]:
    """Factors as `write_factors` would store them, one a block: float32, 1 in a multi-token-prediction head.

    Raises:
        LropeError: where the model cannot have them.
    """
    return _storable(info, factors)[1]


def remove_factors(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> WriteResult:
    """Remove both keys from a model, or from a copy of it: the inverse of `write_factors`, byte for byte.

    Always through a new file, which leaves a process that maps the old one alone.

    Raises:
        LropeError: where a file cannot be read or written, or another writer is at work. Nothing is changed then.
    """
    with _opened(path, output) as gguf:
        target = _target(info_of(gguf), output)
        if target is None and not own(gguf):
            return WriteResult(Path(path), "unchanged", 0, ())
        return _rewrite(gguf, _plan_rewrite(gguf, target, b"", ()), b"", 0, progress)


def plan_remove(path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> WritePlan:
    """What `remove_factors` would do, after all its checks and without writing anything.

    Raises:
        LropeError: as `remove_factors`.
    """
    with _opened(path, output) as gguf:
        target = _target(info_of(gguf), output)
        ours = own(gguf)
        if target is None and not ours:
            return WritePlan(Path(path), "unchanged", 0, (), None)
        keys = tuple(key for key, entry in gguf.entries.items() if entry in ours)
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
    info = info_of(gguf)
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
    slot = slot_of(gguf, key, len(stored)) if target is None else None
    if slot is not None and len(text) <= slot[2]:
        start, end, room, factors_first = slot
        old, new = gguf.read(start, end), entries_for(gguf.order, key, stored, text, room, factors_first)
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
    new = new_entries(gguf, key, stored, text, block_size(path if target is None else target))
    return _plan_rewrite(gguf, target, new, stored), _Change(new)


def _plan_rewrite(gguf: GGUFFile, target: Path | None, new: bytes, factors: tuple[float, ...]) -> WritePlan:
    path = gguf.path if target is None else target
    pieces = pieces_of(gguf, new, 0)
    size = length(pieces)
    place = Path(os.path.realpath(path))
    _check_permission(path)
    if not place.parent.is_dir():
        raise LropeError(f"{path}: its directory does not exist; make it first")
    check_replaceable(path)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise LropeError(f"{path}: its directory is read-only; make it writable or give --output")
    shares = keeps_blocks(pieces, block_size(place)) and can_share_blocks(gguf.file, place.parent)
    free = free_bytes(place.parent)
    if free < size and not shares:
        raise LropeError(
            f"{path}: needs {size} bytes beside it, {free} are free; free some space, or write to another disk with "
            "--output"
        )
    links = place.stat().st_nlink if place.exists() else 1
    notes = (_LINKS.format(links=links, path=path),) if links > 1 else ()
    return WritePlan(path, "rewritten", size, factors, shares, notes)


def _check_permission(path: Path) -> None:
    """Refuse early what could only fail late, or would replace a file that is protected or lies in a store."""
    check_changeable(path)
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


def _storable(info: ModelInfo, factors: Iterable[float]) -> tuple[str, tuple[float, ...]]:
    """The architecture and the float32 values to store, checked against the model."""
    path = info.path
    if info.architecture is None:
        raise LropeError(f"{path}: names no architecture; give a model")
    if not info.has_rope:
        raise LropeError(
            f"{path}: models of architecture {info.architecture!r} like this use no RoPE; give one that does"
        )
    if info.kind == "adapter":
        raise LropeError(f"{path}: is a LoRA adapter; write the factors into its base model")
    if info.block_count is None:
        raise LropeError(f"{path}: has no {info.architecture}.block_count (no layers); give a whole model")
    values = [positive(value, f"{path}: the factor of layer {layer}") for layer, value in enumerate(factors)]
    stored = []
    for layer, value in enumerate(info.shaped(values)):
        if refusal := info.rope.refusal(value):
            raise LropeError(f"{path}: the factor of layer {layer} is {value:g}, but {refusal}")
        stored.append(single(value))
    return info.architecture, (*stored, *[1.0] * info.nextn_predict_layers)


def _target(info: ModelInfo, output: str | os.PathLike[str] | None) -> Path | None:
    """The other file to write; None where that is the model itself."""
    if output is None or os.path.realpath(output) == os.path.realpath(info.path):
        return None
    if Path(output).exists() and info.path.samefile(output) and info.path.stat().st_nlink == 1:
        return None
    match = SHARD.fullmatch(Path(output).name)
    if info.shards > 1 and not (match and int(match[2]) == 1 and int(match[3]) == info.shards):
        raise LropeError(
            f"{output}: a split model's first shard is found by its name; end it in -00001-of-{info.shards:05}.gguf "
            "and put the other shards beside it"
        )
    return Path(output)


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


def _rewrite(gguf: GGUFFile, plan: WritePlan, new: bytes, added: int, progress: Progress | None) -> WriteResult:
    """Write the new file that `plan` describes."""
    pieces, shared, done = pieces_of(gguf, new, added), 0, 0
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
