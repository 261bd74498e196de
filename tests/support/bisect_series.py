"""Whether each patch of the series compiles, on top of those before it and without those after it.

Patches are applied one after the other, and after each of them the C++ files that it adds or changes are compiled.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support import native_build
from support.commands import run

_INCLUDES = ("include", "ggml/include", "src", "common", "vendor", "tools/server", "tools/mtmd")


@dataclass(frozen=True)
class Step:
    patch: str
    files: tuple[str, ...]
    """What was compiled."""
    errors: tuple[str, ...]
    """Lines of the compiler."""
    seconds: float


def touched_units(patch: Path) -> list[str]:
    """The C++ files that a patch adds or changes, by their place in llama.cpp."""
    hooked = re.findall(r"^\+\+\+ b/(\S+)", (patch / "hooks.patch").read_text(), re.M)
    return sorted(file for file in {*hooked, *native_build.added_files(patch)} if file.endswith(".cpp"))


def bisect(source: Path, only: Sequence[str] = ()) -> list[Step]:
    """Apply patch after patch to a copy of the unpatched ``source`` and compile what each one touches.

    Ends with the first patch that needs what the source lacks.

    ``only``: of the touched files, those with these names.
    """
    steps = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, patch in enumerate(native_build.patches(), 1):
            start = time.monotonic()
            copy = Path(temporary) / str(number)
            for folder in _INCLUDES:
                shutil.copytree(source / folder, copy / folder)
            if patch.name in native_build.apply_series(copy, number):  # left out, with those after it
                break
            files = [file for file in touched_units(patch) if not only or Path(file).name in only]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                errors = [line for lines in pool.map(functools.partial(_errors, copy), files) for line in lines]
            steps.append(Step(patch.name, tuple(files), tuple(errors), time.monotonic() - start))
    return steps


def _errors(source: Path, file: str) -> list[str]:
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-w", *(f"-I{path}" for path in _INCLUDES)]
    output = run([*command, file], cwd=source, check=False, env={"LC_ALL": "C"})
    errors = [line for line in output.stderr.splitlines() if "error:" in line]
    return errors or ([f"{file}: the compiler failed"] if output.returncode else [])
