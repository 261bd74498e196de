"""What comes with the package: curves, valid and taken by name, and the embedded model, which is that of its card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from support.gguf_fixtures import write_model

from lrope_gguf import read_model
from lrope_gguf.cli import main
from lrope_gguf.curve import CurveFile, published
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import read_factors
from lrope_search.demo import model as embedded
from lrope_search.tasks import KeyValueTask, TokenLimit
from lrope_search.tasks.vocabulary import KEY_WORDS, VALUE_WORDS

ROOT = Path(__file__).parent.parent
NAME = "qwen2.5-coder-0.5b-instruct"


@pytest.mark.parametrize("name", published())
def test_a_curve_says_what_it_is_good_for(name: str) -> None:
    curve = CurveFile.load(published()[name])
    assert curve.architecture and curve.block_count and curve.layer_factors is not None
    said = curve.provenance
    assert isinstance(said, dict)
    assert said["verdict"] and said["tasks"] and said["command"].startswith("lrope-gguf search ")
    for tested in said["tested"]:
        assert tested["quantization"] and len(tested["fingerprint"]) == 64 and len(tested["gain"]) == 3
    assert said["study"].startswith("research/studies/") and (ROOT / said["study"]).is_file()


def test_write_takes_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = write_model(tmp_path / "fits.gguf", architecture="qwen2", block_count=24)
    assert main(["write", str(fits), "--curve", NAME]) == 0
    assert read_factors(fits) == pytest.approx(CurveFile.load(published()[NAME]).layer_factors)
    other = write_model(tmp_path / "other.gguf", architecture="llama", block_count=24)
    assert main(["write", str(other), "--curve", NAME]) == 1
    assert "is for architecture qwen2" in capsys.readouterr().err
    assert main(["write", str(fits), "--curve", "qwen"]) == 1
    assert (
        f"qwen: no such file or curve; the curves of lrope-gguf are {', '.join(published())}" in capsys.readouterr().err
    )


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "m.gguf", architecture="qwen2", block_count=24)
    CurveFile(layer_factors=(1.5,) * 24).save(tmp_path / NAME)
    assert json.loads((tmp_path / NAME).read_text())["format"] == "lrope-curve"
    assert main(["write", str(model), "--curve", NAME]) == 0
    assert read_factors(model) == (1.5,) * 24


CARD = Path(__file__).resolve().parent.parent / "models" / "README.md"


def test_is_the_model_of_the_card() -> None:
    data = embedded.embedded_model().read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert digest == embedded.SHA256
    assert digest in CARD.read_text(encoding="utf-8")
    assert len(data) < 1 << 20


def test_is_a_llama_without_factors() -> None:
    model = read_model(embedded.embedded_model())
    assert (model.architecture, model.block_count, model.context_length) == ("llama", 4, 512)
    assert model.rope_freq_base == 10000.0
    assert model.factors is None


def test_prompts_are_of_words() -> None:
    task = KeyValueTask(20, probes=5, positions="even", identifiers="word", seed=3)
    context = task.context("test", 1)
    words = context.prefix.split(" ")
    assert (words[0], words[-1], len(words)) == ("{", "}", 22)
    pairs = [word.split("=") for word in words[1:-1]]
    assert [probe.question for probe in context.probes] == [f" {pairs[i][0]}" for i in (0, 5, 10, 14, 19)]
    assert [probe.answer for probe in context.probes] == [pairs[i][1] for i in (0, 5, 10, 14, 19)]
    assert np.isin([key for key, _ in pairs], KEY_WORDS).all()
    assert len({*KEY_WORDS, *VALUE_WORDS}) == len(KEY_WORDS) + len(VALUE_WORDS)
    assert task.calibration().lead == "="


def test_as_many_words_as_fit() -> None:
    def count(text: str) -> int:
        return len(text.replace("=", " =").split())

    context = KeyValueTask(probes=3, identifiers="word", limit=TokenLimit(102, count)).context("test", 0)
    assert count(context.prefix + context.probes[0].question) == 101
    with pytest.raises(LropeError, match="256 pairs take only 515, and there are no more such keys"):
        KeyValueTask(probes=3, identifiers="word", limit=TokenLimit(600, count)).context("test", 0)
