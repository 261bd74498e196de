"""Retrieval of one needle among similar ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import setting
from .identifiers import Pairs, Wording
from .kv import DEFAULT_PAIRS, KeyValueTask, PairsConfig


def _prefix(pairs: Pairs) -> str:
    needles = "\n".join(f"The secret code of {key} is {value}." for key, value in pairs)
    return f"Remember the secret codes in this text. You will be asked for one of them.\n\n{needles}\n\n"


def _question(key: str) -> str:  # asked outright, models answer in ever different ways
    return f"Complete this sentence: The secret code of {key} is"


class MultiKeyTask(KeyValueTask):
    """The task ``niah_multikey_3`` of RULER (Hsieh et al., arXiv 2404.06654, section 3), in words of our own.

    The haystack is made of needles alone, sentences with a UUID for a key and one for a value. RULER asks for one of
    them; here the probes ask for many, in all parts of the context, so that they share its prefix.
    """

    name = "multikey"
    wording = Wording(_prefix, _question, " ")
    _stream = (1,)


@dataclass(frozen=True, kw_only=True)
class MultiKeyConfig(PairsConfig):
    """Settings of `MultiKeyTask`."""

    section = "multikey"
    summary = "one needle among similar ones"
    task = MultiKeyTask

    keys: int | None = setting(None, "needles per context", metavar="N", least=1, unset=str(DEFAULT_PAIRS), option=True)
