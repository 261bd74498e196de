"""Kept studies: packed alike every time, unpacked whole, and nothing written outside their folder."""

from __future__ import annotations

import io
import json
import lzma
import random
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import studies as kept

from lrope_gguf import LropeError
from lrope_search.report.reading import read_study
from lrope_search.report.text import summary_lines

LINE = (
    '{{"factors":[1.0779,1.069009339],"split":"test","index":0,"n_tokens":9,"seconds":{},"probes":[[0.30000000000000004,'
    '{},true],[1.0,"-inf",0.5]],"task":"vt"}}\n'
)


def test_what_is_packed_comes_back_rounded(tmp_path: Path) -> None:
    study = tmp_path / "one"
    study.mkdir()
    for name in ("config.json", "report.html", "report-scan.png", "log.txt"):
        (study / name).write_text(f"of {name}\n")
    (study / "evaluations.jsonl").write_text(LINE.format(4.06, -2.25) + LINE.format(4.0604037589993891, -1.23456789))
    first = kept.packed(study)
    (study / "config.json").touch()
    assert kept.packed(study) == first
    (tmp_path / "one.tar.xz").write_bytes(first)
    found = kept.unpack(tmp_path / "one.tar.xz", tmp_path / "to")
    assert {path.name: path.read_text() for path in found.iterdir()} == {
        "config.json": "of config.json\n",
        "evaluations.jsonl": LINE.format(4.06, -2.25) + LINE.format(4.060404, -1.234568),
    }
    (found / "config.json").write_text("mine")
    assert kept.unpack(tmp_path / "one.tar.xz", tmp_path / "to") == found
    assert (found / "config.json").read_text() == "mine" and [p.name for p in found.parent.iterdir()] == ["one"]


def test_the_kept_ones_are_packed_as_they_are(studies: Path) -> None:
    smallest = min(kept.archived().values(), key=lambda path: path.stat().st_size)
    assert kept.packed(studies / smallest.name.removesuffix(".tar.xz")) == smallest.read_bytes()
    for path in studies.rglob("*.json*"):
        assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", ["smollm2-135m-mdqa", "qwen2.5-coder-0.5b-100-keys-layers"])
def test_digits_that_rounding_drops_are_in_no_report(studies: Path, name: str, tmp_path: Path) -> None:
    full = tmp_path / name
    shutil.copytree(studies / name, full)
    path = full / "evaluations.jsonl"
    before, generator, lines = path.read_bytes(), random.Random(1), []
    for record in map(json.loads, before.splitlines()):
        for probe in record["probes"]:
            probe[1] += generator.uniform(-0.49, 0.49) * 10.0**-kept.DECIMALS
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    assert kept.rounded(path.read_bytes(), path) == before
    told = ["\n".join(summary_lines(read_study(folder))) for folder in (studies / name, full)]
    assert told[0] == told[1] and "gain" in told[0]


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
    pack = ["pack", str(tmp_path), "--to", str(tmp_path / "to")]
    with pytest.raises(SystemExit, match=r"no study \(there is no config.json in it\)"):
        kept.main(pack)
    (tmp_path / "config.json").write_text("{}")
    for damaged in ("[1]", LINE.format(1, 2) + "{", '{"seconds":1}', '{"seconds":1,"probes":[[0]]}'):
        (tmp_path / "evaluations.jsonl").write_text(damaged)
        with pytest.raises(SystemExit, match=r"evaluations\.jsonl: line [12] is damaged; delete that line"):
            kept.main(pack)
