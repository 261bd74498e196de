"""`write --rope-scaling`, and what `show`, `remove` and presets make of it: what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.gguf_fixtures import read_keys, write_model

from lrope_gguf import Scaling, read_model, write_factors
from lrope_gguf.cli import main


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_model(Path("m.gguf"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that succeeds: what it prints, notes after the rest."""

    def run(*arguments: object, status: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == status
        out, err = capsys.readouterr()
        assert "Traceback" not in err and (not status or out == "")
        return str(out + err)

    return run


def test_show_json(model: Path, said: Any) -> None:
    plain = json.loads(said("show", "m.gguf", "--json"))
    assert (plain["rope"]["scaling"], plain["rope_before"], plain["context_length_before"]) == ("none", None, None)
    said("write", "m.gguf", "--rope-scaling", "dynamic-yarn", "--rope-scale", "4")
    shown = json.loads(said("show", "m.gguf", "--json"))
    assert list(shown) == list(plain)
    assert (shown["rope_dynamic_factor"], shown["rope_original_context_length"]) == (4.0, 512)
    assert (shown["context_length"], shown["context_length_before"]) == (2048, 512)
    assert (shown["rope_scaling_type"], shown["rope_scaling_factor"]) == ("yarn", 4.0)
    assert shown["rope"] == read_model(model).rope.json() and shown["rope_before"]["scaling"] == "none"
    assert shown["scaling_error"] is None


def test_the_file_s_factors_are_checked_for_a_preset_too(model: Path, said: Any) -> None:
    write_factors(model, (0.5, 1, 1, 1))
    command = ("write", "m.gguf", "--preset", "p.ini", "--rope-scaling")
    assert "YaRN frequency scale of 0.5" in said(*command, "yarn", "--rope-scale", "2", status=1)
    said(*command, "linear", "--rope-scale", "2")


def test_presets(model: Path, said: Any) -> None:
    before, presets = model.read_bytes(), Path("p.ini")
    command = ("write", "m.gguf", "--preset", "p.ini")
    head = f"[m-lrope]\nmodel = {Path.cwd()}/m.gguf\n"
    scaled = f"{head}rope-scaling = dynamic-yarn\nrope-scale = 4\nctx-size = 2048\n"
    yarn = (*command, "--rope-scaling", "dynamic-yarn", "--rope-scale", "4")
    assert said(*yarn, "--dry-run") == f"p.ini: would contain\n{scaled}"
    assert said(*yarn).startswith("p.ini: entry [m-lrope] written; ask the server for the model by this name; next: ")
    assert presets.read_text() == scaled
    # factors are added, and what else the entry says stays
    presets.write_text(f"{scaled}threads = 2\n")
    listed = "rope-layer-factors = 1.5,1.5,1.5,1.5\n"
    assert "keeps rope-scaling = dynamic-yarn, rope-scale = 4; " in said(*command, "--uniform", "1.5")
    assert presets.read_text() == f"{head}{listed}{scaled.removeprefix(head)}threads = 2\n"
    # another scaling alone leaves the factors
    presets.write_text(presets.read_text() + "LLAMA_ARG_ROPE_FREQ_SCALE = 0.1\nc = 99\n")
    assert "note" not in said(*command, "--rope-scaling", "linear", "--context-length", "768")
    assert presets.read_text() == (
        f"{head}rope-scaling = linear\nrope-scale = 1.5\nctx-size = 768\n{listed}threads = 2\n"
    )
    # a length is replaced by another one only
    presets.write_text(f"{head}ctx-size = 9999\n")
    said(*command, "--rope-scaling", "dynamic", "--uniform", "1.5")
    assert presets.read_text() == f"{head}{listed}rope-scaling = dynamic\nrope-scale = 1\nctx-size = 9999\n"
    said(*command, "--rope-scaling", "none")
    assert presets.read_text() == f"{head}rope-scaling = none\n{listed}"
    assert model.read_bytes() == before


def test_a_preset_of_a_model_that_has_a_scaling(model: Path, said: Any) -> None:
    """It starts from the model as it was."""
    write_factors(model, scaling=Scaling("yarn", 4))
    said("write", "m.gguf", "--preset", "p.ini", "--rope-scaling", "yarn", "--rope-scale", "2")
    assert "rope-scale = 2\nctx-size = 1024\n" in Path("p.ini").read_text()
    assert read_keys(model)["llama.context_length"] == 2048
