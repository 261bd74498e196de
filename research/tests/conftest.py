"""What the tests of the research share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a script of research/, which is no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kept studies, unpacked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        kept = importlib.import_module("studies")
    folder = tmp_path_factory.mktemp("studies")
    for archive in kept.archived().values():
        kept.unpack(archive, folder)
    return folder
