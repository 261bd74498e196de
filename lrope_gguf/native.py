"""The patched llama.cpp that was built with the package: its library and its tools."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import lrope_gguf
from lrope_gguf.errors import LropeError


def _folder(name: str) -> Path | None:
    # an editable installation has two package folders, sources and build: both are looked at
    folders = (Path(folder) / "_native" / name for folder in lrope_gguf.__path__)
    return next((folder for folder in folders if folder.is_dir()), None)


def native_dir() -> Path | None:
    """Return the folder of the patched ``libllama`` that was built with the package, None if it was not."""
    return _folder("lib")


def tool_path(name: str) -> Path:
    """Return the path of a patched llama.cpp tool, such as ``llama-server``.

    Raises:
        LropeError: the package was installed without its native part.
    """
    folder = _folder("bin")
    path = folder / (name + (".exe" if sys.platform == "win32" else "")) if folder else None
    if path is None or not path.is_file():
        raise LropeError(f"{name}: lrope-gguf was installed without its native part; reinstall it with a C++ compiler")
    return path


def run_tool() -> NoReturn:
    """Become the llama.cpp tool that this launcher is named after; arguments and signals are the tool's own."""
    try:
        path = tool_path(Path(sys.argv[0]).stem)
        os.execv(path, [str(path), *sys.argv[1:]])
    except LropeError as error:
        sys.exit(f"error: {error}")
