"""Layer factors in GGUF metadata, against the `gguf` package and byte by byte."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from support.gguf_fixtures import (
    LAYERS,
    header,
    names,
    number_pair,
    read_keys,
    read_tensors,
    string,
    text_pair,
    write_model,
)

from lrope_gguf import CurveFile, LropeError, read_factors, read_model, remove_factors, write_factors
from lrope_gguf import metadata as metadata_module
from lrope_gguf.cli import main
from lrope_gguf.curve import Curve
from lrope_gguf.gguf_file import GGUFFile
from lrope_gguf.rope_scaling import shortest

KEY = "llama.rope.scaling.layer_factors"
FACTORS = (1.0, 1.25, 0.75, 1.1)
STORED = tuple(float(np.float32(s)) for s in FACTORS)


def hand_made(path: Path, pairs: bytes, n_keys: int, rest: bytes = b"", *, version: int = 3, order: str = "<") -> Path:
    path.write_bytes(header(pairs, n_keys, version=version, order=order) + rest)
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_versions_and_nested_arrays(tmp_path: Path, version: int, order: str) -> None:
    nested = string(b"odd", order) + struct.pack(order + "IIQ", 9, 9, 3)
    nested += struct.pack(order + "IQ3H", 2, 3, 1, 2, 3) + struct.pack(order + "IQ", 8, 2)
    nested += string(b"a", order) + string(b"\xff\0", order) + struct.pack(order + "IQ", 9, 1) * 6
    nested += struct.pack(order + "IQ", 9, 0)  # eight levels, the most
    pairs = text_pair("general.architecture", "llama", order) + nested
    pairs += string(b"\xff\xfe key", order) + struct.pack(order + "I?", 7, True)
    pairs += number_pair("llama.block_count", LAYERS, order)
    path = hand_made(tmp_path / "m.gguf", pairs, 4, b"trailing", version=version, order=order)
    original = path.read_bytes()
    write_factors(path, FACTORS)
    assert read_model(path).version == version and read_factors(path) == STORED
    changed = path.read_bytes()
    assert changed.startswith(header(pairs, 6, version=version, order=order)) and changed.endswith(b"trailing")
    remove_factors(path)
    assert path.read_bytes() == original


def test_other_padding_than_zeros_comes_back(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", alignment=128)
    data = bytearray(model.read_bytes())
    with GGUFFile(model) as gguf:
        assert gguf.data_start > gguf.info_end
        data[gguf.info_end : gguf.data_start] = b"\xa5" * (gguf.data_start - gguf.info_end)
    model.write_bytes(data)
    write_factors(model, FACTORS)
    assert model.read_bytes() != data
    remove_factors(model)
    assert model.read_bytes() == data


def test_keys_of_another_program_are_replaced(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_array(KEY, [2.0] * LAYERS)
        writer.add_string("between", "others")
        writer.add_string("lrope.curve", "room for another document".ljust(1000))

    model = write_model(tmp_path / "m.gguf", add=add)
    tensors = read_tensors(model)
    plain = write_model(tmp_path / "plain.gguf", add=lambda writer: writer.add_string("between", "others"))
    assert read_factors(model) == (2.0,) * LAYERS
    assert read_model(model).fingerprint() == read_model(plain).fingerprint()
    shutil.copy(model, tmp_path / "copy.gguf")
    remove_factors(tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == plain.read_bytes()
    assert write_factors(model, FACTORS).how == "rewritten"
    keys = read_keys(model)
    assert list(keys)[-3:] == ["between", KEY, "lrope.curve"] and keys["between"] == "others"
    assert read_tensors(model) == tensors
    remove_factors(model)
    assert model.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("value", [[1.0, 2.0], [1, 2, 3, 4], [1.0, 1.0, math.nan, 1.0], [1.0, 0.0, 1.0, 1.0]], ids=str)
def test_unusable_stored_factors(tmp_path: Path, value: list[float]) -> None:
    model = write_model(tmp_path / "m.gguf", add=lambda writer: writer.add_array(KEY, value))
    info = read_model(model)
    assert info.factors is None and info.factors_error is not None and KEY in info.factors_error
    with pytest.raises(LropeError, match="write the factors again or remove them"):
        read_factors(model)
    write_factors(model, FACTORS)
    assert read_factors(model) == STORED


def test_a_document_that_does_not_fit_is_rewritten_and_still_removed_exactly(model: Path) -> None:
    original = model.read_bytes()
    write_factors(model, FACTORS)
    long = CurveFile(layer_factors=FACTORS, provenance="long " * 10_000).dumps(compact=True)
    assert write_factors(model, FACTORS, curve_json=long).how == "rewritten"
    assert read_model(model).curve_json == long
    assert write_factors(model, FACTORS[::-1]).how == "in place"
    remove_factors(model)
    assert model.read_bytes() == original


def test_first_write_keeps_tensor_data_on_its_place_in_the_page(tmp_path: Path) -> None:
    for alignment in (8, 32, 4096, 65536):
        model = write_model(tmp_path / "m.gguf", alignment=alignment)
        with GGUFFile(model) as gguf:
            before = gguf.data_start
        write_factors(model, FACTORS)
        with GGUFFile(model) as gguf:
            assert gguf.data_start > before
            assert (gguf.data_start - before) % max(4096, alignment) == 0


def test_in_place_is_synced_before_it_is_reported(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_factors(model, FACTORS)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(read_factors(model)))
    write_factors(model, FACTORS[::-1])
    assert synced == [STORED[::-1]]


def test_output_leaves_the_model_alone(model: Path) -> None:
    original, other = model.read_bytes(), model.with_name("other.gguf")
    other.write_bytes(b"old")
    other.chmod(0o640)
    result = write_factors(model, FACTORS, output=other)
    assert json.loads(read_keys(other)["lrope.curve"]) == {  # type: ignore[arg-type]
        "format": "lrope-curve", "version": 1, "layer_factors": list(FACTORS), "architecture": "llama",
    }  # fmt: skip
    assert result.path == other and read_factors(other) == STORED and model.read_bytes() == original
    assert other.stat().st_mode & 0o777 == 0o640
    assert read_model(other).fingerprint() == read_model(model).fingerprint()
    remove_factors(other, output=model.with_name("third.gguf"))
    assert model.with_name("third.gguf").read_bytes() == original and read_factors(other) == STORED


def test_output_that_is_the_model_is_the_model(model: Path) -> None:
    model.with_name("link.gguf").symlink_to(model)
    write_factors(model, FACTORS, output=model)
    inode = model.stat().st_ino
    assert write_factors(model, FACTORS[::-1], output=model.with_name("link.gguf")).how == "in place"
    assert model.stat().st_ino == inode


def test_symbolic_link_and_mode_are_kept(model: Path) -> None:
    original = model.read_bytes()
    (model.parent / "links").mkdir()
    link = model.parent / "links" / "l.gguf"
    link.symlink_to("../m.gguf")
    model.chmod(0o604)
    write_factors(link, FACTORS)
    assert link.is_symlink() and names(link.parent) == ["l.gguf"]
    assert read_factors(model) == STORED and model.stat().st_mode & 0o777 == 0o604
    remove_factors(link)
    assert link.is_symlink() and model.read_bytes() == original


def untouched(path: Path) -> tuple[int, ...]:
    """What a write would change; reading may change the time of access."""
    status = path.stat()
    return status.st_ino, status.st_mode, status.st_nlink, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def test_remove_without_factors_changes_nothing(model: Path) -> None:
    before = untouched(model)
    assert remove_factors(model).how == "unchanged"
    assert untouched(model) == before
    copy = model.with_name("copy.gguf")
    assert remove_factors(model, output=copy).how == "rewritten"
    assert copy.read_bytes() == model.read_bytes()


def fail_with(number: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["copy_file_range", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("to_output", [False, True])
def test_failures_leave_the_old_file_and_no_litter(
    model: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, to_output: bool
) -> None:
    original, output = model.read_bytes(), model.with_name("out.gguf")
    output.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail_with(number))
    with pytest.raises(LropeError, match=r"cannot be written \(.*\), nothing was changed; "):
        write_factors(model, FACTORS, output=output if to_output else None)
    assert model.read_bytes() == original and output.read_bytes() == b"old"
    assert names(model.parent) == ["m.gguf", "out.gguf"]


def test_too_little_space_is_seen_before_writing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.read_bytes()
    monkeypatch.setattr(metadata_module, "free_bytes", lambda _: 10)
    monkeypatch.setattr(metadata_module, "replacing", fail_with(0))
    with pytest.raises(LropeError, match=r"needs \d+ bytes in its directory, 10 are free"):
        write_factors(model, FACTORS)
    assert model.read_bytes() == original


def test_a_model_that_shrinks_while_it_is_copied(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shrink(*_: object, **__: object) -> int:
        os.truncate(model, 1000)
        return 0

    monkeypatch.setattr(os, "copy_file_range", shrink)
    with pytest.raises(LropeError, match="was shortened while being read, to 1000 bytes"):
        write_factors(model, FACTORS)
    assert names(model.parent) == ["m.gguf"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_copy_without_the_kernels_help(model: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    output = model.with_name("out.gguf")
    write_factors(model, FACTORS, output=output)
    expected = output.read_bytes()
    monkeypatch.setattr(os, "copy_file_range", fail_with(number))
    write_factors(model, FACTORS, output=output)
    assert output.read_bytes() == expected
    monkeypatch.delattr(os, "copy_file_range")
    write_factors(model, FACTORS, output=output)
    assert output.read_bytes() == expected


def test_write_protected_places(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.read_bytes()
    with pytest.raises(LropeError, match=r"Permission denied.*check the permissions"):
        monkeypatch.setattr(os, "open", fail_with(errno.EACCES))
        write_factors(model, FACTORS)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anything
    with pytest.raises(LropeError, match="is read-only"):
        write_factors(model, FACTORS)
    assert model.read_bytes() == original


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"format":"lrope-curve","version":1,"layer_factors":[NaN]}'])
def test_bad_curve_json(model: Path, text: str) -> None:
    original = model.read_bytes()
    with pytest.raises(LropeError, match="curve_json: "):
        write_factors(model, FACTORS, curve_json=text)
    assert model.read_bytes() == original


def test_multi_token_prediction_layers_keep_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", add=lambda writer: writer.add_nextn_predict_layers(1))
    assert read_model(model).n_layer == LAYERS - 1
    assert write_factors(model, (1.5, 1.25, 2)).factors == (1.5, 1.25, 2, 1)
    assert read_factors(model) == (1.5, 1.25, 2, 1)
    write_factors(model, (2, 2, 2, 1))
    with pytest.raises(LropeError, match="layer 3 belongs to a multi-token-prediction head"):
        write_factors(model, (2, 2, 2, 2))
    with pytest.raises(LropeError, match="2 factors for a model of 3 layers"):
        write_factors(model, (2, 2))


HEAD_TENSOR = f"blk.{LAYERS - 1}.nextn.eh_proj.weight"


def counted(path: Path, architecture: str = "deepseek4", tensor: str = HEAD_TENSOR, shard: int | None = None) -> Path:
    """A model that counts its last layer as a head's, and holds a tensor of it."""

    def add(writer: GGUFWriter) -> None:
        writer.add_uint32(f"{architecture}.nextn_predict_layers", 1)
        writer.add_tensor(tensor, np.ones((2, 2), np.float32))

    return write_model(path, architecture=architecture, add=add, shard=shard)


@pytest.mark.parametrize(
    ("architecture", "tensor", "n_layer"),
    [
        ("deepseek4", HEAD_TENSOR, LAYERS - 1),
        ("deepseek4", HEAD_TENSOR.replace("eh_proj", "enorm"), LAYERS),
        ("deepseek4", HEAD_TENSOR.replace(f".{LAYERS - 1}.", f".{LAYERS}."), LAYERS),
        ("deepseek4", "blk.0.attn_norm.weight", LAYERS),
        ("deepseek2", "blk.0.attn_norm.weight", LAYERS - 1),
    ],
)
def test_a_head_that_the_file_does_not_hold(architecture: str, tensor: str, n_layer: int, tmp_path: Path) -> None:
    """What llama.cpp makes of it: deepseek4 counts no head then, all others count it."""
    model = counted(tmp_path / "m.gguf", architecture, tensor)
    assert read_model(model).n_layer == n_layer
    write_factors(model, [1.5] * n_layer)
    assert read_factors(model) == (*[1.5] * n_layer, *[1.0] * (LAYERS - n_layer))


def test_a_head_in_another_shard(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    first = counted(path, tensor="blk.0.attn_norm.weight", shard=0)
    assert read_model(first).n_layer == LAYERS - 1  # who knows
    counted(path, tensor="blk.1.attn_norm.weight", shard=1)
    assert read_model(first).n_layer == LAYERS
    counted(path, shard=1)
    assert read_model(first).n_layer == LAYERS - 1


def test_a_search_s_document_fits_a_model_with_multi_token_prediction_layers(tmp_path: Path) -> None:
    """It lists one factor for each layer that was searched; its block count is that of the whole model."""
    model = write_model(tmp_path / "m.gguf", add=lambda writer: writer.add_nextn_predict_layers(1))
    points = ((0.0, 1.0), (0.5, 1.4), (1.0, 1.2))
    listed = tuple(round(float(s), 9) for s in Curve(points).factors(LAYERS - 1))
    CurveFile(points, listed, architecture="llama", block_count=LAYERS).save(tmp_path / "best.json")
    assert main(["write", str(model), "--curve", str(tmp_path / "best.json")]) == 0
    assert read_factors(model) == pytest.approx((*listed, 1.0), abs=1e-6)
    assert main(["show", str(model)]) == 0


def test_models_without_rope(tmp_path: Path) -> None:
    def off(architecture: str) -> Path:
        key = f"{architecture}.rope.scaling.finetuned"
        return write_model(tmp_path / "m.gguf", architecture=architecture, add=lambda w: w.add_bool(key, False))

    for architecture in ("gpt2", "bloom", "mamba", "rwkv7", "t5", "bert", "jina-bert-v2", "starcoder"):
        assert not read_model(write_model(tmp_path / "m.gguf", architecture=architecture)).has_rope
    assert not read_model(off("granitehybrid")).has_rope
    assert read_model(off("llama")).has_rope
    assert read_model(off("granitemoe")).has_rope  # its graph does not ask
    for block_count, rope in ((32, True), (40, False)):  # the larger one has ALiBi
        model = write_model(tmp_path / "m.gguf", architecture="baichuan", block_count=block_count)
        assert read_model(model).has_rope == rope
    assert read_model(write_model(tmp_path / "m.gguf", architecture="nomic-bert")).has_rope
    assert read_model(write_model(tmp_path / "m.gguf", architecture="brand-new")).has_rope
    assert not read_model(write_model(tmp_path / "m.gguf", add=lambda w: w.add_rope_dimension_count(0))).has_rope


def test_split_models(tmp_path: Path) -> None:
    first, second = (write_model(tmp_path / "m.gguf", shard=number) for number in (0, 1))
    before = second.read_bytes()
    write_factors(first, FACTORS)
    assert read_factors(first) == STORED and second.read_bytes() == before
    assert read_model(first).shards == 2
    write_factors(first, FACTORS, output=tmp_path / "out-00001-of-00002.gguf")


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    def fingerprint(**options: object) -> str:
        return read_model(write_model(tmp_path / "m.gguf", **options)).fingerprint()  # type: ignore[arg-type]

    one = fingerprint()
    assert one == fingerprint() and len(one) == 64
    assert len({one, fingerprint(seed=1), fingerprint(block_count=5), fingerprint(tensors=2)}) == 4
    model = write_model(tmp_path / "m.gguf")
    with model.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    assert read_model(model).fingerprint() != one


def test_block_sizes_are_ggmls() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    from lrope_gguf.gguf_file import _BLOCKS

    known = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {kind: _BLOCKS[kind] for kind in known} == known


@given(st.floats(2**-100, 2**100, width=32))
def test_shortest_is_the_same_float32(value: float) -> None:
    assert np.float32(shortest(value)) == np.float32(value)
    assert len(repr(shortest(value))) <= len(repr(value))
