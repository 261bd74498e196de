"""What the build needs to agree on."""

from __future__ import annotations

import os
import re
import shutil
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
    patch = project / "patches" / "01-first"
    (patch / "src").mkdir(parents=True)
    (source / "src").mkdir(parents=True)
    # the source lies inside another repository, as build/ does in ours
    subprocess.run(["git", "init", "-q", project], check=True)
    (source / "a.txt").write_text("one\ntwo\nthree\n")
    (patch / "hooks.patch").write_text(
        "a : change a line\n\n"
        "diff --git a/a.txt b/a.txt\n--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n"
    )
    (patch / "b.txt").write_text("new\nmore\n")
    (patch / "src" / "c.txt").write_text("[new]; \\;\n")
    (project / "cmake").mkdir()
    (project / "cmake" / "llama-cpp.cmake").write_text((ROOT / "cmake" / "llama-cpp.cmake").read_text())
    (project / "run.cmake").write_text(f'include(cmake/llama-cpp.cmake)\nlrope_apply_patches("{source}")\n')
    return source


def apply(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return cmake(source.parent.parent / "run.cmake", **environment)


def later_patch(source: Path, message: str = "a : change it again") -> None:
    """Add a patch that changes what the first one left, and brings a file."""
    folder = source.parent.parent / "patches" / "02-later"
    folder.mkdir()
    (folder / "hooks.patch").write_text(
        f"{message}\n\ndiff --git a/a.txt b/a.txt\n--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n one\n-2\n+II\n three\n"
    )
    (folder / "d.txt").write_text("late\n")


def cmake(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-P", script.name]
    return subprocess.run(command, cwd=script.parent, capture_output=True, text=True, env=os.environ | environment)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(source: Path, *reasons: str, **environment: str) -> None:
    """The series does not apply, for these reasons, and nothing was changed."""
    before = contents(source)
    result = apply(source, **environment)
    assert result.returncode != 0
    said = " ".join(result.stderr.split())
    assert "do not apply" in said and "patches/README.md" in said
    assert [reason for reason in reasons if reason not in said] == []
    assert contents(source) == before


@pytest.mark.parametrize("repository", [False, True])
def test_patches_are_applied_once(checkout: Path, repository: bool) -> None:
    if repository:
        subprocess.run(["git", "init", "-q", checkout], check=True)
    assert "is patched" in apply(checkout).stdout
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\n"
    assert (checkout / "b.txt").read_text() == "new\nmore\n"
    assert (checkout / "src" / "c.txt").read_text() == "[new]; \\;\n"
    made = {path.name for path in checkout.rglob("*") if ".git" not in path.parts}
    assert made == {"a.txt", "b.txt", "c.txt", "src"}
    before = contents(checkout)
    again = apply(checkout)
    assert again.returncode == 0 and "already patched" in again.stdout
    assert contents(checkout) == before


@pytest.mark.parametrize("alone", [False, True])
def test_a_later_patch_may_change_what_an_earlier_one_left(checkout: Path, alone: bool) -> None:
    """And the first ones may be asked for alone."""
    later_patch(checkout)
    if alone:
        script = checkout.parent.parent / "run.cmake"
        script.write_text(f"set(LROPE_PATCHES 1)\n{script.read_text()}")
    for said in ("is patched", "already patched"):
        assert said in apply(checkout).stdout
        assert (checkout / "a.txt").read_text() == f"one\n{2 if alone else 'II'}\nthree\n"
        assert (checkout / "d.txt").exists() != alone


@pytest.mark.parametrize(
    ("header", "lacks"), [("int get_stream_id();\n", "get_stream"), ("int get_stream();\nint discarded;\n", "discard")]
)
def test_a_patch_is_left_out_where_the_source_lacks_what_it_needs(checkout: Path, header: str, lacks: str) -> None:
    """Such as node-llama-cpp's llama.cpp, where the text applies and the code does not compile."""
    later_patch(checkout, "a : change it again\n\nNeeds: src/e.h get_stream\nNeeds: src/e.h discard")
    (checkout / "src" / "e.h").write_text(header)
    for said in ("is patched", "already patched"):
        result = apply(checkout)
        warning = " ".join(result.stderr.split())
        assert result.returncode == 0 and said in result.stdout
        assert f"The patches from 02-later on are left out: {checkout}/src/e.h has no {lacks}." in warning
        assert (checkout / "a.txt").read_text() == "one\n2\nthree\n"
        assert not (checkout / "d.txt").exists()


def test_a_source_that_lacks_what_the_first_patch_needs_is_refused(checkout: Path) -> None:
    patch = checkout.parent.parent / "patches" / "01-first" / "hooks.patch"
    patch.write_text(f"Needs: missing.h graph\n\n{patch.read_text()}")
    before = contents(checkout)
    result = apply(checkout)
    said = " ".join(result.stderr.split())
    assert result.returncode != 0 and f"The patches cannot be used: {checkout}/missing.h has no graph." in said
    assert contents(checkout) == before


def test_context_that_is_only_indented_deeper_is_no_drift(checkout: Path) -> None:
    patch = checkout.parent.parent / "patches" / "01-first" / "hooks.patch"
    patch.write_text(patch.read_text().replace("\n one\n", "\n   one\n"))
    (checkout / "a.txt").write_text("        one\ntwo\nthree\n")
    assert "is patched" in apply(checkout).stdout
    assert (checkout / "a.txt").read_text() == "        one\n2\nthree\n"
    assert "already patched" in apply(checkout).stdout


def test_a_source_that_has_drifted_is_left_alone_with_a_plain_message(checkout: Path) -> None:
    (checkout / "a.txt").write_text("one\nzwei\nthree\n")
    assert_refused(checkout, "has drifted", "patch failed: a.txt:1")
    (checkout / "a.txt").unlink()
    assert_refused(checkout, "a.txt: No such file")
    assert not (checkout / "b.txt").exists()


def test_a_file_in_the_way_is_left_alone(checkout: Path) -> None:
    (checkout / "b.txt").write_text("somebody else's\n")
    assert_refused(checkout, "b.txt is there with other content.")


def test_a_source_with_an_older_series_is_left_alone(checkout: Path) -> None:
    patches = checkout.parent.parent / "patches"
    assert apply(checkout).returncode == 0
    (patches / "01-first" / "b.txt").write_text("new\nmore\nnewer\n")
    assert_refused(checkout, "an older series", "b.txt is there with other content.")
    (checkout / "b.txt").unlink()
    assert_refused(checkout, "an older series", "patch failed: a.txt:1")


def test_files_without_the_hooks_are_no_series(checkout: Path) -> None:
    """Such as what `git checkout .` leaves of a patched checkout."""
    assert apply(checkout).returncode == 0
    (checkout / "a.txt").write_text("one\ntwo\nthree\n")
    assert "is patched" in apply(checkout).stdout
    assert (checkout / "a.txt").read_text() == "one\n2\nthree\n"


def test_an_error_in_the_middle_changes_nothing(checkout: Path, tmp_path: Path) -> None:
    """A git that checks as usual, but runs out of space when it writes."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(
        f"""#!/bin/sh
        case "$*" in *apply*) case "$*" in *--check*) ;; *)
            rm a.txt; echo torn > b.txt; echo "No space left on device" >&2; exit 1;;
        esac esac
        exec {shutil.which("git")} "$@"
        """
    )
    git.chmod(0o755)
    assert_refused(checkout, "No space left on device", PATH=f"{git.parent}:{os.environ['PATH']}")
    assert "is patched" in apply(checkout).stdout


def test_the_build_notices_a_change_of_every_part_of_the_series(checkout: Path) -> None:
    project = checkout.parent.parent
    script = project / "series.cmake"
    script.write_text(
        f"{(project / 'run.cmake').read_text()}lrope_series_hash(hash)\n"
        'get_property(depends DIRECTORY PROPERTY CMAKE_CONFIGURE_DEPENDS)\nmessage("${hash};${depends}")\n'
    )
    parts = sorted(str(path) for path in (project / "patches").rglob("*") if path.is_file())
    first, *depends = cmake(script).stderr.strip().split(";")
    assert sorted(depends) == parts
    script.write_text('include(cmake/llama-cpp.cmake)\nlrope_series_hash(hash)\nmessage("${hash}")\n')
    hashes = [first]
    for part in map(Path, parts):
        part.write_text(part.read_text() + "\n")
        hashes.append(cmake(script).stderr.strip())
    part.rename(part.with_name("other"))
    hashes.append(cmake(script).stderr.strip())
    assert len(set(hashes)) == len(hashes) == len(parts) + 2
