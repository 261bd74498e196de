"""`write --rope-scaling`, and what `show`, `remove` and presets make of it: what is said, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from support.gguf_fixtures import LAYERS, names, read_keys, write_model

from lrope_gguf import CurveFile, Scaling, read_factors, read_model, write_factors
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


def test_what_is_said(model: Path, said: Any) -> None:
    original = model.read_bytes()
    write = ("write", "m.gguf", "--rope-scaling")
    assert said(*write, "dynamic-yarn", "--rope-scale", 4, "--dry-run").splitlines()[1:] == [
        f"  add {PREFIX}.type: yarn",
        f"  add {PREFIX}.factor: 4",
        f"  add {PREFIX}.original_context_length: 512",
        "  replace llama.context_length: 2048 (was 512)",
        f"  add {PREFIX}.dynamic_factor: 4",
        "  add lrope.original: the old values of these keys, which remove restores",
    ]
    assert model.read_bytes() == original
    text = said(*write, "dynamic-yarn", "--rope-scale", 4)
    assert text == (
        f"m.gguf: written ({model.stat().st_size} bytes, the whole file); RoPE scaling dynamic YaRN up to 4 times 512 "
        "tokens, none up to 512; next: llama-server -m m.gguf\n"
    )
    text = said("show", "m.gguf")
    assert row(text, "RoPE scaling") == (
        "dynamic YaRN up to 4 times 512 tokens; none up to 512 (written by lrope-gguf; was: none)"
    )
    assert row(text, "context length") == "2048 tokens (written by lrope-gguf; was: 512)"
    assert said(*write, "dynamic-yarn", "--rope-scale", 8, "--uniform", 1.5, "--dry-run").splitlines()[1:] == [
        f"  add {PREFIX}.layer_factors: layer factor 1.5 in all 4 layers",
        "  add lrope.curve: where the factors come from",
        f"  keep {PREFIX}.type: yarn",
        f"  replace {PREFIX}.factor: 8 (was 4)",
        f"  keep {PREFIX}.original_context_length: 512",
        "  replace llama.context_length: 4096 (was 2048)",
        f"  replace {PREFIX}.dynamic_factor: 8 (was 4)",
        "  keep lrope.original: the old values of these keys, which remove restores",
    ]
    assert "would be changed in place, " in said(*write, "dynamic-yarn", "--rope-scale", 8, "--dry-run")
    text = said(*write, "dynamic", "--context-length", 4096, "--uniform", 1.5)
    assert "layer factor 1.5 in all 4 layers; RoPE scaling dynamic NTK beyond 512 tokens, none up to 512; next" in text
    assert said(*write, "none", "--dry-run").splitlines()[1:] == [
        f"  keep {PREFIX}.layer_factors: layer factor 1.5 in all 4 layers",
        "  keep lrope.curve: where the factors come from",
        f"  remove {PREFIX}.type",
        f"  remove {PREFIX}.original_context_length",
        "  restore llama.context_length: 512 (was 4096)",
        f"  remove {PREFIX}.dynamic_factor",
        "  remove lrope.original",
    ]
    text = said("remove", "m.gguf", "--dry-run")
    assert text.splitlines()[1:] == [
        *(f"  remove {key}" for key in (f"{PREFIX}.layer_factors", f"{PREFIX}.type")),
        *(f"  remove {PREFIX}.{name}" for name in ("original_context_length", "dynamic_factor")),
        *("  remove lrope.original", "  remove lrope.curve", "  restore llama.context_length: 512 (was 4096)"),
    ]
    assert said(*write, "dynamic", "--context-length", 4096).startswith("m.gguf: unchanged, nothing had to change;")
    assert "without layer factors and RoPE scaling (" in said("remove", "m.gguf", "--output", "o.gguf")
    assert Path("o.gguf").read_bytes() == original
    said(*write, "none", "--quiet")
    assert read_factors(model) == (1.5,) * LAYERS
    assert said("remove", "m.gguf").startswith("m.gguf: written without layer factors (")
    assert said(*write, "none", "--dry-run").splitlines()[1:] == ["  nothing: it holds no scaling that write has added"]
    assert said(*write, "none").startswith("m.gguf: unchanged, nothing had to change; RoPE scaling none; next: ")
    said(*write, "linear", "--rope-scale", 2)
    assert said("remove", "m.gguf").startswith("m.gguf: written without RoPE scaling (")
    assert model.read_bytes() == original


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


def test_a_model_s_own_scaling_is_kept_and_that_is_said(model: Path, said: Any) -> None:
    original = yarn_of_its_own(model).read_bytes()
    said("write", "m.gguf", "--rope-scaling", "linear", "--rope-scale", "4")
    text = said("write", "m.gguf", "--rope-scaling", "none")
    assert "note: m.gguf: keeps its own RoPE scaling (YaRN up to 2 times 512 tokens, at any length)" in text
    assert model.read_bytes() == original


REFUSED = [
    (["--rope-scale", "2", "--uniform", "1"], 2, "argument --rope-scale: needs --rope-scaling"),
    (["--context-length", "2", "--uniform", "1"], 2, "argument --context-length: needs --rope-scaling"),
    (["--rope-scaling", "ntk"], 2, "'ntk' is not one of"),
    (["--rope-scaling", "yarn", "--uniform", "1", "--factors", "1"], 2, "not allowed with"),
    ([], 2, "one of the arguments --curve --factors --uniform is required"),
    (["--rope-scaling", "yarn"], 1, "--rope-scaling yarn: needs --rope-scale or --context-length"),
    (["--rope-scaling", "yarn", "--rope-scale", "nan"], 1, "--rope-scale nan: is out of range; give a number"),
    (["--rope-scaling", "yarn", "--rope-scale", "0.5"], 1, "--rope-scale 0.5: is out of range; give a number"),
    (["--rope-scaling", "yarn", "--rope-scale", "1e999"], 1, "--rope-scale inf: is out of range"),
    (["--rope-scaling", "yarn", "--context-length", "9" * 20], 1, "is out of range; give a whole number of tokens"),
    (["--rope-scaling", "yarn", "--context-length", "511"], 1, "was trained on 512 tokens"),
    (["--rope-scaling", "yarn", "--rope-scale", "2", "--context-length", "1025"], 1, "covers only 1024 tokens"),
    (["--rope-scaling", "none", "--rope-scale", "2"], 1, "has no effect with --rope-scaling none"),
    (["--rope-scaling", "yarn", "--rope-scale", "2", "--uniform", "0.5"], 1, "YaRN frequency scale of 0.5"),
    (["--rope-scaling", "yarn", "--rope-scale", "2", "--uniform", "0.5", "--preset", "p.ini"], 1, "scale of 0.5"),
]


@pytest.mark.parametrize(("options", "status", "message"), REFUSED)
def test_refusals(model: Path, said: Any, options: list[str], status: int, message: str) -> None:
    before = model.read_bytes()
    for extra in ([], ["--dry-run"]):
        text = said("write", "m.gguf", *options, *extra, status=status)
        assert message in text and (status == 2 or len(text.splitlines()) == 1)
    assert model.read_bytes() == before and names(Path()) == ["m.gguf"]


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
