"""Text from files, made safe to show."""

from __future__ import annotations


def printable(text: str, limit: int | None = None) -> str:
    """`text` with a mark for each control character, which could steer a terminal, and cut to `limit` characters."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"
