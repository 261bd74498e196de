"""No command writes over what it reads, and what cannot be written is known before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.tiny_models import write_readable

from lrope_gguf.cli import main

CURVE = '{"format": "lrope-curve", "version": 1, "control_points": [[0, 1], [1, 1.1]]}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_readable(tmp_path / "model.gguf", factors=[1.0, 1.1, 1.2, 1.1, 1.0, 1.0])
    for name in ("curve.json", "curve.svg"):
        (tmp_path / name).write_text(CURVE)
    (tmp_path / "data.jsonl").write_text('{"ordered_kv_records": [["a", "b"]]}\n' * 3)
    (tmp_path / "text.txt").write_text("ordinary text")
    (tmp_path / "link.gguf").symlink_to("model.gguf")
    os.link(tmp_path / "data.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "sub").mkdir()
    return tmp_path


CASES = [
    ("search model.gguf --output model.gguf", "--output model.gguf: would overwrite the file given as MODEL"),
    ("search model.gguf --output link.gguf", "--output link.gguf: would overwrite the file given as MODEL"),
    ("search link.gguf --output model.gguf", "would overwrite the file given as MODEL"),
    ("search model.gguf --output sub/../model.gguf", "would overwrite the file given as MODEL"),
    ("search model.gguf --set kv.probes=1 --data data.jsonl --output hard.jsonl", "the file given as --data"),
    ("search model.gguf --set guard_text=text.txt --output text.txt", "would overwrite the file given as guard_text"),
    ("search model.gguf --set degree=1 --start curve.json --output curve.json", "file given as --start curve.json"),
    ("search model.gguf --output sub", "is a folder; name a file"),
    ("search model.gguf --output none/best.json", "its directory does not exist"),
    ("search model.gguf --output best.json --study text.txt", "--study text.txt: is a file"),
    ("show model.gguf --plot model.gguf", "--plot model.gguf: would overwrite the file given as MODEL"),
    ("show model.gguf --plot p.pdf", "ends in .png or .svg"),
    ("show model.gguf --plot png", "ends in .png or .svg"),
    ("eval model.gguf --plot p.pdf", "ends in .png or .svg"),
    ("eval model.gguf --plot no/p.svg", "its directory does not exist"),
    ("eval model.gguf --curve curve.svg --plot curve.svg", "would overwrite the file given as --curve"),
    ("eval model.gguf --study text.txt", "--study text.txt: is a file; give a directory"),
    ("report sub --output sub/best.json", "would overwrite the file given as STUDY's best.json"),
    ("report sub --output sub", "is a folder; name a file"),
    ("report sub --output none/page.html", "its directory does not exist"),
]


@pytest.mark.parametrize(("command", "message"), CASES)
def test_outputs_are_checked_before_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(command.split()) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert list((folder / "sub").iterdir()) == []
