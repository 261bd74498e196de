"""Hugging Face caches as `hf download` and `llama-server -hf` make them."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Repo:
    def __init__(self, cache: Path, name: str, refs: tuple[tuple[str, str], ...] = (("main", COMMIT),)) -> None:
        self.folder = cache / f"models--{name.replace('/', '--')}"
        for ref, commit in refs:
            (self.folder / "refs").mkdir(parents=True, exist_ok=True)
            (self.folder / "refs" / ref).write_text(commit)

    def add(self, name: str, content: bytes = b"", *, commit: str = COMMIT) -> Path:
        """A file as `hf download` leaves it: a link to a blob. Returns the link."""
        blob = self.folder / "blobs" / f"{len(list(self.folder.glob('blobs/*'))):064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = self.folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
        return link
