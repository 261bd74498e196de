"""What the tests of the research share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kept studies, unpacked."""
    kept = importlib.import_module("studies")
    folder = tmp_path_factory.mktemp("studies")
    for archive in kept.archived().values():
        kept.unpack(archive, folder)
    return folder
