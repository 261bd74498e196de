"""Changing a file's RoPE scaling: which keys change, how the model rotates then, and what a removal restores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import MAX_TEXT, Value
from lrope_gguf.layout import ORIGINAL_KEY, Base, Kept, Originals, Part
from lrope_gguf.rope_scaling import NAMES, Recipe, RopeScaling, Scaling, recipe, shortest


@dataclass(frozen=True)
class KeyChange:
    """What happens to one key.

    Attributes:
        key: the key.
        action: `"restore"`: the entry that stood there before returns.
        value: its new value, as text; empty where the key is removed.
        was: its old value, as text, where that is replaced.
    """

    key: str
    action: Literal["add", "replace", "keep", "remove", "restore"]
    value: str
    was: str | None = None


@dataclass(frozen=True)
class Rescaled:
    """A file's scaling after a change.

    Attributes:
        parts: our entries that say it.
        originals: the entries that they replace; None where `parts` and `lrope.original` stay as they are.
        recipe: the scaling in numbers; None where no new one is asked for.
        rope: how the model rotates then.
        changes: what happens to each key of the scaling.
    """

    parts: tuple[Part, ...]
    originals: Originals | None
    recipe: Recipe | None
    rope: RopeScaling
    changes: tuple[KeyChange, ...] = ()


def rescaled(base: Base, scaling: Scaling | None) -> Rescaled:
    """A file's scaling after a change, if one is given. Raises `LropeError`: the model cannot have this scaling."""
    gguf, order = base.gguf, base.gguf.order
    if scaling is None:
        parts = tuple(base.part(key) for key in base.scaling)
        return Rescaled(parts, None, None, RopeScaling.of(gguf, base.architecture))
    if scaling.kind == "none":
        rope = RopeScaling.of(base.values, base.architecture)
        return Rescaled((), Originals(), None, rope, _changes(base, {}, Originals()))
    made = recipe(scaling, base.values, base.architecture, gguf.path)
    wanted = made.values(order)
    new = {name: value for name, value in wanted.items() if _before(base, name) != value}
    replaced = []
    for at, name in ((at, name) for at, (key, _) in enumerate(base.keys) for name in new if key == base.key(name)):
        if (value := _before(base, name)) is None:
            raise LropeError(
                f"{gguf.path}: {base.key(name)} is neither a number nor a short string, so llama.cpp cannot read it; "
                "repair the file first"
            )
        replaced.append(Kept(at, name, value))
    parts = tuple(Part(base.key(name), value.entry(order, base.key(name))) for name, value in new.items())
    originals = Originals(tuple(new), tuple(replaced))
    values = base.values.with_values({base.key(name): value for name, value in new.items()})
    rope = RopeScaling.of(values, base.architecture)
    return Rescaled(parts, originals, made, rope, _changes(base, wanted, originals))


def restored(base: Base) -> tuple[KeyChange, ...]:
    """The entries that a removal puts back."""
    return tuple(change for change in _changes(base, {}, Originals()) if change.action == "restore")


def _single(base: Base, key: str) -> Value | None:
    """A key's number or short string; None where there is none."""
    value = base.gguf.value(key, MAX_TEXT + 1)
    return None if value is None or len(value.data) > MAX_TEXT else value


def _before(base: Base, name: str) -> Value | None:
    """What a key held before we wrote to the file; None where there was none, or no single value."""
    key = base.key(name)
    for kept in base.originals.replaced:
        if kept.name == name:
            return kept.value
    return None if key in base.ours else _single(base, key)


def _changes(base: Base, wanted: Mapping[str, Value], originals: Originals) -> tuple[KeyChange, ...]:
    """What happens to the file's keys where these values are our whole scaling."""
    order, gguf = base.gguf.order, base.gguf
    changes: list[KeyChange] = []
    action: Literal["add", "replace", "keep"]
    for name in NAMES:
        key, before = base.key(name), _before(base, name)
        has = key in gguf.entries
        now = _single(base, key)
        then = wanted.get(name, before)
        shown = "" if then is None else _text(then, order)
        was = _text(now, order) if now is not None else "an array" if has else None
        if name in wanted:
            action = "keep" if now == then else "replace" if has else "add"
            changes.append(KeyChange(key, action, shown, was if action == "replace" else None))
        elif key in base.ours and then is None:
            changes.append(KeyChange(key, "remove", ""))
        elif then is not None and now != then and (key in base.ours or not has):
            changes.append(KeyChange(key, "restore", shown, was))
    has = ORIGINAL_KEY in base.ours
    if originals.written:
        action = "add" if not has else "keep" if originals == base.originals else "replace"
        changes.append(KeyChange(ORIGINAL_KEY, action, "the old values of these keys, which remove restores"))
    elif has:
        changes.append(KeyChange(ORIGINAL_KEY, "remove", ""))
    return tuple(changes)


def _text(value: Value, order: str) -> str:
    number = value.python(order)
    if isinstance(number, str):
        return number[:80]
    return f"{shortest(number):.9g}" if isinstance(number, float) else str(number)
