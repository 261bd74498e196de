"""Factors, query scales and RoPE scaling in a GGUF file's metadata: written and removed, every other byte kept.

`layout.array_keys` names the arrays of float32 that the patched llama.cpp reads: a number for each layer, KV head or
head, layer after layer. `lrope.curve` is the curve file's JSON. `rope_scaling` says which keys a scaling takes,
`layout` where all our keys stand and what they replaced, `rescale` what a new scaling changes, `model_info` what a
header says. `fold` alone changes more: the tensors that make queries, in all files of a model.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrope_gguf import files, layout
from lrope_gguf.curve import MAX_BYTES, ROWS, CurveFile, Rows, head_rows, positive
from lrope_gguf.errors import LropeError
from lrope_gguf.files import append_range, can_share_blocks, free_bytes, locked, mapped_by, replacing, write_all
from lrope_gguf.folded import folded_of
from lrope_gguf.gguf_file import ARRAY, FLOAT32, STRING, GGUFFile, string
from lrope_gguf.layout import (
    CURVE_KEY,
    FOLDED_KEY,
    ORIGINAL_KEY,
    Base,
    Block,
    Contents,
    Made,
    Part,
    Pieces,
    array_keys,
    pieces_of,
)
from lrope_gguf.model_info import SHARD, ModelInfo, has_long_factors, info_of
from lrope_gguf.model_info import read_factors as read_factors
from lrope_gguf.model_info import read_model as read_model
from lrope_gguf.rescale import KeyChange, Rescaled, rescaled, restored
from lrope_gguf.rope_scaling import Recipe, RopeScaling, Scaling, long_factors_error, shortest, shortest_rows, single
from lrope_gguf.stores import check_changeable

if TYPE_CHECKING:  # NumPy, which nothing else here needs
    from lrope_gguf.fold import Folding, Wanted

_LINKS = "{path} had {links} names (hard links); only this one has the new content, the others keep the old"
_MAX_CURVE_BYTES = 1 << 22
_BUFFER = 1 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a write or removal comes to.

    Attributes:
        path: the file that holds the result.
        how: `"in place"`, `"rewritten"` (a whole new file) or `"unchanged"` (it was so already).
        bytes_written: bytes changed in place, or the new file's size.
        factors: the factors that are stored then, one per layer; empty where there are none.
    """

    path: Path
    how: Literal["in place", "rewritten", "unchanged"]
    bytes_written: int
    factors: tuple[float, ...]


@dataclass(frozen=True)
class WriteResult(Outcome):
    """What a write or removal did.

    Attributes:
        bytes_shared: of a new file, the bytes that it shares with the old one on the disk instead of a copy.
        notes: what the user should know besides, such as other names that keep the old content.
        folding: what became of query scales that were folded or taken out.
    """

    bytes_shared: int = 0
    notes: tuple[str, ...] = ()
    folding: Folding | None = None


@dataclass(frozen=True)
class WritePlan(Outcome):
    """What `write_factors` would do.

    Attributes:
        shares: whether a new file would share the tensor data with the old one on the disk; None where only
            writing tells.
        notes: as in `WriteResult`.
        removed: the keys that a removal would take out, those left out that return to what they were before.
        changes: what would become of the keys of the scaling, where that is asked for.
        folding: what would become of query scales that are folded or taken out.
    """

    shares: bool | None
    notes: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changes: tuple[KeyChange, ...] = ()
    folding: Folding | None = None


def write_factors(
    path: str | os.PathLike[str],
    factors: Iterable[float] | None = None,
    *,
    head_factors: Iterable[Iterable[float]] | None = None,
    query_scales: Iterable[Iterable[float]] | None = None,
    curve_json: str | None = None,
    scaling: Scaling | None = None,
    fold: Wanted | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    mapped_ok: bool = False,
) -> WriteResult:
    """Store factors, query scales and a RoPE scaling, or some of them, in a model, or with `output` in a copy of it.

    In place where nothing is folded and the file has the same keys, room for `curve_json` and only one name; else
    through a new file that is moved over the old one when it is whole and on the disk; of a split model through one for
    each file that changes, moved when all are whole. A symbolic link stays and its target is rewritten; of several hard
    links only the given name gets the new file. The model is locked meanwhile.

    Args:
        path: the model; of a split one the first shard.
        factors: one positive float per layer: `n_layer` of them, or `block_count` with 1 for the layers of a
            multi-token-prediction head.
        head_factors: of as many layers, one positive float per KV head each; they go before those of the layers.
        query_scales: likewise one per head. Where any of these three is given, the file has no others then; where none
            is, it keeps what it has.
        curve_json: the document to store beside them; by default one that lists them.
        scaling: the scaling, in place of one that was written before. None leaves that of the file as it is.
        fold: query scales to fold. None leaves those that are folded as they are.
        output: where to write instead; an existing file is replaced.
        progress: called while a new file is written, with the bytes that are done and those in all.
        mapped_ok: change the file in place even while a running process maps it.

    Raises:
        LropeError: where the model has no RoPE or no layers, a factor is unusable or the scaling impossible, a file
            cannot be read or written, another writer is at work, or the file would be changed under a process that maps
            it. Nothing is changed then.
    """
    with _opened(path, output, fold is not None) as models:
        given = _Given(factors, head_factors, query_scales, curve_json, fold)
        plan, change = _plan_write(models, given, scaling, output, mapped_ok)
        if plan.how == "rewritten":
            return _rewrite(change.files, plan, progress)
        if plan.how == "in place":
            _patch(models[0], change)
        return WriteResult(plan.path, plan.how, plan.bytes_written, plan.factors)


def plan_write(
    path: str | os.PathLike[str],
    factors: Iterable[float] | None = None,
    *,
    head_factors: Iterable[Iterable[float]] | None = None,
    query_scales: Iterable[Iterable[float]] | None = None,
    curve_json: str | None = None,
    scaling: Scaling | None = None,
    fold: Wanted | None = None,
    output: str | os.PathLike[str] | None = None,
    mapped_ok: bool = False,
) -> WritePlan:
    """What `write_factors` would do, after all its checks and without writing anything.

    Raises:
        LropeError: as `write_factors`.
    """
    with _opened(path, output, fold is not None) as models:
        given = _Given(factors, head_factors, query_scales, curve_json, fold)
        return _plan_write(models, given, scaling, output, mapped_ok)[0]


def plan_scaling(path: str | os.PathLike[str], scaling: Scaling) -> tuple[RopeScaling, Recipe | None]:
    """How a model would rotate with a scaling, and that in numbers, if any. Raises `LropeError`: it cannot have it."""
    with GGUFFile(path) as gguf:
        _check_rotates(info_of(gguf))
        planned = _rescaled(Base(gguf), scaling)
        return planned.rope, planned.recipe


def storable_factors(info: ModelInfo, factors: Iterable[float], rope: RopeScaling | None = None) -> tuple[float, ...]:
    """Factors as `write_factors` would store them, one per block: float32, 1 in a multi-token-prediction head.

    Args:
        info: the model.
        factors: as in `write_factors`.
        rope: how it will rotate; by default as its file says.

    Raises:
        LropeError: where the model cannot have them.
    """
    _check_rotates(info)
    if info.block_count is None:
        raise LropeError(
            f"{info.path}: has no {info.architecture}.block_count (the number of layers); give a whole model"
        )
    values = [positive(value, f"{info.path}: the factor of layer {layer}") for layer, value in enumerate(factors)]
    shaped = info.shaped(values)
    _check_factors(info, shaped, info.rope if rope is None else rope)
    return (*map(single, shaped), *[1.0] * info.nextn_predict_layers)


def storable_rows(info: ModelInfo, name: str, rows: Iterable[Iterable[float]], rope: RopeScaling | None = None) -> Rows:
    """Numbers of heads (`name` of `ROWS`) as `write_factors` would store them, a row a block: float32.

    Args and raises: as `storable_factors`; query scales need no RoPE.
    """
    if name == "head_factors":
        _check_rotates(info)
    else:
        _check_own(info)
    try:
        values = head_rows(rows, name)
    except LropeError as error:
        raise LropeError(f"{info.path}: {error}") from None
    shaped = info.shaped_rows(name, values)
    if name == "head_factors":
        for layer, row in enumerate(shaped):
            _check_factors(info, row, info.rope if rope is None else rope, f"of layer {layer}, KV head")
    return tuple(tuple(map(single, row)) for row in shaped)


def remove_factors(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> WriteResult:
    """Remove all that `write_factors` has written, from a model or from a copy of it: its inverse, byte for byte.

    Always through a new file, which leaves a process that maps the old one alone.

    Raises:
        LropeError: where a file cannot be read or written, what stood in it before is not known, a tensor with folded
            scales was changed since, or another writer is at work. Nothing is changed then.
    """
    with _opened(path, output) as models:
        plan, files_ = _plan_remove(models, output)
        if plan.how == "unchanged":
            return WriteResult(plan.path, plan.how, 0, ())
        return _rewrite(files_, plan, progress)


def plan_remove(path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> WritePlan:
    """What `remove_factors` would do, after all its checks and without writing anything.

    Raises:
        LropeError: as `remove_factors`.
    """
    with _opened(path, output) as models:
        return _plan_remove(models, output)[0]


def _plan_remove(
    models: Sequence[GGUFFile], output: str | os.PathLike[str] | None
) -> tuple[WritePlan, tuple[_File, ...]]:
    gguf = models[0]
    target, base = _target(info_of(gguf), output), Base(gguf, folded=False)
    if target is None and not base.ours:
        return WritePlan(gguf.path, "unchanged", 0, (), None), ()
    folding = None
    if (folded := folded_of(gguf)) is not None:
        from lrope_gguf.fold import unfold

        folding = unfold(models, folded)
    # the first file, which says what is folded, is the last to change, so that an interrupted removal can be repeated
    plan, files_ = _plan_rewrite(models, target, pieces_of(base), (), folding)
    back = {base.key(name) for _, name, _ in base.originals.replaced}
    keys = tuple(key for key in base.ours if key not in back)
    return replace(plan, removed=keys, changes=restored(base), folding=folding), files_


@contextmanager
def _opened(
    path: str | os.PathLike[str], output: str | os.PathLike[str] | None, whole: bool | None = None
) -> Iterator[list[GGUFFile]]:
    """The model, locked against other writers together with the file that is to be replaced.

    `whole`: with the other files of a split model; None: where something is folded into it.
    """
    other = None
    try:
        with ExitStack() as stack:
            there = output is not None and Path(output).exists() and Path(path).exists()
            if output is not None and not (there and Path(path).samefile(output)):
                other = output
            stack.enter_context(locked(path, shared=other is not None))
            models = [stack.enter_context(GGUFFile(path))]
            if other is not None:
                stack.enter_context(locked(other))
            if FOLDED_KEY in models[0].entries if whole is None else whole:
                info = info_of(models[0])
                for shard, target in _shards(info, None if other is None else _target(info, other)):
                    stack.enter_context(locked(shard, shared=target != shard))
                    models.append(stack.enter_context(GGUFFile(shard)))
                    if target != shard:
                        stack.enter_context(locked(target))
            yield models
    except OSError as error:
        raise files.write_error(Path(path if output is None else output), error, "nothing was changed") from error


def _shards(info: ModelInfo, target: Path | None) -> list[tuple[Path, Path]]:
    """The other files of a split model, and where to write each. Raises `LropeError`: the name does not tell."""
    if info.shards == 1:
        return []
    match = SHARD.fullmatch(info.path.name)
    if match is None:
        raise LropeError(
            f"{info.path}: its name does not end in -00001-of-{info.shards:05}.gguf; give it its name again"
        )
    names = [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(2, info.shards + 1)]
    new = match if target is None else SHARD.fullmatch(target.name)
    beginning = match[1] if new is None else new[1]
    return [
        (info.path.with_name(name), (target or info.path).with_name(f"{beginning}{name[len(match[1]) :]}"))
        for name in names
    ]


@dataclass(frozen=True)
class _File:
    """A new file to write: from which, where, and of what."""

    gguf: GGUFFile
    path: Path
    contents: Contents


@dataclass(frozen=True)
class _Change:
    """New files, or new bytes in place of the `old` ones from `start` on."""

    files: tuple[_File, ...] = ()
    start: int = 0
    new: bytes = b""
    old: bytes = b""


@dataclass(frozen=True)
class _Given:
    """What `write_factors` is given to store besides a scaling."""

    factors: Iterable[float] | None
    head_factors: Iterable[Iterable[float]] | None
    query_scales: Iterable[Iterable[float]] | None
    curve_json: str | None
    fold: Wanted | None

    @property
    def rows(self) -> dict[str, Iterable[Iterable[float]]]:
        """Those of `ROWS` that are given."""
        return {name: rows for name in ROWS if (rows := getattr(self, name)) is not None}


def _plan_write(
    models: Sequence[GGUFFile],
    given: _Given,
    scaling: Scaling | None,
    output: str | os.PathLike[str] | None,
    mapped_ok: bool,
) -> tuple[WritePlan, _Change]:
    gguf = models[0]
    path, info = gguf.path, info_of(gguf)
    fold, keeps = given.fold, given.factors is None and not given.rows
    if keeps and scaling is None and fold is None:
        raise LropeError(f"{path}: nothing to write; give factors or a scaling")
    if scaling is not None or (keeps and fold is None):
        _check_rotates(info)
    _check_own(info)
    if given.query_scales is not None and FOLDED_KEY in gguf.entries:
        raise LropeError(f"{path}: has query scales folded into it; take them out with lrope-gguf remove first")
    base = Base(gguf, folded=fold is None)
    scaled = _rescaled(base, scaling)
    if keeps:
        stored = info.factors or ()
        _check_factors(info, stored, scaled.rope)
        for layer, row in enumerate(info.head_factors or ()):
            _check_factors(info, row, scaled.rope, f"of layer {layer}, KV head")
        parts, text = _as_they_are(base, None if fold is None else "query_scales")
    else:
        stored = () if given.factors is None else storable_factors(info, given.factors, scaled.rope)
        rows = {name: storable_rows(info, name, rows, scaled.rope) for name, rows in given.rows.items()}
        parts, text = _array_parts(base, info, stored, rows, given.curve_json)
    block = _block(base, parts, text, scaled)
    without = {base.key(kept.name) for kept in (scaled.originals or base.originals).replaced}
    target = _target(info, output)
    if fold is None and target is None and not base.ours and not len(block):
        return WritePlan(path, "unchanged", 0, stored, None, changes=scaled.changes), _Change()
    same_base = scaled.originals is None or scaled.originals == base.originals
    fitting = layout.parts_in_place(base, block) if target is None and same_base and fold is None else None
    if fitting is not None:
        start, new = fitting[0], b"".join(part.data for part in fitting[1])
        old = gguf.read(start, start + len(new))
        if old == new:
            return WritePlan(path, "unchanged", 0, stored, None, changes=scaled.changes), _Change()
        if os.fstat(gguf.file.fileno()).st_nlink == 1 and layout.in_one_page(block, *fitting, old):
            first = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
            last = next(i for i in range(len(new), 0, -1) if old[i - 1] != new[i - 1])
            _check_permission(path)
            users = [] if mapped_ok else mapped_by(path)
            if users:
                name, process = users[0]
                others = f" and {len(users) - 1} more" if len(users) > 1 else ""
                raise LropeError(
                    f"{path}: is mapped by {name} (process {process}){others}: changing it in place would change the "
                    "memory of a running program; stop that, write a copy with --output, or allow it with --mapped-ok"
                )
            plan = WritePlan(path, "in place", last - first, stored, None, changes=scaled.changes)
            return plan, _Change((), start + first, new[first:last], old[first:last])
    unit = files.block_size(path if target is None else target)
    added = layout.new_parts(base, block, without, unit)
    folding = None
    if fold is not None:
        from lrope_gguf import fold as folds

        folding = folds.fold(models, info, fold)
        unit = max(layout.PAGE, gguf.alignment, unit)
        added = [*layout.folded_parts(gguf.order, folding.record, folding.before, unit), *added]
    plan, files_ = _plan_rewrite(models, target, pieces_of(base, added, without), stored, folding)
    # the first file is the first to change: it says for each tensor whether a write was interrupted before its file
    return replace(plan, changes=scaled.changes, folding=folding), _Change(files_[::-1])


def _array_parts(
    base: Base, info: ModelInfo, stored: tuple[float, ...], rows: Mapping[str, Rows], curve_json: str | None
) -> tuple[tuple[Part, ...], bytes | None]:
    """The arrays' entries, and the curve's document."""
    if curve_json is None:
        listed: dict[str, Any] = {name: shortest_rows(of_heads) for name, of_heads in rows.items()}
        factors = tuple(map(shortest, stored)) or None
        document = CurveFile(layer_factors=factors, architecture=info.architecture, **listed)
    else:
        document = CurveFile.loads(curve_json, "curve_json")
    text = document.dumps(compact=True).encode()
    if len(text) > MAX_BYTES:
        raise LropeError(f"{info.path}: the curve's document is larger than 1 MiB; shorten its provenance")
    order, parts = base.gguf.order, []
    flat = {"layer_factors": stored, **{name: tuple(chain(*of_heads)) for name, of_heads in rows.items()}}
    for name, key in array_keys(base.architecture).items():
        if values := flat.get(name):
            array = struct.pack(f"{order}IIQ{len(values)}f", ARRAY, FLOAT32, len(values), *values)
            parts.append(Part(key, string(order, key.encode(errors="surrogateescape")) + array))
    return tuple(parts), text


def _as_they_are(base: Base, without: str | None = None) -> tuple[tuple[Part, ...], bytes | None]:
    """The entries of the arrays that the file has, and the curve's document; empty and None where there is none.

    `without`: the array that is left out.
    """
    gguf = base.gguf
    keys = [key for name, key in array_keys(base.architecture).items() if key in base.ours and name != without]
    parts = tuple(map(base.part, keys))
    curve = base.ours.get(CURVE_KEY)
    if curve is None or (without is not None and not parts):
        return parts, None
    if curve.kind != STRING or curve.end - curve.value > _MAX_CURVE_BYTES:
        raise LropeError(f"{gguf.path}: {CURVE_KEY} is not a curve; write the factors again or remove them")
    return parts, gguf.read(curve.value, curve.end).rstrip(b" ")


def _block(base: Base, parts: tuple[Part, ...], text: bytes | None, scaled: Rescaled) -> Block:
    """All that is to be ours in the file."""
    order, original = base.gguf.order, None
    if scaled.originals is not None:
        original = scaled.originals.dumps(order).encode() if scaled.originals.written else None
    elif ORIGINAL_KEY in base.ours:
        entry = base.ours[ORIGINAL_KEY]
        original = base.gguf.read(entry.value, entry.end).rstrip(b" ")
    strings = ((ORIGINAL_KEY, original), (CURVE_KEY, text))
    return Block(order, (*parts, *scaled.parts), tuple((key, text) for key, text in strings if text is not None))


def _plan_rewrite(
    models: Sequence[GGUFFile], target: Path | None, pieces: Pieces, factors: tuple[float, ...], folding: Folding | None
) -> tuple[WritePlan, tuple[_File, ...]]:
    """New files: the first of the model, and those of the others that change or must go with a copy of it."""
    gguf = models[0]
    made = folding.made if folding is not None else [[]]
    new = [_File(gguf, gguf.path if target is None else target, layout.with_made(pieces, made[0]))]
    if len(models) > 1:
        shards = zip(models[1:], _shards(info_of(gguf), target), made[1:], strict=True)
        new += [
            _File(shard, path, layout.with_made([(0, shard.size)], own))
            for shard, (_, path), own in shards
            if own or target is not None
        ]
    needed = 0
    notes: list[str] = []
    sharing: set[bool | None] = set()
    for file in new:
        place = Path(os.path.realpath(file.path))
        _check_permission(file.path)
        if not place.parent.is_dir():
            raise LropeError(f"{file.path}: its directory does not exist; create it first")
        files.check_replaceable(file.path)
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise LropeError(f"{file.path}: its directory is read-only; make it writable or give --output")
        own = layout.unshared(file.contents, files.block_size(place), file.gguf.info_end)
        shares = own is not None and can_share_blocks(file.gguf.file, place.parent)
        needed += own if shares and own is not None else layout.length(file.contents)
        sharing.add(shares)
        free = free_bytes(place.parent)
        if free < needed:
            raise LropeError(
                f"{file.path}: needs {needed} bytes in its directory, {free} are free; free some space, or write "
                "elsewhere with --output"
            )
        links = place.stat().st_nlink if place.exists() else 1
        notes += [_LINKS.format(links=links, path=file.path)] if links > 1 else []
    size = sum(layout.length(file.contents) for file in new)
    shares = False if False in sharing else None if None in sharing else True
    return WritePlan(new[0].path, "rewritten", size, factors, shares, tuple(notes)), tuple(new)


def _check_permission(path: Path) -> None:
    """Refuse early what could only fail late, or would replace a file that is protected or lies in a store."""
    check_changeable(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise LropeError(f"{path}: is read-only; make it writable or give --output")


def _check_rotates(info: ModelInfo) -> None:
    """Refuse what has no RoPE of its own."""
    if info.architecture is not None and not info.has_rope:
        raise LropeError(
            f"{info.path}: has no RoPE (architecture {info.architecture!r}): factors have no effect; give another model"
        )
    _check_own(info)


def _check_own(info: ModelInfo) -> None:
    """Refuse what has no keys of its own architecture."""
    if info.architecture is None:
        raise LropeError(f"{info.path}: does not name its architecture; give a model")
    if info.kind == "adapter":
        raise LropeError(f"{info.path}: is a LoRA adapter; write to its base model")


def _rescaled(base: Base, scaling: Scaling | None) -> Rescaled:
    """As `rescaled`, which does not look into other shards."""
    result = rescaled(base, scaling)
    if result.recipe is not None and has_long_factors(base.gguf):
        raise long_factors_error(base.gguf.path)
    return result


def _check_factors(info: ModelInfo, factors: Sequence[float], rope: RopeScaling, of: str = "of layer") -> None:
    """Refuse factors that the patched library refuses where the model rotates like this."""
    for number, value in enumerate(factors):
        if refusal := rope.refusal(value):
            raise LropeError(f"{info.path}: the factor {of} {number} is {value:g}, but {refusal}")


def _target(info: ModelInfo, output: str | os.PathLike[str] | None) -> Path | None:
    """The other file to write; None where that is the model itself."""
    if output is None or os.path.realpath(output) == os.path.realpath(info.path):
        return None
    if Path(output).exists() and info.path.samefile(output) and info.path.stat().st_nlink == 1:
        return None
    match = SHARD.fullmatch(Path(output).name)
    if info.shards > 1 and not (match and int(match[2]) == 1 and int(match[3]) == info.shards):
        raise LropeError(
            f"{output}: the name of a split model's first file must end in -00001-of-{info.shards:05}.gguf; change it, "
            "and put the other files beside it"
        )
    return Path(output)


def _patch(gguf: GGUFFile, change: _Change) -> None:
    """Overwrite bytes in place, in one write; put the old ones back where that fails."""
    consequence = "nothing was changed"
    try:
        with gguf.path.open("r+b", buffering=0) as file:
            try:
                file.seek(change.start)
                write_all(file, change.new)
                os.fsync(file.fileno())
            except BaseException:
                consequence = "its layer factors may be half changed, write them again"
                if _take_back(file, change):
                    consequence = "nothing was changed"
                raise
    except OSError as error:
        raise files.write_error(gguf.path, error, consequence) from error


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


def _rewrite(new: Sequence[_File], plan: WritePlan, progress: Progress | None) -> WriteResult:
    """Write the new files, each beside its place, and when all are whole and checked put them there, the last first."""
    shared, done, whole = 0, 0, False
    notes = list(plan.notes)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, plan.bytes_written)

    try:
        with ExitStack() as stack:
            for one in new:
                # a new copy is as private as its model
                mode = stat.S_IMODE(os.fstat(one.gguf.file.fileno()).st_mode) & 0o777
                file = stack.enter_context(replacing(one.path, notes, mode=mode))
                for piece in one.contents:
                    if isinstance(piece, tuple):
                        shared += append_range(one.gguf.file, file, *piece, advance)
                        continue
                    for data in piece.chunks() if isinstance(piece, Made) else (piece,):
                        write_all(file, data)
                        advance(len(data))
                _check_made(file, one)
            whole = True
    except LropeError as error:
        if whole and len(new) > 1:
            raise LropeError(f"{error}; the model's other files may be changed, run lrope-gguf remove on it") from error
        raise
    return WriteResult(plan.path, "rewritten", plan.bytes_written, plan.factors, shared, tuple(notes), plan.folding)


def _check_made(file: FileIO, new: _File) -> None:
    """Read back what was made. Raises `LropeError`: it is not what was checked when it was planned."""
    place = 0
    for piece in new.contents:
        size = layout.length([piece])
        if isinstance(piece, Made):
            import hashlib  # loads OpenSSL

            digest = hashlib.sha256()
            file.seek(place)
            for at in range(0, size, _BUFFER):
                digest.update(file.read(min(_BUFFER, size - at)))
            if digest.hexdigest() != piece.digest:
                raise LropeError(
                    f"{new.path}: {piece.name} is not read back as it was written, nothing was changed; check the disk"
                )
        place += size
