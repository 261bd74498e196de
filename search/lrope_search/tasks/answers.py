"""Whether a text contains an answer."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Return ``text`` in lower case, without ASCII punctuation and English articles, words one blank apart.

    The normalization of SQuAD's evaluation (Rajpurkar et al., arXiv 1606.05250), which "Lost in the Middle" uses
    for multi-document question answering.
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def share(text: str, references: Sequence[str]) -> float:
    """Return how many of ``references``, of all of them, stand in ``text``, whatever the case; 0 to 1.

    ``string_match_all`` of RULER (Hsieh et al., arXiv 2404.06654).
    """
    text = text.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def holds(text: str, wordings: Iterable[str], *, normalized: bool = False) -> bool:
    """Whether ``text`` contains one of ``wordings``, whatever the case.

    ``normalized``: compare as `normalize` leaves them; a wording of which nothing is left is in no text.
    """
    if not normalized:
        return any(wording.lower() in text.lower() for wording in wordings)
    text = normalize(text)
    return any(wording in text for wording in map(normalize, wordings) if wording)
