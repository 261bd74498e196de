"""`lrope-gguf demo`, as the README shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrope_gguf import read_factors
from lrope_gguf.curve import CurveFile

pytestmark = pytest.mark.native


def test_the_demo_shows_a_gain_over_base_and_uniform_interpolation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lrope_gguf", "demo", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"^gain ([\d.]+) points \[([\d.]+), .*; ([\d.]+) points \[([\d.]+), .* above it", done.stdout, re.M
    )
    assert found is not None, done.stdout
    assert all(float(number) > 5.0 for number in found.groups())
    over_http = {name: int(n) for name, n in re.findall(r"^(base|written) .* (\d+)/240$", done.stdout, re.M)}
    assert over_http["written"] > over_http["base"] + 24
    curve = CurveFile.load(tmp_path / "lrope-kv.json")
    assert read_factors(tmp_path / "lrope-kv-lrope.gguf") == pytest.approx(curve.factors_for(4))
    assert read_factors(tmp_path / "lrope-kv.gguf") is None
    assert (tmp_path / "lrope-kv.study" / "report.html").is_file()
    assert (tmp_path / "lrope-kv.png").is_file()
