"""The embedded model's vocabulary, by token id."""

from __future__ import annotations

from lrope_search.tasks.vocabulary import KEY_WORDS, VALUE_WORDS

BOS, EOS, N_SPECIAL = 0, 1, 2
OPEN = N_SPECIAL + ord("{")  # what a context begins with; as all single bytes a token anyway
CLOSE = N_SPECIAL + 256
CLOSE_TEXT = " }"
KEYS = CLOSE + 1
VALUES = KEYS + len(KEY_WORDS)
N_VOCAB = VALUES + len(VALUE_WORDS)


def words() -> tuple[str, ...]:
    """All words as they stand in a prompt, in the order of their tokens from `KEYS`."""
    return (*(f" {word}" for word in KEY_WORDS), *(f"={word}" for word in VALUE_WORDS))
