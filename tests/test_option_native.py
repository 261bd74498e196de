"""The option --rope-layer-factors: the same as writing the factors, without a change to the file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.readers import curved, document
from support.tiny_models import LLAMA, readable, write_readable

from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import write_factors
from lrope_gguf.native import native_dir, tool_path
from lrope_search.demo.server import LlamaServer

pytestmark = pytest.mark.native

FACTORS = [1.0, 1.3, 0.8, 2.5, 1.07, 3.1]
LIST = ",".join(map(str, FACTORS))
N_LAYER = len(FACTORS)
PROMPT = 'Key: "4711" has the value "123" and Key: "815" has another value, so what is it? '


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readable(tmp_path_factory.mktemp("option") / "tiny.gguf")


@pytest.fixture(scope="module")
def written(model: Path) -> Path:
    path = model.with_name("written.gguf")
    write_factors(model, FACTORS, output=path)
    return path


def served(path: Path, *options: str) -> tuple[list[float], str, str]:
    """Factors in /props, the greedy answer, and the log."""
    with LlamaServer(path, 512, n_threads=1, options=options) as server:
        return server.properties()["rope_layer_factors"], server.complete(PROMPT, 16), server.log


def perplexity(path: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of llama-perplexity."""
    text = path.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    command = [tool_path("llama-perplexity"), "-m", path, "-f", text, "-c", "64", "-t", "1", *options]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    return result.returncode, result.stdout + result.stderr


def value(path: Path, *options: str, environment: dict[str, str] | None = None) -> str:
    # the tool does not flush its log when it ends, and sometimes the last line is lost
    for _ in range(10):
        status, text = perplexity(path, *options, environment=environment)
        assert status == 0, text
        if found := re.search(r"PPL = ([0-9.]+)", text):
            return found[1]
    raise AssertionError(text)


def test_a_list_equals_the_written_file(model: Path, written: Path) -> None:
    base, file, option = served(model), served(written), served(model, "--rope-layer-factors", LIST)
    assert base[0] == [1.0] * N_LAYER
    assert file[0] == option[0] == pytest.approx(FACTORS)
    assert file[1] == option[1] != base[1]
    line = "RoPE factors from 0.8 to 3.1, 5 of 6 layers differ from 1"
    assert [text.count(line) for _, _, text in (base, file, option)] == [0, 1, 1]


def test_off_ignores_the_factors_of_the_file(model: Path, written: Path) -> None:
    base, off = served(model), served(written, "--rope-layer-factors", "off")
    assert off[:2] == base[:2]
    line = "RoPE factors are 1 in all 6 layers"  # without it, another library runs
    assert [text.count(line) for text in (base[2], off[2], served(written)[2])] == [1, 1, 0]


def test_perplexity_takes_it_from_option_and_environment(model: Path, written: Path) -> None:
    base, file = value(model), value(written)
    assert base != file
    assert value(model, "--rope-layer-factors", LIST) == file
    assert value(written, environment={"LLAMA_ARG_ROPE_LAYER_FACTORS": "off"}) == base


def test_cli_has_the_option(model: Path) -> None:
    command = [str(tool_path("llama-cli")), "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    assert "--rope-layer-factors" in text and "LLAMA_ARG_ROPE_LAYER_FACTORS" in text


def test_a_draft_model_keeps_its_own(model: Path) -> None:
    """Its four layers would refuse six factors."""
    draft = write_readable(
        model.with_name("draft.gguf"),
        readable(replace(LLAMA, config=replace(LLAMA.config, ropes=LLAMA.config.ropes[:4], windows=(None,) * 4))),
    )
    options = ["--model-draft", str(draft), "--spec-type", "draft-simple", "--rope-layer-factors", LIST]
    factors, answer, log = served(model, *options)
    assert factors == pytest.approx(FACTORS)
    assert answer == served(model, "--rope-layer-factors", LIST)[1]
    assert "draft.gguf" in log and log.count("RoPE factors from") == 1


BAD: dict[str, tuple[str, Sequence[str]]] = {
    "short": ("1,1.2", ["has 2 factors, but the model has 6 layers"]),
    "zero": ("1,1,0,1,1,1", ["bad factor for layer 2: 0"]),
    "no file": ("missing.json", ["neither a list of numbers such as 1,1.05,0.98 nor a file that can be read"]),
    "nothing in it": (document(layer_factors=...), ["has no layer_factors; lrope-gguf write MODEL"]),
    "other architecture": (document(architecture="gemma3"), ["another model", "llama, 6 layers"]),
    "a curve alone": (
        curved(factors=...),
        [
            "has no layer_factors; lrope-gguf write MODEL --curve",
            "curve.json puts the factors of its curve into the model",
        ],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_ends_the_tool_and_says_why(name: str, model: Path, tmp_path: Path) -> None:
    value, messages = BAD[name]
    if value[0] in "{[":
        (tmp_path / "curve.json").write_text(value)
        value = str(tmp_path / "curve.json")
    status, text = perplexity(model, "--rope-layer-factors", value)
    assert status == 1, text
    assert all(message in text for message in (*messages, f"--rope-layer-factors {value}")), text


def test_factors_are_no_value_to_override(model: Path) -> None:
    status, text = perplexity(model, "--override-kv", "llama.rope.scaling.layer_factors=float:1.5")
    assert status == 1 and "layer factors are a list, use --rope-layer-factors" in text


def test_no_other_library_goes_before_ours(model: Path, tmp_path: Path) -> None:
    """Files of the same names on LD_LIBRARY_PATH, as of a stock llama.cpp, are not even opened."""
    library = native_dir()
    assert library is not None
    others = [path.name for path in library.iterdir()]
    assert "libllama.so" in others and "libggml-base.so" in others
    for name in others:
        (tmp_path / name).write_text("no library")
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert value(model, "--rope-layer-factors", LIST, environment=environment) == value(
        model, "--rope-layer-factors", LIST
    )
    for tool in ("llama-server", "llama-cli", "llama-bench", "llama-quantize", "llama-gguf-split"):
        command = [str(tool_path(tool)), "--help"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        assert "no library" not in result.stderr and "shared libraries" not in result.stderr, result.stderr
    # the binding loads it by its path, and its own libraries come with it
    load = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library / "libllama.so")]
    subprocess.run(load, check=True, env={**os.environ, **environment})


def test_the_server_ends_too(model: Path) -> None:
    with (
        pytest.raises(LropeError, match="llama-server does not start"),
        LlamaServer(model, 512, options=["--rope-layer-factors", "1,2"]),
    ):
        pass
