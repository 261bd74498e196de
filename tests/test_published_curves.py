"""The curves that come with the package: valid, and taken by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.gguf_fixtures import write_model

from lrope_gguf.cli import main
from lrope_gguf.curve import CurveFile, published
from lrope_gguf.metadata import read_factors

ROOT = Path(__file__).parent.parent
NAME = "qwen2.5-coder-0.5b-instruct"


@pytest.mark.parametrize("name", published())
def test_a_curve_says_what_it_is_good_for(name: str) -> None:
    curve = CurveFile.load(published()[name])
    assert curve.architecture and curve.block_count and curve.layer_factors is not None
    said = curve.provenance
    assert isinstance(said, dict)
    assert said["verdict"] and said["tasks"] and said["command"].startswith("lrope-gguf search ")
    for tested in said["tested"]:
        assert tested["quantization"] and len(tested["fingerprint"]) == 64 and len(tested["gain"]) == 3
    assert said["study"].startswith("research/studies/") and (ROOT / said["study"]).is_file()


def test_write_takes_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = write_model(tmp_path / "fits.gguf", architecture="qwen2", block_count=24)
    assert main(["write", str(fits), "--curve", NAME]) == 0
    assert read_factors(fits) == pytest.approx(CurveFile.load(published()[NAME]).layer_factors)
    other = write_model(tmp_path / "other.gguf", architecture="llama", block_count=24)
    assert main(["write", str(other), "--curve", NAME]) == 1
    assert "is for architecture qwen2" in capsys.readouterr().err
    assert main(["write", str(fits), "--curve", "qwen"]) == 1
    assert (
        f"qwen: no such file or curve; the curves of lrope-gguf are {', '.join(published())}" in capsys.readouterr().err
    )


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "m.gguf", architecture="qwen2", block_count=24)
    CurveFile(layer_factors=(1.5,) * 24).save(tmp_path / NAME)
    assert json.loads((tmp_path / NAME).read_text())["format"] == "lrope-curve"
    assert main(["write", str(model), "--curve", NAME]) == 0
    assert read_factors(model) == (1.5,) * 24
