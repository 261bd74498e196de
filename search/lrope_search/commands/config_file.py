"""The file of ``--config``: TOML, each of whose keys is a setting; and what ``--print-config`` writes."""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..settings import Setting, Settings
from .given import Given, no_such

_LINE_AT = re.compile(r"\(at line (\d+), column \d+\)$")
_MOST_BYTES = 1 << 20


def read_config(path: str, known: Mapping[str, Setting]) -> dict[str, Given]:
    """Return what a file says of ``known`` settings, by their dotted names.

    Raises `LropeError`: it cannot be read, is not valid TOML, or has a key that is unknown, given twice, or of a wrong
    type; names the line.
    """
    try:
        data = Path(path).read_bytes()
        if len(data) > _MOST_BYTES:
            raise LropeError(f"--config {path}: has {len(data)} bytes, too many for settings; give another file")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise LropeError(f"--config {path}: cannot be read ({error.strerror}); give a TOML file") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LropeError(f"{path}:{line}: is not UTF-8 text; give a TOML file") from None
    text = text.replace("\r\n", "\n")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _malformed(path, text, error) from None
    lines: dict[str, int] = {}
    for key, line in key_lines(text):
        lines.setdefault(key, line)
    return {key: _given(path, lines, key, value, known) for key, value in _leaves(document, known)}


def key_lines(text: str) -> Iterator[tuple[str, int]]:
    """Yield each key of a TOML text, dotted, with its line, in order, up to what is no TOML; tables end with a dot."""
    lines, table, begin = text.split("\n"), "", 0
    for end in range(1, len(lines) + 1):
        try:
            value: Any = tomllib.loads("\n".join(lines[begin:end]))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            if "at end of document" in str(error):  # a value that goes on in the next line
                continue
            return
        parts, is_table = [], lines[begin].lstrip().startswith("[")
        while isinstance(value, dict) and len(value) == 1:
            ((part, value),) = value.items()
            parts.append(part)
            value = value[0] if is_table and isinstance(value, list) and value else value
        if is_table:
            table = f"{'.'.join(parts)}."
            yield table, begin + 1
        elif parts:
            yield table + ".".join(parts), begin + 1
        begin = end


def _malformed(path: str, text: str, error: Exception) -> LropeError:
    seen: dict[str, int] = {}
    for key, line in key_lines(text):
        if key in seen:
            what = f"table [{key[:-1]}]" if key.endswith(".") else key
            return LropeError(f"{path}:{line}: {what} is given twice, first in line {seen[key]}; leave out one of them")
        seen[key] = line
    if isinstance(error, RecursionError):
        return LropeError(f"--config {path}: is nested too deeply; settings need one level of tables")
    place = _LINE_AT.search(str(error))
    line = int(place[1]) if place else text.count("\n") + 1
    reason = _LINE_AT.sub("", str(error)).removesuffix("(at end of document)").strip()
    return LropeError(f"{path}:{line}: is not valid TOML ({reason})")


def _leaves(document: Mapping[str, Any], known: Mapping[str, Setting], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known and value:
            yield from _leaves(value, known, f"{key}.")
        elif not (isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known)):
            yield key, value


def _given(path: str, lines: Mapping[str, int], key: str, value: Any, known: Mapping[str, Setting]) -> Given:
    line, above = lines.get(key), key
    while line is None and above:  # within an inline table, or in none at all
        above = above.rpartition(".")[0]
        line = lines.get(above, lines.get(f"{above}."))
    where = f"{path}:{line or 1}: {key}"
    if key not in known:
        raise no_such(where, key, known)
    return Given(where, value)


def printed(first: str, shared: Iterable[type[Settings]], tables: Iterable[tuple[str, str, Iterable[Setting]]]) -> str:
    """Return a TOML text with all settings and their defaults, each with a comment.

    Args:
        first: What stands at its beginning.
        shared: Settings that stand before all tables.
        tables: Of each its name, a comment and its settings.
    """
    parts = [_comment(first)]
    parts += [_entry(one) for kind in shared for one in kind.settings()]
    for name, text, settings in tables:
        parts.append(f"{_comment(text)}[{name}]\n")
        parts += [_entry(one) for one in settings]
    return "\n".join(parts)


def _entry(one: Setting) -> str:
    choices = f" ({', '.join(one.choices)})" if one.choices else ""
    unset = f"; default: {one.unset}" if one.unset else ""
    comment = _comment(f"{one.text}{choices}{unset}")
    if one.default is not None:
        return f"{comment}{one.key} = {_value(one.default)}\n"
    example = one.choices[0] if one.choices else one.metavar or "..."
    return f"{comment}# {one.key} = {_value(example) if one.kind is str else example}\n"


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 110))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{quoted}"'
    return repr(value)
