"""The studies kept in docs/ say what docs/results.md says of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from lrope_gguf.cli import main

DOCS = Path(__file__).parents[1] / "docs"
STUDIES = sorted(path for path in (DOCS / "studies").iterdir() if path.is_dir())


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_kept_study_gives_the_figures_of_the_page(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / study.name  # reports are written into the study
    shutil.copytree(study, copy)
    assert main(["report", str(copy)]) == 0
    verdict = re.search(r"gain (\S+) points \[(\S+), (\S+)\] on (\d+) unseen contexts", capsys.readouterr().out)
    assert verdict is not None
    gain, low, high, n = verdict.groups()
    signed = re.escape(f"{float(gain):+.1f}")
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|.*\| {n} x \d.*{signed} points(\*\*)? \[{low}, {high}\]", page, re.MULTILINE)
    assert f"studies/{study.name}/report.html" in page
    assert not re.search(r"/(home|root|tmp|work)/", (study / "report.html").read_text(encoding="utf-8"))
