"""The launchers of llama.cpp's tools that pip installs: under any name, and without the native part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import lrope_gguf
from lrope_gguf import native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts and symbolic links")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of a copy of the package without its native part."""
    folder = tmp_path / "site"
    shutil.copytree(Path(lrope_gguf.__file__).parent, folder / "lrope_gguf", ignore=shutil.ignore_patterns("_native"))
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def launcher(path: Path, name: str = "llama-server") -> Path:
    """What pip makes of an entry point; without site-packages, whose hook for an editable installation comes first."""
    function = name.replace("-", "_")
    return script(path, f"#!{sys.executable} -S\nfrom lrope_gguf.native import {function}\n{function}()\n")


def tool(path: Path) -> Path:
    return script(path, '#!/bin/sh\necho "$0" "$@"\n')


def run(path: Path, package: Path, folders: Sequence[Path], *arguments: str) -> tuple[int, str, str]:
    environment = {"PYTHONPATH": str(package), "PATH": os.pathsep.join(map(str, folders))}
    result = subprocess.run([path, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    return result.returncode, result.stdout, result.stderr


def test_each_launcher_has_its_tool() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    tools = {name: target for name, target in scripts.items() if name.startswith("llama-")}
    assert set(tools) == {"llama-server", "llama-cli", "llama-bench", "llama-perplexity"}
    for name, target in tools.items():
        module, _, attribute = target.partition(":")
        assert module == native.__name__ and getattr(native, attribute).args == (name,)


@pytest.mark.parametrize("how", ["itself", "link", "link to a link", "hard link", "copy"])
def test_a_launcher_of_any_name_is_its_tool(how: str, package: Path, tmp_path: Path) -> None:
    real = tool(package / "lrope_gguf" / "_native" / "bin" / "llama-server")
    path = launcher(tmp_path / "bin" / "llama-server")
    if how != "itself":
        other = tmp_path / "other" / "serve-it"
        other.parent.mkdir()
        if how == "link to a link":
            (tmp_path / "between").symlink_to(path)
            path = tmp_path / "between"
        if how == "hard link":
            other.hardlink_to(path)
        elif how == "copy":
            shutil.copy(path, other)
        else:
            other.symlink_to(path)
        path = other
    assert run(path, package, [], "-m", "a b.gguf") == (0, f"{real} -m a b.gguf\n", "")


def test_without_the_native_part_the_next_on_path_runs(package: Path, tmp_path: Path) -> None:
    own, later = launcher(tmp_path / "own" / "llama-server"), tool(tmp_path / "later" / "llama-server")
    between = tmp_path / "between"
    between.mkdir()
    (between / "llama-server").write_text("no program")
    folders = [own.parent, between, later.parent]
    status, out, err = run(own, package, folders, "--version")
    assert (status, out) == (0, f"{later} --version\n")
    assert "note: llama-server: lrope-gguf was installed without its native part" in err and f"running {later}" in err
    link = tmp_path / "serve-it"
    link.symlink_to(own)
    assert run(link, package, folders)[:2] == (0, f"{later}\n")


def test_never_back_to_itself(package: Path, tmp_path: Path) -> None:
    own, second = (launcher(tmp_path / folder / "llama-server") for folder in ("own", "second"))
    alias = tmp_path / "alias"
    alias.symlink_to(own.parent)
    linked = tmp_path / "linked" / "llama-server"
    linked.parent.mkdir()
    linked.symlink_to(own)
    earlier = tool(tmp_path / "earlier" / "llama-server")
    folders = [earlier.parent, own.parent, second.parent, alias, linked.parent, own.parent, second.parent]
    for path in (own, second, alias / "llama-server", linked):
        status, out, err = run(path, package, folders)
        assert (status, out) == (1, "")
        assert "installed without its native part; reinstall it with a C++ compiler" in err and "Traceback" not in err


def test_what_cannot_be_run_is_said(package: Path, tmp_path: Path) -> None:
    script(package / "lrope_gguf" / "_native" / "bin" / "llama-server", "#!/no/such/interpreter\n")
    status, _, err = run(launcher(tmp_path / "bin" / "llama-server"), package, [])
    assert status == 1 and err.startswith("error: ") and "cannot be run (No such file or directory)" in err
