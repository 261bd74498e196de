"""Base classes of all settings: frozen dataclasses that check their values and describe themselves.

A room declares its settings as the fields of a dataclass (`setting`). The command line's options, the keys of a
``--config`` file, the names that ``--set`` takes and ``config.json`` all derive from these fields. Nothing here imports
NumPy or llama.cpp.
"""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any, ClassVar, Generic, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from lrope_gguf.errors import LropeError

C = TypeVar("C")

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class SettingError(LropeError):
    """A setting has a wrong value.

    Attributes:
        names: The settings that the message is about, as a ``--config`` file names them.
        reason: What is wrong, without their names.
    """

    def __init__(self, names: Sequence[str], where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.names, self.reason = tuple(names), reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names, str(self)[: -len(self.reason) - 2], self.reason)


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    Attributes:
        text: What it is, in a few words; for ``--help`` and the ``--config`` file.
        default: Its value unless another is given.
        key: Its name in files and options, if that is not the field's.
        metavar: What stands for a value in ``--help``.
        choices: The texts that it may be; none: any.
        least: Its lowest value.
        above: What a number must exceed.
        most: Its highest value.
        unset: What None comes to, in words.
        option: Whether it has an option of its own on the command line, and not only ``--set``.
        name: The field's name; this and what follows `Settings.settings` fills in.
        section: The table of a ``--config`` file that it stands in.
        kind: Of its values, or of the items of a tuple (``repeated``); ``optional``: it may be None.
    """

    text: str
    default: Any
    key: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    unset: str = ""
    option: bool = False
    name: str = ""
    section: str = ""
    kind: type = str
    optional: bool = False
    repeated: bool = False

    @property
    def dotted(self) -> str:
        """Its name in a ``--config`` file: the section's and its own."""
        return f"{self.section}.{self.key}" if self.section else self.key

    @property
    def flag(self) -> str:
        """What its option is called, or would be."""
        return f"--{self.key.replace('_', '-')}"

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.flag if self.option else self.dotted

    def wanted(self) -> str:
        """Return what a value must be, in words."""
        if self.repeated:
            return f"a list of {'texts' if self.kind is str else 'numbers'}"
        return _WANTED[self.kind]

    def checked(self, value: Any) -> Any:
        """Return ``value`` as it is kept: lists as tuples, paths as texts, whole numbers as floats where these belong.

        Raises `SettingError`: it is of the wrong type, or out of range.
        """
        if value is None and self.optional:
            return None
        if not self.repeated:
            return self._one(value, value)
        if not isinstance(value, list | tuple):
            raise self.error(value, f"give {self.wanted()}")
        return tuple(self._one(item, value) for item in value)

    def _one(self, item: Any, value: Any) -> Any:
        if self.kind is str and isinstance(item, os.PathLike):
            item = os.fspath(item)
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if not (
            number and isinstance(item, int | self.kind) if self.kind in (int, float) else isinstance(item, self.kind)
        ):
            raise self.error(value, f"give {self.wanted()}")
        if self.choices and item not in self.choices:
            meant = _nearest(str(item), self.choices)
            raise self.error(value, f"unknown; choose from {', '.join(self.choices)}{meant}")
        if not number:
            return item
        if self.kind is float and not math.isfinite(item):
            raise self.error(value, "not finite; give a large number for no limit")
        if self.least is not None and not item >= self.least:
            raise self.error(value, f"too small; give at least {self.least:g}")
        if self.above is not None and not item > self.above:
            raise self.error(value, f"too small; give more than {self.above:g}")
        if self.most is not None and not item <= self.most:
            raise self.error(value, f"too large; give at most {self.most:g}")
        return float(item) if self.kind is float else item

    def parsed(self, text: str) -> Any:
        """Return what ``--set NAME=TEXT`` says. Raises `SettingError`: it is of the wrong type, or out of range."""
        if self.optional and text == "":
            return None
        if self.repeated:
            return self.checked([self._word(word.strip(), text) for word in text.split(",")] if text else [])
        return self.checked(self._word(text, text))

    def _word(self, word: str, text: str) -> Any:
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[word]
            return self.kind(word)
        except (ValueError, KeyError):
            raise self.error(text, f"give {self.wanted()}") from None

    def error(self, value: Any, reason: str) -> SettingError:
        """Return the error of a wrong value."""
        shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        return SettingError((self.dotted,), f"{self.label} {shown}", reason)


def setting(default: Any, text: str, **details: Any) -> Any:
    """Declare a setting as a field of a `Settings` dataclass; ``details`` are attributes of `Setting`."""
    return field(default=default, metadata={"setting": Setting(text, default, **details)})


@dataclass(frozen=True)
class Settings:
    """Settings of one room: a frozen dataclass whose fields are declared with `setting`."""

    section: ClassVar[str] = ""
    """The table of a ``--config`` file that holds them; empty: they stand before all tables."""

    def __post_init__(self) -> None:
        """Check each setting, then all of them together. Raises `SettingError`: names what is wrong."""
        for one in self.settings():
            object.__setattr__(self, one.name, one.checked(getattr(self, one.name)))
        self.check()

    def check(self) -> None:
        """Refuse settings that conflict."""

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """Return the settings, in the order of their declaration."""
        if cls not in _KNOWN:
            _KNOWN[cls] = _settings_of(cls)
        return _KNOWN[cls]

    @classmethod
    def named(cls, name: str) -> Setting:
        """Return the setting of a field."""
        return next(one for one in cls.settings() if one.name == name)

    def wrong(self, reason: str, *names: str) -> SettingError:
        """Return the error that these fields' settings conflict; of a single one it shows the value."""
        settings = [self.named(name) for name in names]
        if len(settings) == 1:
            return settings[0].error(getattr(self, names[0]), reason)
        return SettingError([one.dotted for one in settings], ", ".join(one.label for one in settings), reason)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote. Raises `LropeError`: an unknown field, or a value out of range."""
        known = [one.name for one in fields(cls)]
        for name in value:
            if name not in known:
                raise LropeError(f"{name}: no setting of {cls.__name__}{_nearest(name, known)}")
        return cls(**{name: _frozen(item) for name, item in value.items()})


class Registry(Generic[C]):
    """Classes by name, in a fixed order; each is imported on first use."""

    def __init__(self, what: str, entries: Mapping[str, str | type[C]]) -> None:
        """Hold ``entries``: classes, or where they stand as ``module:Class``; ``what`` they are, for messages."""
        self._what, self._entries = what, dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def add(self, name: str, entry: str | type[C]) -> None:
        """Register one more."""
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget one."""
        del self._entries[name]

    def order(self, name: str) -> int:
        """Return the place of ``name``."""
        return list(self._entries).index(name)

    def __getitem__(self, name: str) -> type[C]:
        """Return the class. Raises `SettingError`: no class has this name."""
        entry = self._entries.get(name)
        if entry is None:
            reason = f"unknown; choose from {', '.join(self._entries)}{_nearest(name, self._entries)}"
            raise SettingError((self._what,), f"--{self._what} {name}", reason)
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        assert isinstance(entry, type)
        return entry

    def classes(self) -> list[type[C]]:
        """Return all of them."""
        return [self[name] for name in self]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return which of ``known`` dotted names a mistyped one may have meant: in its own section, else in any."""
    section, _, last = name.rpartition(".")
    parts = [(*other.rpartition(".")[::2], other) for other in known]
    for among in ([part for part in parts if part[0] == section], parts):
        found = difflib.get_close_matches(last, [part[1] for part in among], 1, 0.6)
        if found:
            return next(part[2] for part in among if part[1] == found[0])
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" (did you mean {found[0]}?)" if found else ""


_KNOWN: dict[type[Settings], tuple[Setting, ...]] = {}


def _settings_of(cls: type[Settings]) -> tuple[Setting, ...]:
    hints = get_type_hints(cls)
    found = []
    for one in fields(cls):
        if (declared := one.metadata.get("setting")) is not None:
            kind, optional, repeated = _kind(hints[one.name])
            key, known = declared.key or one.name, {"name": one.name, "section": cls.section}
            found.append(replace(declared, key=key, kind=kind, optional=optional, repeated=repeated, **known))
    return tuple(found)


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """Return the kind of a field's values, whether it may be None, and whether it is a tuple of such."""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        hint = next(part for part in get_args(hint) if part is not type(None))
    repeated = get_origin(hint) is tuple
    return (get_args(hint)[0] if repeated else hint), optional, repeated


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_frozen, value)) if type(value) in (list, tuple) else value
