"""Atomic replacement of small files."""

from __future__ import annotations

import errno
import os
import random
from io import FileIO
from pathlib import Path

import pytest
from support.gguf_fixtures import names

from lrope_gguf import files
from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes, atomic_write_text, replacing, write_all


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_text(path, "Bézier")
    assert path.read_bytes() == "Bézier".encode()
    atomic_write_bytes(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert names(tmp_path) == ["a.json"]


def test_mode_is_kept_and_new_files_follow_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a"
    before = os.umask(0o027)
    try:
        atomic_write_bytes(path, b"1")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o751)
    atomic_write_bytes(path, b"2")
    assert path.stat().st_mode & 0o777 == 0o751


def test_failure_after_the_rename_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(directory: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("lrope_gguf.files.sync_directory", fail)
    with pytest.raises(LropeError, match="the new content is in place, but may not be on the disk yet"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupt_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as file:
        write_all(file, b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_short_writes_are_continued() -> None:
    class Dribbling:
        written = b""

        def write(self, data: memoryview) -> int:
            self.written += bytes(data[:3])
            return min(3, len(data))

    file = Dribbling()
    write_all(file, b"0123456789")  # type: ignore[arg-type]
    assert file.written == b"0123456789"


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(LropeError, match=r"No such file.*check that the directory exists"):
        atomic_write_bytes(tmp_path / "missing" / "a", b"")
    with pytest.raises(LropeError, match="is a directory"):
        atomic_write_bytes(tmp_path, b"")
    with pytest.raises(LropeError, match="Not a directory"):
        (tmp_path / "file").touch()
        atomic_write_bytes(tmp_path / "file" / "a", b"")


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize(("start", "place"), [(24, 4120), (0, 0), (70_000, 4464), (65_536, 1)])
def test_copies_lie_at_multiples_of_the_pipe_in_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool, start: int, place: int
) -> None:
    """Else Linux needs half as long again; and each is on its way to the disk while the next is made."""
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(files, "_CHUNK", 1 << 17)
    monkeypatch.setattr(files, "_BUFFER", 1 << 17)
    monkeypatch.setattr(files, "_clone", lambda *_: False)
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(files, "_begin_writing", lambda _, at, length: begun.append((at, length)))
    data = random.Random(1).randbytes(500_000)
    (tmp_path / "old").write_bytes(data)
    steps: list[int] = []
    with FileIO(tmp_path / "old") as source, FileIO(tmp_path / "new", "w+") as target:
        target.write(bytes(place))
        files.append_range(source, target, start, len(data), steps.append)
    assert (tmp_path / "new").read_bytes() == bytes(place) + data[start:]
    assert sum(steps) == len(data) - start == sum(length for _, length in begun)
    ends = [at + length for at, length in begun]
    assert [at for at, _ in begun] == [place, *ends[:-1]]
    assert all(end % (1 << 16) == 0 for end in ends[:-1]) and 3 < len(ends) < 7
