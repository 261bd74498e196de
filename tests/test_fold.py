"""Folded query scales: float64 products of what gguf-py reads, back to the bit, and refused in words where not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import foldable, hostile_gguf, kill_points
from support.commands import lrope_gguf
from support.foldable import (
    HALF,
    HEADS,
    LAYERS,
    OFFSETS,
    PLAIN,
    ROWS,
    SCALES,
    WIDTH,
    queries,
    raw,
    write,
    write_queries,
)
from support.gguf_fixtures import names

from lrope_gguf import CurveFile, LropeError, metadata, read_model, remove_factors, write_factors
from lrope_gguf.blocks import LAYOUTS, Corrections, Packer
from lrope_gguf.fold import Wanted
from lrope_gguf.gguf_file import GGUFFile
from lrope_gguf.metadata import plan_remove, plan_write

TYPES = (*OFFSETS, *PLAIN)
scales = st.floats(1 / 16, 16).map(lambda q: float(np.float32(q)))
magnitudes = st.sampled_from((1e-7, 3e-6, 2e-5, 1e-3, 0.1, 30.0))


def fold(path: Path, rows: Sequence[Sequence[float]] = SCALES, output: Path | None = None, **options: Any) -> Any:
    replace = options.pop("replace", False)
    wanted = Wanted(tuple(map(tuple, rows)), "best.json", replace)
    return write_factors(path, fold=wanted, output=output, **options)


def refusal(act: Callable[[], object], folder: Path) -> str:
    """The message of a refusal, one line, which leaves all files as they were."""
    before = kill_points.contents(folder)
    with pytest.raises(LropeError) as caught:
        act()
    assert kill_points.contents(folder) == before
    text = str(caught.value)
    assert "\n" not in text and "; " in text
    return text


def per_block(q: Sequence[float], blocks: int) -> np.ndarray[Any, Any]:
    return np.repeat(np.array(q), blocks // len(q))


# What is folded


@pytest.mark.parametrize("name", OFFSETS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(q=st.lists(scales, min_size=HEADS, max_size=HEADS), magnitude=magnitudes, seed=st.integers(0, 2**32))
def test_blocks_are_float64_products_and_come_back(
    name: str, q: list[float], magnitude: float, seed: int, tmp_path: Path
) -> None:
    assume(set(q) != {1.0})
    _, data, shape = queries(name)
    rng = np.random.default_rng(seed)
    given_scales = (rng.standard_normal((len(data), foldable.n_scales(name))) * magnitude).astype(np.float16)
    given_scales[:8] = np.array([0, -0.0, magnitude, magnitude, 6e-8, 6e-8, -6.2e-5, -6.2e-5])[:, None]
    foldable.set_scales(name, data, given_scales)
    path = write(tmp_path / "m.gguf", {"blk.1.attn_q.weight": (name, data, shape)})
    original, before = path.read_bytes(), raw(path)
    rounding = fold(path, [[1.0] * HEADS, q]).folding.rounding
    after = raw(path)
    assert {key: value.tobytes() for key, value in after.items() if key != "blk.1.attn_q.weight"} == {
        key: value.tobytes() for key, value in before.items() if key != "blk.1.attn_q.weight"
    }
    size = data.shape[1]
    old, new = (tensors["blk.1.attn_q.weight"].reshape(-1, size) for tensors in (before, after))
    # float64: the sum of all scales times q times what they contribute
    given, units = foldable.parts(name, old)
    of_block = per_block(q, len(old))[:, None]
    wanted = np.einsum("bs,bsi->bi", given * of_block, units)
    step = np.maximum(np.abs(given * of_block) * 2.0**-11, 2.0**-25)
    bound = np.einsum("bs,bsi->bi", step, np.abs(units)) + 1e-6 * np.abs(wanted) + 1e-30
    from gguf import quants

    got = quants.dequantize(new, foldable.kind(name)).astype(np.float64).reshape(wanted.shape)
    assert (np.abs(got - wanted) <= bound * 1.001).all()
    assert rounding.worst <= 2.0**-11 * 1.001 and rounding.scales == given.size
    # and nothing but the scales
    masked = [blocks.copy() for blocks in (old, new)]
    for blocks in masked:
        foldable.set_scales(name, blocks, np.zeros(1))
    assert (masked[0] == masked[1]).all()
    remove_factors(path)
    assert path.read_bytes() == original


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(q=st.lists(scales, min_size=HEADS, max_size=HEADS), magnitude=magnitudes)
def test_plain_weights_are_float64_products_and_come_back(
    name: str, q: list[float], magnitude: float, tmp_path: Path
) -> None:
    assume(set(q) != {1.0})
    _, data, shape = queries(name)
    if name != "BF16":
        data = (data * magnitude).astype(data.dtype)
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (name, data, shape)})
    original = path.read_bytes()
    result = fold(path, [q, [1.0] * HEADS])

    def values(raw_: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if name == "BF16":
            return (raw_.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return raw_.view(np.float16 if name == "F16" else np.float32).astype(np.float64)

    wanted = values(data) * np.repeat(q, ROWS)[:, None]
    got = values(raw(path)["blk.0.attn_q.weight"]).reshape(wanted.shape)
    assert (np.abs(got - wanted) <= np.abs(wanted) * HALF[name] * 1.001 + (2.0**-25 if name == "F16" else 0)).all()
    assert result.folding.rounding.worst <= HALF[name] * 1.001
    remove_factors(path)
    assert path.read_bytes() == original


def test_biases_and_every_head_in_its_rows(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "m.gguf", "F32")
    before = raw(path)
    fold(path)
    for name, data in raw(path).items():
        q = SCALES[int(name[4])] if name.startswith("blk.") else (1.0,) * HEADS
        old, new = (values.view(np.float32) for values in (before[name], data))
        if name.startswith("blk."):
            factors = np.repeat(np.array(q), ROWS).reshape(-1, *[1] * (old.ndim - 1))
            assert (new == (old.astype(np.float64) * factors).astype(np.float32)).all()
        else:
            assert (new == old).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ1_M", "F16", "BF16", "F32"])
def test_big_endian(name: str, tmp_path: Path) -> None:
    type_name, data, shape = queries(name)
    swapped = data.byteswap() if name in PLAIN else data.copy()
    if name in OFFSETS:
        foldable.set_scales(name, swapped, foldable.get_scales(name, data), ">")
        if name == "IQ1_M":
            words = data[:, -8:].copy().view("<u2")
            swapped[:, -8:] = words.astype(">u2").view(np.uint8)
    little = write(tmp_path / "little.gguf", {"blk.0.attn_q.weight": (type_name, data, shape)})
    big = write(tmp_path / "big.gguf", {"blk.0.attn_q.weight": (type_name, swapped, shape)}, big_endian=True)
    original = big.read_bytes()
    rows = [SCALES[0], [1.0] * HEADS]
    for path in (little, big):
        fold(path, rows)
    assert read_model(big).folded is not None
    want = raw(little)["blk.0.attn_q.weight"]
    got = next(t for t in GGUFReader(big).tensors if t.name == "blk.0.attn_q.weight").data.view(np.uint8).copy()
    if name in PLAIN:
        width = np.dtype(data.dtype).itemsize
        assert (got.reshape(-1, width)[:, ::-1] == want.reshape(-1, width)).all()
    else:
        sizes = data.shape[1]
        numbers = [foldable.get_scales(name, b.reshape(-1, sizes), o) for b, o in ((want, "<"), (got, ">"))]
        assert (numbers[0] == numbers[1]).all()
    remove_factors(big)
    assert big.read_bytes() == original


def fused(rows: int, name: str = "Q8_0") -> Mapping[str, Any]:
    return {"blk.0.attn_qkv.weight": queries(name, rows), "blk.0.attn_qkv.bias": vector(rows)}


def vector(n: int, seed: int = 1) -> tuple[str, Any, tuple[int, ...]]:
    return "F32", np.random.default_rng(seed).standard_normal(n, np.float32), (n,)


def changed_rows(before: Any, after: Any) -> list[int]:
    old, new = (np.atleast_2d(x) if x.ndim > 1 else x.reshape(-1, 4) for x in (before, after))
    return [int(i) for i in np.flatnonzero((old != new).any(1))]


def test_only_queries_of_fused_weights(tmp_path: Path) -> None:
    n = HEADS * ROWS
    path = write(tmp_path / "m.gguf", fused(n + 2 * 2 * ROWS), heads_kv=2, architecture="phi3")
    before, original = raw(path), path.read_bytes()
    fold(path, [[1.0, 1.5, 1.0, 1.5], [1.0] * HEADS])
    after = raw(path)
    wanted = [*range(ROWS, 2 * ROWS), *range(3 * ROWS, 4 * ROWS)]
    for name in ("blk.0.attn_qkv.weight", "blk.0.attn_qkv.bias"):
        assert changed_rows(before[name], after[name]) == wanted
    remove_factors(path)
    assert path.read_bytes() == original


def test_latent_queries(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q_a.weight": queries(rows=WIDTH), "blk.0.attn_q_b.weight": queries(rows=HEADS * 12)}
    tensors["blk.0.attn_q_a_norm.weight"] = vector(WIDTH)
    path = write(tmp_path / "m.gguf", tensors, architecture="deepseek2", heads_kv=1)
    before = raw(path)
    fold(path, [[1.5, 1.0, 1.0, 1.5], [1.0] * HEADS])
    after = raw(path)
    changed = {name: changed_rows(before[name], after[name]) for name in before}
    assert changed.pop("blk.0.attn_q_b.weight") == [*range(12), *range(36, 48)]
    assert not any(changed.values())


NORMS: dict[str, tuple[str, tuple[str, Any, tuple[int, ...]], int, dict[str, Any]]] = {
    "one weight": ("qwen3", vector(ROWS), HEADS * ROWS, {}),
    "with gates": ("qwen3next", vector(ROWS), 2 * HEADS * ROWS, {}),
    "of all heads": ("olmo2", vector(HEADS * ROWS), HEADS * ROWS, {}),
    "a row a head": (
        "stablelm", ("F32", np.arange(HEADS * ROWS, dtype=np.float32).reshape(HEADS, ROWS) + 1, (HEADS, ROWS)),
        HEADS * ROWS, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_normalized_queries(name: str, tmp_path: Path) -> None:
    architecture, norm, rows, options = NORMS[name]
    tensors = {"blk.0.attn_q.weight": queries(rows=rows), "blk.0.attn_q_norm.weight": norm}
    path = write(tmp_path / "m.gguf", tensors, architecture=architecture, **options)
    before, original = raw(path), path.read_bytes()
    alike = norm[2] == (ROWS,)
    q = [1.25] * HEADS if alike else [1.5, 1.0, 0.5, 2.0]
    if alike:
        said = refusal(lambda: fold(path, [[1.0, 1.0, 1.0, 2.0], [1.0] * HEADS]), tmp_path)
        assert "layer 0 normalizes its queries after attn_q" in said and "write without --fold" in said
    fold(path, [q, [1.0] * HEADS])
    after = raw(path)
    old, new = (x.pop("blk.0.attn_q_norm.weight").view(np.float32).astype(float).ravel() for x in (before, after))
    assert new == pytest.approx(old * np.repeat(q[:1] if alike else q, ROWS), rel=1e-7)
    assert all((before[key] == after[key]).all() for key in before)
    remove_factors(path)
    assert path.read_bytes() == original


# The file around


def test_what_show_says_and_what_stands_in_the_file(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "m.gguf", "Q4_K")
    curve = tmp_path / "best.json"
    CurveFile(layer_factors=(1.0, 1.5), query_scales=SCALES).save(curve)
    original = path.read_bytes()
    dry = lrope_gguf("write", path, "--curve", curve, "--fold", "--dry-run")
    assert path.read_bytes() == original and "folded into 4 tensors" in dry.stdout and not dry.returncode
    done = lrope_gguf("write", path, "--curve", curve, "--fold")
    assert "query scales from 0.0625 to 2.5 folded into 4 tensors, rounded by at most 4" in done.stdout
    said = lrope_gguf("show", path).stdout
    assert (
        "0.0625 to 2.5, in 4 of 8 heads and 2 of 2 layers other than 1; folded into the weights by lrope-gguf" in said
    )
    assert "from best.json, remove takes them out" in said and "llama-quantize keeps these scales" in said
    shown = json.loads(lrope_gguf("show", "--json", path).stdout)["folded"]
    assert shown["query_scales"] == [list(row) for row in SCALES] and shown["source"] == "best.json"
    fields = GGUFReader(path).fields
    assert all(fields[key].contents().isascii() for key in ("lrope.folded", "lrope.folded.before"))
    again = lrope_gguf("write", path, "--curve", curve, "--fold")
    assert again.returncode == 1 and "has query scales folded into it already (from best.json)" in again.stderr
    assert "restore blk.0.attn_q.weight" in lrope_gguf("remove", path, "--dry-run").stdout
    gone = lrope_gguf("remove", path)
    assert "written without layer factors and folded query scales" in gone.stdout and path.read_bytes() == original


def test_beside_scales_for_the_patched_runtime(tmp_path: Path) -> None:
    """Never both: what is folded goes before, and is not written again."""
    path, curve = write_queries(tmp_path / "m.gguf"), tmp_path / "best.json"
    CurveFile(query_scales=SCALES).save(curve)
    original, words = path.read_bytes(), ("write", path, "--curve", curve)
    assert lrope_gguf(*words).returncode == 0 and read_model(path).query_scales is not None
    assert lrope_gguf(*words, "--fold").returncode == 0
    info = read_model(path)
    assert info.query_scales is None and info.curve_json is None and info.folded is not None
    assert "has query scales folded into it; take them out" in lrope_gguf(*words).stderr
    assert lrope_gguf("remove", path).returncode == 0 and path.read_bytes() == original
    CurveFile(query_scales=SCALES, head_factors=[[1.5] * HEADS] * LAYERS).save(curve)
    assert lrope_gguf(*words, "--fold").returncode == 0
    info = read_model(path)
    assert info.query_scales is None and info.head_factors is not None
    assert "agrees with the factors" in lrope_gguf("show", path).stdout
    assert lrope_gguf("remove", path).returncode == 0 and path.read_bytes() == original


def test_factors_beside_a_fold_are_written_in_place(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "m.gguf")
    original = path.read_bytes()
    fold(path)
    folded = path.read_bytes()
    write_factors(path, (1.0, 1.5))
    assert write_factors(path, (1.5, 1.0)).how == "in place"
    assert read_model(path).folded is not None
    fold(path, [[2.0] * HEADS] * LAYERS, replace=True)
    assert read_model(path).factors == (1.5, 1.0)
    fold(path, replace=True)
    again = tmp_path / "again.gguf"
    remove_factors(path, output=again)
    assert again.read_bytes() == original
    fold(again)
    assert again.read_bytes() == folded
    # what is 1 in the new scales is as it was
    fold(again, [[1.0] * HEADS, SCALES[1]], replace=True)
    assert (raw(again)["blk.0.attn_q.weight"] == raw(path)["blk.0.attn_q.weight"]).all() is np.False_
    remove_factors(again)
    assert again.read_bytes() == original


def test_a_plan_is_what_is_done(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "m.gguf")
    wanted = Wanted(SCALES, "best.json")
    before = kill_points.contents(tmp_path)
    plan = plan_write(path, fold=wanted)
    assert kill_points.contents(tmp_path) == before
    result = write_factors(path, fold=wanted)
    assert (plan.path, plan.how, plan.bytes_written) == (result.path, result.how, result.bytes_written)
    assert plan_remove(path).bytes_written == remove_factors(path).bytes_written == len(before["m.gguf"])


def test_stores_are_never_changed(tmp_path: Path) -> None:
    store = tmp_path / "blobs"
    store.mkdir()
    path = write_queries(tmp_path / "m.gguf").rename(store / f"sha256-{'a' * 64}")
    assert "is in the store of Ollama" in refusal(lambda: fold(path), store)
    copy = tmp_path / "copy.gguf"
    fold(path, output=copy)
    assert read_model(copy).folded is not None


@pytest.mark.parametrize("name", OFFSETS)
def test_restoring_costs_at_most_three_percent(name: str, tmp_path: Path) -> None:
    rows = 1024
    tensor = queries(name, rows)
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": tensor}, layers=1, keys={})
    fold(path, [np.random.default_rng(3).uniform(0.7, 1.4, HEADS).tolist()])
    with GGUFFile(path) as gguf:
        entry = gguf.entries["lrope.folded.before"]
        text = gguf.read(entry.value, entry.end).rstrip(b" ")
    assert len(text) <= 0.03 * tensor[1].nbytes


@pytest.mark.parametrize("far", [False, True])
def test_corrections_are_packed_in_any_portions(far: bool) -> None:
    rng = np.random.default_rng(4)
    values = rng.integers(-1, 2, 1000).astype(np.int32)
    if far:
        values[rng.integers(0, 1000, 50)] = rng.integers(-(2**31), 2**31, 50)
        values[7:9] = -(2**31), 2**31 - 1
    packer = Packer()
    for part in np.split(values, [1, 6, 500]):
        packer.add(part)
    data = packer.packed()
    for size in (1, 3, 7, 1000):
        back = Corrections(data, 1000)
        assert (np.concatenate([back.take(min(size, 1000 - at)) for at in range(0, 1000, size)]) == values).all()
    for wrong in (data[:-1], b"", data[5:], Packer.packed.__doc__.encode()):  # type: ignore[union-attr]
        with pytest.raises(ValueError):
            Corrections(wrong, 1000)
    with pytest.raises(ValueError):
        Corrections(data, 1009)


def test_copies_by_other_tools(tmp_path: Path) -> None:
    path, copy = write_queries(tmp_path / "m.gguf"), tmp_path / "copy.gguf"
    before = raw(path)
    fold(path)
    tool = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--general-name", "x"]
    subprocess.run([*tool, path, copy], check=True, capture_output=True)
    assert (raw(copy)["blk.0.attn_q.weight"] == raw(path)["blk.0.attn_q.weight"]).all()
    remove_factors(copy)
    assert all((raw(copy)[name] == data).all() for name, data in before.items())


# Split models


def write_split(folder: Path) -> Path:
    first = write_queries(folder / "s.gguf", layers=[], shard=(0, 3))
    for layer in range(LAYERS):
        write_queries(folder / "s.gguf", layers=[layer], shard=(layer + 1, 3))
    return first


def test_split_models(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    whole = write_queries(tmp_path / "whole.gguf")
    before = kill_points.contents(tmp_path)
    fold(first)
    fold(whole)
    wanted, got = raw(whole), {}
    for path in tmp_path.glob("s-*.gguf"):
        got |= raw(path)
    assert all((got[key] == value).all() for key, value in wanted.items() if key.startswith("blk."))
    after = kill_points.contents(tmp_path)
    assert {name for name in after if after[name] == before[name]} == set()
    other = tmp_path / "other"
    other.mkdir()
    remove_factors(first, output=other / "t-00001-of-00003.gguf")
    assert {name.replace("t-", "s-"): data for name, data in kill_points.contents(other).items()} == {
        name: data for name, data in before.items() if name.startswith("s-")
    }
    fold(first, [SCALES[0], [1.0] * HEADS], replace=True)
    assert (tmp_path / "s-00003-of-00003.gguf").read_bytes() == before["s-00003-of-00003.gguf"]
    remove_factors(first)
    remove_factors(whole)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_missing_file_of_a_split_model(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    (tmp_path / "s-00003-of-00003.gguf").unlink()
    assert "s-00003-of-00003.gguf: no such file" in refusal(lambda: fold(first), tmp_path)


@pytest.mark.skipif(not kill_points.can_trace(), reason="processes cannot be traced here")
@pytest.mark.parametrize("act", ["fold", "remove"])
def test_killed_between_the_files_of_a_split_model(act: str, tmp_path: Path) -> None:
    first = write_split(tmp_path)
    original = kill_points.contents(tmp_path)
    fold(first)
    folded = kill_points.contents(tmp_path)
    start, do = (original, lambda: fold(first)) if act == "fold" else (folded, lambda: remove_factors(first))

    def reset() -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, data in start.items():
            (tmp_path / name).write_bytes(data)

    reset()
    stops = kill_points.trace(do).stops
    mixed = 0
    for stop in [*range(1, stops - 120, 41), *range(stops - 120, stops + 1, 7)]:
        reset()
        kill_points.trace(do, kill_at=stop)
        found = kill_points.contents(tmp_path)
        mixed += (
            sum({found[name] == state[name] for name in original} == {True, False} for state in (original, folded)) > 1
        )
        try:
            fold(first, replace=True)  # goes on after either
        except LropeError as error:
            raise AssertionError(stop) from error
        assert {name: (tmp_path / name).read_bytes() for name in folded} == folded
        remove_factors(first)
        assert kill_points.contents(tmp_path) == original
    assert mixed


# Bad input


def bad(folder: Path, **options: Any) -> Path:
    return write_queries(folder / "m.gguf", **options)


Q = [[1.5] * HEADS] * LAYERS
BAD: dict[str, tuple[Callable[[Path], Path], Sequence[Sequence[float]], str]] = {
    "too few layers": (bad, Q[:1], "1 lists of query_scales for a model of 2 layers"),
    "too few heads": (bad, [[1.5] * 3, [1.0] * 4], "query_scales of layer 0 has 3 numbers, but that layer has 4 heads"),
    "too high": (bad, [[17.0] * 4, [1.0] * 4], "the query scale of head 0 in layer 0 is 17, beyond 1/16 to 16"),
    "not a number": (bad, [[float("nan")] * 4, [1.0] * 4], "best.json: the query scale of head 0 in layer 0 is NaN"),
    "nothing": (bad, [[1.0] * 4] * 2, "all its query scales are 1"),
    "no attention there": (lambda f: bad(f, layers=[0]), Q, "layer 1 has no attention"),
    "unknown": (lambda f: bad(f, architecture="llama4"), Q, "how 'llama4' makes its queries is not known"),
    "clamped": (lambda f: bad(f, keys={"llama.attention.clamp_kqv": 8.0}), Q, "limits its queries"),
    "layer without keys": (lambda f: bad(f, heads_kv=[4, 0]), Q, "layer 1 has no attention"),
    "MXFP4": (
        lambda f: write(
            f / "m.gguf",
            {"blk.0.attn_q.weight": ("MXFP4", np.zeros((32 * 8, 17), np.uint8), (32, 256))},
        ),
        [[1.5] * HEADS, [1.0] * HEADS],
        "blk.0.attn_q.weight has a type without 16-bit scales",
    ),
    "fused of another shape": (
        lambda f: write(f / "m.gguf", fused(4 * 32), architecture="phi3"), Q, "attn_qkv.weight has another shape",
    ),
    "recurrent": (
        lambda f: write(f / "m.gguf", fused(3 * 32), architecture="qwen3next"), Q, "layer 0 has no attention",
    ),
    "rows": (
        lambda f: write(f / "m.gguf", {"blk.0.attn_q.weight": queries(rows=33)}), Q, "attn_q.weight has another shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path) -> None:
    make, rows, message = BAD[name]
    path = make(tmp_path)
    assert message in refusal(lambda: fold(path, rows), tmp_path)


def test_bad_scales(tmp_path: Path) -> None:
    for value, message in ((60000.0, "too large for its type after folding"), (np.inf, "not a finite number")):
        name, data, shape = queries("Q8_0")
        foldable.set_scales(name, data, np.array([value]))
        path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (name, data, shape)})
        assert message in refusal(lambda path=path: fold(path, [[1.2] * HEADS, [1.0] * HEADS]), tmp_path)


def test_usage(tmp_path: Path) -> None:
    path, curve = write_queries(tmp_path / "m.gguf"), tmp_path / "best.json"
    CurveFile(layer_factors=(1.0, 1.5)).save(curve)
    for words, status, message in (
        (["--factors", "1,1", "--fold"], 2, "argument --fold: needs --curve FILE"),
        (["--curve", curve, "--replace"], 2, "argument --replace: needs --fold"),
        (["--curve", curve, "--fold", "--preset", "x.ini"], 2, "not allowed with argument --fold"),
        (["--curve", curve, "--fold"], 1, "has no query_scales to fold"),
    ):
        done = lrope_gguf("write", path, *words)
        assert done.returncode == status and message in done.stderr, done.stderr


def test_changed_since(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "m.gguf")
    fold(path)
    data = bytearray(path.read_bytes())
    with GGUFFile(path) as gguf:
        start = gguf.data_start + gguf.queries["blk.1.attn_q.weight"].offset
    data[start + 999] ^= 1
    path.write_bytes(data)
    for act in (lambda: remove_factors(path), lambda: fold(path, replace=True)):
        assert "blk.1.attn_q.weight was changed after query scales were folded into it" in refusal(act, tmp_path)
    # as llama-quantize leaves it: the keys copied, the tensors of another type
    fields = GGUFReader(path).fields
    kept = {key: fields[key].contents() for key in ("lrope.folded", "lrope.folded.before")}
    other = write_queries(tmp_path / "other.gguf", "Q8_0", keys=kept)
    said = lrope_gguf("show", other).stdout
    assert "for good: blk.0.attn_q.weight has another type now" in said
    assert "blk.0.attn_q.weight was changed" in refusal(lambda: remove_factors(other), tmp_path)


# Damage


def test_damage_to_what_is_stored_loses_nothing_quietly(tmp_path: Path) -> None:
    path = write_queries(tmp_path / "m.gguf")
    original = path.read_bytes()
    fold(path)
    folded, rng = path.read_bytes(), random.Random(5)
    with GGUFFile(path) as gguf:
        spans = [gguf.entries[key] for key in ("lrope.folded", "lrope.folded.before")]
        used = [len(gguf.read(entry.value, entry.end).rstrip(b" ")) for entry in spans]
    refused = 0
    for _ in range(300):
        data = bytearray(folded)
        entry, length = rng.choice([*zip(spans, used, strict=True)])
        at = entry.value + rng.randrange(length)
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), ord(rng.choice('0123456789"[]{},:aA='))))
        path.write_bytes(data)
        try:
            read_model(path)
            remove_factors(path)
        except LropeError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert path.read_bytes() == original, at
        assert names(tmp_path) == ["m.gguf"]
    assert refused > 150


def test_fuzzing(tmp_path: Path) -> None:
    seeds = []
    for i, options in enumerate(({}, {"big_endian": True}, {"name": "Q8_0", "architecture": "qwen2"})):
        path = write_queries(tmp_path / f"{i}.gguf", **options)
        fold(path)
        seeds.append(hostile_gguf.load(path))
    path, other = tmp_path / "x.gguf", tmp_path / "o.gguf"
    seen = {"done": 0, "refused": 0}
    for number in range(400):
        path.write_bytes(hostile_gguf.mutant(seeds, 11, number))
        for act in (
            lambda: lrope_gguf("show", path),
            lambda: remove_factors(path, output=other),
            lambda: fold(path, output=other, replace=True),
        ):
            try:
                act()
                seen["done"] += 1
            except LropeError as error:
                assert "\n" not in str(error) and str(error).startswith((str(path), "best.json")), error
                seen["refused"] += 1
    assert min(seen.values()) > 50, seen


@contextmanager
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is written to the disk comes back with a bit changed."""
    real = metadata.write_all

    def write_wrong(file: Any, data: Any) -> None:
        data = bytearray(data)
        data[len(data) // 2] ^= 1
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "write_all", write_wrong)
        yield


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_queries(tmp_path / "m.gguf")
    with failing_disk(monkeypatch):
        assert "is not read back as it was written, nothing was changed" in refusal(lambda: fold(path), tmp_path)


def test_layouts_are_those_of_gguf_py() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, layout in LAYOUTS.items():
        known = {member.value: member for member in GGMLQuantizationType}.get(number)
        if known is not None:
            assert known.name == layout.name and GGML_QUANT_SIZES[known] == (layout.items, layout.size)
