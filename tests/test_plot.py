"""Pictures of layer factors."""

from __future__ import annotations

import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from support.gguf_fixtures import LAYERS, write_model

from lrope_gguf import CurveFile, LropeError, write_factors
from lrope_gguf.cli import main
from lrope_gguf.plot import bezier, plot_factors

POINTS = ((0.0, 1.0), (0.3, 1.4), (1.0, 1.1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_model(tmp_path / "m.gguf")
    document = CurveFile(POINTS)
    write_factors(path, document.factors_for(LAYERS), curve_json=document.dumps(compact=True))
    return path


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("}text")]


def markers(path: Path) -> list[list[float]]:
    """Of each line with several markers, their places from left to right."""
    groups = [e for e in ElementTree.parse(path).iter() if e.get("id", "").startswith("line2d_")]
    places = [[float(e.get("x", "nan")) for e in group.iter() if e.tag.endswith("}use")] for group in groups]
    return [xs for xs in places if len(xs) > 1]


def test_svg_holds_factors_polygon_and_curve(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    assert main(["show", str(model), "--plot", str(picture)]) == 0
    found = texts(picture)
    for text in ("layer", "control points", "curve", "stored factors", "Layer factors of Tiny (llama, 4 layers)"):
        assert text in found
    polygon, factors = markers(picture)
    assert (len(polygon), len(factors)) == (len(POINTS), LAYERS)
    width = factors[-1] - factors[0]
    assert [(x - factors[0]) / width for x in polygon] == pytest.approx([x for x, _ in POINTS], abs=1e-4)
    first = picture.read_bytes()
    main(["show", str(model), "--plot", str(picture)])
    assert picture.read_bytes() == first


def test_png(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.PNG"
    assert main(["show", str(model), "--plot", str(picture)]) == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", data[16:24]) == (1200, 675)


def test_without_a_curve_there_is_no_polygon(tmp_path: Path) -> None:
    plot_factors(tmp_path / "p.svg", (1, 1.2, 1.1))
    assert "control points" not in texts(tmp_path / "p.svg") and [len(xs) for xs in markers(tmp_path / "p.svg")] == [3]


@pytest.mark.parametrize("factors", [(1.0,), (1.0,) * 4, (0.001, 1024.0), tuple(1 + i / 4096 for i in range(4096))])
def test_any_factors(factors: tuple[float, ...], tmp_path: Path) -> None:
    plot_factors(tmp_path / "p.svg", factors, control_points=((0, 1), (0, 2), (1, 1)))
    assert "stored factors" in texts(tmp_path / "p.svg")


def test_a_title_from_a_hostile_file(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plot_factors(tmp_path / "p.svg", (1, 2), title="a$x^{$ \x1b[31m \udc80 模型 \n<b>" + "y" * 200)
    (title,) = (text for text in texts(tmp_path / "p.svg") if text.startswith("a$x^{$"))
    assert len(title) == 90 and "<b>" in title and "\x1b" not in title and not recwarn.list


def test_the_drawn_curve_is_the_evaluated_one() -> None:
    x, y = bezier(POINTS)
    layers = np.linspace(0, 1, 33)
    drawn = np.interp(layers, x, y)
    assert drawn == pytest.approx(CurveFile(POINTS).factors_for(33), abs=1e-5)


def test_layers_of_a_prediction_head_lie_beyond_the_curve(tmp_path: Path) -> None:
    for n_layer, last in ((2, 1), (None, 2)):
        plot_factors(tmp_path / "p.svg", (1, 1.2, 1), control_points=POINTS, n_layer=n_layer)
        polygon, factors = markers(tmp_path / "p.svg")
        assert polygon[-1] == pytest.approx(factors[last], abs=0.01)


def test_without_matplotlib(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LropeError, match=r"pip install 'lrope-gguf\[plot\]'"):
        plot_factors(tmp_path / "p.svg", (1, 2))


def test_drawing_needs_no_display(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lrope_gguf.cli import main; status = main(sys.argv[1:]);"
        "print(status, 'matplotlib.pyplot' in sys.modules)"
    )
    arguments = ["show", str(model), "--plot", str(tmp_path / "p.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("0 False\n"), done
