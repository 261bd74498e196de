"""Hostile files against the patched library: the part of proofs/fuzz_metadata.py that needs no sanitizers."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.hostile_metadata import Case, Outcome, complaint, mutants, parse_output, seed_model, structured_cases
from support.llama_direct import Context, library
from support.rope_models import YARN

pytestmark = pytest.mark.native

SEED, MUTANTS = 20261123, 200
TIME_LIMIT_S = 30
MEMORY_LIMIT = 8 << 30


def use(path: Path) -> str:
    """Load, decode and free a file; the result as fuzz_loader.cpp tells it."""
    with contextlib.redirect_stderr(io.StringIO()) as messages:  # where `llama_direct` writes llama.cpp's errors
        try:
            with Context(path, n_ctx=64) as context:
                context.decode([1, 2, 3])
        except (OSError, AssertionError, ValueError):
            return f"@refused {' '.join(messages.getvalue().splitlines())}"
    return "@ok"


def use_all(paths: Sequence[Path]) -> None:
    """Each file in a process of its own, so that no crash hides another."""
    library()
    for path in paths:
        print(f"@file {path}", flush=True)
        pid = os.fork()
        if pid == 0:
            signal.alarm(TIME_LIMIT_S)
            # what would take the memory of the machine must fail instead
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
            print(use(path), flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            print(f"@died {status}", flush=True)


def outcomes(folder: Path, cases: Sequence[Case]) -> list[Outcome]:
    paths = [folder / f"{i}.gguf" for i in range(len(cases))]
    for path, case in zip(paths, cases, strict=True):
        path.write_bytes(case.file)
    search = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, __file__, *map(str, paths)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": search, "GGML_NO_BACKTRACE": "1"},
        text=True,
        errors="replace",
    )
    assert result.returncode == 0, result.stdout[-2000:]
    found = parse_output(result.stdout)
    return [found[str(path)] for path in paths]


def test_structured_cases_load_or_are_refused_with_key_and_layer(tmp_path: Path) -> None:
    cases = [case for case in structured_cases(tmp_path, step=97) if case.verdict != "any"]
    assert {"value", "length", "element type", "scalar", "claimed length", "truncated"} <= {case.kind for case in cases}
    assert [
        text for case, got in zip(cases, outcomes(tmp_path, cases), strict=True) if (text := complaint(case, got))
    ] == []


def test_damaged_factors_do_not_crash_the_loader(tmp_path: Path) -> None:
    """Only the factors are damaged: elsewhere llama.cpp's own assertions would end the process."""
    models = [seed_model(tmp_path), seed_model(tmp_path, YARN)]
    cases = list(mutants(models, SEED, MUTANTS, weights=(1, 0, 0)))
    got = outcomes(tmp_path, cases)
    assert [
        (case.name, outcome.message) for case, outcome in zip(cases, got, strict=True) if outcome.verdict == "crash"
    ] == []
    assert {outcome.verdict for outcome in got} == {"ok", "refused"}, "the damage must be neither harmless nor total"


if __name__ == "__main__":
    use_all([Path(argument) for argument in sys.argv[1:]])
