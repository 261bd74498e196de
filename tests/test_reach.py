"""Which layers rotate over a whole context, from headers of models whose pattern is known from llama.cpp's source."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from lrope_gguf.cli import main
from lrope_gguf.model_info import read_model


def reach(path: Path, architecture: str, n_layer: int, **keys: int | list[int] | list[bool]) -> tuple[int | None, ...]:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(n_layer)
    for name, value in keys.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_model(path).rope_reach


@pytest.mark.parametrize(
    ("architecture", "n_layer", "keys", "expected"),
    [
        ("llama", 3, {}, (None,) * 3),
        ("llama", 3, {"attention__sliding_window": 512}, (None,) * 3),  # llama.cpp has no window for it
        ("qwen2", 2, {}, (None,) * 2),
        ("gemma3", 7, {"attention__sliding_window": 512}, (512,) * 5 + (None, 512)),
        ("gemma2", 4, {}, (4096, None, 4096, None)),
        ("gpt-oss", 4, {"attention__sliding_window": 128}, (128, None, 128, None)),
        ("gemma4", 3, {"attention__sliding_window": 9, "attention__sliding_window_pattern": [True, False, True]},
         (9, None, 9)),
        ("gemma3", 4, {"attention__sliding_window": 9, "attention__sliding_window_pattern": 2}, (9, None, 9, None)),
        ("smollm3", 8, {}, (None, None, None, 0) * 2),
        ("llama4", 4, {}, (8192, 8192, 8192, 0)),
        ("exaone4", 4, {"attention__sliding_window": 4096}, (None,) * 4),  # only the model of 64 layers has windows
        ("cohere2", 4, {"attention__sliding_window": 4096}, (4096, 4096, 4096, 0)),
        ("qwen3next", 4, {"full_attention_interval": 4}, (0, 0, 0, None)),
        ("gpt2", 2, {}, (0, 0)),
        ("llama", 2, {"full_attention_interval": 2}, (None, None)),  # means nothing to it
        ("minimax-01", 8, {}, (0,) * 7 + (None,)),
        ("qwen35", 3, {"attention__recurrent_layers": [True, False, True]}, (0, None, 0)),
        ("granite", 2, {"rope__scaling__finetuned": False}, (0, 0)),
        ("granite", 2, {"rope__scaling__finetuned": True}, (None, None)),
        ("afmoe", 4, {}, (None, None, None, 0)),
        ("smallthinker", 4, {"attention__sliding_window": 9}, (0, 9, 9, 9)),
        ("smallthinker", 4, {}, (None,) * 4),
        ("maple", 2, {"attention__sliding_window": 9, "attention__sliding_window_pattern": [True, False]}, (9, 0)),
        ("baichuan", 40, {}, (0,) * 40),  # ALiBi
        ("llama", 2, {"rope__dimension_count": 0}, (0, 0)),
        ("lfm2", 3, {"attention__head_count_kv": [0, 2, 0]}, (0, None, 0)),
    ],
)  # fmt: skip
def test_reach(
    tmp_path: Path, architecture: str, n_layer: int, keys: dict[str, int], expected: tuple[int | None, ...]
) -> None:
    assert reach(tmp_path / "model.gguf", architecture, n_layer, **keys) == expected
    info = read_model(tmp_path / "model.gguf")
    assert info.layers_reaching(100) == tuple(i for i, r in enumerate(expected) if r is None or r >= 100)


def test_a_model_where_no_layer_rotates_is_refused_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    reach(path, "qwen3next", 3, full_attention_interval=4)
    assert main(["search", str(path), "--output", str(tmp_path / "best.json")]) == 1
    assert "none of its layers rotates" in capsys.readouterr().err
    assert not (tmp_path / "best.study").exists()
