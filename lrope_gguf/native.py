"""The patched llama.cpp that was built with the package: its library and its tools."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import lrope_gguf
from lrope_gguf.errors import LropeError
from lrope_gguf.text import say


def _folder(name: str) -> Path | None:
    # an editable installation has two package folders, sources and build: both are looked at
    folders = (Path(folder) / "_native" / name for folder in lrope_gguf.__path__)
    return next((folder for folder in folders if folder.is_dir()), None)


def native_dir() -> Path | None:
    """Return the folder of the patched ``libllama`` that was built with the package, None if it was not."""
    return _folder("lib")


def tool_path(name: str) -> Path:
    """Return the path of a patched llama.cpp tool. Raises `LropeError`: there is no native part in the package."""
    folder = _folder("bin")
    path = folder / (name + (".exe" if sys.platform == "win32" else "")) if folder else None
    if path is None or not path.is_file():
        raise LropeError(f"{name}: lrope-gguf was installed without its native part; reinstall it with a C++ compiler")
    return path


def run_tool(name: str | None = None) -> NoReturn:
    """Replace this process by a llama.cpp tool, which gets the arguments and signals.

    Args:
        name: the tool; by default the one that the launcher is named after, as launchers of older installations need.

    An installation without the native part runs the next tool of that name on PATH, so as not to hide it.
    """
    name = name or Path(sys.argv[0]).resolve().stem
    try:
        path = str(tool_path(name))
    except LropeError as error:
        other = _next_on_path(name)
        if other is None:
            sys.exit(f"error: {error}")
        say(f"lrope-gguf: note: {error}; running {other}", err=True)
        path = other
    try:
        os.execv(path, [path, *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"error: {path}: cannot be run ({error.strerror}); check its permissions")


def _next_on_path(name: str) -> str | None:
    """Return the next program of this name on PATH, only after this launcher's folder: several such ones end."""
    folders = list(dict.fromkeys(map(os.path.realpath, os.get_exec_path())))
    launcher = Path(sys.argv[0])
    own = os.path.realpath(launcher.parent)
    later = folders[folders.index(own) + 1 :] if own in folders else folders
    for folder in later:
        path = shutil.which(name, path=folder)
        if path and not (launcher.exists() and launcher.samefile(path)):
            return path
    return None


llama_server = partial(run_tool, "llama-server")
llama_cli = partial(run_tool, "llama-cli")
llama_bench = partial(run_tool, "llama-bench")
llama_perplexity = partial(run_tool, "llama-perplexity")
