"""Bad factors in a file: refused when the model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from support.rope_models import FACTORS, LLAMA, N_LAYER, YARN, file_of

pytestmark = pytest.mark.native


def bad_file(folder: Path, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """The llama model with something else under the key."""
    source = gguf.GGUFReader(file_of(LLAMA))
    path = folder / "bad.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        writer.add_key_value(field.name, field.contents(), field.types[0])
    add(writer)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEY = "llama.rope.scaling.layer_factors"


def one_of(value: float, layer: int) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_array(KEY, [value if il == layer else 1.5 for il in range(N_LAYER)])


BAD: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "short": (
        lambda w: w.add_array(KEY, [1.5] * (N_LAYER - 1)),
        f"has {N_LAYER - 1} factors, but the model has {N_LAYER}",
    ),
    "long": (lambda w: w.add_array(KEY, [1.5] * (N_LAYER + 1)), f"has {N_LAYER + 1} factors"),
    "scalar": (lambda w: w.add_float32(KEY, 1.5), "must be an array of float32"),
    "integers": (lambda w: w.add_array(KEY, [1] * N_LAYER), "must be an array of float32"),
    "strings": (lambda w: w.add_array(KEY, ["1.5"] * N_LAYER), "must be an array of float32"),
    "nan": (one_of(float("nan"), 2), "layer 2"),
    "infinite": (one_of(float("inf"), 3), "layer 3"),
    "zero": (one_of(0.0, 0), "layer 0"),
    "negative": (one_of(-1.5, 5), "layer 5"),
    "denormal": (one_of(1e-40, 1), "layer 1"),
    "huge": (one_of(1e30, 5), "layer 5"),
}


def load_elsewhere(path: Path) -> subprocess.CompletedProcess[str]:
    """Load in a process of its own: llama.cpp writes its errors to the standard error stream."""
    code = f"from support import llama_direct; import pathlib; llama_direct.Context(pathlib.Path({str(path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_refused_with_the_key_and_the_layer(name: str, tmp_path: Path) -> None:
    add, message = BAD[name]
    result = load_elsewhere(bad_file(tmp_path, add))
    assert result.returncode == 1 and "not loaded" in result.stderr
    assert KEY in result.stderr and message in result.stderr


def test_a_factor_at_the_scale_of_yarn_is_refused_with_the_layer() -> None:
    """What the file says is checked against the scaling that the context sets, so the context is refused."""
    result = load_elsewhere(file_of(YARN, [*FACTORS[:4], 0.25, 1.0]))
    assert result.returncode == 1 and "no context" in result.stderr
    assert "layer 4" in result.stderr
