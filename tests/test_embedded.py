"""The embedded model as a file: what it is, and that it is the one that the card describes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lrope_gguf import read_model
from lrope_gguf.errors import LropeError
from lrope_search.demo import model as embedded
from lrope_search.tasks import KeyValueTask, TokenLimit
from lrope_search.tasks.vocabulary import KEY_WORDS, VALUE_WORDS

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
