"""One table of curve files and lists for both programs that read them, which must judge alike."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from support.readers import (
    CURVE,
    DOCUMENTS,
    FACTORS,
    HEAD_COUNTS,
    HEAD_DOCUMENTS,
    HEAD_LISTS,
    HEADS,
    LISTS,
    N_LAYER,
    REFUSED,
    UNCHECKED,
    Table,
    Verdict,
)
from support.tiny_models import LLAMA, readable, write_readable

from lrope_gguf.cli import main
from lrope_gguf.metadata import read_factors
from lrope_gguf.model_info import read_model
from lrope_gguf.native import tool_path
from lrope_gguf.rope_scaling import single
from lrope_search.demo.server import LlamaServer

TABLES: dict[str, tuple[bool, Table]] = {
    "document": (False, DOCUMENTS),
    "list": (False, LISTS),
    "head's document": (True, HEAD_DOCUMENTS),
    "head's list": (True, HEAD_LISTS),
}
CASES = [(table, name) for table, (_, cases) in TABLES.items() for name in cases]
Case = tuple[str, str]
HEAD_CASES = [(kind, name) for kind, cases in HEADS.items() for name in cases]
OPTIONS = {"head_factors": "--rope-head-factors", "query_scales": "--query-scales"}
PROPERTIES = {"head_factors": "rope_head_factors", "query_scales": "query_scales"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model of six layers, and one whose sixth is a multi-token-prediction head."""
    folder = tmp_path_factory.mktemp("readers")
    config = replace(LLAMA.config, ropes=LLAMA.config.ropes[:5], windows=(None,) * 5)
    shorter = readable(replace(LLAMA, config=config))
    return {
        False: write_readable(folder / "plain.gguf"),
        True: write_readable(folder / "head.gguf", shorter, n_head_layers=1),
    }


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six layers with four heads and two KV heads each."""
    path = write_readable(tmp_path_factory.mktemp("heads") / "heads.gguf")
    info = read_model(path)
    assert info.n_head == (HEAD_COUNTS["query_scales"],) * N_LAYER
    assert info.n_head_kv == (HEAD_COUNTS["head_factors"],) * N_LAYER
    return path


def value(case: Case, folder: Path) -> tuple[bool, str]:
    """Whether the case is a file, and what to give to an option for it."""
    table, name = case
    content = TABLES[table][1][name][0]
    if "document" not in table:
        assert isinstance(content, str)
        return False, content
    path = folder / "curve.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return True, str(path)


def verdict(case: Case) -> Verdict:
    table, name = case
    wanted = TABLES[table][1][name][1]
    return wanted if isinstance(wanted, str) else tuple(map(single, wanted))


def model_of(case: Case, models: dict[bool, Path]) -> Path:
    return models[TABLES[case[0]][0]]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_write(case: Case, models: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    is_file, given = value(case, tmp_path)
    model, written = model_of(case, models), tmp_path / "written.gguf"
    option = "--curve" if is_file else "--factors"
    status = main(["write", str(model), f"{option}={given}", "--output", str(written)])
    if verdict(case) in (REFUSED, UNCHECKED):
        assert status != 0 and not written.exists()
        assert "Traceback" not in capsys.readouterr().err
    elif verdict(case) == CURVE:
        assert status == 0 and written.exists()
    else:
        assert status == 0 and read_factors(written) == verdict(case)


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_tools(case: Case, models: dict[bool, Path], tmp_path: Path) -> None:
    _, given = value(case, tmp_path)
    model, wanted = model_of(case, models), verdict(case)
    if wanted == UNCHECKED:
        wanted = tuple(map(single, FACTORS))
    if not isinstance(wanted, str):
        with LlamaServer(model, 256, n_threads=1, options=["--rope-layer-factors", given]) as server:
            assert tuple(map(single, server.properties()["rope_layer_factors"])) == wanted
        return
    text = model.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    tool = str(tool_path("llama-perplexity"))
    command = [tool, "-m", str(model), "-f", str(text), "-c", "64", "-t", "1", "--rope-layer-factors", given]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=tmp_path)
    said = result.stdout + result.stderr
    assert result.returncode == 1 and f"--rope-layer-factors {given}: " in said, said
    assert ("lrope-gguf write MODEL --curve" in said) == (wanted == CURVE), said


def curve_of(case: Case, folder: Path) -> Path:
    content, path = HEADS[case[0]][case[1]][0], folder / "curve.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("case", HEAD_CASES, ids=" ".join)
def test_write_of_heads(case: Case, heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, wanted = tmp_path / "written.gguf", HEADS[case[0]][case[1]][1]
    status = main(["write", str(heads), "--curve", str(curve_of(case, tmp_path)), "--output", str(written)])
    if isinstance(wanted, str):
        assert status != 0 and not written.exists()
        assert "Traceback" not in capsys.readouterr().err
    else:
        assert status == 0
        rows = read_model(written).rows[case[0]]
        assert [len(row) for row in rows] == [HEAD_COUNTS[case[0]]] * N_LAYER
        assert tuple(chain(*rows)) == tuple(map(single, wanted))


@pytest.mark.native
@pytest.mark.parametrize("case", HEAD_CASES, ids=" ".join)
def test_tools_of_heads(case: Case, heads: Path, tmp_path: Path) -> None:
    option, wanted, curve = OPTIONS[case[0]], HEADS[case[0]][case[1]][1], str(curve_of(case, tmp_path))
    tool = str(tool_path("llama-perplexity"))
    if option not in subprocess.run([tool, "--help"], capture_output=True, text=True, errors="replace").stdout:
        pytest.skip(f"the tools have no {option}")
    if not isinstance(wanted, str):
        with LlamaServer(heads, 256, n_threads=1, options=[option, curve]) as server:
            assert tuple(map(single, server.properties()[PROPERTIES[case[0]]])) == tuple(map(single, wanted))
        return
    text = heads.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    command = [tool, "-m", str(heads), "-f", str(text), "-c", "64", "-t", "1", option, curve]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=tmp_path)
    said = result.stdout + result.stderr
    assert result.returncode == 1 and f"{option} {curve}: " in said, said


def test_the_models_are_what_the_tables_are_for(models: dict[bool, Path]) -> None:
    plain, head = (read_model(models[with_head]) for with_head in (False, True))
    assert (plain.n_layer, plain.block_count) == (N_LAYER, N_LAYER) == (len(FACTORS), N_LAYER)
    assert (head.n_layer, head.block_count) == (N_LAYER - 1, N_LAYER)
