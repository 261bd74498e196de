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


@pytest.mark.parametrize("scale", ["heads", "both"])
def test_an_ascent_of_heads_is_judged(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, curve = ["--tasks", "kv:keys=120", "kv:keys=100", *TASK[2:]], tmp_path / "curve.json"
    args = ["ascend", MODEL, *task, "--steps", 3, "--scale", scale, "--output", tmp_path / "steps", "--curve", curve]
    wanted = run(monkeypatch, capsys, *args, "--weights", 1, 2)
    kept = json.loads(curve.read_text())
    assert kept.keys() - {"format", "version"} == (
        {"head_factors"} if scale == "heads" else {"head_factors", "query_scales"}
    )
    assert [*map(len, kept["head_factors"])] == [2] * 4
    steps = (tmp_path / "steps").read_text().splitlines(keepends=True)
    (tmp_path / "steps").write_text("".join(steps[:2]))
    assert run(monkeypatch, capsys, *args, "--weights", 1, 2)[-2:] == wanted[-2:]
    (tmp_path / "none.json").write_text(
        json.dumps(kept | {"head_factors": [[1.0] * 2] * 4, "query_scales": [[1.0] * 4] * 4})
    )
    judged = run(monkeypatch, capsys, "gains", MODEL, *task, "--curve", curve, tmp_path / "none.json", "--contexts", 2)
    rows = [[cell.strip() for cell in line.split("|")[2:6]] for line in judged[2:]]
    assert [row[0] for row in rows] == ["kv:keys=120", "kv:keys=120", "kv:keys=100", "kv:keys=100"]
    assert [row[3] for row in rows[1::2]] == ["+0.000"] * 2 != [row[3][:6] for row in rows[::2]]
