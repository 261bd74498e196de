"""Kinds of keys and values of generated contexts, and how a prompt words them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from .vocabulary import KEY_WORDS, VALUE_WORDS, word_context, word_question


class Wording(Protocol):
    """How a prompt puts pairs and asks for one."""

    @property
    def lead(self) -> str:
        """What comes between question and value."""

    def prefix(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return the context."""

    def question(self, key: str) -> str:
        """Return the question that follows the context."""


class JsonWording:
    """The benchmark's prompt ("Lost in the Middle", Liu et al., arXiv 2307.03172, figure 6): a JSON object."""

    lead = ' "'

    def prefix(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return the task and the JSON object."""
        records = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
        task = "Extract the value corresponding to the specified key in the JSON object below."
        return f"{task}\n\nJSON data:\n{{{records}}}\n\n"

    def question(self, key: str) -> str:
        """Return the key, and the words before the value."""
        return f'Key: "{key}"\nCorresponding value:'


class WordWording:
    """The prompt that the embedded model was trained on: ``{ badi=bab mano=div } mano``, and it answers ``=div``."""

    lead = "="

    def prefix(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return the pairs in braces."""
        return word_context(pairs)

    def question(self, key: str) -> str:
        """Return the key alone."""
        return word_question(key)


JSON_WORDING = JsonWording()


class Identifiers(Protocol):
    """A kind of keys and values."""

    @property
    def most(self) -> int | None:
        """Distinct keys that there are, None if as many as wanted."""

    @property
    def description(self) -> str:
        """What they are, for help."""

    @property
    def wording(self) -> Wording:
        """How a prompt puts them."""

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of key and value, their keys distinct; only ``generator`` decides."""


class Uuids:
    """Keys and values are random UUIDs (version 4), as in the benchmark."""

    most = None
    description = "UUIDs, as in the benchmark"
    wording = JSON_WORDING

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of UUIDs."""
        data = generator.bytes(32 * n)
        ids = [str(uuid.UUID(bytes=data[i : i + 16], version=4)) for i in range(0, len(data), 16)]
        return list(zip(ids[::2], ids[1::2], strict=True))


class Numbers:
    """Keys of four digits and values of three, for models too small to copy a UUID."""

    most = 9000
    description = "keys of 4 digits and values of 3, for small models"
    wording = JSON_WORDING

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of numbers, at most `most`."""
        keys = generator.choice(self.most, n, replace=False) + 1000
        values = generator.integers(100, 1000, n)
        return [(str(key), str(value)) for key, value in zip(keys, values, strict=True)]


class Words:
    """Words of the embedded model's vocabulary; no other model knows its prompt."""

    most = len(KEY_WORDS)
    description = "words of the embedded model"
    wording = WordWording()

    def pairs(self, generator: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """Return ``n`` pairs of words, at most `most`."""
        keys = generator.choice(self.most, n, replace=False)
        values = generator.integers(len(VALUE_WORDS), size=n)
        return [(KEY_WORDS[key], VALUE_WORDS[value]) for key, value in zip(keys, values, strict=True)]


IDENTIFIERS: MappingProxyType[str, Identifiers] = MappingProxyType(
    {"uuid": Uuids(), "number": Numbers(), "word": Words()}
)
"""The kinds by their names on the command line; the first is the default."""


def describe() -> str:
    """Return what each kind is, in a line."""
    return "; ".join(f"{name}: {kind.description}" for name, kind in IDENTIFIERS.items())
