"""RoPE scaling in GGUF metadata: written, as the `gguf` package reads it, and the original back byte for byte."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_fixtures import (
    LAYERS,
    finish,
    header,
    names,
    number_pair,
    read_keys,
    read_tensors,
    string,
    text_pair,
    u32,
    write_model,
)

from lrope_gguf import CurveFile, LropeError, Scaling, plan_remove, plan_write, read_factors, read_model, remove_factors
from lrope_gguf import write_factors as write
from lrope_gguf.cli import main
from lrope_gguf.gguf_file import GGUFFile, Value
from lrope_gguf.layout import Kept, Originals, originals_of
from lrope_gguf.rope_scaling import RopeScaling, differences

TYPE, FACTOR, ORIGINAL, DYNAMIC = (
    f"llama.rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "dynamic_factor")
)
CONTEXT, FACTORS_KEY, KEPT = "llama.context_length", "llama.rope.scaling.layer_factors", "lrope.original"
FACTORS = (1.0, 1.25, 0.75, 1.5)
TRAINED = 512


def with_keys(path: Path, **keys: Any) -> Path:
    return write_model(path, keys={f"llama.{key.replace('__', '.')}": value for key, value in keys.items()})


def scaling_of(path: Path) -> dict[str, object]:
    """All that the file says of its scaling, as the `gguf` package reads it."""
    return {key: value for key, value in read_keys(path).items() if key in (TYPE, FACTOR, ORIGINAL, CONTEXT, DYNAMIC)}


def refused(path: Path, message: str, scaling: Scaling, factors: tuple[float, ...] | None = None) -> None:
    """Refuse in one line, dry or not, and leave the file as it is."""
    before = path.read_bytes()
    for call in (plan_write, write):
        with pytest.raises(LropeError) as caught:
            call(path, factors, scaling=scaling)
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert path.read_bytes() == before and names(path.parent) == [path.name]


def test_the_file_says_how_long_it_was_trained(tmp_path: Path) -> None:
    path = with_keys(tmp_path / "m.gguf", rope__scaling__original_context_length=128, rope__scaling__type="yarn",
                     rope__scaling__factor=4.0)  # fmt: skip
    refused(path, "--context-length 127: ", Scaling("yarn", 4, 127))
    assert write(path, scaling=Scaling("yarn", 4)).how == "unchanged"  # all of it is there already
    write(path, scaling=Scaling("yarn", 8))
    with GGUFFile(path) as gguf:
        assert originals_of(gguf).written == ("rope.scaling.factor", "context_length")


def test_nothing_to_write(model: Path) -> None:
    with pytest.raises(LropeError, match="nothing to write; give factors or a scaling"):
        write(model)
    assert write(model, scaling=Scaling("none")).how == "unchanged"
    write(model, FACTORS)
    assert write(model, scaling=Scaling("linear", 2)).factors == FACTORS


def test_in_place(model: Path) -> None:
    """Another factor of the same scaling, other factors and another document change values alone."""
    write(model, FACTORS, scaling=Scaling("dynamic-yarn", 4))
    inode = model.stat().st_ino
    with GGUFFile(model) as gguf:
        keys = (FACTORS_KEY, TYPE, FACTOR, ORIGINAL, CONTEXT, DYNAMIC, KEPT, "lrope.curve")
        ours = [gguf.entries[key] for key in keys]
        assert all(a.end == b.start for a, b in pairwise(ours)) and ours[-1].end == gguf.kv_end
        assert ours[0].value // 4096 == (ours[5].end - 1) // 4096
    other = CurveFile(layer_factors=(1.0,)).dumps(compact=True)
    for factors, factor, text in ((None, 2, None), (FACTORS[::-1], 3, other)):
        before, scaling = model.read_bytes(), Scaling("dynamic-yarn", factor)
        result = write(model, factors, curve_json=text, scaling=scaling)
        after = model.read_bytes()
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert result.how == "in place" and result.bytes_written == changed[-1] - changed[0] + 1
        assert all(any(entry.value <= i < entry.end for entry in ours) for i in changed)
        assert (scaling_of(model)[DYNAMIC], scaling_of(model)[CONTEXT]) == (factor, factor * 512)
        assert read_factors(model) == (factors or FACTORS) and text in (None, read_model(model).curve_json)
        same = write(model, factors, curve_json=text, scaling=scaling)
        assert (same.how, same.bytes_written, model.read_bytes()) == ("unchanged", 0, after)
    assert model.stat().st_ino == inode and names(model.parent) == ["m.gguf"]
    assert write(model, scaling=Scaling("yarn", 3)).how == "rewritten"  # another key less
    model.with_name("other.gguf").hardlink_to(model)
    assert write(model, scaling=Scaling("yarn", 2)).how == "rewritten"
    assert scaling_of(model.with_name("other.gguf"))[FACTOR] == 3.0


@pytest.mark.parametrize("length", range(0, 4096, 512))
@pytest.mark.parametrize("scalings", [(None, None), (Scaling("yarn", 4), Scaling("yarn", 8))], ids=["", "yarn"])
def test_values_lie_inside_a_page(tmp_path: Path, length: int, scalings: tuple[Scaling | None, Scaling | None]) -> None:
    """So that no change in place can be seen half done, wherever the keys before it end."""
    path = write_model(tmp_path / "m.gguf", block_count=200, add=lambda writer: writer.add_string("x", "x" * length))
    original = path.read_bytes()
    write(path, (1.5,) * 200, scaling=scalings[0])
    with GGUFFile(path) as gguf:
        keys = (FACTORS_KEY, TYPE, FACTOR, ORIGINAL, CONTEXT) if scalings[0] else (FACTORS_KEY,)
        values = [gguf.entries[key] for key in keys]
        assert values[0].value // 4096 == (values[-1].end - 1) // 4096
    assert write(path, (1.25,) * 200, scaling=scalings[1]).how == "in place"
    remove_factors(path)
    assert path.read_bytes() == original


OLD_TYPES = st.sampled_from(["none", "linear", "yarn", "x" * 40, ""])
SCALINGS = st.one_of(
    st.just(Scaling("none")),
    st.builds(
        Scaling,
        st.sampled_from(["linear", "yarn", "dynamic-yarn"]),
        st.sampled_from([1, 1.25, 2, 2.5, 4, 1024]),
        st.none() | st.just(TRAINED),
    ),
    st.builds(Scaling, st.sampled_from(["linear", "yarn", "dynamic-yarn"]), st.none(), st.integers(TRAINED, 5000)),
    st.builds(Scaling, st.just("dynamic"), st.none() | st.floats(1, 1024), st.none() | st.integers(TRAINED, 1 << 30)),
)
LISTS = st.lists(st.floats(2.5, 8, width=32), min_size=LAYERS, max_size=LAYERS)  # which no scaling here refuses
STEPS = st.lists(st.tuples(st.none() | LISTS, st.none() | SCALINGS).filter(any), min_size=1, max_size=4)
GENERATED = {
    GGUFValueType.UINT8: st.integers(0, 2**8 - 1), GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: st.integers(0, 2**16 - 1), GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1), GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32), GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1), GGUFValueType.FLOAT64: st.floats(),
    GGUFValueType.BOOL: st.booleans(), GGUFValueType.STRING: st.text(max_size=20),
}  # fmt: skip


@st.composite
def random_keys(draw: st.DrawFn) -> list[tuple[str, Any, GGUFValueType, GGUFValueType | None]]:
    pairs: list[tuple[str, Any, GGUFValueType, GGUFValueType | None]] = []
    for i in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(list(GENERATED)))
        name = f"x.{i}.{draw(st.text(max_size=5))}"
        if draw(st.booleans()):
            pairs.append((name, draw(st.lists(GENERATED[kind], min_size=1, max_size=20)), GGUFValueType.ARRAY, kind))
        else:
            pairs.append((name, draw(GENERATED[kind]), kind, None))
    return pairs


@settings(deadline=None, max_examples=30)
@given(
    old=st.fixed_dictionaries(
        {CONTEXT: st.just(TRAINED), "llama.block_count": st.just(LAYERS), "x.filler": st.text("xy", max_size=5000)},
        optional={
            TYPE: OLD_TYPES, FACTOR: st.floats(0.5, 8, width=32), ORIGINAL: st.integers(64, TRAINED),
            "llama.rope.freq_base": st.floats(1, 1e6, width=32), "general.name": st.text(max_size=9),
        },
    ),
    others=random_keys(),
    order=st.randoms(use_true_random=False),
    big_endian=st.booleans(),
    alignment=st.none() | st.sampled_from([8, 16, 64, 256, 4096, 16384]),
    tensors=st.integers(0, 4),
    provenance=st.text(max_size=3000),
    steps=STEPS,
)  # fmt: skip
def test_round_trip_of_any_file(
    tmp_path_factory: pytest.TempPathFactory,
    old: dict[str, object],
    others: list[Any],
    order: Any,
    big_endian: bool,
    alignment: int | None,
    tensors: int,
    provenance: str,
    steps: list[tuple[list[float] | None, Scaling | None]],
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    kinds = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
    pairs = [*others, *((key, value, kinds[type(value)], None) for key, value in old.items())]
    order.shuffle(pairs)
    writer = GGUFWriter(path, "llama", endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
    for pair in pairs:
        writer.add_key_value(*pair)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    finish(writer, {f"blk.{i}.weight": np.full((i + 1, 37), i, np.float32) for i in range(tensors)})
    original, before, arrays = path.read_bytes(), read_keys(path), read_tensors(path)
    fingerprint = read_model(path).fingerprint()
    trained = int(str(old.get(ORIGINAL, TRAINED)))
    factors, said = None, scaling_of(path)
    for new, scaling in steps:
        if scaling is not None and scaling.factor and scaling.context_length:
            scaling = Scaling(scaling.kind, scaling.factor, round(scaling.factor * trained))
        text = None if new is None else CurveFile(layer_factors=tuple(new), provenance=provenance).dumps()
        plan = plan_write(path, new, curve_json=text, scaling=scaling)
        result = write(path, new, curve_json=text, scaling=scaling)
        assert (plan.how, plan.bytes_written) == (result.how, result.bytes_written)
        factors = new or factors
        if scaling is not None:
            said = {key: value for key, value in before.items() if key in (TYPE, FACTOR, ORIGINAL, CONTEXT)}
            said |= expected(scaling, trained)
        assert scaling_of(path) == said
        fields, after = GGUFReader(path).fields, read_keys(path)  # which refuse a key that stands there twice
        assert {key: fields[key].types[0] for key in said} == {key: kinds[type(value)] for key, value in said.items()}
        theirs = [key for key in before if key not in (*said, "GGUF.kv_count")]
        assert [key for key in after if key in theirs] == theirs
        assert repr([after[key] for key in theirs]) == repr([before[key] for key in theirs])
        assert factors is None or fields[FACTORS_KEY].types == [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]
        assert after["GGUF.kv_count"] == len(after) - 3
        info = read_model(path)
        assert (info.factors or ()) == tuple(factors or ()) == tuple(after.get(FACTORS_KEY, ()))  # type: ignore[arg-type]
        assert text is None or CurveFile.loads(info.curve_json or "", "x") == CurveFile.loads(text, "x")
        assert info.fingerprint() == fingerprint and info.scaling_error is None
        assert GGUFReader(path).byte_order == ("S" if big_endian else "I") and read_tensors(path) == arrays
        with GGUFFile(path) as gguf:
            assert not tensors or gguf.data_start % gguf.alignment == 0
    assert remove_factors(path).how in ("rewritten", "unchanged")
    assert path.read_bytes() == original


def expected(scaling: Scaling, trained: int) -> dict[str, object]:
    """The keys by the definition of each scaling."""
    if scaling.kind == "none":
        return {}
    length = scaling.context_length
    factor = scaling.factor or (1.0 if scaling.kind == "dynamic" else (length or 0) / trained)
    said: dict[str, object] = {TYPE: {"linear": "linear", "dynamic": "none"}.get(scaling.kind, "yarn")}
    said[ORIGINAL] = trained
    if scaling.kind != "dynamic":
        said[FACTOR] = float(np.float32(factor))
        if length is None and factor > 1:
            length = round(factor * trained)
    if length is not None:
        said[CONTEXT] = length
    return said | ({DYNAMIC: float(np.float32(factor))} if scaling.kind.startswith("dynamic") else {})


def tool(name: str) -> list[str | Path]:
    return [sys.executable, "-m", f"gguf.scripts.gguf_{name}"]


def copied_by_the_package(path: Path, change: Callable[[str, Any], Any]) -> None:
    """As `gguf_new_metadata.py` copies a model: each key by its name and value."""
    reader = GGUFReader(path)
    other = path.with_name("copied.gguf")
    writer = GGUFWriter(other, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = change(name, field.contents())
        if value is not None:
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    finish(writer, {tensor.name: tensor.data for tensor in reader.tensors}).replace(path)


def test_a_copy_by_another_tool_is_restored(tmp_path: Path) -> None:
    path, plain = (
        with_keys(tmp_path / f"{name}.gguf", rope__scaling__type="linear", rope__scaling__factor=2.0, a="b")
        for name in ("m", "plain")
    )
    write(path, FACTORS, scaling=Scaling("dynamic-yarn", 4))
    for source in (path, plain):
        command = [*tool("new_metadata"), "--general-name", "Other", source, tmp_path / "copied.gguf"]
        subprocess.run(command, check=True)
        (tmp_path / "copied.gguf").replace(source)
    info = read_model(path)
    assert (info.name, info.factors, scaling_of(path)[DYNAMIC]) == ("Other", FACTORS, 4.0)
    assert CurveFile.loads(info.curve_json or "", "stored").layer_factors == FACTORS
    assert info.fingerprint() == read_model(plain).fingerprint()
    remove_factors(path)
    assert path.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda name, value: "linear" if name == TYPE else value,
        lambda name, value: 99 if name == CONTEXT else value,
        lambda name, value: None if name in (TYPE, CONTEXT, DYNAMIC, FACTORS_KEY, "lrope.curve") else value,
        lambda name, value: 7.0 if name in (FACTOR, DYNAMIC) else value,
    ],
)
def test_a_change_by_another_tool_is_undone(tmp_path: Path, change: Callable[[str, Any], Any]) -> None:
    path = with_keys(tmp_path / "m.gguf", rope__scaling__type="none", rope__scaling__factor=2.0)
    before = read_keys(path)
    original = path.read_bytes()
    write(path, FACTORS, scaling=Scaling("dynamic-yarn", 4))
    copied_by_the_package(path, change)
    write(path, FACTORS)  # leaves what it finds
    remove_factors(path)
    assert read_keys(path) == before and path.read_bytes() == original


def test_a_file_that_was_converted_to_the_other_byte_order(model: Path) -> None:
    """And back: of a string, the tool turns the length and not the text."""
    plain = model.with_name("plain.gguf")
    plain.write_bytes(model.read_bytes())
    write(model, FACTORS, scaling=Scaling("yarn", 4))
    before = model.read_bytes()
    for order in ("big", "little"):
        for path in (model, plain):
            subprocess.run([*tool("convert_endian"), path, order], input="YES\n", text=True, check=True)
        assert read_factors(model) == FACTORS and scaling_of(model)[FACTOR] == 4.0
        copy = model.with_name("copy.gguf")
        remove_factors(model, output=copy)
        assert copy.read_bytes() == plain.read_bytes()
    assert model.read_bytes() == before


def test_a_stray_dynamic_factor_is_ours(tmp_path: Path) -> None:
    path = with_keys(tmp_path / "m.gguf", rope__scaling__dynamic_factor=4.0, rope__scaling__type="yarn")
    plain = with_keys(tmp_path / "plain.gguf", rope__scaling__type="yarn")
    assert read_model(path).rope.scaling == "dynamic-yarn"
    assert read_model(path).fingerprint() == read_model(plain).fingerprint()
    write(path, FACTORS)
    assert scaling_of(path)[DYNAMIC] == 4.0
    write(path, scaling=Scaling("dynamic", 2))
    assert scaling_of(path)[DYNAMIC] == 2.0
    remove_factors(path)
    assert path.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ntk", 2), "--rope-scaling ntk: is unknown; give one of none, linear"),
        (("yarn", math.inf), "--rope-scale inf: is out of range"),
        (("yarn", True), "--rope-scale True: is out of range"),
        (("yarn", "2"), "--rope-scale 2: is out of range"),
        (("yarn", None, 1 << 31), "--context-length 2147483648: is out of range; give a whole number of tokens"),
        (("yarn", None, 2.5), "--context-length 2.5: is out of range; give a whole number of tokens"),
        (("none", None, 2), "--context-length 2: has no effect with --rope-scaling none"),
    ],
)
def test_values_out_of_range(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LropeError) as caught:
        Scaling(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_length_of_training_that_the_file_does_not_say(model: Path) -> None:
    original = model.read_bytes()
    write(model, scaling=Scaling("dynamic-yarn", context_length=1000, original=100))
    assert scaling_of(model) == {TYPE: "yarn", FACTOR: 10.0, ORIGINAL: 100, CONTEXT: 1000, DYNAMIC: 10.0}
    refused(model, "--context-length 99: ", Scaling("dynamic", None, 99, 100))
    with pytest.raises(LropeError, match=r"^--yarn-orig-ctx 0: is out of range; give a whole number of tokens"):
        Scaling("dynamic", original=0)
    with pytest.raises(LropeError, match=r"^--yarn-orig-ctx 5: has no effect with --rope-scaling none"):
        Scaling("none", original=5)
    remove_factors(model)
    assert model.read_bytes() == original


def hand_made(path: Path, pairs: bytes, n_keys: int) -> Path:
    path.write_bytes(header(text_pair("general.architecture", "llama") + pairs, n_keys + 1))
    return path


def test_models_that_cannot_have_it(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "m.gguf"
    scaling = Scaling("yarn", 2)
    refused(hand_made(path, b"", 0), "has no llama.context_length", scaling)
    refused(hand_made(path, text_pair(CONTEXT, "512"), 1), "has no llama.context_length", scaling)
    refused(hand_made(path, number_pair(CONTEXT, 0), 1), "has no llama.context_length", scaling)
    refused(hand_made(path, number_pair(CONTEXT, 1 << 31), 1), "llama.context_length is 2147483648, which", scaling)
    long = text_pair(TYPE, "x" * 5000)
    refused(hand_made(path, number_pair(CONTEXT, 9) + long, 2), f"{TYPE} is neither a number", scaling)
    for kind in ("linear", "yarn", "dynamic", "dynamic-yarn"):
        refused(with_keys(path, rope__scaling__type="longrope"), "uses LongRoPE", Scaling(kind, 2))
        tensor = np.ones(4, np.float32)
        write_model(path, add=lambda writer: writer.add_tensor("rope_factors_long.weight", tensor))  # noqa: B023
        refused(path, "uses LongRoPE", Scaling(kind, 2))


def test_long_factors_in_another_shard(tmp_path: Path) -> None:
    def shard(number: int, tensor: str) -> Path:
        def add(writer: GGUFWriter) -> None:
            writer.add_tensor(tensor, np.ones(4, np.float32))

        return write_model(tmp_path / "m.gguf", shard=number, add=add)

    first = shard(0, "x")
    assert plan_write(first, scaling=Scaling("yarn", 2)).how == "rewritten"
    shard(1, "y")
    assert plan_write(first, scaling=Scaling("yarn", 2)).how == "rewritten"
    shard(1, "rope_factors_long.weight")
    with pytest.raises(LropeError, match="LongRoPE"):
        plan_write(first, scaling=Scaling("yarn", 2))


def test_what_only_static_scaling_fits(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "m.gguf"
    write_model(path, add=lambda writer: writer.add_array("llama.rope.dimension_sections", [1, 2, 3, 4]))
    refused(path, "uses M-RoPE", Scaling("dynamic-yarn", 2))
    assert plan_write(path, scaling=Scaling("yarn", 2)).how == "rewritten"
    with_keys(path, rope__scaling__yarn_log_multiplier=0.1)
    for kind in ("linear", "yarn", "dynamic"):
        assert plan_write(path, scaling=Scaling(kind, 2)).how == "rewritten"


@pytest.mark.parametrize("alone", [False, True])
def test_factors_that_the_new_scaling_refuses(tmp_path: Path, alone: bool) -> None:
    (tmp_path / "one").mkdir()
    path = write_model(tmp_path / "one" / "m.gguf")

    def check(kind: str, factor: float, value: float, message: str | None) -> None:
        factors = (1.0, value, 1.0, 1.0)
        write_model(path)
        if alone:
            write(path, factors)
        scaling, given = Scaling(kind, factor), None if alone else factors
        if message is None:
            assert write(path, given, scaling=scaling).how == "rewritten"
            assert read_factors(path) == tuple(np.float32(factors).tolist())
        else:
            why = f"the factor of layer 1 is {value:g}, but llama.cpp accepts none so close to {message}"
            refused(path, why, scaling, given)

    scale = "the model's YaRN frequency scale of"
    check("yarn", 2, 0.5, f"{scale} 0.5")
    check("yarn", 4, 0.5, None)
    check("linear", 2, 0.5, None)
    check("dynamic", 2, 0.5, None)
    for k, step in ((1, 2**-0.5), (2, 0.5), (3, 2**-1.5)):
        value = float(np.float32(step))
        check("dynamic-yarn", 4, value, f"{scale} {step:g}")
        check("dynamic-yarn", 2 ** (k / 2) * 0.9, value, None)
    check("dynamic-yarn", 3, 1 / 3, f"{scale} 0.333333")
    check("dynamic-yarn", 4, 1 / 3, None)
    check("dynamic-yarn", 1024, 2**-9.5, f"{scale} 0.03125")


def test_taking_a_scaling_away_checks_the_factors_too(tmp_path: Path) -> None:
    path = with_keys(tmp_path / "m.gguf", rope__scaling__type="yarn", rope__scaling__factor=2.0)
    write(path, (0.5, 1, 1, 1), scaling=Scaling("linear", 2))
    refused(path, "YaRN frequency scale of 0.5", Scaling("none"))
    refused(path, "YaRN frequency scale of 0.5", Scaling("none"), (0.5, 1.0, 1.0, 1.0))
    with pytest.raises(LropeError, match=r"frequency scale of 0\.25"):
        write(path, (0.25, 1, 1, 1), scaling=Scaling("yarn", 4))


def test_originals_are_what_they_were(tmp_path: Path) -> None:
    kept = (
        Kept(3, "rope.scaling.type", Value(8, "é\0".encode())),
        Kept(5, "context_length", Value(4, b"\0\2\0\0")),
        Kept(9, "rope.scaling.factor", Value(12, b"12345678")),
    )
    originals = Originals(("rope.scaling.type", "rope.scaling.factor", "context_length"), kept)
    for order in "<>":
        text = originals.dumps(order)
        assert text.isascii() and json.loads(text)["version"] == 1
        pairs = text_pair("general.architecture", "llama", order) + text_pair(KEPT, text + " " * 99, order)
        (tmp_path / "m.gguf").write_bytes(header(pairs, 2, order=order))
        with GGUFFile(tmp_path / "m.gguf") as gguf:
            assert originals_of(gguf) == originals


def document(**changes: Any) -> str:
    item = {"at": 1, "name": "context_length", "type": 4, "value": "00020000"}
    item |= {key: value for key, value in changes.items() if key in item}
    whole: dict[str, Any] = {
        "format": "lrope-original", "version": 1, "written": ["context_length", "rope.scaling.type"],
        "replaced": [item],
    }  # fmt: skip
    return json.dumps(whole | {key: value for key, value in changes.items() if key not in item})


HOSTILE: list[str | bytes] = [
    "", "null", "[1]", "{}", "x", "[" * 30000, '{"a":' * 6000, "1" * 5000, "\xe9", b"\xff\xfe", " " * 40000,
    "9" * 40000,
    document(format="x"), document(version=2), document(version=True), document(version=None), document(written=None),
    document(written=["context_length", "context_length"]), document(written=["general.alignment"]),
    document(written=[1]), document(written=[["context_length"]]), document(written=[]), document(replaced=None),
    document(replaced=[1]), document(replaced=[{}]), document(replaced={"a": 1}), document(at=-1), document(at=1 << 16),
    document(at=True), document(at=1.0), document(at="1"), document(at=10**400), document(name="rope.scaling.factor"),
    document(name="general.alignment"), document(name=1), document(name="\x1b[31m\n" * 50), document(type=9),
    document(type=13), document(type=-1), document(type="4"), document(type=True), document(value="0002"),
    document(value="0002000g"), document(value="00 20000"), document(value=512), document(value="00020000" * 2),
    document(type=8, value="00" * 4097), document(value=["00020000"]),
    document(written=["rope.scaling.dynamic_factor"], name="rope.scaling.dynamic_factor"),
    document(replaced=[{"at": 1, "name": "context_length", "type": 4, "value": "00020000"}] * 2),
    document(replaced=[{"at": 3, "name": "context_length", "type": 4, "value": "00020000"},
                       {"at": 1, "name": "rope.scaling.type", "type": 8, "value": ""}]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_hostile_originals(tmp_path: Path, case: int, capsys: pytest.CaptureFixture[str]) -> None:
    stored = HOSTILE[case]
    data = stored.encode("utf-8") if isinstance(stored, str) else stored
    pairs = number_pair("llama.block_count", LAYERS) + number_pair(CONTEXT, 99) + string(KEPT.encode()) + u32(8)
    path = hand_made(tmp_path / "m.gguf", pairs + string(data), 3)
    before = path.read_bytes()
    calls: list[Callable[[], object]] = [
        lambda: remove_factors(path), lambda: plan_remove(path), lambda: write(path, FACTORS),
        lambda: plan_write(path, scaling=Scaling("yarn", 2)), lambda: read_model(path).fingerprint(),
        lambda: write(path, scaling=Scaling("none")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LropeError) as caught:
            call()
        text = str(caught.value)
        assert text.startswith(f"{path}: {KEPT} at byte ") and "is damaged (" in text and len(text) < 600
        assert "\n" not in text
    assert main(["show", str(path)]) == 0
    assert "what was there before is unknown: lrope.original at byte" in capsys.readouterr().out
    assert main(["remove", str(path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert path.read_bytes() == before


def test_originals_of_another_type(tmp_path: Path) -> None:
    path = hand_made(tmp_path / "m.gguf", number_pair(KEPT, 4), 1)
    with pytest.raises(LropeError, match=r"is damaged \(not a string, or too long\)"):
        remove_factors(path)


def test_a_place_behind_the_end_is_the_end(tmp_path: Path) -> None:
    pairs = number_pair(CONTEXT, 99) + text_pair(KEPT, document(at=60000))
    path = hand_made(tmp_path / "m.gguf", pairs, 2)
    remove_factors(path)
    assert path.read_bytes() == header(text_pair("general.architecture", "llama") + number_pair(CONTEXT, 512), 2)


def test_rope_scaling_of_a_file(model: Path) -> None:
    def rope(kind: str, *arguments: Any) -> RopeScaling:
        write(model, scaling=Scaling(kind, *arguments))
        return read_model(model).rope

    assert rope("linear", 4).json() == {"scaling": "linear", "freq_base": 1e4, "freq_scale": 0.25, "attn_factor": 1.0}
    yarn = rope("yarn", 4)
    assert (yarn.orig_ctx, yarn.freq_scale, yarn.scaling) == (512, 0.25, "yarn")
    dynamic = rope("dynamic", 2, 4096)
    assert dynamic.json() == {
        "scaling": "dynamic", "freq_base": 1e4, "freq_scale": 1.0, "attn_factor": 1.0, "orig_ctx": 512, "factor": 2.0,
    }  # fmt: skip
    both = rope("dynamic-yarn", 4)
    assert both.json() == {
        "scaling": "dynamic-yarn", "freq_base": 1e4, "freq_scale": 1.0, "orig_ctx": 512, "beta_fast": 32.0,
        "beta_slow": 1.0, "ext_factor": 1.0, "factor": 4.0,
    }  # fmt: skip
    ropes = [RopeScaling(orig_ctx=512), yarn, dynamic, both]
    assert all(differences(a.json(), b) for a in ropes for b in ropes if a is not b)
    assert not any(differences(a.json(), a) for a in ropes)
    assert differences(both.json(), yarn) == {"rope_scaling": ("dynamic-yarn", "yarn"), "rope_scale": (4.0, 1.0)}
    assert differences(yarn.json(), both) == {"rope_scaling": ("yarn", "dynamic-yarn")}
    assert differences(rope("dynamic-yarn", 8).json(), both) == {"rope_scale": (8.0, 4.0)}


@pytest.mark.parametrize("value", [0.0, -1.0, 0.5, math.nan, math.inf, 1e30])
def test_dynamic_factors_of_any_value(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_keys(tmp_path / "m.gguf", rope__scaling__type="yarn", rope__scaling__dynamic_factor=value)
    info = read_model(path)
    assert info.rope.scaling == "dynamic-yarn" and info.rope.refusal(1.5) is None
    for options in ([], ["--json"]):
        assert main(["show", str(path), *options]) == 0
    assert "dynamic YaRN" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic", "dynamic-yarn"])
def test_no_tensors_and_no_layers(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "m.gguf", tensors=0, block_count=None)
    original = path.read_bytes()
    write(path, scaling=Scaling(kind, 2))
    assert scaling_of(path)[ORIGINAL] == 512
    remove_factors(path)
    assert path.read_bytes() == original


DYNAMIC_3 = RopeScaling("dynamic", factor=3.0)
UNDER = [
    # llama_rope_dynamic_init: the factor is that of --rope-scale, else of the file, whatever its kind
    (RopeScaling("linear", freq_scale=0.5), {"rope_scaling": "dynamic"}, ("dynamic", 2.0)),
    (RopeScaling("yarn", freq_scale=0.25), {"rope_scaling": "dynamic-yarn"}, ("dynamic-yarn", 4.0)),
    (RopeScaling("yarn", freq_scale=0.25), {"rope_scaling": "dynamic", "rope_freq_scale": 0.5}, ("dynamic", 2.0)),
    (RopeScaling(orig_ctx=512), {"rope_scaling": "dynamic"}, ("dynamic", 1.0)),
    (DYNAMIC_3, {"rope_scaling": "dynamic-yarn"}, ("dynamic-yarn", 3.0)),
    (DYNAMIC_3, {"rope_freq_base": 5.0}, ("dynamic", 3.0)),
    # and a static context has it too, if it scales
    (RopeScaling("dynamic", factor=4.0), {"rope_scaling": "yarn"}, ("yarn", 0.25)),
    (RopeScaling("dynamic", factor=4.0), {"rope_scaling": "none"}, ("none", 1.0)),
]


@pytest.mark.parametrize(("file", "options", "wanted"), UNDER)
def test_the_factor_of_a_context(file: RopeScaling, options: dict[str, object], wanted: tuple[str, float]) -> None:
    said = file.under(options).json()
    assert (said["scaling"], said.get("factor", said["freq_scale"])) == wanted
