"""`write --rope-scaling`, and what `show`, `remove` and presets make of it: what is said, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from support.gguf_fixtures import read_keys, write_model

from lrope_gguf import CurveFile, Scaling, read_model, write_factors
from lrope_gguf.cli import main
from lrope_gguf.rope_scaling import RopeScaling

PREFIX = "llama.rope.scaling"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_model(Path("m.gguf"))


def yarn_of_its_own(path: Path) -> Path:
    def add(writer: GGUFWriter) -> None:
        writer.add_string(f"{PREFIX}.type", "yarn")
        writer.add_float32(f"{PREFIX}.factor", 2.0)

    return write_model(path, add=add)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that succeeds: what it prints, notes after the rest."""

    def run(*arguments: object, status: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == status
        out, err = capsys.readouterr()
        assert "Traceback" not in err and (not status or out == "")
        return str(out + err)

    return run


def row(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{re.escape(name)}  +(.*)$", text, re.MULTILINE)
    return str(found)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["linear", "--rope-scale", "4"], "linear up to 4 times 512 tokens, at any length"),
        (["yarn", "--rope-scale", "2.5"], "YaRN up to 2.5 times 512 tokens, at any length"),
        (["yarn", "--context-length", "1536"], "YaRN up to 3 times 512 tokens, at any length"),
        (["dynamic"], "dynamic NTK beyond 512 tokens; none up to 512"),
        (["dynamic", "--rope-scale", "2"], "dynamic NTK beyond 512 tokens, factor 2; none up to 512"),
        (["dynamic-yarn", "--rope-scale", "2"], "dynamic YaRN up to 2 times 512 tokens; none up to 512"),
    ],
)
def test_show_says_it_in_words(model: Path, said: Any, options: list[str], shown: str) -> None:
    said("write", "m.gguf", "--rope-scaling", *options)
    assert row(said("show", "m.gguf"), "RoPE scaling") == f"{shown} (written by lrope-gguf; was: none)"
    yarn_of_its_own(model)
    before = row(said("show", "m.gguf"), "RoPE scaling")
    assert before == "yarn, factor 2"
    said("write", "m.gguf", "--rope-scaling", *options)
    was = "was: YaRN up to 2 times 512 tokens, at any length"
    assert row(said("show", "m.gguf"), "RoPE scaling") == f"{shown} (written by lrope-gguf; {was})"
    said("write", "m.gguf", "--rope-scaling", "none")
    assert row(said("show", "m.gguf"), "RoPE scaling") == before


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


def curve(rope: RopeScaling) -> str:
    document = CurveFile(layer_factors=(1, 1.2, 1.1, 1), provenance={"rope": rope.json()})
    document.save(Path("best.json"))
    return "best.json"


def test_a_curve_that_was_found_under_another_scaling(model: Path, said: Any) -> None:
    write_factors(model, scaling=Scaling("dynamic-yarn", 4))
    found = read_model(model).rope
    assert "note" not in said("write", "m.gguf", "--curve", curve(found))
    text = said("write", "m.gguf", "--curve", curve(RopeScaling(orig_ctx=512)))
    assert "found with --rope-scaling none (the file says dynamic-yarn); give llama-server the same" in text
    assert text.splitlines()[0].endswith("next: llama-server -m m.gguf --rope-scaling none")
    # what was asked for is not taken back by an option
    text = said("write", "m.gguf", "--curve", curve(RopeScaling(orig_ctx=512)), "--rope-scaling", "dynamic")
    assert "--rope-scaling none (the file says dynamic); write the same scaling, or search again" in text
    assert text.splitlines()[0].endswith("next: llama-server -m m.gguf")
    text = said("write", "m.gguf", "--curve", curve(found), "--rope-scaling", "dynamic-yarn", "--rope-scale", "2")
    assert "--rope-scale 4 (the file says 2); write the same scaling" in text
    yarn = RopeScaling(scaling="yarn", freq_scale=0.25, orig_ctx=512)
    assert "note" not in said("write", "m.gguf", "--curve", curve(yarn), "--rope-scaling", "yarn", "--rope-scale", "4")
    said("write", "m.gguf", "--rope-scaling", "none")
    text = said("write", "m.gguf", "--curve", curve(found))
    assert "--rope-scaling dynamic-yarn --rope-scale 4" in text.splitlines()[0]
    assert "the curve was found with --rope-scaling dynamic-yarn (the file says none), --rope-scale 4" in text


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


def test_a_preset_for_a_curve(model: Path, said: Any) -> None:
    found = curve(RopeScaling(scaling="yarn", freq_scale=0.25, orig_ctx=512))
    command = ("write", "m.gguf", "--preset", "p.ini", "--curve", found, "--rope-scaling")
    assert "note" not in said(*command, "yarn", "--rope-scale", "4")
    assert "rope-scaling = yarn\nrope-scale = 4\nctx-size = 2048\n" in Path("p.ini").read_text()
    text = said(*command, "dynamic")
    assert "found with --rope-scaling yarn (the file says dynamic), --rope-freq-scale 0.25" in text
    assert "write the same scaling, or search again" in text
    assert "freq-scale" not in Path("p.ini").read_text()


def test_a_preset_of_a_model_that_has_a_scaling(model: Path, said: Any) -> None:
    """It starts from the model as it was."""
    write_factors(model, scaling=Scaling("yarn", 4))
    said("write", "m.gguf", "--preset", "p.ini", "--rope-scaling", "yarn", "--rope-scale", "2")
    assert "rope-scale = 2\nctx-size = 1024\n" in Path("p.ini").read_text()
    assert read_keys(model)["llama.context_length"] == 2048
