"""Factors of KV heads and query scales in a model's metadata, against the `gguf` package and byte by byte."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gguf_fixtures import LAYERS, read_keys, read_tensors, write_model

from lrope_gguf import CurveFile, LropeError, Scaling, read_model, remove_factors, write_factors
from lrope_gguf.cli import main
from lrope_gguf.curve import Rows
from lrope_gguf.gguf_file import GGUFFile
from lrope_gguf.layout import array_keys
from lrope_gguf.metadata import plan_write
from lrope_search.commands.evaluate import _sides
from lrope_search.commands.search import starting_with
from lrope_search.scores import Tuned, tuned
from lrope_search.study.plan import make_optimizer
from lrope_search.study.settings import SearchConfig

KEYS = array_keys("llama")
COUNTS = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": [2, 1, 0, 2]}
HEAD_FACTORS: Rows = ((1.0, 1.5), (1.25,), (), (0.9, 1.0))
QUERY_SCALES: Rows = ((0.75, 1.0, 1.25, 1.5), (1.0,) * 4, (1.0,) * 4, (0.7, 1.0, 1.0, 1.3))
BOTH: dict[str, Any] = {"head_factors": HEAD_FACTORS, "query_scales": QUERY_SCALES}


def singles(rows: Rows) -> Rows:
    return tuple(tuple(map(float, np.float32(row))) for row in rows)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", keys=COUNTS)


@pytest.mark.parametrize("big_endian", [False, True])
def test_the_keys_are_flat_float32_layer_after_layer(tmp_path: Path, big_endian: bool) -> None:
    model = write_model(tmp_path / "m.gguf", keys=COUNTS, big_endian=big_endian)
    original, tensors = model.read_bytes(), read_tensors(model)
    write_factors(model, (1.0, 1.25, 2.0, 0.5), **BOTH)
    found = read_keys(model)
    assert list(found)[-4:] == [*KEYS.values(), "lrope.curve"]
    for name, rows in BOTH.items():
        assert found[KEYS[name]] == [float(np.float32(value)) for value in chain(*rows)]
    with GGUFFile(model) as gguf:
        assert {gguf.entries[key].item for key in KEYS.values()} == {6}
    info = read_model(model)
    assert info.factors == (1.0, 1.25, 2.0, 0.5) and info.rows == {name: singles(rows) for name, rows in BOTH.items()}
    assert info.n_head == (4,) * 4 and info.n_head_kv == (2, 1, 0, 2)
    document = CurveFile.loads(info.curve_json or "", "x")
    assert document.rows == BOTH and document.layer_factors == (1.0, 1.25, 2.0, 0.5)
    assert read_tensors(model) == tensors
    remove_factors(model)
    assert model.read_bytes() == original


@st.composite
def written(draw: st.DrawFn) -> tuple[dict[str, Any], Rows | None, Rows | None]:
    """Keys with the numbers of heads, and numbers for these."""
    n_head = draw(st.lists(st.integers(0, 5), min_size=LAYERS, max_size=LAYERS).filter(any))
    n_head_kv = draw(st.none() | st.lists(st.integers(0, 5), min_size=LAYERS, max_size=LAYERS).filter(any))
    keys: dict[str, Any] = {"llama.attention.head_count": n_head[0] if len({*n_head}) == 1 else n_head}
    if n_head_kv is not None:
        keys["llama.attention.head_count_kv"] = n_head_kv

    def rows(counts: list[int], most: float) -> Rows:
        number = st.floats(1 / most, most, width=32)
        return tuple(tuple(draw(st.lists(number, min_size=n, max_size=n))) for n in counts)

    which = draw(st.integers(1, 3))
    factors = rows(n_head if n_head_kv is None else n_head_kv, 1024) if which & 1 else None
    return keys, factors, rows(n_head, 16) if which & 2 else None


@given(written())
def test_any_numbers_come_back_and_go_again(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], Rows | None, Rows | None]
) -> None:
    keys, head_factors, query_scales = case
    model = write_model(tmp_path_factory.getbasetemp() / "any.gguf", keys=keys)
    original, fingerprint = model.read_bytes(), read_model(model).fingerprint()
    write_factors(model, head_factors=head_factors, query_scales=query_scales)
    info = read_model(model)
    assert (info.factors, info.head_factors, info.query_scales) == (None, head_factors, query_scales)
    assert info.fingerprint() == fingerprint
    remove_factors(model)
    assert model.read_bytes() == original


def test_a_write_leaves_what_it_is_given_and_nothing_else(model: Path) -> None:
    write_factors(model, (1.0, 1.25, 2.0, 0.5), **BOTH)
    write_factors(model, query_scales=QUERY_SCALES)
    assert list(read_model(model).rows) == ["query_scales"] and read_model(model).factors is None
    write_factors(model, scaling=Scaling("yarn", 2))
    assert list(read_model(model).rows) == ["query_scales"]
    write_factors(model, (1.0, 1.25, 2.0, 1.1))
    assert not read_model(model).rows and read_model(model).rope.scaling == "yarn"


def test_in_place_where_the_numbers_change_within_a_page(model: Path, tmp_path: Path) -> None:
    write_factors(model, **BOTH)
    inode = model.stat().st_ino
    assert write_factors(model, **BOTH).how == "unchanged"
    assert write_factors(model, **BOTH | {"query_scales": tuple(row[::-1] for row in QUERY_SCALES)}).how == "in place"
    assert model.stat().st_ino == inode
    # 1,600 heads take more than a page: a killed change in place could leave half of them
    keys = {"llama.attention.head_count": 400}
    large = write_model(tmp_path / "large.gguf", keys=keys)
    write_factors(large, query_scales=((1.25,) * 400,) * LAYERS)
    assert plan_write(large, query_scales=((1.5,) * 400,) * LAYERS).how == "rewritten"
    one = ((1.5, *(1.25,) * 399), *((1.25,) * 400,) * (LAYERS - 1))
    assert write_factors(large, query_scales=one).how == "in place"
    assert read_model(large).query_scales == one


def test_layers_of_a_prediction_head_keep_one(tmp_path: Path) -> None:
    keys = COUNTS | {"llama.nextn_predict_layers": 1}
    model = write_model(tmp_path / "m.gguf", keys=keys)
    write_factors(model, head_factors=HEAD_FACTORS[:3], query_scales=QUERY_SCALES[:3])
    info = read_model(model)
    assert info.head_factors == (*HEAD_FACTORS[:3], (1.0, 1.0)) and info.query_scales == (*QUERY_SCALES[:3], (1.0,) * 4)
    with pytest.raises(LropeError, match="layer 3 belongs to a multi-token-prediction head and must keep 1 in all KV"):
        write_factors(model, head_factors=HEAD_FACTORS)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"query_scales": QUERY_SCALES[:3]}, "m.gguf: 3 lists of query_scales for a model of 4 layers; give one per layer"),
    ({"query_scales": (*QUERY_SCALES[:3], (1,))}, "query_scales of layer 3 has 1 numbers, but that layer has 4 heads"),
    ({"head_factors": ((1, 1),) * 4}, "head_factors of layer 1 has 2 numbers, but that layer has 1 KV heads; give one"),
    ({"query_scales": ((1, 1, 1, math.nan), *QUERY_SCALES[1:])}, "the query scale of head 3 in layer 0 is NaN"),
    ({"query_scales": ((1, 1, 1, math.inf), *QUERY_SCALES[1:])}, "the query scale of head 3 in layer 0 is infinite"),
    ({"query_scales": ((1, 1, 1, -1), *QUERY_SCALES[1:])}, "the query scale of head 3 in layer 0 is negative"),
    (
        {"query_scales": ((1, 1, 1, 16.01), *QUERY_SCALES[1:])},
        "head 3 in layer 0 is 16.01, beyond 1/16 to 16; give one",
    ),
    (
        {"query_scales": ((1, 1, 1, 0.062), *QUERY_SCALES[1:])},
        "head 3 in layer 0 is 0.062, beyond 1/16 to 16; give one",
    ),
    ({"head_factors": ((1, 2000), *HEAD_FACTORS[1:])}, "the factor of KV head 1 in layer 0 is 2000, beyond 1/1024 to"),
    ({"query_scales": 3}, "query_scales is int, not a list"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message[-50:] for _, message in BAD])
def test_bad_numbers(given: dict[str, Any], message: str, model: Path) -> None:
    original = model.read_bytes()
    for function in (write_factors, plan_write):
        with pytest.raises(LropeError) as refused:
            function(model, **given)
        assert str(model) in str(refused.value) and message in str(refused.value) and "\n" not in str(refused.value)
    assert model.read_bytes() == original


MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"llama.rope.dimension_sections": [1, 2, 3, 0]}, {"head_factors": HEAD_FACTORS}, "uses M-RoPE, for which there"),
    ({"llama.attention.kv_lora_rank": 512}, {"head_factors": HEAD_FACTORS}, "uses MLA, whose heads share one rotated"),
    ({"llama.attention.key_length_mla": 192}, {"head_factors": HEAD_FACTORS}, "uses MLA"),
    ({"llama.rope.dimension_count": 0}, {"head_factors": HEAD_FACTORS}, "has no RoPE (architecture 'llama')"),
    ({"general.type": "adapter"}, {"query_scales": QUERY_SCALES}, "is a LoRA adapter"),
    ({"llama.attention.head_count": [4, 4]}, {"query_scales": QUERY_SCALES}, "has no llama.attention.head_count (the"),
    ({"llama.attention.head_count": 4.0}, {"query_scales": QUERY_SCALES}, "has no llama.attention.head_count"),
    ({"llama.attention.head_count": 1 << 20}, {"query_scales": QUERY_SCALES}, "has no llama.attention.head_count"),
    ({"llama.attention.head_count_kv": [2, 1, -1, 2]}, {"head_factors": HEAD_FACTORS}, "has no llama.attention.head_"),
    # as for factors of layers: close to YaRN's own scale
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
     {"head_factors": ((1, 0.25), *HEAD_FACTORS[1:])}, "the factor of layer 0, KV head 1 is 0.25, but llama.cpp"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "given", "message"), MODELS, ids=[message[:25] for *_, message in MODELS])
def test_models_that_cannot_have_them(
    keys: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m.gguf", keys=COUNTS | keys)
    original = model.read_bytes()
    with pytest.raises(LropeError) as refused:
        write_factors(model, **given)
    assert str(refused.value).startswith(f"{model}: {message}") and "\n" not in str(refused.value)
    assert model.read_bytes() == original


@pytest.mark.parametrize("key", ["rope.dimension_sections", "attention.kv_lora_rank"])
def test_query_scales_need_no_rotation_of_a_head(key: str, tmp_path: Path) -> None:
    value: Any = [1, 2, 3, 0] if "sections" in key else 512
    model = write_model(tmp_path / "m.gguf", keys=COUNTS | {f"llama.{key}": value})
    write_factors(model, query_scales=QUERY_SCALES)
    assert read_model(model).query_scales == singles(QUERY_SCALES)
    gpt = write_model(tmp_path / "gpt.gguf", architecture="gpt2", keys={"gpt2.attention.head_count": 4})
    write_factors(gpt, query_scales=QUERY_SCALES)
    assert read_keys(gpt)["gpt2.attention.query_scales"] == list(map(float, np.float32([*chain(*QUERY_SCALES)])))


@pytest.mark.parametrize("value", [[1.0] * 15, [1] * 16, [1.0] * 15 + [math.nan], [0.06] + [1.0] * 15, "text"], ids=str)
def test_unusable_stored_scales(tmp_path: Path, value: object) -> None:
    model = write_model(tmp_path / "m.gguf", keys=COUNTS | {KEYS["query_scales"]: value})
    info = read_model(model)
    assert info.query_scales is None and KEYS["query_scales"] in (info.query_scales_error or "")
    write_factors(model, query_scales=QUERY_SCALES)
    assert read_model(model).query_scales == singles(QUERY_SCALES)


def test_show_compares_them_with_the_curve(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verdict() -> Any:
        assert main(["show", str(model), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["curve_agrees"]

    write_factors(model, **BOTH)
    assert verdict() is True
    for document in (
        CurveFile(head_factors=HEAD_FACTORS),
        CurveFile(head_factors=HEAD_FACTORS, query_scales=(*QUERY_SCALES[:3], (0.7, 1.0, 1.0, 1.31))),
        CurveFile(layer_factors=(1.0,) * LAYERS, **BOTH),
    ):
        write_factors(model, curve_json=document.dumps(), **BOTH)
        assert verdict() is False
    assert main(["show", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: tuple(map(tuple, found[name])) for name in BOTH} == BOTH  # with as few digits as float32 needs
    assert found["n_head_kv"] == [2, 1, 0, 2]


def test_the_picture_has_a_block_a_head_on_one_scale(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_factors(model, query_scales=((1.0, 2.0, 3.0, 8.0), (1.0,) * 4, (8.0,) * 4, (4.0,) * 4))
    assert main(["show", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("layer  query scales")
    assert lines[at + 1 :] == ["    0  ▁▂▃█  1 to 8", "    1  ▁▁▁▁  1", "    2  ████  8", "    3  ▄▄▄▄  4"]


def test_a_preset_names_the_curve_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve, preset, original = tmp_path / "best.json", tmp_path / "p.ini", model.read_bytes()
    CurveFile(layer_factors=(1, 1.25, 2, 1), **BOTH).save(curve)
    assert main(["write", str(model), "--curve", str(curve), "--preset", str(preset), "--preset-name", "a"]) == 0
    lines = ["rope-layer-factors = 1,1.25,2,1", f"rope-head-factors = {curve}", f"query-scales = {curve}"]
    assert preset.read_text().splitlines() == ["[a]", f"model = {model}", *lines] and model.read_bytes() == original
    # factors of layers alone take the place of all
    assert main(["write", str(model), "--uniform", "1.5", "--preset", str(preset), "--preset-name", "a"]) == 0
    assert preset.read_text().splitlines()[2:] == ["rope-layer-factors = 1.5,1.5,1.5,1.5"]
    # and turn off what the file has
    write_factors(model, **BOTH)
    assert main(["write", str(model), "--uniform", "1.5", "--preset", str(preset), "--preset-name", "a"]) == 0
    assert preset.read_text().splitlines()[3:] == ["rope-head-factors = off", "query-scales = off"]
    # a scaling alone leaves them
    assert main(["write", str(model), "--rope-scaling=none", "--preset", str(preset), "--preset-name", "b"]) == 0
    assert preset.read_text().split("[b]")[1].split() == ["model", "=", str(model), "rope-scaling", "=", "none"]
    capsys.readouterr()


def test_a_preset_needs_a_name_for_the_curve(model: Path, tmp_path: Path) -> None:
    CurveFile(query_scales=QUERY_SCALES).save(tmp_path / "best.json")
    command = [
        sys.executable,
        "-m",
        "lrope_gguf",
        "write",
        str(model),
        "--curve=-",
        "--preset",
        str(tmp_path / "p.ini"),
    ]
    text = (tmp_path / "best.json").read_text()
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "p.ini").exists()
    assert done.stderr == "lrope-gguf: --curve -: an entry names the file of its query_scales; give a file\n"


def test_eval_asks_with_what_heads_have(model: Path, tmp_path: Path) -> None:
    curve = tmp_path / "best.json"
    for layers, wanted in ((None, (1.0,) * LAYERS), ((1.0, 1.25, 2.0, 1.0), (1.0, 1.25, 2.0, 1.0))):
        CurveFile(layer_factors=layers, **BOTH).save(curve)
        sides = _sides(read_model(model), [str(curve)], None, alone=True)
        assert sides == {"curve": tuned(wanted, BOTH)} != {"curve": wanted}


def test_a_search_begins_with_factors_of_layers_only(tmp_path: Path) -> None:
    CurveFile(query_scales=QUERY_SCALES).save(tmp_path / "best.json")
    with pytest.raises(LropeError, match=r"--start .*best.json: has no factors of layers to begin with; give a curve"):
        starting_with([str(tmp_path / "best.json")], SearchConfig())


def test_a_search_of_heads_begins_with_what_heads_have(tmp_path: Path) -> None:
    path = str(tmp_path / "best.json")
    CurveFile(query_scales=QUERY_SCALES).save(path)
    settings = starting_with([path], SearchConfig(scale="queries", method="gradient"))
    assert settings.start == (Tuned((1.0,) * len(QUERY_SCALES), None, QUERY_SCALES),)
    again = SearchConfig.from_json(json.loads(json.dumps(settings.to_json())))
    assert again == settings and again.identity() == settings.identity()
    assert json.loads(json.dumps(settings.to_json()["start"])) == [
        {"factors": [1.0] * len(QUERY_SCALES), "query_scales": [list(row) for row in QUERY_SCALES]}
    ]
    CurveFile(layer_factors=(1.0, 1.25, 2.0, 1.0), **BOTH).save(path)
    both = starting_with([path], SearchConfig(scale="both", method="gradient"))
    assert both.start == (tuned((1.0, 1.25, 2.0, 1.0), BOTH),)
    assert starting_with([path], SearchConfig()).start == ((1.0, 1.25, 2.0, 1.0),)
    assert both.of_layers().start == ((1.0, 1.25, 2.0, 1.0),) and both.of_layers().scale == "layers"
    with pytest.raises(LropeError, match=r"^--start: outside the bounds 0.95,1.05 \(a factor of"):
        replace(both, bounds=(0.95, 1.05))
    with pytest.raises(LropeError, match=r"^--start: has numbers of heads, and this search scales layers alone; give"):
        replace(both, scale="layers")
    optimizer = make_optimizer(both, LAYERS, None, [tuned((1.0,) * LAYERS, BOTH)])
    found = [optimizer.ask() for _ in range(optimizer.lag)]
    assert [one.origin for one in found if one and one.factors == both.start[0]] == ["seed"]
    assert [one.origin for one in found if one][-1] == "gradient"
