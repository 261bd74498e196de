"""The script on gradients, on the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import gradients

pytestmark = pytest.mark.native
MODEL = str(Path(__file__).parents[2] / "models" / "lrope-kv.gguf")
TASK = ["--keys", "30", "--probes", "4", "--identifiers", "word", "--threads", "1"]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["gradients.py", *map(str, args)])
    gradients.main()
    return capsys.readouterr().out.splitlines()


def test_memory_grows_with_the_context(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    *_, short, long = run(monkeypatch, capsys, "memory", MODEL, "--tokens", 512, 8192)
    a, b = ([float(cell) for cell in line.split("|")[2:4]] for line in (short, long))
    assert a[0] < b[0] < b[1]


def test_tasks_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    *_, first, second = run(
        monkeypatch, capsys, "conflicts", MODEL, *TASK[2:], "--contexts", 1, "--tasks", "kv:keys=30", "kv:keys=40"
    )
    a, b = ([float(cell) for cell in line.split("|")[2:4]] for line in (first, second))
    assert a[0] == b[1] == 1.0
    assert a[1] == b[0] != 1.0


def test_an_ascent_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    args = ["ascend", MODEL, *TASK, "--steps", 3, "--mean", 2, "--output"]
    wanted = run(monkeypatch, capsys, *args, whole)
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[:1]))
    got = run(monkeypatch, capsys, *args, cut)
    assert got[-2:] == wanted[-2:]
    assert [json.loads(line)["number"] for line in cut.read_text().splitlines()] == [1, 2, 3]
