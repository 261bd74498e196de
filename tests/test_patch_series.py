"""The patch series itself: small, in upstream's form, and with no RoPE call of any architecture left out."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import call_sites, native_build
from support.bisect_series import bisect

ROOT = Path(__file__).parent.parent
FOLDERS = native_build.patches()
PATCHES = [folder / "hooks.patch" for folder in FOLDERS]
FILES = native_build.series_files()
MAX_ADDED = {
    "01-layer-factors": 470, "02-scores": 200, "03-memory-size": 30, "04-dynamic-scaling": 710, "05-states": 170,
    "06-query-scales": 370, "07-head-factors": 620,
}  # fmt: skip
MAX_HUNK, MAX_LINE = 8, 160
# a template, lambdas, an inverse rotation, an indexer and a cache, besides the usual
QUICK = ("llama.cpp", "dflash.cpp", "hy-v4.cpp", "deepseek4.cpp", "llama-kv-cache.cpp", "llama-model-loader.cpp")


@dataclass
class Hunk:
    """One hunk of a patch."""

    patch: str
    file: str
    lines: list[str]

    @property
    def added(self) -> list[str]:
        return [line[1:] for line in self.lines if line.startswith("+")]

    @property
    def context(self) -> tuple[int, int]:
        """Lines of context before and after the change."""
        changed = [i for i, line in enumerate(self.lines) if line[0] in "+-"]
        return changed[0], len(self.lines) - 1 - changed[-1]


def parse(patches: list[Path]) -> list[Hunk]:
    hunks: list[Hunk] = []
    for path in patches:
        file = ""
        left = [0, 0]
        for line in path.read_text().splitlines():
            if left != [0, 0]:
                hunks[-1].lines.append(line)
                left[0] -= line[0] in " -"
                left[1] -= line[0] in " +"
            elif match := re.match(r"diff --git a/(\S+) b/(\S+)$", line):
                file = match[2]
            elif match := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
                left = [int(match[1] or 1), int(match[2] or 1)]
                hunks.append(Hunk(path.parent.name, file, []))
        assert left == [0, 0], f"{path.parent.name}: cut short"
    return hunks


HUNKS = parse(PATCHES)


def added_lines() -> list[tuple[str, str]]:
    """Each line that the series adds, with its file."""
    lines = [(hunk.file, line) for hunk in HUNKS for line in hunk.added]
    return lines + [(file, line) for file, path in FILES.items() for line in path.read_text().splitlines()]


def test_the_parser_sees_every_hunk() -> None:
    text = "".join(path.read_text() for path in PATCHES)
    assert len(HUNKS) == len(re.findall(r"^@@ ", text, re.M)) > 0
    files = {hunk.file for hunk in HUNKS}
    assert files == set(re.findall(r"^\+\+\+ b/(\S+)", text, re.M))


def test_new_files_are_files_and_not_patches() -> None:
    assert FILES and {Path(file).suffix for file in FILES} <= {".cpp", ".h"}
    assert not {hunk.file for hunk in HUNKS} & FILES.keys()
    for path in PATCHES:
        assert not re.search(r"^(new|deleted) file mode|^rename |^(---|\+\+\+) /dev/null", path.read_text(), re.M)


def test_each_patch_is_small() -> None:
    """Blank lines do not count."""
    added = Counter(hunk.patch for hunk in HUNKS for line in hunk.added if line.strip())
    for folder in FOLDERS:
        lines = (line for path in native_build.added_files(folder).values() for line in path.read_text().splitlines())
        added[folder.name] += sum(bool(line.strip()) for line in lines)
    print(added)
    assert added.keys() == MAX_ADDED.keys()
    assert [patch for patch, most in MAX_ADDED.items() if added[patch] > most] == []


def test_hunks_of_upstream_files_add_few_lines() -> None:
    large = [(h.patch, h.file, len(h.added)) for h in HUNKS if len(h.added) > MAX_HUNK]
    assert not large


def test_hunks_quote_one_line_of_context_at_most() -> None:
    assert not [(h.patch, h.file, h.lines[0]) for h in HUNKS if max(h.context) > 1]


def test_added_lines_are_clean() -> None:
    lines = added_lines()
    assert not [(file, line) for file, line in lines if len(line) > MAX_LINE]
    assert not [(file, line) for file, line in lines if line != line.rstrip() or "\t" in line]
    assert not [file for file, path in FILES.items() if not re.search(r"\S\n\Z", path.read_text())]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.parent.name)
def test_patches_say_what_they_do(patch: Path) -> None:
    head = patch.read_text().split("\ndiff --git ")[0]
    subject, _, body = head.partition("\nSubject: ")[2].partition("\n\n")
    assert re.fullmatch(rf"\[PATCH \d/{len(PATCHES)}\] [a-z][a-z0-9/-]* : \S.{{1,60}}[^.\s]", subject), (
        "upstream: 'module : what it does'"
    )
    assert len(body.split()) >= 10
    places = [place for place in re.findall(r"[\w/-]+", body) if place == "common" or "/" in place]
    hooked = {hunk.file for hunk in HUNKS if hunk.patch == patch.parent.name}
    assert not [file for file in hooked if not file.startswith(tuple(places))]


@pytest.fixture
def source(source: Path) -> Path:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    return source


def test_members_cover_every_rope_function_of_ggml(source: Path) -> None:
    added = call_sites.blank("\n".join(line for file, line in added_lines() if file.endswith(".h")))
    missing = [name for name in call_sites.rope_functions(source) if not re.search(rf"\b{name} *\(", added)]
    assert not missing, "a later use of these would rotate without the factor, unnoticed"


def test_every_rope_call_of_some_models_is_hidden(source: Path) -> None:
    result = call_sites.prove(source, QUICK)
    assert result.differences == []
    assert len(result.hidden) >= 15
    assert {site.file for site in result.outside} == {"src/llama-kv-cache.cpp", "src/llama-model-loader.cpp"}


@pytest.mark.slow
def test_every_rope_call_is_hidden(source: Path) -> None:
    result = call_sites.prove(source)
    print(call_sites.report(result))
    assert result.differences == []
    assert len({site.file for site in result.hidden}) > 100


def test_a_call_that_members_do_not_hide_is_found(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "src", tmp_path / "src")
    for folder in ("include", "ggml/include"):
        shutil.copytree(source / folder, tmp_path / folder)
    file = tmp_path / "src/models/llama.cpp"
    lines = file.read_text().count("\n")
    file.write_text(file.read_text() + "\nggml_tensor * f(ggml_context * c) { return ggml_rope(c, 0, 0, 8, 0); }\n")
    result = call_sites.prove(tmp_path, ["llama.cpp"])
    assert result.differences == [f"src/models/llama.cpp:{lines + 2} ggml_rope"]


def test_what_a_patch_needs_is_in_the_source(source: Path) -> None:
    needs = [line.split() for patch in PATCHES for line in patch.read_text().splitlines() if line.startswith("Needs: ")]
    assert needs and all(len(words) == 3 for words in needs)
    for _, file, name in needs:
        assert re.search(rf"\b{name}\b", (source / file).read_text()), (file, name)


def test_a_patch_that_needs_a_later_one_does_not_compile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the series once was: the logic of dynamic scaling came with another patch than its hooks."""
    for folder in ("patches", "cmake"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(native_build, "PROJECT", tmp_path)
    monkeypatch.setattr(native_build, "PATCHES", tmp_path / "patches")
    file = tmp_path / "patches/03-memory-size/src/llama-memory-size.cpp"
    file.write_text(file.read_text() + '#include "llama-rope-state.h"\n')  # comes with 05-states
    steps = bisect(source, [file.name])
    assert [step.patch for step in steps if step.files] == [step.patch for step in steps if step.errors]
    assert [step.patch for step in steps if step.errors] == ["03-memory-size"]
    assert "llama-rope-state.h" in steps[2].errors[0]


def test_mentions_in_comments_and_strings_do_not_count() -> None:
    text = '// ggml_rope(\nx = ggml_rope_ext(a,\n  f(b)\n); /* ggml_rope */ s = "ggml_rope(";\n'
    (site,) = call_sites.text_sites("a.cpp", text, ["ggml_rope", "ggml_rope_ext"])
    assert (site.line, site.last, site.name) == (2, 4, "ggml_rope_ext")
