"""What the build needs to agree on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_binding_and_source_are_of_one_release() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = next(item for item in extras["search"] if item.startswith("llama-cpp-python"))
    source = (ROOT / "patches" / "source.txt").read_text()
    pattern = (
        rf"# llama.cpp commit [0-9a-f]{{7,40}}, as vendored by\n{re.escape(pinned)} --hash=sha256:[0-9a-f]{{64}}\n"
    )
    assert re.fullmatch(pattern, source)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with one file, and a series that changes and extends it, laid out like this project."""
    project, source = tmp_path / "project", tmp_path / "project" / "build" / "source"
    (project / "patches" / "fallback").mkdir(parents=True)
    (source / "src").mkdir(parents=True)
    (source / "src" / "llama-cparams.h").write_text("struct {\n    int ctx_other;\n};\n")
    # the source lies inside another repository, as build/ does in ours
    subprocess.run(["git", "init", "-q", project], check=True)
    (source / "a.txt").write_text("one\ntwo\nthree\n")
    (project / "patches" / "0001-first.patch").write_text(
        "diff --git a/a.txt b/a.txt\n--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n"
        "diff --git a/b.txt b/b.txt\nnew file mode 100644\n--- /dev/null\n+++ b/b.txt\n@@ -0,0 +1 @@\n+new\n"
    )
    (project / "patches" / "0002-second.patch").write_text(
        "diff --git a/b.txt b/b.txt\n--- a/b.txt\n+++ b/b.txt\n@@ -1 +1,2 @@\n new\n+more\n"
    )
    (project / "patches" / "fallback" / "ctx-other.patch").write_text(
        "diff --git a/src/llama-cparams.h b/src/llama-cparams.h\n"
        "--- a/src/llama-cparams.h\n+++ b/src/llama-cparams.h\n@@ -1,2 +1,3 @@\n struct {\n+    int ctx_other;\n };\n"
    )
    (project / "cmake").mkdir()
    (project / "cmake" / "llama-cpp.cmake").write_text((ROOT / "cmake" / "llama-cpp.cmake").read_text())
    (project / "run.cmake").write_text(f'include(cmake/llama-cpp.cmake)\nlrope_apply_patches("{source}")\n')
    return source


def apply(source: Path) -> subprocess.CompletedProcess[str]:
    project = source.parent.parent
    return subprocess.run(["cmake", "-P", "run.cmake"], cwd=project, capture_output=True, text=True)


def test_patches_are_applied_once(checkout: Path) -> None:
    assert "is patched" in apply(checkout).stdout
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\n"
    assert (checkout / "b.txt").read_text() == "new\nmore\n"
    again = apply(checkout)
    assert again.returncode == 0 and "already patched" in again.stdout
    assert (checkout / "b.txt").read_text() == "new\nmore\n"


def test_an_older_source_gets_the_fallback_too(checkout: Path) -> None:
    header = checkout / "src" / "llama-cparams.h"
    recent = header.read_text()
    assert apply(checkout).returncode == 0
    assert header.read_text() == recent
    (checkout / "a.txt").write_text("one\ntwo\nthree\n")
    (checkout / "b.txt").unlink()
    header.write_text("struct {\n};\n")
    for said in ("is patched", "already patched"):
        assert said in apply(checkout).stdout
        assert header.read_text() == recent


def test_context_that_is_only_indented_deeper_is_no_drift(checkout: Path) -> None:
    patch = checkout.parent.parent / "patches" / "0001-first.patch"
    patch.write_text(patch.read_text().replace("\n one\n", "\n   one\n"))
    (checkout / "a.txt").write_text("        one\ntwo\nthree\n")
    assert "is patched" in apply(checkout).stdout
    assert (checkout / "a.txt").read_text() == "        one\n2\nthree\n"
    assert "already patched" in apply(checkout).stdout


def test_a_source_that_has_drifted_is_left_alone_with_a_plain_message(checkout: Path) -> None:
    (checkout / "a.txt").write_text("one\nzwei\nthree\n")
    result = apply(checkout)
    assert result.returncode != 0
    assert "do not apply" in result.stderr and "patches/README.md" in result.stderr and "a.txt" in result.stderr
    assert not (checkout / "b.txt").exists()
