"""Hostile GGUF files, and what must become of them: read, or refused with one line that names the file.

The seeds cover both versions and byte orders, alignments, nested arrays, split models, adapters and files without
tensors; the mutants flip bits, set bytes, lengths and types, splice, cut, repeat and nest. A mutant depends only on
the seed and its number. What is accepted may also be shown, written to another file and restored, byte for byte;
anything else than that or a refusal is a finding.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lrope_gguf import LropeError, Scaling, cli
from lrope_gguf.gguf_file import ARRAY, STRING, GGUFFile
from lrope_gguf.layout import array_keys
from lrope_gguf.metadata import read_factors, read_model, remove_factors, write_factors

SECONDS = 2.0
LENGTHS = (0, 1, 2, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


class Seed(NamedTuple):
    """A valid file and where its parts stand.

    `spots`: offsets worth changing, padding left out; `lengths`: of 64-bit lengths; `types`: of 32-bit types.
    `pairs`: start and end of the keys with their values.
    """

    data: bytes
    order: str
    spots: list[int]
    lengths: list[int]
    types: list[int]
    pairs: list[tuple[int, int]]
    info_end: int


class Outcome(NamedTuple):
    """What became of a file; `finding` is empty unless it is one."""

    kind: str
    message: str = ""
    finding: str = ""


class _TimeoutError(BaseException):
    """Not an Exception, so that no handler takes it for an error of the file."""


def make_seeds(folder: Path) -> list[Path]:
    """Write the seed files into `folder`, which must exist. Needs the `gguf` package."""
    # imported here: the processes of the long run make no seeds and are to stay small
    from gguf import GGUFValueType, GGUFWriter

    from support.gguf_fixtures import header, number_pair, string, text_pair, write_model

    paths: list[Path] = []

    def path(name: str) -> Path:
        paths.append(folder / f"{name}.gguf")
        return paths[-1]

    def of_every_type(writer: GGUFWriter) -> None:
        for kind in GGUFValueType:
            if kind not in (GGUFValueType.ARRAY, GGUFValueType.STRING):
                value = kind == GGUFValueType.BOOL or 1
                writer.add_key_value(f"x.{kind.name}", value, kind)
                writer.add_key_value(f"x.{kind.name}s", [value] * 3, GGUFValueType.ARRAY, kind)

    def split(writer: GGUFWriter) -> None:
        writer.add_key_value("split.no", 0, GGUFValueType.UINT16)
        writer.add_key_value("split.count", 3, GGUFValueType.UINT16)

    def adapter(writer: GGUFWriter) -> None:
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 16.0)

    plain = write_model(path("plain")).read_bytes()
    path("version-2").write_bytes(plain[:4] + struct.pack("<I", 2) + plain[8:])
    write_model(path("big-endian"), big_endian=True)
    write_model(path("types"), add=of_every_type)
    for alignment in (8, 256, 4096):
        write_model(path(f"alignment-{alignment}"), alignment=alignment)
    write_model(path("split-00001-of-00003"), add=split)
    write_model(path("adapter"), add=adapter, block_count=None)
    write_model(path("vocabulary"), tensors=0)
    write_factors(write_model(path("factors")), (1.0, 1.25, 0.75, 1.1))
    write_factors(write_model(path("factors-big-endian"), big_endian=True, alignment=64), (1.0, 1.5, 2.0, 0.5))
    for name, kind, big_endian in (("scaling", "yarn", False), ("scaling-big-endian", "dynamic-yarn", True)):
        scaled = write_model(path(name), big_endian=big_endian)
        write_factors(scaled, (1.0, 1.5, 2.0, 0.75) if big_endian else None, scaling=Scaling(kind, 4.0))
    counts = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": [2, 1, 0, 2]}
    for name, big_endian in (("heads", False), ("heads-big-endian", True)):
        of_heads = write_model(path(name), big_endian=big_endian, keys=counts)
        scales = ((0.75, 1.0, 1.25, 1.5),) * 4
        write_factors(of_heads, head_factors=((1.0, 1.5), (1.25,), (), (0.9, 1.0)), query_scales=scales)
    nested = struct.pack("<IIQ", ARRAY, ARRAY, 2)
    for inner in (struct.pack("<IQ", STRING, 2) + string(b"a") + string(b"bc"), struct.pack("<IQ3H", 2, 3, 1, 2, 3)):
        nested += struct.pack("<IQ", ARRAY, 1) + inner
    pairs = text_pair("general.architecture", "llama") + number_pair("llama.block_count", 4)
    path("nested").write_bytes(header(pairs + string(b"x.nested") + nested + string(b"\xff\xfe") + nested, 4))
    return paths


def load(path: Path) -> Seed:
    with GGUFFile(path) as gguf:
        order, info_end, entries = gguf.order, gguf.info_end, list(gguf.entries.values())
        kv_end = gguf.kv_end
    spots = set(range(info_end))
    lengths, types = [8, 16], []
    for entry in entries:
        spots -= set(range(entry.value + 200, entry.end - 8))
        lengths.append(entry.start)
        if entry.kind == STRING:
            lengths.append(entry.value - 8)
            types.append(entry.value - 12)
        elif entry.kind == ARRAY:
            lengths.append(entry.value - 8)
            types += [entry.value - 12, entry.value - 16]
        else:
            types.append(entry.value - 4)
        if entry.item == STRING:
            lengths += [entry.value] * 3
    lengths += range(kv_end, info_end, 4)  # tensors: some are lengths, some types
    types += range(kv_end, info_end, 4)
    pairs = [(entry.start, entry.end) for entry in entries]
    return Seed(path.read_bytes(), order, sorted(spots), lengths, types, pairs, info_end)


def mutant(seeds: list[Seed], seed: int, number: int) -> bytes:
    rng = random.Random(f"{seed}:{number}")
    base = rng.choice(seeds)
    data = bytearray(base.data)
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3, 8))):
        rng.choice(_MUTATIONS)(data, base, seeds, rng)
    return bytes(data)


def _flip(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    at = rng.choice(base.spots)
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _set(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    at, size = rng.choice(base.spots), rng.choice((1, 1, 2, 4, 8, 40))
    new = rng.choice((b"\0", b"\xff", b"\x80", b" ")) * size if rng.random() < 0.7 else rng.randbytes(size)
    _overwrite(data, at, new)


def _length(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    at = rng.choice(base.lengths)
    value = rng.choice((*LENGTHS, len(data), len(data) - at, len(data) - at - 8, rng.randrange(4096)))
    if at + 8 <= len(data) and rng.random() < 0.5:
        value = struct.unpack_from(base.order + "Q", data, at)[0] + rng.choice((-8, -2, -1, 1, 2, 8))
    _overwrite(data, at, struct.pack(base.order + "Q", value % 2**64))


def _type(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    value = rng.choice((*range(14), 39, 2**31, 2**32 - 1))
    _overwrite(data, rng.choice(base.types), struct.pack(base.order + "I", value))


def _splice(data: bytearray, base: Seed, seeds: list[Seed], rng: random.Random) -> None:
    other = rng.choice(seeds)
    start = rng.choice(other.spots)
    piece = other.data[start : start + rng.choice((1, 4, 8, 16, 100, 1000))]
    at = rng.choice(base.spots)
    data[at : at + rng.choice((0, len(piece), rng.randrange(64)))] = piece


def _cut(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    where = rng.random()
    at = rng.choice(base.spots)
    if where < 0.4:
        del data[at:]
    elif where < 0.7:
        del data[at : at + rng.choice((1, 2, 4, 8, 64))]
    elif where < 0.9:
        del data[len(data) - rng.randrange(1, 400) :]
    else:
        data += rng.randbytes(rng.randrange(1, 200))


def _pairs(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    """Repeat, move or remove a key with its value; the number of keys mostly fits."""
    start, end = rng.choice(base.pairs)
    at = rng.choice(base.pairs)[0]
    what = rng.randrange(3)
    piece = bytes(data[start:end])
    if what == 2:
        del data[start:end]
    elif what == 1 and at <= start:
        del data[start:end]
        data[at:at] = piece
    else:
        data[at:at] = piece
    change = {0: 1, 1: 0 if at <= start else 1, 2: -1}[what] if rng.random() < 0.8 else 0
    _add_keys(data, base, change)


def _nest(data: bytearray, base: Seed, _: list[Seed], rng: random.Random) -> None:
    key = rng.choice((b"x.deep", b"\xc3\x28", b"general.alignment", rng.randbytes(3)))
    pack = struct.Struct(base.order + "IQ").pack
    levels = [pack(ARRAY, rng.choice((1, 1, 1, 0, 2, 2**62))) for _ in range(rng.choice((1, 2, 7, 8, 9, 40)))]
    piece = struct.pack(base.order + "Q", len(key)) + key + struct.pack(base.order + "I", ARRAY) + b"".join(levels)
    piece += pack(rng.choice((0, 6, 8)), 0)
    at = rng.choice(base.pairs)[0]
    data[at:at] = piece
    _add_keys(data, base, 1)


_MUTATIONS: tuple[Callable[[bytearray, Seed, list[Seed], random.Random], None], ...] = (
    *(_flip, _flip, _set, _set, _length, _length, _type, _splice, _cut, _pairs, _nest),
)


def _overwrite(data: bytearray, at: int, new: bytes) -> None:
    if at < len(data):
        data[at : at + len(new)] = new[: len(data) - at]


def _add_keys(data: bytearray, base: Seed, change: int) -> None:
    if len(data) >= 24:
        number = struct.unpack_from(base.order + "Q", data, 16)[0]
        struct.pack_into(base.order + "Q", data, 16, (number + change) % 2**64)


def check(path: Path, data: bytes, *, deep: bool) -> Outcome:
    """Read the file `path`, which holds `data`; with `deep` show, write and restore it too if it is accepted."""
    try:
        info = read_model(path)
    except LropeError as error:
        return _refusal("refused", path, data, error)
    if not deep:
        return Outcome("read")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for options in ([], ["--json"]):
            if cli.main(["show", *options, str(path)]):
                return Outcome("finding", finding="show refuses what read_model reads")
    end = f"-00001-of-{info.shards:05d}.gguf" if info.shards > 1 else ".gguf"
    other, plain = path.with_name(f"other{end}"), path.with_name(f"plain{end}")
    for leftover in (other, plain):
        leftover.unlink(missing_ok=True)
    try:
        remove_factors(path, output=plain)
    except LropeError as error:
        return _refusal("read, removal refused", path, data, error)
    if read_model(plain).factors is not None or read_model(plain).rows:
        return Outcome("finding", finding="factors after remove")
    restored = plain.read_bytes()
    ours = {"lrope.curve", "lrope.original", f"{info.architecture}.rope.scaling.dynamic_factor"}
    ours |= {*array_keys(str(info.architecture)).values()}
    if not ours & _keys(path) and restored != data:
        return Outcome("finding", finding="remove changes a file without factors")
    if read_model(plain).fingerprint() != info.fingerprint():
        return Outcome("finding", finding="another fingerprint after remove")
    try:
        wanted = write_factors(path, [1.0 + layer / 8192 for layer in range(info.n_layer or 1)], output=other).factors
    except LropeError as error:
        if other.exists():
            return Outcome("finding", finding="a refused write leaves a file")
        return _refusal("read, writing refused", path, data, error)
    if read_factors(other) != wanted:
        return Outcome("finding", finding="other factors read than written")
    remove_factors(other)
    if other.read_bytes() != restored:
        return Outcome("finding", finding="other bytes after write and remove")
    rows = {"head_factors": info.n_head_kv, "query_scales": info.n_head}
    for name, counts in rows.items():
        if not any(counts or ()) or (name == "head_factors" and info.without_head_factors):
            continue
        kept = len(counts or ()) - info.nextn_predict_layers
        numbers = tuple((1.125 if layer < kept else 1.0,) * n for layer, n in enumerate(counts or ()))
        try:
            write_factors(path, **{name: numbers}, output=other)  # type: ignore[arg-type]
        except LropeError as error:
            refusal = _refusal("refused", path, data, error)
            if refusal.finding:
                return refusal
            continue
        if read_model(other).rows != {name: numbers}:
            return Outcome("finding", finding=f"other {name} read than written")
        remove_factors(other)
        if other.read_bytes() != restored:
            return Outcome("finding", finding=f"other bytes after {name} and their removal")
    for scaling in (Scaling("dynamic", 2.0), Scaling("yarn", 2.0)):
        try:
            write_factors(other, scaling=scaling, output=other)
        except LropeError as error:
            refusal = _refusal("refused", other, data, error)
            if refusal.finding and not str(error).startswith("--rope-scale 2: gives "):  # which blames the option
                return refusal
            continue
        if read_model(other).fingerprint() != info.fingerprint():
            return Outcome("finding", finding="another fingerprint after a scaling")
        remove_factors(other)
        if other.read_bytes() != restored:
            return Outcome("finding", finding="other bytes after a scaling and its removal")
    if path.read_bytes() != data:
        return Outcome("finding", finding="the input has changed")
    return Outcome("read, written, restored byte for byte")


def _keys(path: Path) -> set[str]:
    with GGUFFile(path) as gguf:
        return set(gguf.entries)


def _refusal(kind: str, path: Path, data: bytes, error: LropeError) -> Outcome:
    """A refusal, or the finding that its message is not what a user needs."""
    text = str(error)
    message = text.removeprefix(f"{path}: ")
    if message == text or "\n" in text or len(message) > 600:
        return Outcome("finding", finding=f"a message of other form: {text[:200]!r}")
    offsets = re.findall(r"\bbyte (\d+)", message.replace("ends at byte", ""))
    if any(int(offset) > len(data) for offset in offsets):
        return Outcome("finding", finding=f"an offset behind the end: {text[:200]!r}")
    where = "" if not kind.startswith("refused") else ", with the byte" if offsets else ", without a byte"
    return Outcome(kind + where, re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", re.sub(r"\d+", "N", message)))


def guarded(path: Path, data: bytes, *, deep: bool, seconds: float = SECONDS) -> Outcome:
    """`check` with a time limit; whatever it raises is a finding."""

    def alarm(*_: object) -> None:
        raise _TimeoutError

    path.write_bytes(data)
    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return check(path, data, deep=deep)
    except _TimeoutError:
        return Outcome("finding", finding=f"not done after {seconds:g} s")
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
        return Outcome(
            "finding", finding=f"{type(error).__name__} at {where}: {str(error).replace(str(path.parent), '')[:150]}"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
