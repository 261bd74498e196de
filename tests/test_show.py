"""What `show` says of all kinds of files and to all kinds of terminals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import on_a_terminal
from support.gguf_fixtures import LAYERS, header, number_pair, text_pair, write_model

from lrope_gguf import Curve, CurveFile, read_model, write_factors
from lrope_gguf.cli import main
from lrope_gguf.commands.show import _lines, _row, agrees
from lrope_gguf.text import sparkline

POINTS = ((0.0, 1.0), (0.3, 1.4), (1.0, 1.1))
KEYS = [
    "path", "file_size", "version", "n_tensors", "name", "kind", "architecture", "block_count",
    "nextn_predict_layers", "context_length",
    "windows", "windows_error", "rope_freq_base", "rope_dimension_count", "rope_scaling_type",
    "rope_scaling_factor", "rope_dynamic_factor", "rope_original_context_length", "rope_before",
    "context_length_before", "scaling_error", "factors", "factors_error", "n_head", "n_head_kv", "head_factors",
    "head_factors_error", "query_scales", "query_scales_error", "shards", "n_layer", "has_rope", "rope",
    "factors_key", "curve",
    "curve_error", "curve_agrees",
]  # fmt: skip


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["show", str(path)]) == 0
    return capsys.readouterr().out


def as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    def constant(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert main(["show", str(path), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=constant)
    return result


def row(text: str, name: str) -> str:
    (found,) = re.findall(rf"^ *{re.escape(name)}  +(.*)$", text, re.MULTILINE)
    return str(found)


def test_json_has_the_same_keys_for_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_model(tmp_path / "m.gguf")
    adapter = write_model(tmp_path / "a.gguf", block_count=None, add=lambda writer: writer.add_type("adapter"))
    for path in (plain, adapter):
        assert list(as_json(path, capsys)) == KEYS
    write_factors(plain, (1, 1.25, 0.8, 1))
    found = as_json(plain, capsys)
    assert list(found) == KEYS
    assert found["factors"] == [1, 1.25, 0.8, 1] and found["factors_key"] == "llama.rope.scaling.layer_factors"


def test_json_of_numbers_that_json_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add = lambda writer: writer.add_float32("llama.rope.scaling.factor", float("nan"))  # noqa: E731
    path = write_model(tmp_path / "m.gguf", add=add)
    assert as_json(path, capsys)["rope_scaling_factor"] is None
    assert "factor nan" in shown(path, capsys)


def test_agreement() -> None:
    curve = Curve(POINTS)
    factors: list[float] = curve.factors(24).astype(np.float32).tolist()
    listed = tuple(curve.factors(24).tolist())
    for document in (CurveFile(POINTS), CurveFile(layer_factors=listed), CurveFile(POINTS, listed)):
        assert agrees(document, factors)
        assert agrees(document, [*factors, 1.0], 24)
        assert not agrees(document, [*factors, 1.1], 24)
        assert not agrees(document, [*factors[:7], factors[7] + 1e-4, *factors[8:]])
    # a list must agree to float32's rounding, a curve to 1e-5
    nearly = [*factors[:7], factors[7] + 4e-7, *factors[8:]]
    assert agrees(CurveFile(POINTS), nearly) and not agrees(CurveFile(layer_factors=listed), nearly)
    # the list is what was stored, the curve beside it another one
    assert not agrees(CurveFile(((0, 1), (1, 1.5)), listed), factors)
    # a list for another model counts only where nothing else is there
    assert agrees(CurveFile(POINTS, tuple(curve.factors(6).tolist())), factors)
    assert not agrees(CurveFile(layer_factors=listed[:6]), factors)


def test_provenance_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "m.gguf")
    provenance = {
        "config": {"task": {"name": "kv", "keys": 100, "data": None}, "seed": 0},
        "results": {"fitness": 0.12345678, "by_depth": [{"a": 1}] * 3, "depths": [0.0, 0.5, 1.0]},
        "text": "z" * 500,
        "steer": "\x1b[2J",
    }
    document = CurveFile(POINTS, provenance=provenance)
    write_factors(path, document.factors_for(LAYERS), curve_json=document.dumps(compact=True))
    text = shown(path, capsys)
    assert row(text, "task") == "name kv, keys 100" and row(text, "seed") == "0"
    assert row(text, "results") == "fitness 0.123457, by_depth (3 in all), depths [0, 0.5, 1]"
    assert row(text, "text").endswith("z…") and "\x1b" not in text
    many = CurveFile(POINTS, provenance={f"k{i}": i for i in range(100)})
    write_factors(path, many.factors_for(LAYERS), curve_json=many.dumps(compact=True))
    text = shown(path, capsys)
    assert "60 more lines, see --json" in text and "k39" in text and "k40" not in text


def test_provenance_of_any_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "m.gguf")
    provenance: Any
    for provenance in ("by hand", ["a", 1], 3, {}, {"": {"": {}}}, {"a": []}, {"a": [[1]], "b": True}):
        document = CurveFile(POINTS, provenance=provenance)
        write_factors(path, document.factors_for(LAYERS), curve_json=document.dumps(compact=True))
        assert "agrees" in shown(path, capsys)


def test_terminal_width(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", block_count=96)
    document = CurveFile(POINTS, provenance={"verdict": "a gain of four points " * 12})
    write_factors(path, document.factors_for(96), curve_json=document.dumps(compact=True))
    info = read_model(path)
    for width in (60, 80, 120, 200):
        lines = _lines(info, document, None, True, width)
        long = [line for line in lines if len(line) > width]
        assert all(str(path) in line for line in long)  # a path is never broken
        table = lines[lines.index("") + 1 :]
        assert len(table) - 1 == -(-96 // min(4, (width + 3) // 23))
        found = re.findall(r"(\d+)  (\d\.\d+)", "\n".join(table[1:]))
        assert sorted(int(layer) for layer, _ in found) == list(range(96))
        assert "".join(re.findall("[▁▂▃▄▅▆▇█]", "".join(lines))) == sparkline(info.factors or ())
    assert max(map(len, _lines(info, document, None, True, None))) > 110
    assert _row("name", "word", 1) == ["name            word"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", block_count=64)
    write_factors(path, [1 + i / 64 for i in range(64)])
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lrope_gguf", "show", path.name]
    status, shown = on_a_terminal(command, "stdout", 72, cwd=tmp_path, env=environment)
    assert status == 0
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 72 and lines[-3].count(".") == 3


@pytest.mark.parametrize(("encoding", "line"), [("ascii", "=#_="), ("latin-1", "=#_="), ("utf-8", "▅█▁▅")])
def test_encodings(encoding: str, line: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    document = CurveFile(layer_factors=(1, 1.25, 0.75, 1), provenance={"é": "q" * 300})
    write_factors(path, (1, 1.25, 0.75, 1), curve_json=document.dumps(compact=True))
    done = subprocess.run(
        [sys.executable, "-m", "lrope_gguf", "show", str(path)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0 and f"{line}  0.75 to 1.25" in done.stdout.decode(encoding)
    assert b"?" not in done.stdout


def test_the_most_layers_and_control_points_are_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    pairs = text_pair("general.architecture", "llama") + number_pair("llama.block_count", 4096)
    path.write_bytes(header(pairs, 2))
    document = CurveFile(tuple((i / 63, 1 + i % 2) for i in range(64)))
    write_factors(path, [1.5] * 4096, curve_json=document.dumps(compact=True))
    start = time.process_time()
    assert "DOES NOT AGREE with the factors" in shown(path, capsys)
    assert time.process_time() - start < 5
