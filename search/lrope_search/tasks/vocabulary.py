"""The words of the embedded model: its vocabulary, and what ``kv.identifiers`` word makes contexts of."""

from __future__ import annotations

from collections.abc import Iterable

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)

KEY_WORDS = tuple(SYLLABLES[i % 70] + SYLLABLES[(29 * i + i // 70 + 7) % 70] for i in range(256))
"""Keys: 256 words of two syllables, such as ``badi``."""

VALUE_WORDS = tuple(SYLLABLES[i % 70] + _CONSONANTS[(9 * i + 5 * (i // 70)) % 14] for i in range(128))
"""Values: 128 words of one closed syllable, such as ``bab``."""


def word_context(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a context such as ``{ badi=bab mano=div }``."""
    return "{" + "".join(f" {key}={value}" for key, value in pairs) + " }"


def word_question(key: str) -> str:
    """Return the question for ``key``; the model answers it with ``=`` and the value."""
    return f" {key}"
