"""What a GGUF model's header says of its layers, its RoPE and our keys."""

from __future__ import annotations

import math
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lrope_gguf.curve import ROWS, Rows
from lrope_gguf.errors import LropeError
from lrope_gguf.folded import Folded, folded_of
from lrope_gguf.gguf_file import ARRAY, FLOAT32, GGUFFile
from lrope_gguf.heads import head_counts, without_head_factors
from lrope_gguf.layout import CURVE_KEY, ORIGINAL_KEY, PAGE, Base, array_keys
from lrope_gguf.reach import has_rope, windows
from lrope_gguf.rope_scaling import RopeScaling

MAX_LAYERS = 4096
_MAX_CURVE_BYTES = 4 << 20
_BUFFER = 1 << 20
_SAMPLES = 64
_NO_WINDOW = frozenset(("llama", "phi3", "exaone4"))  # where llama.cpp 0c1e570 passes over a window (src/models/*.cpp)

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
"""The name of a split model's file: its beginning, its number from 1 on, and how many there are."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model's header says; None where it says nothing.

    Attributes:
        block_count: layers, those of a multi-token-prediction head included.
        nextn_predict_layers: layers of that head, the last ones; all, where the file holds the head alone.
        context_length: trained length in tokens.
        has_rope: whether it uses RoPE, as far as its metadata tells; an unknown architecture is taken to.
        windows: of the layers that a curve shapes, the sliding window in tokens; None where a layer has none.
        windows_error: why the header does not tell them, as a sentence's end.
        rope: how llama.cpp rotates without further options.
        rope_freq_base, rope_dimension_count, rope_scaling_type, rope_scaling_factor, rope_dynamic_factor,
            rope_original_context_length: what the RoPE keys say.
        rope_before, context_length_before: the same before `write_factors` wrote a scaling; None where it did not.
        scaling_error: why what stood there before is not known, as a sentence's end.
        factors: `s_l` of all `block_count` layers, float32 values; None where absent or not usable.
        factors_error: why a stored array is not usable, as a sentence's end.
        n_head, n_head_kv: heads and KV heads of all `block_count` layers; None where the header does not tell both.
        head_factors, query_scales: of these KV heads and heads, a row a layer, float32 values; None where absent or not
            usable.
        head_factors_error, query_scales_error: as `factors_error`.
        without_head_factors: why KV heads can have no factors of their own, as a sentence's end.
        curve_json: the curve's document as stored, without its padding.
        folded: query scales that are folded into the tensors; None where none are.
        folded_error: what is wrong with what is stored of them, as a sentence's end.
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
    has_rope: bool
    windows: tuple[int | None, ...]
    windows_error: str | None
    rope: RopeScaling
    rope_freq_base: float | None
    rope_dimension_count: int | None
    rope_scaling_type: str | None
    rope_scaling_factor: float | None
    rope_dynamic_factor: float | None
    rope_original_context_length: int | None
    rope_before: RopeScaling | None
    context_length_before: int | None
    scaling_error: str | None
    factors: tuple[float, ...] | None
    factors_error: str | None
    n_head: tuple[int, ...] | None
    n_head_kv: tuple[int, ...] | None
    head_factors: Rows | None
    head_factors_error: str | None
    query_scales: Rows | None
    query_scales_error: str | None
    without_head_factors: str | None
    curve_json: str | None
    folded: Folded | None
    folded_error: str | None
    shards: int

    @property
    def n_layer(self) -> int | None:
        """The layers that a curve shapes: all but those of a multi-token-prediction head."""
        return None if self.block_count is None else self.block_count - self.nextn_predict_layers

    @property
    def rows(self) -> dict[str, Rows]:
        """Those of `ROWS` that it has."""
        return {name: rows for name in ROWS if (rows := getattr(self, name)) is not None}

    def error_of(self, name: str) -> str | None:
        """Why the stored array of this name in a curve file is not usable, as a sentence's end."""
        error: str | None = getattr(self, f"{name.removeprefix('layer_')}_error")
        return error

    def shaped(self, factors: Sequence[float]) -> tuple[float, ...]:
        """The factors of `n_layer` layers, of a list that gives these or, with 1 for the head's, `block_count`.

        Raises `LropeError`: the list has another length, or another factor for a layer of the head, or there is no more
        than the head.
        """
        n_layer = self.n_layer or 0
        if self.block_count and not n_layer:
            raise LropeError(
                f"{self.path}: holds only a multi-token-prediction head, whose layers keep factor 1; write the factors "
                "to the model that it belongs to"
            )
        if not factors or len(factors) not in (n_layer, self.block_count):
            raise LropeError(f"{self.path}: {len(factors)} factors for a model of {n_layer} layers; give one per layer")
        for layer, factor in enumerate(factors[n_layer:], n_layer):
            if factor != 1:
                raise LropeError(
                    f"{self.path}: layer {layer} belongs to a multi-token-prediction head and must keep factor 1"
                )
        return tuple(factors[:n_layer])

    def shaped_rows(self, name: str, rows: Rows) -> Rows:
        """The rows of `ROWS[name]` of all `block_count` layers, of as many rows or of those of `n_layer` layers.

        Raises `LropeError`: another number of rows, or of numbers in one; another number than 1 for the layers of a
        multi-token-prediction head; heads that the header does not tell; or KV heads that can have no factors.
        """
        if name == "head_factors" and self.without_head_factors is not None:
            raise LropeError(f"{self.path}: {self.without_head_factors}")
        n_head, what = (self.n_head, "heads") if name == "query_scales" else (self.n_head_kv, "KV heads")
        if n_head is None:
            key = f"{self.architecture}.attention.head_count"
            raise LropeError(f"{self.path}: has no {key} (the number of heads) for each layer; give a whole model")
        n_layer = self.n_layer or 0
        if len(rows) not in (n_layer, len(n_head)):
            raise LropeError(
                f"{self.path}: {len(rows)} lists of {name} for a model of {n_layer} layers; give one per layer"
            )
        rows = (*rows, *((1.0,) * n for n in n_head[len(rows) :]))
        for layer, (row, n) in enumerate(zip(rows, n_head, strict=True)):
            if len(row) != n:
                raise LropeError(
                    f"{self.path}: {name} of layer {layer} has {len(row)} numbers, but that layer has {n} {what}; give "
                    "one for each"
                )
            if layer >= n_layer and set(row) - {1.0}:
                raise LropeError(
                    f"{self.path}: layer {layer} belongs to a multi-token-prediction head and must keep 1 in all {what}"
                )
        return rows

    @property
    def whole_context_layers(self) -> tuple[int, ...]:
        """The layers that see the whole context that the model was trained on, as far as the header tells."""
        n_tokens = self.context_length or sys.maxsize
        return tuple(i for i, window in enumerate(self.windows) if window is None or window >= n_tokens)

    def uniform(self, factor: float) -> tuple[float, ...]:
        """`factor` for the `whole_context_layers`, else 1. Raises `LropeError`: there are none, or unknown ones."""
        ask = "give one factor per layer with --factors"
        if self.windows_error is not None:
            raise LropeError(f"{self.path}: {self.windows_error}; {ask}")
        layers = self.whole_context_layers
        if self.n_layer and self.has_rope and not layers:
            raise LropeError(f"{self.path}: no layer sees the whole context, all have sliding windows; {ask}")
        return tuple(factor if layer in layers else 1.0 for layer in range(self.n_layer or 1))

    def fingerprint(self) -> str:
        """Identity of the base model: SHA-256 in hex, the same before and after `write_factors`, unless that folds.

        Covers the header as it was before, and of the tensor data 64 blocks of 4 KiB, evenly spaced, the first and the
        last included. Raises `LropeError`: the file cannot be read, or what it held before is not known.
        """
        import hashlib  # loads OpenSSL

        with GGUFFile(self.path) as gguf:
            digest = hashlib.sha256()
            for piece in (*Base(gguf).pieces(), (gguf.kv_end, gguf.info_end)):
                if isinstance(piece, bytes):
                    digest.update(piece)
                    continue
                for at in range(*piece, _BUFFER):
                    digest.update(gguf.read(at, min(piece[1], at + _BUFFER)))
            last = max(gguf.data_start, gguf.size - PAGE)
            for i in range(_SAMPLES):
                at = gguf.data_start + (last - gguf.data_start) * i // (_SAMPLES - 1)
                digest.update(gguf.read(at, min(gguf.size, at + PAGE)))
            return digest.hexdigest()


def read_model(path: str | os.PathLike[str]) -> ModelInfo:
    """What the header of the GGUF file `path` says.

    Raises:
        LropeError: where it is missing, not GGUF, damaged or truncated, or a later shard of a split model.
    """
    with GGUFFile(path) as gguf:
        return info_of(gguf)


def read_factors(path: str | os.PathLike[str]) -> tuple[float, ...] | None:
    """The stored factors, one for each of `block_count` layers as float32 values; None where there are none.

    Raises:
        LropeError: as `read_model`, and where the stored array is not usable.
    """
    info = read_model(path)
    if info.factors_error:
        raise LropeError(f"{path}: {info.factors_error}; write the factors again or remove them")
    return info.factors


def info_of(gguf: GGUFFile) -> ModelInfo:
    """What the header of an open file says; raises as `read_model`."""
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
    if not 0 <= nextn <= (block_count or MAX_LAYERS):
        at = gguf.entries[of("nextn_predict_layers")].value
        raise LropeError(f"{gguf.path}: {of('nextn_predict_layers')} is {nextn} (byte {at}); the file is damaged")
    if architecture == "deepseek4":  # counts a head where it has its tensor (`llama_model_deepseek4`)
        first = (block_count or 0) - nextn
        if not _in_a_shard(gguf, shards, lambda shard: first in shard.head_layers, missing=True):
            nextn = 0
    n_layer = block_count - nextn if block_count else 0
    of_layers = windows(gguf, str(architecture), n_layer)
    factor = real("rope.scaling.factor")
    keys = array_keys(str(architecture))
    factors, factors_error = _stored_factors(gguf, keys["layer_factors"], block_count)
    n_head, n_head_kv = head_counts(gguf, str(architecture), block_count or 0) or (None, None)
    head_factors, head_factors_error = _stored_rows(gguf, keys, "head_factors", n_head_kv)
    query_scales, query_scales_error = _stored_rows(gguf, keys, "query_scales", n_head)
    curve = gguf.text(CURVE_KEY, _MAX_CURVE_BYTES)
    rope_before, context_length_before, scaling_error = _before(gguf)
    folded, folded_error = _folded(gguf)
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
        has_rope=has_rope(gguf, str(architecture), block_count),
        windows=of_layers,
        windows_error=_windows_error(gguf, str(architecture), of_layers),
        rope=RopeScaling.of(gguf, str(architecture)),
        rope_freq_base=real("rope.freq_base"),
        rope_dimension_count=gguf.integer(of("rope.dimension_count")),
        rope_scaling_type=gguf.text(of("rope.scaling.type")),
        rope_scaling_factor=real("rope.scale_linear") if factor is None else factor,
        rope_dynamic_factor=real("rope.scaling.dynamic_factor"),
        rope_original_context_length=gguf.integer(of("rope.scaling.original_context_length")),
        rope_before=rope_before,
        context_length_before=context_length_before,
        scaling_error=scaling_error,
        factors=factors,
        factors_error=factors_error,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_factors=head_factors,
        head_factors_error=head_factors_error,
        query_scales=query_scales,
        query_scales_error=query_scales_error,
        without_head_factors=without_head_factors(gguf, str(architecture)),
        curve_json=None if curve is None else curve.rstrip(" "),
        folded=folded,
        folded_error=folded_error,
        shards=shards,
    )


def _windows_error(gguf: GGUFFile, architecture: str, of_layers: Sequence[int | None]) -> str | None:
    """What is wrong where the header names a sliding window, but nothing says which layers have it."""
    key = f"{architecture}.attention.sliding_window"
    told = gguf.has(f"{key}_pattern") or architecture in _NO_WINDOW or any(window is not None for window in of_layers)
    if told or not gguf.integer(key):
        return None
    return f"its header does not tell which layers of {architecture!r} have the sliding window of {key}"


def _before(gguf: GGUFFile) -> tuple[RopeScaling | None, int | None, str | None]:
    """How the model rotated and its context length before we wrote a scaling, and why that is not known."""
    if ORIGINAL_KEY not in gguf.entries:
        return None, None, None
    try:
        base = Base(gguf)
    except LropeError as error:
        return None, None, str(error).removeprefix(f"{gguf.path}: ")
    return RopeScaling.of(base.values, base.architecture), base.values.integer(base.key("context_length")), None


def _folded(gguf: GGUFFile) -> tuple[Folded | None, str | None]:
    """What is folded, and why it cannot be taken out, as far as the header of this file tells."""
    try:
        folded = folded_of(gguf)
    except LropeError as error:
        return None, str(error).removeprefix(f"{gguf.path}: ")
    name = None if folded is None else folded.changed(gguf)
    return folded, None if name is None else f"{name} has another type now"


def _shards(gguf: GGUFFile) -> int:
    """The number of shards, where this file is the first of them."""
    number, count = gguf.integer("split.no") or 0, gguf.integer("split.count") or 1
    match = SHARD.fullmatch(gguf.path.name)
    if match and count == 1:
        number, count = int(match[2]) - 1, int(match[3])
    if number > 0:
        first = gguf.path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else "the file -00001-of-..."
        raise LropeError(f"{gguf.path}: is shard {number + 1} of {count} of a split model; give the first, {first}")
    return max(count, 1)


def has_long_factors(gguf: GGUFFile) -> bool:
    """Whether the model holds factors of LongRoPE, in this shard or another that is there; raises as `read_model`."""
    return _in_a_shard(gguf, _shards(gguf), lambda shard: shard.has_long_factors, missing=False)


def _in_a_shard(gguf: GGUFFile, shards: int, holds: Callable[[GGUFFile], bool], *, missing: bool) -> bool:
    """Whether this shard or another one `holds` something; `missing` is the answer for one that is not there."""
    if holds(gguf):
        return True
    match = SHARD.fullmatch(gguf.path.name)
    for number in range(2, shards + 1):
        other = gguf.path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") if match else None
        if other is None or not other.exists():
            if missing:
                return True
            continue
        with GGUFFile(other) as shard:
            if holds(shard):
                return True
    return False


def _stored_factors(gguf: GGUFFile, key: str, n: int | None) -> tuple[tuple[float, ...] | None, str | None]:
    """The array of `key` and None, or None and what is wrong with it; None and None where it is absent."""
    values, error = _stored_floats(gguf, key, n, "layers")
    for layer, value in enumerate(values or ()):
        if not (math.isfinite(value) and value > 0):
            return None, f"{key} is {value} in layer {layer}"
    return values, error


def _stored_rows(
    gguf: GGUFFile, keys: Mapping[str, str], name: str, counts: Sequence[int] | None
) -> tuple[Rows | None, str | None]:
    """The same of `ROWS[name]`, in rows of as many numbers as the layers have heads."""
    key, most = keys[name], ROWS[name]
    values, error = _stored_floats(gguf, key, sum(counts or ()), "heads" if name == "query_scales" else "KV heads")
    if values is None:
        return None, error
    numbers = iter(values)
    rows = tuple(tuple(islice(numbers, n)) for n in counts or ())
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if not 1 / most <= value <= most:
                return None, f"{key} is {value} for head {head} of layer {layer}, beyond 1/{most} to {most}"
    return rows, None


def _stored_floats(gguf: GGUFFile, key: str, n: int | None, what: str) -> tuple[tuple[float, ...] | None, str | None]:
    """The array of `n` float32 of `key` and None, or None and what is wrong with it; None and None without it."""
    entry = gguf.entries.get(key)
    if entry is None:
        return None, None
    if (entry.kind, entry.item) != (ARRAY, FLOAT32):
        return None, f"{key} is not an array of float32"
    if not n or entry.length != n:
        return None, f"{key} has {entry.length} values for {n or 'an unknown number of'} {what}"
    return struct.unpack(f"{gguf.order}{n}f", gguf.read(entry.value, entry.end)), None
