"""The embedded model: a small one of our own, on which position scaling visibly works (``models/README.md``)."""

from __future__ import annotations

from pathlib import Path

from lrope_gguf.errors import LropeError

NAME = "lrope-kv.gguf"
SHA256 = "3be565554f75caf287bd952d442c76fdd72dced76bc389727b1003329d6a4dee"


def embedded_model() -> Path:
    """Return the path of the embedded model, in the package or the source tree. Raises `LropeError`: it is missing."""
    here = Path(__file__).resolve().parent
    for path in (here / NAME, here.parents[2] / "models" / NAME):
        if path.is_file():
            return path
    raise LropeError(f"{here / NAME}: is missing; reinstall lrope-gguf")
