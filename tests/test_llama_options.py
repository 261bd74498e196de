"""Options of llama.cpp that decide which factors are good: RoPE scaling and the types of the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rope_models import GEMMA3, LINEAR, LLAMA, QWEN2, WIDE_64, YARN, YARN_2, TinyModel
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model
from lrope_gguf.rope_scaling import RopeScaling, differences
from lrope_search import ModelConfig
from lrope_search.evaluation.binding import llama_library
from lrope_search.evaluation.make import open_model
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.settings import CACHE_TYPES

native = pytest.mark.native
YARN_OPTIONS = {"rope_scaling": "yarn", "rope_scale": 4.0, "yarn_orig_ctx": 256}  # what the file of YARN says
ON_COMMAND = ["--set", "rope_scaling=yarn", "--set", "rope_scale=4", "--set", "yarn_orig_ctx=256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": "longrope"}, "rope_scaling longrope: unknown; choose from none, linear, yarn"),
        ({"cache_type_k": "q6_K"}, "cache_type_k q6_K: unknown; choose from f16"),
        ({"yarn_orig_ctx": -1}, "yarn_orig_ctx -1: out of range; give a number above 0"),
        ({"yarn_orig_ctx": 1 << 40}, "yarn_orig_ctx 1099511627776: out of range"),
        ({"yarn_orig_ctx": 2.5}, "yarn_orig_ctx 2.5: give a whole number"),
        ({"yarn_ext_factor": -0.5}, "yarn_ext_factor -0.5: out of range; give a number at least 0"),
        *(
            ({name: value}, f"{name} {value}: {reason}".replace("+", "[+]"))
            for name in ("rope_scale", "rope_freq_base", "rope_freq_scale")
            for value, reason in (
                (-2.0, "out of range; give a number above 0"),
                (1e39, "out of range"),
                (float("nan"), "not finite"),
                (float("inf"), "not finite"),
            )
        ),
        ({"rope_scale": 2.0, "rope_freq_scale": 0.5}, "rope_scale, rope_freq_scale: both say"),
        ({"rope_scaling": "none", "rope_scale": 2.0}, "rope_scale: has no effect with rope_scaling none"),
        ({"rope_scaling": "dynamic", "rope_scale": 0.5}, "rope_scale 0.5: rope_scaling dynamic needs a factor from 1"),
        ({"rope_scaling": "dynamic", "rope_freq_scale": 2.0}, "rope_freq_scale 2.0: rope_scaling dynamic needs"),
        ({"rope_scaling": "dynamic-yarn", "rope_freq_base": 1e6}, "rope_freq_base: rope_scaling dynamic-yarn sets"),
        ({"rope_scaling": "dynamic-yarn", "yarn_ext_factor": 1.0}, "yarn_ext_factor: rope_scaling dynamic-yarn"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LropeError, match=f"^{message}") as caught:
        ModelConfig("m.gguf", **settings)
    assert "\n" not in str(caught.value)


def test_settings_that_come_to_the_same_are_the_same() -> None:
    assert ModelConfig("m").llama_options() == {}
    defaults: dict[str, Any] = {
        "rope_freq_base": 0.0, "yarn_orig_ctx": 0, "yarn_ext_factor": -1.0, "yarn_beta_fast": -1.0,
    }  # fmt: skip
    assert ModelConfig("m", **defaults, cache_type_k="f16").llama_options() == {}
    scale = ModelConfig("m", rope_scale=4.0, cache_type_v="q8_0")
    assert scale.llama_options() == {"rope_freq_scale": 0.25, "cache_type_v": "q8_0"}
    assert ModelConfig("m", rope_freq_scale=0.25, cache_type_v="q8_0").llama_options() == scale.llama_options()
    assert ModelConfig("m", yarn_ext_factor=0.0).llama_options() == {"yarn_ext_factor": 0.0}
    assert ModelConfig.from_json(json.loads(json.dumps(scale.to_json()))) == scale


@native
def test_the_context_is_told_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_readable(tmp_path / "m.gguf", WIDE_64)
    llama, told = llama_library(), []
    make = llama.llama_init_from_model
    monkeypatch.setattr(llama, "llama_init_from_model", lambda model, given: told.append(given) or make(model, given))
    given: dict[str, Any] = {
        "rope_scaling": "yarn", "rope_freq_base": 5e5, "rope_freq_scale": 0.5, "yarn_orig_ctx": 300,
        "yarn_ext_factor": 0.5, "yarn_attn_factor": 1.5, "yarn_beta_slow": 2.0, "yarn_beta_fast": 16.0,
    }  # fmt: skip
    with open_model(ModelConfig(str(path), n_threads=1, **given, cache_type_k="q5_1", cache_type_v="q4_0")) as model:
        model.reserve(64)
        parameters = told[-1]
        for name in given.keys() - {"rope_scaling"}:
            assert getattr(parameters, name) == given[name]
        assert parameters.rope_scaling_type == llama.LLAMA_ROPE_SCALING_TYPE_YARN
        assert (parameters.type_k, parameters.type_v) == (llama.GGML_TYPE_Q5_1, llama.GGML_TYPE_Q4_0)
        assert parameters.flash_attn_type == 1
    for kind in CACHE_TYPES:
        with Model(path, n_threads=1, llama_options={"cache_type_k": kind, "cache_type_v": kind}) as model:
            model.reserve(64)
            model.prefill(np.array([1, 2, 3], np.int32))
    with (
        Model(path, flash_attention=False, llama_options={"cache_type_v": "q8_0"}) as model,
        pytest.raises(LropeError, match="quantized V cache requires flash_attn"),
    ):
        model.reserve(64)


def evaluated(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    command = ["eval", str(path), "--keys", "6", "--set", "kv.probes=3", "--contexts", "1", "--threads", "1", "--json"]
    assert main([*command, "--uniform", "1.3", *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@native
def test_options_are_what_a_file_that_says_so_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, yarn, linear = (write_readable(tmp_path / f"{model.name}.gguf", model) for model in (LLAMA, YARN, LINEAR))
    base = evaluated(plain, capsys)
    assert "llama_options" not in base["task"]
    by_file, by_options = evaluated(yarn, capsys), evaluated(plain, capsys, *ON_COMMAND)
    assert by_options["by_depth"] == by_file["by_depth"] != base["by_depth"]
    assert by_options["task"]["llama_options"] == {
        "rope_scaling": "yarn",
        "rope_freq_scale": 0.25,
        "yarn_orig_ctx": 256,
    }
    assert evaluated(yarn, capsys, "--set", "rope_scaling=none")["by_depth"] == base["by_depth"]
    by_file, by_options = evaluated(linear, capsys), evaluated(plain, capsys, "--set", "rope_freq_scale=0.5")
    assert by_options["by_depth"] == by_file["by_depth"] != base["by_depth"]
    assert evaluated(plain, capsys, "--set", "rope_freq_base=20000")["by_depth"] != base["by_depth"]
    wide = write_readable(tmp_path / "wide.gguf", WIDE_64)
    caches = [("--set", "cache_type_k=q4_0"), ("--set", "cache_type_v=q4_0"), ()]
    assert len({json.dumps(evaluated(wide, capsys, *options)["by_depth"]) for options in caches}) == 3


@native
def test_a_stretched_context_is_trained_length(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "short.gguf", context_length=128)
    with Model(path, n_threads=1, llama_options={"rope_scaling": "yarn", "rope_freq_scale": 0.25}) as model:
        model.reserve(300)
        assert model.n_ctx_train == 512


@pytest.mark.parametrize("command", ["search", "eval"])
def test_mistakes_are_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Model, "__init__", load)
    monkeypatch.chdir(tmp_path)
    assert main([command, str(write_readable(tmp_path / "m.gguf")), "--set", "rope_scaling=longrope"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("lrope-gguf: --set rope_scaling=longrope: unknown; choose from none, linear, yarn")


SEARCH = ["--set", "kv.identifiers=number", "--keys", "6", "--set", "kv.probes=3", "--max-evaluations", "8",
          "--set", "ga.population=4",
          "--set", "search_contexts=1", "--set", "validation_contexts=1", "--set", "test_contexts=2", "--threads", "1",
          "--max-kl", "100"]  # fmt: skip


@native
def test_a_study_is_bound_to_them_and_its_curve_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_readable(tmp_path / "m.gguf", WIDE_64))
    plain, other = [["search", path, *SEARCH, "--output", name] for name in ("plain.json", "other.json")]
    caches = ["--set", "cache_type_k=q8_0", "--set", "cache_type_v=q8_0"]
    assert main(plain) == main([*other, *ON_COMMAND, *caches]) == 0
    config = json.loads((tmp_path / "plain.study" / "config.json").read_text())
    assert set(config) == {"model", "task", "search", "guard", "computing", "versions"}
    bound = {"rope_scaling": "yarn", "rope_freq_scale": 0.25, "yarn_orig_ctx": 256,
             "cache_type_k": "q8_0", "cache_type_v": "q8_0"}  # fmt: skip
    assert json.loads((tmp_path / "other.study" / "config.json").read_text()) == config | {"llama_options": bound}
    best = CurveFile.load("other.json")
    assert best.provenance["config"]["llama_options"] == bound
    assert best.provenance["rope"] == {
        "scaling": "yarn", "freq_base": 10000.0, "freq_scale": 0.25, "orig_ctx": 256, "beta_fast": 32.0,
        "beta_slow": 1.0, "ext_factor": 1.0,
    }  # fmt: skip
    capsys.readouterr()

    for command, differs in (
        ([*plain, "--set", "cache_type_k=q8_0"], 'llama_options was absent, is {"cache_type_k": "q8_0"}'),
        (other, "llama_options was {"),
        ([*other, *ON_COMMAND], 'llama_options.cache_type_k was "q8_0", is absent'),
    ):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "the study was begun with other settings: " in line and differs in line
    same = ["--set", "rope_scaling=yarn", "--set", "rope_freq_scale=0.25", "--set", "yarn_orig_ctx=256", *caches]
    before = (tmp_path / "other.study" / "evaluations.jsonl").read_bytes()
    assert main([*other, *same]) == 0
    assert (tmp_path / "other.study" / "evaluations.jsonl").read_bytes() == before


def write_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: TinyModel, provenance: object
) -> tuple[str, str]:
    path, curve = write_readable(tmp_path / f"{model.name}.gguf", model), tmp_path / "curve.json"
    CurveFile(layer_factors=(1.1,) * 6, provenance=provenance).save(curve)
    assert main(["write", str(path), "--curve", str(curve)]) == 0
    return capsys.readouterr()


def test_write_warns_where_the_file_says_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rope_of(model: TinyModel) -> dict[str, Any]:
        return read_model(write_readable(tmp_path / "it.gguf", model)).rope.json()

    for model in (LLAMA, YARN, LINEAR, QWEN2, GEMMA3):
        assert write_with(tmp_path, capsys, model, {"rope": rope_of(model)})[1] == ""
    out, err = write_with(tmp_path, capsys, LLAMA, {"rope": rope_of(QWEN2)})
    assert "--rope-freq-base 1000000 (the file says 10000)" in err
    assert out.rstrip().endswith("llama.gguf --rope-freq-base 1000000")
    # YaRN that options asked for and that the file has by now
    asked = read_model(write_readable(tmp_path / "it.gguf", LLAMA)).rope.under(
        ModelConfig("m", **YARN_OPTIONS).llama_options()
    )
    assert write_with(tmp_path, capsys, YARN, {"rope": asked.json()})[1] == ""
    assert "0.25 (the file says 0.5)" in write_with(tmp_path, capsys, YARN_2, {"rope": asked.json()})[1]


@pytest.mark.parametrize(
    "provenance",
    [
        None, "found by hand", [1], {"rope": None}, {"rope": [1]}, {"rope": {"scaling": "\x1b[31m", "freq_base": "x"}},
        {"rope": {"freq_base": True, "freq_scale": 10**300, "orig_ctx": None}}, {"config": 3},
        {"config": {"llama_options": {"cache_type_k": "q8_0; rm", "cache_type_v": 8}}},
        {"config": {"llama_options": 1}},
        {"rope": {"scaling": "none", "freq_base": True, "freq_scale": [1e300], "orig_ctx": None, "beta_slow": [1]}},
    ],
)  # fmt: skip
def test_a_provenance_of_any_kind_is_no_reason_to_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], provenance: object
) -> None:
    assert write_with(tmp_path, capsys, LLAMA, provenance)[1] == ""


def test_what_does_not_matter_does_not_differ() -> None:
    assert RopeScaling().json() == RopeScaling(scaling="none", freq_scale=0.5, beta_fast=1.0, orig_ctx=9).json()
    yarn = RopeScaling(scaling="yarn", freq_scale=0.25, orig_ctx=256)
    assert differences(yarn.json(), yarn) == {}
    assert differences(yarn.json() | {"freq_scale": 0.25000001}, yarn) == {}
    half = RopeScaling(scaling="yarn", freq_scale=0.25, orig_ctx=256, ext_factor=0.5)
    assert differences(yarn.json(), half) == {"yarn_ext_factor": (1.0, 0.5)}
    assert differences(half.json(), yarn) == {"yarn_ext_factor": (0.5, 1.0)}
    assert differences(RopeScaling().json(), half) == {"rope_scaling": ("none", "yarn"), "yarn_ext_factor": (0.0, 0.5)}
    assert differences(yarn.json(), RopeScaling(scaling="yarn", freq_scale=0.25, orig_ctx=128)) == {
        "yarn_orig_ctx": (256, 128)
    }
