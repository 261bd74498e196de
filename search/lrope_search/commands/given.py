"""The values that a user gave, each with the place where it was given, for messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lrope_gguf.errors import LropeError

from ..settings import Registry, Setting, SettingError, Settings, nearest

S = TypeVar("S", bound=Settings)
C = TypeVar("C")


@dataclass(frozen=True)
class Given:
    """A value, and where it was given: ``FILE:LINE: key`` or an option with it; ``text``: whether it is one still."""

    where: str
    value: Any
    text: bool = False

    def read(self, setting: Setting) -> Any:
        """Return the value as the setting keeps it. Raises `LropeError`: wrong type, or out of range; says where."""
        try:
            return setting.parsed(self.value) if self.text else setting.checked(self.value)
        except SettingError as error:
            raise LropeError(f"{self.shown()}: {error.reason}") from None

    def shown(self) -> str:
        """Return where it was given, with the value."""
        return self.where if self.text or isinstance(self.value, list) else f"{self.where} = {_toml(self.value)}"


def made(kind: type[S], given: Mapping[str, Given], *positional: Any, **others: Any) -> S:
    """Return the settings of a class, made of what was given and of ``others``.

    Raises `LropeError`: a wrong value, or two that conflict; says where they were given.
    """
    values = {one.name: given[one.dotted].read(one) for one in kind.settings() if one.dotted in given}
    try:
        return kind(*positional, **values | others)
    except SettingError as error:
        said = [given[name].shown() for name in error.names if name in given]
        raise LropeError(f"{', '.join(said)}: {error.reason}" if said else str(error)) from None


def no_such(where: str, key: str, known: Iterable[str]) -> LropeError:
    """Return the error of a name that no setting has."""
    found = nearest(key, known)
    hint = f"did you mean {found}?" if found else "lrope-gguf search --print-config has all of them"
    return LropeError(f"{where}: no such setting; {hint}")


def chosen(registry: Registry[C], name: str, given: Given | None) -> type[C]:
    """Return what ``given`` chose by its name. Raises `LropeError`: no class has this name; says where it was given."""
    try:
        return registry[name]
    except SettingError as error:
        if given is None:
            raise
        where = given.where if given.text else f"{given.where} {name}"
        raise LropeError(f"{where}: {error.reason}") from None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
