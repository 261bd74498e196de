"""Which layers see a whole context, from headers of models whose pattern is known from llama.cpp's source."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gguf_fixtures import write_model

from lrope_gguf.cli import main
from lrope_gguf.model_info import read_factors, read_model


def reach(
    path: Path, architecture: str, n_layer: int, context_length: int = 512, **keys: int | list[int] | list[bool]
) -> tuple[int | None, ...]:
    given = {f"{architecture}.{name.replace('__', '.')}": value for name, value in keys.items()}
    write_model(path, architecture=architecture, block_count=n_layer, context_length=context_length, keys=given)
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
