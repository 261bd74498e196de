"""The pages: few, short, with links and paths that lead somewhere; and the appendix of the audit is complete."""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path

import pytest
from support.arch_models import FIXTURES, UNUSABLE

ROOT = Path(__file__).parent.parent
PRODUCT = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*PRODUCT, ROOT / "CONTRIBUTING.md", *(path for folder in ("curves", "models", "patches", "research")
                                             for path in sorted((ROOT / folder).glob("*.md")))]  # fmt: skip


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_products_pages_are_few_and_short() -> None:
    names = {path.stem for path in PRODUCT}
    assert names == {"README", "search", "tasks", "serve", "dynamic", "metadata-format", "patch", "design", "evidence"}
    assert sum(len(path.read_text(encoding="utf-8").split()) for path in PRODUCT) <= 12_000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    for name in re.findall(r"\b(?:tests|proofs|benchmarks|research|models)/[\w./-]+\.(?:py|cpp|csv|gguf)\b", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_pages_name_no_place_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(home|root|tmp|work)/", page.read_text(encoding="utf-8")), page


def test_every_architecture_is_in_the_appendix() -> None:
    with (ROOT / "docs" / "architectures.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == FIXTURES.keys() | UNUSABLE.keys()
    bad = [row["model"] for row in rows if not row["verdict"].startswith(("exact", "refused: ", "cannot be loaded: "))]
    assert not bad
    page = (ROOT / "docs" / "patch.md").read_text(encoding="utf-8")
    assert f"{len(rows)} models, 0 problems" in page


def test_the_repository_stays_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in names if name]
    assert sum(path.read_bytes().count(b"\n") for path in paths if path.is_file()) <= 60_000
