"""Kept studies: packed alike every time, unpacked whole, and nothing written outside their folder."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
from pathlib import Path

import pytest
import studies as kept

from lrope_gguf import LropeError


def test_what_is_packed_comes_back(tmp_path: Path) -> None:
    study = tmp_path / "one"
    study.mkdir()
    for name in ("config.json", "evaluations.jsonl", "report.html", "report-scan.png", "log.txt"):
        (study / name).write_text(f"of {name}\n")
    first = kept.packed(study)
    (study / "config.json").touch()
    assert kept.packed(study) == first
    (tmp_path / "one.tar.xz").write_bytes(first)
    found = kept.unpack(tmp_path / "one.tar.xz", tmp_path / "to")
    assert {path.name: path.read_text() for path in found.iterdir()} == {
        name: f"of {name}\n" for name in ("config.json", "evaluations.jsonl")
    }
    (found / "config.json").write_text("mine")
    assert kept.unpack(tmp_path / "one.tar.xz", tmp_path / "to") == found
    assert (found / "config.json").read_text() == "mine" and [p.name for p in found.parent.iterdir()] == ["one"]


def test_the_kept_ones_are_packed_as_they_are(studies: Path) -> None:
    smallest = min(kept.archived().values(), key=lambda path: path.stat().st_size)
    assert kept.packed(studies / smallest.name.removesuffix(".tar.xz")) == smallest.read_bytes()
    for path in studies.rglob("*.json*"):
        assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8")), path


def archive(*members: tuple[str, bytes, int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = bytes([kind]), "/etc/passwd"
            info.size = len(data) if kind == tarfile.REGTYPE[0] else 0
            tar.addfile(info, io.BytesIO(data))
    return lzma.compress(buffer.getvalue())


PLAIN, LINK, HARD, FOLDER = (kind[0] for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE))
HOSTILE = {
    "another folder": (archive(("two/config.json", b"{}", PLAIN)), "'two/config.json' is not a plain file of one/"),
    "upwards": (archive(("one/../x", b"", PLAIN)), "'one/../x' is not a plain file"),
    "its parent": (archive(("one/..", b"", PLAIN)), "'one/..' is not a plain file"),
    "from the root": (archive(("/one/x", b"", PLAIN)), "'/one/x' is not a plain file"),
    "link": (archive(("one/x", b"", LINK)), "'one/x' is not a plain file"),
    "hard link": (archive(("one/x", b"", HARD)), "'one/x' is not a plain file"),
    "folder": (archive(("one/x", b"", FOLDER)), "'one/x' is not a plain file"),
    "bomb": (archive(("one/x", bytes(65 << 20), PLAIN)), "is above 64 MiB unpacked"),
    "no study": (archive(("one/best.json", b"{}", PLAIN)), "holds no study"),
    "torn": (archive(("one/config.json", b"{}" * 999, PLAIN))[:-20], "cannot be unpacked"),
    "no archive": (b"config", "cannot be unpacked"),
    "nothing": (b"", "cannot be unpacked"),
}


@pytest.mark.parametrize(("data", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_archive_is_refused_and_leaves_nothing(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "one.tar.xz").write_bytes(data)
    with pytest.raises(LropeError, match=re.escape(said)):
        kept.unpack(tmp_path / "one.tar.xz", tmp_path / "to")
    assert not list((tmp_path / "to").iterdir()) and not (tmp_path / "x").exists()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothing: no kept study has this name; there are "):
        kept.main(["unpack", "nothing"])
    with pytest.raises(SystemExit, match=r"no study \(there is no config.json in it\)"):
        kept.main(["pack", str(tmp_path), "--to", str(tmp_path / "to")])
