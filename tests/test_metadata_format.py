"""docs/metadata-format.md and its vectors: the reference, the document's function, the patched library and we agree."""

from __future__ import annotations

import cmath
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.dynamic_rope import level_of
from support.gguf_fixtures import write_model
from support.llama_direct import Context, RopeTrace, errors
from support.rope_angles import check, constant, unit_pairs
from support.rope_models import N_FF, N_VOCAB, TinyModel
from support.rope_reference import Config, Rope

from lrope_gguf import Scaling, write_factors
from lrope_gguf.curve import Curve
from lrope_gguf.layout import array_keys
from lrope_gguf.rope_scaling import RopeScaling

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, VECTORS = ROOT / "docs" / "metadata-format.md", ROOT / "docs" / "metadata-format-vectors.json"
SCRIPT = ROOT / "proofs" / "format_vectors.py"
FOUND: dict[str, Any] = json.loads(VECTORS.read_text())
ROTATIONS, DYNAMIC = FOUND["rotations"], FOUND["dynamic"]
# how the architectures of the vectors pair the numbers of a head
NEOX = {"llama": False, "mistral3": False, "qwen2": True, "phi3": True, "qwen2vl": True, "qwen3vl": True}
# dimension_sections: pairs of time, height, width
SECTIONS = {"qwen2vl": [2, 3, 3, 0], "qwen3vl": [3, 3, 2, 0]}

Rotation = Callable[..., tuple[list[float], float]]
Json = dict[str, Any]


def named(vector: Json) -> str:
    return str(vector["name"])


def rows(vectors: list[Json]) -> Iterator[tuple[Json, Json, list[int], int, list[float], float]]:
    """Of each angle row: model, layer, position, length, angles and magnitude."""
    for vector in vectors:
        for case in vector.get("lengths", [vector]):
            n = case.get("n", 1)
            for layer in case["layers"]:
                positions = vector.get("positions", [[n - 1]])
                for position, angles in zip(positions, layer["angles"], strict=True):
                    yield vector["rope"], layer, position, n, angles, case["magnitude"]


def test_the_vectors_are_what_the_reference_gives() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check", VECTORS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert VECTORS.stat().st_size < 60_000


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda v: v["rotations"][1]["layers"][2]["angles"][0].__setitem__(3, 1.0),
            r"rotations\[1\].layers\[2\].angles",
        ),
        (lambda v: v["curves"].pop(), "curves is"),
        (None, "^error: .*vectors.json: "),
    ],
)
def test_check_finds_what_is_wrong(damage: Callable[[Json], object] | None, words: str, tmp_path: Path) -> None:
    damaged, path = json.loads(VECTORS.read_text()), tmp_path / "vectors.json"
    if damage is not None:
        damage(damaged)
    path.write_text(json.dumps(damaged) if damage is not None else "{")
    done = subprocess.run([sys.executable, SCRIPT, "--check", path], capture_output=True, text=True)
    assert done.returncode == 1 and re.search(words, done.stderr) and "Traceback" not in done.stderr


def test_every_number_of_a_file_is_exact_in_float32() -> None:
    for rope, layer, *_ in rows(ROTATIONS + DYNAMIC):
        numbers = [value for value in (*rope.values(), layer["s"]) if isinstance(value, float)]
        for value in (*numbers, *(rope["frequency_factors"] or [])):
            assert float(np.float32(value)) == value


@pytest.fixture(scope="module")
def rotation() -> Rotation:
    """The document's function, from its text."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names
    assert len(code[code.index("def ") :].splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(code, names)
    function: Rotation = names["rotation"]
    return function


def test_the_document_gives_the_vectors(rotation: Rotation) -> None:
    seen = 0
    for rope, layer, position, n, angles, magnitude in rows(ROTATIONS + DYNAMIC):
        got, size = rotation(rope, layer["s"], position, n)
        np.testing.assert_allclose(got, angles, rtol=0, atol=1e-9)
        assert size == pytest.approx(magnitude, abs=1e-9)
        seen += 1
    assert seen > 150


def test_the_vectors_tell_wrong_functions_apart(rotation: Rotation) -> None:
    """Each parameter of a rotation matters somewhere."""
    wrong: dict[str, Callable[[Json], Any]] = {
        "factor": lambda rope: rope["factor"] * 1.001,
        "original": lambda rope: rope["original"] * 4,
        "attn_factor": lambda rope: 1.0,
        "ext_factor": lambda rope: 1.0,
        "beta_fast": lambda rope: 32.0,
        "beta_slow": lambda rope: 1.0,
        "log_multiplier": lambda rope: 0.0,
        "frequency_factors": lambda rope: None,
        "components": lambda rope: None,
        "levels_per_doubling": lambda rope: 2,
    }
    off = dict.fromkeys(wrong, 0.0)
    for rope, layer, position, n, angles, magnitude in rows(ROTATIONS + DYNAMIC):
        for name in wrong.keys() & rope.keys():
            got, size = rotation(rope | {name: wrong[name](rope)}, layer["s"], position, n)
            off[name] = max(off[name], abs(size - magnitude), *np.abs(np.subtract(got, angles)))
    assert min(off.values()) > 1e-3, off


def test_the_bytes_in_the_document_are_those_of_the_vectors() -> None:
    shown = re.search(r"^20 00.*?\n```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    first, *others = re.findall(
        r"^((?:[0-9a-f]{2} {1,2})+)(?:\.\.\. ((?:[0-9a-f]{2} {1,2})+))?", shown[0], re.MULTILINE
    )
    entry = FOUND["entries"][0]["little"]
    start, end = (re.sub(" ", "", part) for part in first)
    assert entry.startswith(start)
    assert entry.endswith(end + re.sub(" ", "", "".join(part for part, _ in others)))


def folded_rope(vector: Json, case: Json, layer: Json) -> Rope:
    """The stock rotation with the parameters of a layer."""
    rope = vector["rope"]
    divisors, component = (value and tuple(value) for value in (rope["frequency_factors"], rope["components"]))
    betas = {name: rope[name] for name in ("beta_fast", "beta_slow") if name in rope}
    more = layer["folded"] | betas | {"n_ctx_orig": rope["original"], "neox": NEOX[vector["architecture"]]}
    return Rope(rope["n_dims"], case.get("base", rope["base"]), divisors=divisors, component=component, **more)


@pytest.mark.parametrize("vector", ROTATIONS + DYNAMIC, ids=named)
def test_folded_parameters_give_the_angles_at_whole_positions(vector: Json) -> None:
    for case in vector.get("lengths", [vector]):
        positions = np.array([[*p, 0, 0, 0][:4] for p in vector.get("positions", [[case.get("n", 1) - 1]])], float)
        for layer in case["layers"]:
            rope = folded_rope(vector, case, layer)
            np.testing.assert_allclose(rope.angles(positions), layer["angles"], rtol=0, atol=1e-9)
            assert rope.magnitude == pytest.approx(case["magnitude"], abs=1e-12)


def test_the_singular_factors_are_those_that_we_refuse() -> None:
    for fold in FOUND["folds"]:
        rope = RopeScaling("yarn", freq_scale=fold["freq_scale"])
        assert (rope.refusal(fold["s"]) is not None) == fold["refused"], fold
    assert {fold["refused"] for fold in FOUND["folds"]} == {False, True}


@pytest.mark.parametrize("vector", FOUND["curves"], ids=lambda v: f"degree-{len(v['control_points']) - 1}")
def test_curves_give_the_factors(vector: Json) -> None:
    curve = Curve(tuple((x, y) for x, y in vector["control_points"]))
    for factors in vector["factors"]:
        assert curve.factor_list(len(factors)) == pytest.approx(factors, abs=1e-12)
        assert list(curve.factors(len(factors))) == pytest.approx(factors, abs=1e-12)


def of_heads(vector: Json, rotation: Rotation) -> Iterator[tuple[int, int, list[float], list[float]]]:
    """Layer, head, logits and weights by the document: slices of the flat arrays, its function, section 2."""

    def at(vector: list[float], rope: Json, s: float, position: int) -> list[complex]:
        angles, size = rotation(rope, s, [position])
        pairs = zip(vector[::2], vector[1::2], angles, strict=True)
        return [complex(x, y) * size * cmath.exp(1j * angle) for x, y, angle in pairs]

    factors, scales, rope = iter(vector["head_factors"]), iter(vector["query_scales"]), vector["rope"]
    cap, last = vector["soft_cap"], vector["positions"][-1]
    for layer, (n, n_kv) in enumerate(zip(vector["n_head"], vector["n_head_kv"], strict=True)):
        of_layer = list(islice(factors, n_kv))
        for head, scale in enumerate(islice(scales, n)):
            s = of_layer[head * n_kv // n]
            query = at(vector["query"], rope, s, last)
            keys = [at(key, rope, s, p) for key, p in zip(vector["keys"], vector["positions"], strict=True)]
            products = [sum((a * b.conjugate()).real for a, b in zip(query, key, strict=True)) for key in keys]
            logits = [scale * product / math.sqrt(len(vector["query"])) for product in products]
            powers = [math.exp(x if cap is None else cap * math.tanh(x / cap)) for x in logits]
            yield layer, head, logits, [power / sum(powers) for power in powers]
    assert not [*factors, *scales]


@pytest.mark.parametrize("vector", FOUND["heads"], ids=named)
def test_heads_by_the_document(vector: Json, rotation: Rotation) -> None:
    seen = 0
    for layer, head, logits, weights in of_heads(vector, rotation):
        wanted = vector["layers"][layer]["heads"][head]
        assert logits == pytest.approx(wanted["logits"], abs=1e-9)
        assert weights == pytest.approx(wanted["weights"], abs=1e-9)
        seen += 1
    assert seen == sum(len(layer["heads"]) for layer in vector["layers"]) == sum(vector["n_head"])
    numbers = [*vector["head_factors"], *vector["query_scales"], *vector["query"], *chain(*vector["keys"])]
    assert numbers == [float(np.float32(number)) for number in numbers]


def test_the_vectors_tell_wrong_heads_apart(rotation: Rotation) -> None:
    """A scale after the soft cap, another grouping, factors of layers, and arrays read in another order all differ."""
    vector, capped = FOUND["heads"]
    right = {row[:2]: row[3] for row in of_heads(vector, rotation)}
    for name, wrong in (("head_factors", [1.0] * 5), ("query_scales", [1.0] * 10)):
        for turned in (wrong, vector[name][::-1]):
            found = {row[:2]: row[3] for row in of_heads(vector | {name: turned}, rotation)}
            assert max(abs(a[0] - found[key][0]) for key, a in right.items()) > 1e-3
    uncapped = [row[3] for row in of_heads(capped | {"soft_cap": None}, rotation)]
    assert max(abs(a[0] - row[3][0]) for a, row in zip(uncapped, of_heads(capped, rotation), strict=True)) > 1e-3


@pytest.mark.parametrize("vector", FOUND["heads"], ids=named)
def test_we_store_the_heads_of_the_vectors(vector: Json, tmp_path: Path) -> None:
    keys = {f"llama.attention.head_count{end}": vector[f"n_head{end}"] for end in ("", "_kv")}
    path = write_model(tmp_path / "m.gguf", block_count=len(vector["n_head"]), keys=keys)
    rows = {
        name: [[of_head[field] for of_head in layer["heads"]] for layer in vector["layers"]]
        for name, field in (("head_factors", "s"), ("query_scales", "scale"))
    }
    rows["head_factors"] = [
        row[:: n // n_kv] if n else [] for row, n, n_kv in zip(rows["head_factors"], vector["n_head"],
                                                              vector["n_head_kv"], strict=True)
    ]  # fmt: skip
    write_factors(path, **rows)
    fields = gguf.GGUFReader(path).fields
    for name, key in array_keys("llama").items():
        assert name not in rows or fields[key].contents() == vector[name]


@pytest.mark.parametrize("order", ["little", "big"])
def test_we_write_the_bytes(order: str, tmp_path: Path) -> None:
    counts = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    path = write_model(tmp_path / "m.gguf", block_count=3, big_endian=order == "big", keys=counts)
    factors, dynamic, of_kv, scales = (entry["value"] for entry in FOUND["entries"])
    rows = {"head_factors": [[s] for s in of_kv], "query_scales": list(zip(scales[::2], scales[1::2], strict=True))}
    write_factors(path, factors, **rows, scaling=Scaling("dynamic-yarn", dynamic))
    data, fields = path.read_bytes(), gguf.GGUFReader(path).fields
    for entry in FOUND["entries"]:
        assert data.count(bytes.fromhex(entry[order])) == 1
        assert fields[entry["key"]].contents() == entry["value"]


def tiny(vector: Json, factors: list[float]) -> TinyModel:
    """A model that rotates as a vector says, with a layer for each of its factors."""
    rope, arch = vector["rope"], vector["architecture"]
    head = max(16, rope["n_dims"])
    ropes = (Rope(rope["n_dims"], rope["base"], neox=NEOX[arch]),) * len(factors)
    config = Config(N_VOCAB, 2 * head, 2, 1, head, N_FF, ropes, (None,) * len(factors))
    kind = {"dynamic": "none", "dynamic-yarn": "yarn"}.get(rope["type"], rope["type"])
    metadata: dict[str, Any] = {
        "rope.scaling.type": kind,
        "rope.scaling.original_context_length": rope["original"],
        "rope.scaling.attn_factor": rope["attn_factor"],
    }
    if kind == rope["type"]:
        metadata["rope.scaling.factor"] = rope["factor"]
    else:
        # for readers that do not know the key, and no other
        metadata |= {"rope.scaling.factor": 7.0, "rope.scaling.dynamic_factor": rope["factor"]}
    if rope.get("log_multiplier"):
        metadata["rope.scaling.yarn_log_multiplier"] = rope["log_multiplier"]
    if arch in SECTIONS:
        metadata["rope.dimension_sections"] = SECTIONS[arch]
    tensors = {}
    if rope["frequency_factors"] is not None:
        divisors = np.array(rope["frequency_factors"], np.float32)
        if rope["type"] == "longrope":
            tensors = {"rope_factors_long.weight": divisors, "rope_factors_short.weight": np.ones_like(divisors)}
        else:
            tensors = {"rope_freqs.weight": divisors}
    return TinyModel(vector["name"], arch, config, tuple(metadata.items()), tensors, n_ctx=1024)


def traced(vector: Json, tmp_path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """What each layer makes of heads of unit pairs, a position after the other."""
    first = vector.get("lengths", [vector])[0]
    factors = [layer["s"] for layer in first["layers"]]
    model = tiny(vector, factors)
    head = unit_pairs(model.config.ropes[0], model.config.head_dim)
    path = model.write(tmp_path / "model.gguf", factors, constant(model, head))
    trace, rope = RopeTrace(), vector["rope"]
    if rope["type"] == "yarn":
        options |= {f"yarn_{name}": rope[name] for name in ("ext_factor", "beta_fast", "beta_slow")}
    with Context(path, model.n_ctx, trace=trace, **options) as context:
        assert context.model_factors(len(factors)) == factors
        for position in vector.get("positions", [[case["n"] - 1] for case in vector.get("lengths", [])]):
            context.clear()
            if rope["components"]:
                context.decode_embeddings(np.ones((1, model.config.n_embd), np.float32), np.array([position]))
            else:
                context.decode([1], start=position[0])
            shaped = {name: out.reshape(1, -1, model.config.head_dim) for name, out in trace.outputs.items()}
            yield {"position": position, "level": level_of(context), **shaped}


def check_case(vector: Json, case: Json, got: dict[str, Any]) -> None:
    """By the angles of the folded parameters, which are the vectors', and with the document's bound."""
    position = np.array([[*got["position"], 0, 0, 0][:4]], float)
    for il, layer in enumerate(case["layers"]):
        for name in (f"Qcur-{il}", f"Kcur-{il}"):
            check(folded_rope(vector, case, layer), got[name], position, 1.0)
    assert 2 * len(case["layers"]) == sum(name.startswith(("Q", "K")) for name in got)


@pytest.mark.native
@pytest.mark.parametrize("vector", ROTATIONS, ids=named)
def test_the_library_turns_as_the_vectors_say(vector: Json, tmp_path: Path) -> None:
    found = list(traced(vector, tmp_path))
    for got in found:
        check_case(vector, vector, got)
    assert len(found) == len(vector["positions"])


@pytest.mark.native
@pytest.mark.parametrize("vector", [v for v in DYNAMIC if v["rope"]["levels_per_doubling"] == 2], ids=named)
def test_the_library_has_the_levels_of_the_vectors(vector: Json, tmp_path: Path) -> None:
    for case, got in zip(vector["lengths"], traced(vector, tmp_path), strict=True):
        assert got["level"] == case["level"]
        check_case(vector, case, got)


@pytest.mark.native
@pytest.mark.parametrize("vector", [v for v in DYNAMIC if v["rope"]["levels_per_doubling"] == 1], ids=named)
def test_the_library_has_a_level_a_doubling_with_quantized_keys(vector: Json, tmp_path: Path) -> None:
    wide = vector | {"rope": vector["rope"] | {"n_dims": 32}}  # a block of the cache
    got = list(traced(wide, tmp_path, type_k=8))
    assert [row["level"] for row in got] == [case["level"] for case in vector["lengths"]]


@pytest.mark.native
@pytest.mark.parametrize("factor", [0.5, 1025.0, math.nan])
def test_the_library_refuses_other_dynamic_factors(factor: float, tmp_path: Path) -> None:
    model = tiny(DYNAMIC[0] | {"rope": DYNAMIC[0]["rope"] | {"factor": factor}}, [1.0])
    with errors() as logged, pytest.raises(OSError, match="not loaded"):
        Context(model.write(tmp_path / "model.gguf"))
    assert "dynamic_factor" in "".join(logged)
