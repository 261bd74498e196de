"""What all tests of the product share."""

from __future__ import annotations

import pytest

from lrope_search.report import pictures


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of a report take seconds: they are drawn only for tests with the marker ``pictures``."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(
            pictures, "_picture", lambda name, draw, study: pictures.Picture(name, "<svg ></svg>", b"x")
        )
