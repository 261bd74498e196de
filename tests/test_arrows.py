"""The rooms of the house and the arrows between them, as docs/design.md draws them: what imports what."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ROOT / "search" / "lrope_search"
HEAVY = {
    "llama_cpp": {"evaluation.binding"}, "click": {"commands"}, "ray": {"workers.ray_cluster"},
    "torch": {"gradient"}, "gguf": {"gradient"},
}  # fmt: skip
"""Who alone may import what."""


def table() -> dict[str, set[str]]:
    """The table of docs/design.md: room -> rooms that it may import."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    assert len(rows) > 10
    return {room: set(re.findall(r"`(\w+)`", may)) for room, may in rows}


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, package: str) -> Iterator[str]:
    """Full names of the modules that ``path`` imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from [base] if node.module else (f"{base}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> tuple[str, str]:
    """Module and package names, within lrope_search."""
    parts = path.relative_to(ROOMS).with_suffix("").parts
    module = ".".join(parts if parts[-1] != "__init__" else parts[:-1])
    package = ".".join(["lrope_search", *parts[:-1]])
    return module, package


def arrows() -> set[tuple[str, str]]:
    """All pairs of rooms of which the first imports the second."""
    found = set()
    for path in modules(ROOMS):
        module, package = name_of(path)
        for name in imports(path, package) if module else ():  # the package itself loads names on first use
            top, _, rest = name.partition(".")
            if top == "lrope_gguf" or (top == "lrope_search" and rest):
                found.add((module.split(".")[0], top if top == "lrope_gguf" else rest.split(".")[0]))
    return {(room, other) for room, other in found if room != other}


def test_rooms_import_what_the_design_allows_and_no_more() -> None:
    may = table()
    rooms = {path.stem for path in ROOMS.iterdir() if path.suffix in ("", ".py") and path.name[0] != "_"}
    assert rooms | {"lrope_gguf"} == set(may), "a room without a line in docs/design.md, or a line without its room"
    found = arrows()
    assert {(a, b) for a, b in found if b not in may[a]} == set(), "not allowed by docs/design.md"
    allowed = {(room, other) for room, others in may.items() for other in others}
    assert allowed == found, "docs/design.md allows what nobody needs"


def test_all_arrows_go_one_way() -> None:
    """The rooms can be put in an order in which each imports only those before it; else this raises CycleError."""
    TopologicalSorter(table()).prepare()


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_a_library_is_imported_in_one_place(library: str) -> None:
    found = set()
    for path in modules(ROOMS):
        module, package = name_of(path)
        if any(name.split(".")[0] == library for name in imports(path, package)):
            found.add(module if module in HEAVY[library] else module.split(".")[0])
    assert found == HEAVY[library]


def test_the_product_knows_nothing_of_the_research_nor_lrope_gguf_of_the_search() -> None:
    """Nor its tests, of proofs and benchmarks: these may import ``tests/support``, never the other way round."""
    standard = sys.stdlib_module_names
    folders = ("research", "proofs", "benchmarks")
    research, proofs, benchmarks = ({path.stem for path in (ROOT / name).glob("*.py")} for name in folders)
    of_tests = {"research", *research, *proofs, *benchmarks}
    may_not = {
        "lrope_gguf": {*of_tests, "support", "lrope_search", "scipy", "llama_cpp", "gguf"},
        "search": {*of_tests, "support"}, "tests": of_tests,
        "proofs": {"research", *research, *benchmarks}, "benchmarks": {"research", *research, *proofs},
    }  # fmt: skip
    for folder, names in may_not.items():
        for path in modules(ROOT / folder):
            for name in imports(path, ".".join(path.relative_to(ROOT).parts[:-1])):
                assert name.split(".")[0] not in names - standard, f"{folder}: {path.name} imports {name}"


def test_the_modules_of_lrope_gguf_stand_in_order() -> None:
    """Each imports only those before it in docs/design.md, and what needs none of them."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    before, free = re.findall(r"Inside `lrope_gguf`:(.*?)only those before it(.*?)\.\n", text, re.DOTALL)[0]
    order, alone = re.findall(r"`(\w+)` \(", before), set(re.findall(r"`(\w+)`", free))
    assert {path.stem for path in (ROOT / "lrope_gguf").glob("[!_]*.py")} == {*order, *alone, "cli"}
    for name in {*order, *alone}:
        may = {*order[: order.index(name)], *alone} if name in order else alone
        found = imports(ROOT / "lrope_gguf" / f"{name}.py", "lrope_gguf")
        assert {one.split(".")[1] for one in found if one.startswith("lrope_gguf.")} <= may, name
