"""Entries of the INI file that ``llama-server --models-preset`` reads: factors for a model that stays as it is.

An entry is a line ``[name]`` with lines ``option = value`` below it, options by the names of the server's own
(llama.cpp's ``common/preset.cpp`` has the grammar). Everything else in the file stays byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes, check_replaceable, locked

_MODEL = ("m", "model", "mu", "model-url", "dr", "docker-repo", "hf", "hfr", "hf-repo", "hff", "hf-file")
_MODEL_VARIABLES = ("MODEL", "MODEL_URL", "DOCKER_REPO", "HF_REPO", "HF_FILE")
MODEL = frozenset((*_MODEL, *(f"LLAMA_ARG_{name}" for name in _MODEL_VARIABLES)))
"""Options that say which model, by all their names."""

ROWS = {"head_factors": "rope-head-factors", "query_scales": "query-scales"}
"""The options of what heads have of their own, by its name in a curve file."""

FACTORS = frozenset(
    (
        *("rope-layer-factors", *ROWS.values()),
        *(f"LLAMA_ARG_{name}" for name in ("ROPE_LAYER_FACTORS", "ROPE_HEAD_FACTORS", "QUERY_SCALES")),
    )
)
"""Options that say which factors of layers and heads, and which query scales."""

SCALING = frozenset(
    (
        *("rope-scaling", "rope-scale", "rope-freq-scale", "yarn-orig-ctx"),
        *(f"LLAMA_ARG_{name}" for name in ("ROPE_SCALING_TYPE", "ROPE_SCALE", "ROPE_FREQ_SCALE", "YARN_ORIG_CTX")),
    )
)
"""Options that say how RoPE is scaled."""

CONTEXT = frozenset(("c", "ctx-size", "LLAMA_ARG_CTX_SIZE"))
"""Options that say how long a context is."""

OWN = MODEL | FACTORS
"""Options that an entry with factors replaces."""

SERVING = re.compile(r"rope-(?!layer|head)|yarn-|cache-type-|ct[kv]$|LLAMA_ARG_(ROPE_(?!LAYER|HEAD)|YARN_|CACHE_TYPE_)")
"""Options that decide whether factors fit: scaling, and types of the cache."""

_LINES = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
_HEADER = re.compile(r"\[[ \t]*([^]]+?)[ \t]*\][ \t]*(?:[;#].*)?")
_OPTION = re.compile(r"([a-zA-Z_][a-zA-Z0-9_.-]*)[ \t]*=[ \t]*(.*)")
_NOTHING = re.compile(r"[ \t]*(?:[;#].*)?")


def write_preset(
    path: str | os.PathLike[str], name: str, options: Mapping[str, str], replaced: Collection[str] = OWN
) -> dict[str, str]:
    """Write an entry, or update it where there is one of this name: whole or not at all.

    Args:
        path: The file; made if it is missing.
        name: The entry's name, by which requests ask for the model.
        options: Its options.
        replaced: Options that an entry which is there loses, besides those given.

    Returns:
        The options of `SERVING` that the entry had and keeps.

    Raises:
        LropeError: a name or value that such a file cannot hold, a line that llama.cpp would not read, or a file that
            cannot be read or written.
    """
    with locked(path):
        data, kept = _changed(path, name, options, replaced)
        atomic_write_bytes(path, data)
    return kept


def plan_preset(
    path: str | os.PathLike[str], name: str, options: Mapping[str, str], replaced: Collection[str] = OWN
) -> dict[str, str]:
    """Check and return all that `write_preset` does, without writing anything. Raises `LropeError`: as that."""
    return _changed(path, name, options, replaced)[1]


def _changed(
    path: str | os.PathLike[str], name: str, options: Mapping[str, str], replaced: Collection[str]
) -> tuple[bytes, dict[str, str]]:
    """The file's new content, and what its entry keeps of `SERVING`."""
    named = name.isprintable() and re.fullmatch(r"[^\[\]\s](?:[^\[\]]*[^\[\]\s])?", name)
    if not named or name in ("default", "*"):
        raise LropeError(f"--preset-name {name!r}: cannot name an entry; give one without brackets, not default or *")
    for key, value in options.items():
        if re.search(r"[;#\r\n]|^[ \t]|[ \t]$", value):
            raise LropeError(
                f"--preset {path}: {key} = {value!r} has a character that a preset cannot store (; or # or a line "
                "break, or a space at an end); rename that file, or give a link to it"
            )
    check_replaceable(path)
    try:
        text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise LropeError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    lines = _LINES.findall(text)
    start, end = _entry(path, lines, name)
    newline = "\r\n" if "\r\n" in text else "\n"
    written = [f"{key} = {value}{newline}" for key, value in options.items()]
    if start is None:
        if lines and not lines[-1].endswith(("\n", "\r")):
            lines[-1] += newline
        gap = [newline] if lines and lines[-1].strip() else []
        lines += [*gap, f"[{name}]{newline}", *written]
        return "".join(lines).encode("utf-8", "surrogateescape"), {}
    body: list[str] = []
    kept: dict[str, str] = {}
    for line in lines[start + 1 : end]:
        option = _OPTION.fullmatch(line.rstrip("\r\n"))
        if option is not None and (option[1] in replaced or option[1] in options):
            continue
        body.append(line)
        if option is not None and SERVING.match(option[1]):
            kept[option[1]] = re.split(r"[ \t]*[;#]", option[2])[0].strip()
    if not lines[start].endswith(("\n", "\r")):
        lines[start] += newline
    lines[start + 1 : end] = [*written, *body]
    return "".join(lines).encode("utf-8", "surrogateescape"), kept


def _entry(path: str | os.PathLike[str], lines: list[str], name: str) -> tuple[int | None, int]:
    """The lines of the entry, from its header on; of several of one name the last, which is what counts."""
    start, end = None, len(lines)
    for number, line in enumerate(lines):
        text = line.rstrip("\r\n")
        header = _HEADER.fullmatch(text)
        if header is None and not _OPTION.fullmatch(text) and not _NOTHING.fullmatch(text):
            raise LropeError(f"{path}: llama-server cannot read line {number + 1}; correct it or name another file")
        if header is not None and _canonical(header[1]) == _canonical(name):
            start, end = number, len(lines)
        elif header is not None and start is not None and end == len(lines):
            end = number
    return start, end


def _canonical(name: str) -> str:
    """A name as llama.cpp compares it: what follows the last colon is a quant, in capitals."""
    repo, colon, quant = name.rpartition(":")
    if not colon:
        return name
    match = re.search(r"[-.]([A-Z0-9_]+)$", quant, re.IGNORECASE)
    return f"{repo}:{(match[1] if match else quant).upper()}"
