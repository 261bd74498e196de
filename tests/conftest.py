"""What all tests of the product share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import native_build
from support.commands import CommandError
from support.gguf_fixtures import write_model

from lrope_gguf.errors import LropeError
from lrope_search import climbing
from lrope_search.evaluation import make
from lrope_search.report import pictures
from lrope_search.report.pictures import Picture


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes a second or more of each search and each report, and is tested where it belongs.

    All divisions of the cores are equally fast (tests/test_session.py measures them), pictures are blank but for
    tests with the marker ``pictures``, and torch is missing, as it may be, but for those with ``gradient``.
    """
    if request.node.get_closest_marker("gradient") is None:
        monkeypatch.setattr(climbing, "check_installed", _missing)
    monkeypatch.setattr(make, "measure_rates", lambda model, choices: dict.fromkeys(choices, 100.0))
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(pictures, "_picture", lambda name, draw, study: Picture(name, "<svg ></svg>", b"x"))


def _missing() -> None:
    raise LropeError("gradients need torch 2.5: pip install 'lrope-gguf[gradient]'")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model file, alone in its folder."""
    return write_model(tmp_path / "m.gguf")


@pytest.fixture(scope="session")
def source() -> Path:
    """The unpatched llama.cpp: from the archive that the build keeps, else from the network."""
    try:
        return native_build.fetch_source()
    except CommandError as error:
        if os.environ.get("LROPE_REQUIRE_NATIVE"):
            raise
        pytest.skip(f"no llama.cpp source: {error}")
