"""Hostile GGUF files: what is wrong, at which byte, in bounded time and memory. The long run is proofs/fuzz_gguf.py."""

from __future__ import annotations

import functools
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from gguf import GGUFReader
from support import hostile_gguf
from support.gguf_fixtures import header, number_pair, string, text_pair, u64, write_model

from lrope_gguf import LropeError, read_model, write_factors
from lrope_gguf.gguf_file import GGUFFile

MIB = 1 << 20


def array_pair(item: int, count: int, items: bytes, order: str = "<", key: bytes = b"k") -> bytes:
    return string(key, order) + struct.pack(order + "IIQ", 9, item, count) + items


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hostile_gguf.make_seeds(tmp_path_factory.mktemp("seeds"))


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MIB:.1f} MiB"


def refusal(path: Path) -> str:
    with pytest.raises(LropeError) as caught:
        read_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < len(str(path)) + 500
    return text.removeprefix(f"{path}: ")


@functools.cache
def cases(order: str, version: int) -> dict[str, tuple[str, bytes]]:
    """What is wrong and the file; the first key begins at byte 24, `k`'s type at 33, its array's items at 49."""

    def made(pairs: bytes, n_keys: int, n_tensors: int = 0) -> bytes:
        return header(pairs, n_keys, n_tensors=n_tensors, version=version, order=order)

    def array(item: int, count: int, items: bytes = b"") -> bytes:
        return made(array_pair(item, count, items, order), 1)

    def number(key: str, value: int) -> bytes:
        return number_pair(key, value, order)

    def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
        head = string(name, order) + struct.pack(f"{order}I{len(dims)}Q", len(dims), *dims)
        return made(head + struct.pack(order + "IQ", kind, offset), 0, 1)

    def end(size: int, what: str, at: int) -> str:
        return f"the end of the file ({size} bytes) inside {what} at byte {at}"

    head = struct.pack(order + "IQ", 9, 1)
    long_name = b"\xff" * 65535
    llama = text_pair("general.architecture", "llama", order) + number("llama.block_count", 4)
    whole = tensor(b"t", [8, 4])
    return {
        "nothing": ("is not a GGUF file (it begins with b'')", b""),
        "another file": ("is not a GGUF file (it begins with b'PK\\x03\\x04')", b"PK\3\4 some other file"),
        "alignment text": (
            "general.alignment None, not a power of two up to 1048576 at byte 61",
            made(text_pair("general.alignment", "32", order), 1),
        ),
        "block count 2^31": (
            "llama.block_count is 2147483648 (byte 98)",
            made(llama[:-4] + struct.pack(order + "I", 1 << 31), 2),
        ),
        "block count 0": ("llama.block_count is 0 (byte 98)", made(llama[:-4] + bytes(4), 2)),
        "prediction layers": (
            "llama.nextn_predict_layers is 5 (byte 140)",
            made(llama + number("llama.nextn_predict_layers", 5), 3),
        ),
        "data one byte short": (
            "is truncated: tensor 't' ends at byte 224, the file at byte 223 (described at byte 24)",
            whole.ljust(223, b"\0"),
        ),
        "keys 2^64 - 1": (f"an impossible number of keys ({2**64 - 1}) at byte 16", made(bytes(99), 2**64 - 1)),
        "tensors 2^60": (f"an impossible number of tensors ({2**60}) at byte 8", made(bytes(99), 0, 2**60)),
        "one key more": (end(55, "the length of a key", 55), (made(array_pair(0, 6, bytes(6), order), 2))),
        "key of 2^64 - 1": (f"a key of {2**64 - 1} bytes at byte 24", made(u64(2**64 - 1, order) + bytes(9), 1)),
        "key of 2^16": ("a key of 65536 bytes at byte 24", made(string(bytes(65536), order) + bytes(9), 1)),
        "all keys": (
            "a key of 65535 bytes at byte 4195096",
            made(
                b"".join(
                    string(b"%3d" % i + long_name[3:], order) + struct.pack(order + "IB", 0, 1) for i in range(70)
                ),
                70,
            ),
        ),
        "string of 2^64 - 1": (
            end(45, "the string of 'k'", 45),
            made(string(b"k", order) + struct.pack(order + "IQ", 8, 2**64 - 1), 1),
        ),
        "type 13": (
            "a value of unknown type 13 for 'k' at byte 33",
            (made(string(b"k", order) + struct.pack(order + "IQ", 13, 0), 1)),
        ),
        "value cut": (
            end(40, "the value of 'k'", 37),
            made(string(b"k", order) + struct.pack(order + "I", 10) + bytes(3), 1),
        ),
        "float64 2^61, 2^64 bytes": (end(49, f"the array of 'k' ({2**61} items)", 49), array(12, 2**61)),
        "strings 2^40": (f"an impossible length of the array of 'k' ({2**40} items) at byte 41", array(8, 2**40)),
        "arrays 2^40": (f"an impossible length of the array of 'k' ({2**40} items) at byte 41", array(9, 2**40)),
        "item that wraps to itself": (
            f"the end of the file inside the array of 'k' (3 items), in a string of {2**64 - 8} bytes at byte 59",
            array(8, 3, string(b"ab", order) + u64(2**64 - 8, order) + bytes(20)),
        ),
        "item one byte too long": (
            "the end of the file inside the array of 'k' (2 items), in a string of 21 bytes at byte 59",
            array(8, 2, string(b"ab", order) + u64(21, order) + bytes(20)),
        ),
        "items cut": (
            end(71, "the array of 'k' (2 items)", 69),
            array(8, 2, string(b"abcdefghijkl", order) + bytes(2)),
        ),
        "inner array of 2^62": (
            f"an impossible length of the array of 'k' ({2**62} items) at byte 53",
            array(9, 1, struct.pack(order + "IQ", 8, 2**62)),
        ),
        "inner type 99": (
            "an array of unknown type 99 for 'k' at byte 49",
            (array(9, 1, struct.pack(order + "IQ", 99, 1))),
        ),
        "9 levels": ("arrays nested deeper than 8 for 'k' at byte 145", array(9, 1, head * 5000)),
        "key twice": (
            "the key 'k' for the second time (first at byte 24) at byte 41",
            (made(number("k", 1) + number("k", 2), 2)),
        ),
        "key of other bytes twice": (
            r"the key '\udcff\udcfe' for the second time (first at byte 24) at byte 39",
            made(2 * (string(b"\xff\xfe", order) + struct.pack(order + "IB", 0, 1)), 2),
        ),
        "alignment 3": (
            "general.alignment 3, not a power of two up to 1048576 at byte 53",
            made(number("general.alignment", 3), 1),
        ),
        "tensor's name of 2^63": (
            f"a tensor's name of {2**63} bytes at byte 24",
            made(u64(2**63, order) + bytes(20), 0, 1),
        ),
        "5 dimensions": ("a tensor of 5 dimensions at byte 33", tensor(b"t", [1] * 5)),
        "tensor of 2^189 items": (
            f"is truncated: tensor 't' ends at byte {96 + 4 * 2**189}, the file at byte 73 (described at byte 24)",
            tensor(b"t", [2**63] * 3),
        ),
        "tensor at 2^64 - 1": (
            f"is truncated: tensor 't\ufffd' ends at byte {67 + 2**64}, the file at byte 58 (described at byte 24)",
            tensor(b"t\xff", [1], offset=2**64 - 1),
        ),
    }


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("case", cases("<", 3))
def test_what_is_wrong_and_where(tmp_path: Path, case: str, order: str) -> None:
    for version in (2, 3):
        message, content = cases(order, version)[case]
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        start = time.perf_counter()
        with memory_below(16 * MIB):
            assert refusal(path).partition(";")[0] == message
        assert time.perf_counter() - start < 5
        with pytest.raises(LropeError):
            write_factors(path, [1.0])
        assert path.read_bytes() == content


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_versions_that_cannot_be_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(header(b"", 0, version=version))
    assert refusal(path).startswith(f"is GGUF version {version} (byte 4);")


def test_parts_lie_where_the_gguf_package_finds_them(seeds: list[Path]) -> None:
    read = 0
    for path in seeds:
        if path.stem == "nested":
            continue  # the package cannot read it
        reader = GGUFReader(path)
        fields = {name: field.offset for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        with GGUFFile(path) as gguf:
            assert {key: entry.start for key, entry in gguf.entries.items()} == fields, path.stem
            assert list(gguf.entries) == list(fields)
            assert (gguf.alignment, gguf.n_tensors) == (reader.alignment, len(reader.tensors))
            assert not reader.tensors or gguf.data_start == reader.data_offset
        read += 1
    assert read >= 10


def many_strings(path: Path, count: int) -> Path:
    rng = random.Random(1)
    words = [string(b"w" * length) for length in range(14)]
    pairs = array_pair(8, count, b"".join(rng.choices(words, k=count)), key=b"words")
    path.write_bytes(header(pairs + text_pair("general.architecture", "llama"), 2))
    return path


@pytest.mark.parametrize("count", [500_000, pytest.param(5_000_000, marks=pytest.mark.slow)])
def test_strings_are_stepped_over_fast(tmp_path: Path, count: int) -> None:
    path = many_strings(tmp_path / "m.gguf", count)
    start = time.perf_counter()
    assert read_model(path).architecture == "llama"
    assert time.perf_counter() - start < 0.5 + count / 2.5e6  # 0.1 microseconds each, on a slow machine four times
    with memory_below(4 * MIB):
        read_model(path)


def test_complete_data_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(cases("<", 3)["data one byte short"][1] + b"\0")
    assert read_model(path).n_tensors == 1


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        assert refusal(tmp_path / name) == "is not a regular file; give a model"


def sparse(path: Path, head: bytes, size: int) -> Path:
    with path.open("wb") as file:
        file.write(head)
        try:
            file.truncate(size)
        except OSError:
            pytest.skip("the file system holds no such sparse file")
    return path


@pytest.mark.parametrize(("item", "count"), [(8, 2**38), (9, 2**38), (8, 2**25), (9, 2**20)])
def test_a_large_file_does_not_make_its_claims_possible(tmp_path: Path, item: int, count: int) -> None:
    path = sparse(tmp_path / "m.gguf", header(array_pair(item, count, b""), 1), 2**42)
    start = time.perf_counter()
    assert refusal(path).startswith("more strings, nested arrays or large values than a model has, in the array of 'k'")
    assert time.perf_counter() - start < 1


def test_long_strings_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, length = 1000, 300_000
    path = sparse(tmp_path / "m.gguf", header(array_pair(8, count, b""), 1), 49 + count * (8 + length))
    with path.open("r+b") as file:
        for i in range(count):
            file.seek(49 + i * (8 + length))
            file.write(u64(length))
    total = 0
    read = GGUFFile.read

    def counted(self: GGUFFile, start: int, end: int) -> bytes:
        nonlocal total
        total += end - start
        return read(self, start, end)

    monkeypatch.setattr(GGUFFile, "read", counted)
    with GGUFFile(path) as gguf:
        assert gguf.entries["k"].length == count
    assert total < 3 * count * 4096  # of 300 MB


def test_the_most_keys_take_little_memory(tmp_path: Path) -> None:
    n, letters = 65536, "\U0001f600" * 13  # 4 bytes each in memory too, nearly 4 MiB in all
    pairs = b"".join(string(f"{letters}{i:x}".encode()) + struct.pack("<IB", 0, 1) for i in range(n))
    path = tmp_path / "m.gguf"
    path.write_bytes(header(pairs, n))
    with memory_below(32 * MIB), GGUFFile(path) as gguf:
        assert len(gguf.entries) == n


def test_a_large_curve_takes_little_memory(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.gguf", add=lambda writer: writer.add_string("lrope.curve", "\U0001f600" * 3_000_000)
    )
    with memory_below(48 * MIB):
        read_model(path)


DOCUMENT = b'{"format":"lrope-curve","version":1,"layer_factors":[1.0,1.0,1.0,1.0],"provenance":%s}'
ROOM = (1 << 20) - len(DOCUMENT)


def listed(item: bytes) -> bytes:
    return b"[" + b",".join([item] * ((ROOM - 2) // (len(item) + 1))) + b"]"


@pytest.mark.parametrize(
    "provenance",
    [
        *(listed(b"[]"), listed(b"[" * 28 + b"]" * 28), listed(b'{"":{"":{}}}'), listed(b'""')),
        b'"' + ("\U0001f600" * (ROOM // 4 - 1)).encode() + b'"',
        b'1}, "layer_factors": [' + b",".join([b"1.5"] * 1000) + b"]",
    ],
    ids=["lists", "deep", "deep objects", "strings", "text", "damaged"],
)
def test_show_takes_little_memory_whatever_the_curve_holds(tmp_path: Path, provenance: bytes) -> None:
    """The whole process, interpreter included."""
    path = tmp_path / "m.gguf"
    document = DOCUMENT % provenance
    assert len(document) <= 1 << 20
    pairs = text_pair("general.architecture", "llama") + number_pair("llama.block_count", 4)
    pairs += string(b"lrope.curve") + struct.pack("<I", 8) + string(document)
    path.write_bytes(header(pairs, 3))
    code = (
        "import os, resource, sys; from lrope_gguf.cli import main; "
        "assert main(sys.argv[1:]) == main([*sys.argv[1:], '--json']) == 0; sys.stdout.flush()"
    )
    code += "; os.write(2, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())"
    # through a small process: on Linux, a child's peak begins with its parent's
    small = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", small, "-c", code, "show", str(path)], capture_output=True, check=True)
    assert int(done.stderr) < 60 << 10
    assert b"lrope" in done.stdout or b"curve" in done.stdout


def test_every_truncation_is_seen_and_said_where(seeds: list[Path], tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "short.gguf"
    for source in seeds:
        with GGUFFile(source) as gguf:
            end = gguf.info_end
        data = source.read_bytes()
        for length in sorted({*range(24), *rng.sample(range(end), 20), end - 1}):
            path.write_bytes(data[:length])
            message = refusal(path)
            assert "byte" in message if length >= 4 else message.startswith("is not a GGUF file"), (source, length)


def test_mutants(seeds: list[Path], tmp_path: Path) -> None:
    loaded = [hostile_gguf.load(path) for path in seeds]
    outcomes: Counter[str] = Counter()
    path = tmp_path / "mutant.gguf"
    with memory_below(16 * MIB):
        for number in range(300):
            data = hostile_gguf.mutant(loaded, 7, number)
            outcome = hostile_gguf.guarded(path, data, deep=number % 8 == 0, seconds=20)
            assert not outcome.finding, (number, outcome.finding)
            outcomes[outcome.kind] += 1
    assert outcomes["refused, with the byte"] > 120 and outcomes["read"] > 30, outcomes
    assert outcomes["read, written, restored byte for byte"] > 3, outcomes


def test_mutants_depend_on_seed_and_number_only(seeds: list[Path]) -> None:
    loaded = [hostile_gguf.load(path) for path in seeds]
    made = [hostile_gguf.mutant(loaded, 3, number) for number in range(300)]
    assert made == [hostile_gguf.mutant(loaded, 3, number) for number in range(300)]
    assert made[0] != hostile_gguf.mutant(loaded, 4, 0)
    assert len(set(made)) > 280


def test_the_fuzzer_finds(seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "m.gguf", seeds[0].read_bytes()

    def finding(deep: bool = False, seconds: float = 20) -> str:
        return hostile_gguf.guarded(path, data, deep=deep, seconds=seconds).finding

    def failing(error: Exception) -> NoReturn:
        raise error

    assert not finding(deep=True)
    for error, wanted in [
        (ValueError("bad"), "ValueError at"),
        (MemoryError(), "MemoryError at"),
        (LropeError("no file named"), "a message of other form"),
        (LropeError(f"{path}: two\nlines"), "a message of other form"),
        (LropeError(f"{path}: wrong at byte {len(data) + 1}"), "an offset behind the end"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(hostile_gguf, "read_model", lambda _, error=error: failing(error))
            assert wanted in finding()
    with monkeypatch.context() as patch:
        patch.setattr(hostile_gguf, "read_model", lambda _: time.sleep(5))
        assert finding(seconds=0.2) == "not done after 0.2 s"
    for name in ("write_factors", "remove_factors"):
        original = getattr(hostile_gguf, name)

        def changing(path: Path, *args: object, original: object = original, **options: object) -> object:
            result = original(path, *args, **options)  # type: ignore[operator]
            with result.path.open("ab") as file:
                file.write(b"x")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(hostile_gguf, name, changing)
            assert finding(deep=True), name
