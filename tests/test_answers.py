"""When a text holds an answer: plainly, and as "Lost in the Middle" compares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrope_search.tasks.answers import holds, normalize
from lrope_search.tasks.task import Probe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Who", "who"), ("An apple, a day;\tthe\nend!", "apple day end"),
        ("Theatre of A.B. Marx", "theatre of ab marx"), ("A", ""), ("*", ""),
        ("Wilhelm Conrad Röntgen", "wilhelm conrad röntgen"),
    ],
)  # fmt: skip
def test_normalized_texts(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text(max_size=40))
def test_normalizing_again_changes_no_punctuation_or_blank(text: str) -> None:
    once = normalize(text)
    assert not set(once) & set("!,.;'\"") and "  " not in once and once == once.strip()


def test_any_wording_will_do() -> None:
    probe = Probe(0.5, "?", "Wilhelm Röntgen", ("W. C. Röntgen",))
    assert probe.answered_by("It was wilhelm röntgen.") and probe.answered_by("W. C. RÖNTGEN")
    assert not probe.answered_by("Röntgen")
    assert not probe.answered_by("WC Röntgen")
    loose = Probe(0.5, "?", "Wilhelm Röntgen", ("W. C. Röntgen", "The"), normalized=True)
    assert loose.answered_by("it was the W.C. Röntgen") is False  # without punctuation: wc
    assert loose.answered_by("it was W. C. the Röntgen")
    assert not loose.answered_by("the end")
    assert not holds("C", ["C++"]) and holds("C", ["C++"], normalized=True)
