"""The rooms of the house and the arrows between them, as docs/design.md draws them: what imports what."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ROOT / "search" / "lrope_search"
HEAVY = {
    "llama_cpp": {"evaluation.binding"},
    "click": {"commands"},
    "ray": {"workers.ray_cluster"},
    "torch": {"gradient"},
    "gguf": {"gradient"},
}
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
            if not node.level:
                yield node.module or ""
                continue
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            if node.module:
                yield ".".join([*base, node.module])
            else:
                yield from (".".join([*base, alias.name]) for alias in node.names)


def name_of(path: Path) -> tuple[str, str]:
    """Module and package names, within lrope_search."""
    parts = path.relative_to(ROOMS).with_suffix("").parts
    module = ".".join(parts if parts[-1] != "__init__" else parts[:-1])
    package = ".".join(["lrope_search", *parts[:-1]])
    return module, package


def room_of(module: str) -> str:
    return module.split(".")[0]


def arrows() -> set[tuple[str, str]]:
    """All pairs of rooms of which the first imports the second."""
    found = set()
    for path in modules(ROOMS):
        module, package = name_of(path)
        if not module:  # the package itself, which loads names on first use
            continue
        for name in imports(path, package):
            top, _, rest = name.partition(".")
            if top == "lrope_search" and rest:
                target = room_of(rest)
            elif top == "lrope_gguf":
                target = "lrope_gguf"
            else:
                continue
            if target != room_of(module):
                found.add((room_of(module), target))
    return found


def test_rooms_import_what_the_design_allows_and_no_more() -> None:
    may = table()
    rooms = {path.stem for path in ROOMS.iterdir() if path.suffix in ("", ".py") and path.name[0] != "_"}
    assert rooms | {"lrope_gguf"} == set(may), "a room without a line in docs/design.md, or a line without its room"
    found = arrows()
    assert {(a, b) for a, b in found if b not in may[a]} == set(), "not allowed by docs/design.md"
    allowed = {(room, other) for room, others in may.items() for other in others}
    assert allowed == found, "docs/design.md allows what nobody needs"


def test_all_arrows_go_one_way() -> None:
    """The rooms can be put in an order in which each imports only those before it."""
    left = table()
    while left:
        free = {room for room, others in left.items() if not others & set(left)}
        assert free, f"these import each other: {', '.join(sorted(left))}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_a_library_is_imported_in_one_place(library: str) -> None:
    found = set()
    for path in modules(ROOMS):
        module, package = name_of(path)
        if any(name.split(".")[0] == library for name in imports(path, package)):
            found.add(module if module in HEAVY[library] else room_of(module))
    assert found == HEAVY[library]


def test_lrope_gguf_knows_nothing_of_the_search_but_its_commands() -> None:
    """`lrope_gguf.cli` finds the commands of the search by name; nothing else looks there."""
    for path in modules(ROOT / "lrope_gguf"):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for name in imports(path, package):
            assert not name.startswith("lrope_search"), f"{path.name} imports {name}"
            assert name.split(".")[0] not in ("scipy", "llama_cpp", "gguf"), f"{path.name} imports {name}"


def scripts(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")}


def test_the_product_knows_nothing_of_the_research() -> None:
    """Nor its tests, of proofs and benchmarks: these may import ``tests/support``, never the other way round."""
    standard = sys.stdlib_module_names
    may_not = {
        "lrope_gguf": {"research", *scripts("research"), *scripts("proofs"), *scripts("benchmarks"), "support"},
        "search": {"research", *scripts("research"), *scripts("proofs"), *scripts("benchmarks"), "support"},
        "tests": {"research", *scripts("research"), *scripts("proofs"), *scripts("benchmarks")},
        "proofs": {"research", *scripts("research"), *scripts("benchmarks")},
        "benchmarks": {"research", *scripts("research"), *scripts("proofs")},
    }
    for folder, names in may_not.items():
        for path in modules(ROOT / folder):
            for name in imports(path, folder):
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
