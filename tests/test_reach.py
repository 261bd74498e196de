"""Which layers see a whole context, from headers of models whose pattern is known from llama.cpp's source."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from lrope_gguf.cli import main
from lrope_gguf.model_info import read_factors, read_model


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
    return read_model(path).windows


@pytest.mark.parametrize(
    ("architecture", "n_layer", "keys", "expected"),
    [
        ("llama", 3, {}, (None,) * 3),
        ("llama", 3, {"attention__sliding_window": 512}, (None,) * 3),  # llama.cpp has no window for it
        ("gemma3", 7, {"attention__sliding_window": 512}, (512,) * 5 + (None, 512)),
        ("gemma2", 4, {}, (4096, None, 4096, None)),
        ("gpt-oss", 4, {"attention__sliding_window": 128}, (128, None, 128, None)),
        ("gemma4", 3, {"attention__sliding_window": 9, "attention__sliding_window_pattern": [True, False, True]},
         (9, None, 9)),
        ("gemma3", 4, {"attention__sliding_window": 9, "attention__sliding_window_pattern": 2}, (9, None, 9, None)),
        ("llama4", 4, {}, (8192, 8192, 8192, None)),
        ("exaone4", 4, {"attention__sliding_window": 4096}, (None,) * 4),  # only the model of 64 layers has windows
        ("cohere2", 4, {"attention__sliding_window": 4096}, (4096, 4096, 4096, None)),
        ("smallthinker", 4, {"attention__sliding_window": 9}, (None, 9, 9, 9)),
        ("smallthinker", 4, {}, (None,) * 4),
    ],
)  # fmt: skip
def test_windows(
    tmp_path: Path, architecture: str, n_layer: int, keys: dict[str, int], expected: tuple[int | None, ...]
) -> None:
    assert reach(tmp_path / "model.gguf", architecture, n_layer, **keys) == expected


GEMMA = {"attention__sliding_window": 512, "context_length": 2048}
MOVED = [
    ("llama", 4, {}, (0, 1, 2, 3), "all 4 layers"),
    ("gemma3", 7, GEMMA, (5,), "1 of 7 layers, those that see the whole context"),
    ("gemma3", 7, GEMMA | {"context_length": 512}, tuple(range(7)), "all 7 layers"),  # no longer than the window
    ("phi3", 2, GEMMA, (0, 1), "all 2 layers"),
    ("brand-new", 2, {}, (0, 1), "all 2 layers"),  # names no window
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "n_layer", "keys", "layers", "words"), MOVED)
def test_write_uniform_moves_the_layers_that_a_search_moves(
    tmp_path: Path, architecture: str, n_layer: int, keys: dict[str, int], layers: tuple[int, ...], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "model.gguf"
    reach(path, architecture, n_layer, **keys)
    for options in (["--dry-run"], []):
        assert main(["write", str(path), "--uniform", "1.25", *options]) == 0
        assert f"layer factor 1.25 in {words}" in capsys.readouterr().out
    assert read_factors(path) == tuple(1.25 if layer in layers else 1.0 for layer in range(n_layer))
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert (f"in {len(layers)} of {n_layer} layers other than 1" in shown) == (len(layers) < n_layer)
    assert ("1 of them see the whole context: 5" in shown) == (len(layers) == 1)
    # a list reaches every layer
    assert main(["write", str(path), "--factors", ",".join(["1.25"] * n_layer)]) == 0
    assert read_factors(path) == (1.25,) * n_layer


UNTOLD = [
    ("brand-new", GEMMA, "does not tell which layers of 'brand-new' have the sliding window of brand-new.attention"),
    ("lfm2", GEMMA, "does not tell which layers of 'lfm2'"),
    ("gemma3", GEMMA | {"attention__sliding_window_pattern": [True] * 3}, "no layer sees the whole context"),
]


@pytest.mark.parametrize(("architecture", "keys", "message"), UNTOLD)
def test_write_uniform_asks_where_the_header_does_not_tell(
    tmp_path: Path, architecture: str, keys: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    reach(path, architecture, 3, **keys)
    before = path.read_bytes()
    assert main(["write", str(path), "--uniform", "1.25"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.endswith("; give one factor per layer with --factors")
    assert path.read_bytes() == before
    assert main(["show", str(path)]) == 0


def test_a_uniform_factor_is_what_a_search_measured(tmp_path: Path) -> None:
    """Gemma 3 270M: the winner of its study is the uniform factor 1.25, on 3 of 18 layers."""
    path = tmp_path / "uniform.gguf"
    reach(path, "gemma3", 18, attention__sliding_window=512, context_length=32768)
    assert main(["write", str(path), "--uniform", "1.25"]) == 0
    assert read_factors(path) == tuple(1.25 if layer in (5, 11, 17) else 1.0 for layer in range(18))
