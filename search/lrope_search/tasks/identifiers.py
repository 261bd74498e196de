"""Kinds of keys and values of generated contexts, and how a prompt words them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from .vocabulary import KEY_WORDS, VALUE_WORDS, word_context, word_question

Pairs = Sequence[tuple[str, str]]
"""Keys with their values."""


@dataclass(frozen=True)
class Wording:
    """How a prompt puts pairs and asks for one: ``lead`` comes between question and value."""

    prefix: Callable[[Pairs], str]
    question: Callable[[str], str]
    lead: str


@dataclass(frozen=True)
class Identifiers:
    """A kind of keys and values.

    ``most``: distinct keys that there are; None: as many as wanted. ``pairs`` makes so many pairs of distinct keys, as
    the generator alone decides.
    """

    description: str
    most: int | None
    wording: Wording
    pairs: Callable[[np.random.Generator, int], Pairs]


def _json_prefix(pairs: Pairs) -> str:
    records = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    task = "Extract the value corresponding to the specified key in the JSON object below."
    return f"{task}\n\nJSON data:\n{{{records}}}\n\n"


def _json_question(key: str) -> str:
    return f'Key: "{key}"\nCorresponding value:'


def _uuids(generator: np.random.Generator, n: int) -> Pairs:
    data = generator.bytes(32 * n)
    ids = [str(uuid.UUID(bytes=data[i : i + 16], version=4)) for i in range(0, len(data), 16)]
    return list(zip(ids[::2], ids[1::2], strict=True))


def _numbers(generator: np.random.Generator, n: int) -> Pairs:
    keys = generator.choice(9000, n, replace=False) + 1000
    return [(str(key), str(value)) for key, value in zip(keys, generator.integers(100, 1000, n), strict=True)]


def _words(generator: np.random.Generator, n: int) -> Pairs:
    keys = generator.choice(len(KEY_WORDS), n, replace=False)
    values = generator.integers(len(VALUE_WORDS), size=n)
    return [(KEY_WORDS[key], VALUE_WORDS[value]) for key, value in zip(keys, values, strict=True)]


# the benchmark's prompt, figure 6 of "Lost in the Middle" (Liu et al., arXiv 2307.03172); the embedded model's own
_JSON, _WORDS = Wording(_json_prefix, _json_question, ' "'), Wording(word_context, word_question, "=")
IDENTIFIERS: Mapping[str, Identifiers] = MappingProxyType(
    {
        "uuid": Identifiers("UUIDs, as in the benchmark", None, _JSON, _uuids),
        "number": Identifiers("keys of 4 digits and values of 3, for small models", 9000, _JSON, _numbers),
        "word": Identifiers("words of the embedded model", len(KEY_WORDS), _WORDS, _words),
    }
)
"""The kinds by their names on the command line; the first is the default."""
DESCRIBED = "; ".join(f"{name}: {kind.description}" for name, kind in IDENTIFIERS.items())
