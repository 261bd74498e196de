"""The kept studies say what research/results.md and the published curves say of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lrope_gguf.cli import main
from lrope_gguf.curve import CurveFile, published

RESEARCH = Path(__file__).parents[1]
SEARCHES = [
    path.name.removesuffix(".tar.xz")
    for path in sorted((RESEARCH / "studies").glob("*.tar.xz"))
    if not path.name.endswith("-measured.tar.xz")
]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_kept_study_gives_the_figures_of_the_page(
    studies: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / name  # reports are written into the study
    shutil.copytree(studies / name, copy)
    assert main(["report", str(copy)]) == 0
    out = capsys.readouterr().out
    verdict = re.search(r"^(.*)gain (\S+) points \[(\S+), (\S+)\] on (\d+) unseen contexts", out, re.MULTILINE)
    assert verdict is not None
    said, gain, low, high, n = verdict.groups()
    signed = re.escape(f"{float(gain):+.1f}")
    page = (RESEARCH / "results.md").read_text(encoding="utf-8")
    row = re.search(rf"^\|.*\| {n} x \d.*{signed} points(\*\*)? \[{low}, {high}\].*\| (.*) \|$", page, re.MULTILINE)
    assert row is not None
    wanted = "too few contexts to tell" if "too few" in said else said.rstrip(": ") or "gain"
    assert row[2].startswith(wanted)
    assert f"`{name}`" in page


@pytest.mark.parametrize("name", published())
def test_a_published_curve_is_its_studys(
    studies: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = CurveFile.load(published()[name])
    said = curve.provenance
    assert isinstance(said, dict) and curve.block_count
    folder = studies / Path(said["study"]).name.removesuffix(".tar.xz")
    study = CurveFile.load(folder / "best.json")
    assert curve.control_points == study.control_points
    assert curve.layer_factors == pytest.approx(study.factors_for(curve.block_count), abs=1e-6)
    assert main(["report", str(folder), "--json", "--output", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["recommended"]) == (said["verdict"], said["recommended"]) and said["recommended"]
    assert [tested["gain"] for tested in said["tested"]] == [found["test"]["accuracy_gain"]]
