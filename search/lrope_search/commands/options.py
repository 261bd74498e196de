"""Options that the search commands share; they derive from the settings, as ``--set`` and ``--config`` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from lrope_gguf.commands.options import FILE
from lrope_gguf.errors import LropeError

from ..evaluation.settings import ModelConfig
from ..optimizers.settings import OPTIMIZERS
from ..settings import Setting, Settings, setting
from ..study.settings import SearchConfig
from ..tasks.settings import TASKS, TaskConfig, TaskMix, check_once, check_owned
from ..workers.settings import WorkersConfig
from .config_file import read_config
from .given import Given, S, chosen, made, no_such

Function = TypeVar("Function", bound=Callable[..., Any])
POSITIVE, NATURAL = click.IntRange(min=1), click.IntRange(min=0)
option = click.option


@dataclass(frozen=True)
class RunConfig(Settings):
    """Settings of a command itself, beside those of model, task, search and workers."""

    task: tuple[str, ...] = setting(
        ("kv",), "task to ask the model; give several to mix them, with options such as --data TASK=FILE",
        metavar="TASK", option=True,
    )  # fmt: skip
    seed: int = setting(0, "random seed", metavar="N", least=0, option=True)


@dataclass(frozen=True)
class SearchRun(RunConfig):
    """Settings of `search` itself."""

    output: str = setting("best.json", "curve file to write", metavar="FILE", option=True)
    study: str | None = setting(
        None, "keep results here, and resume from them", metavar="DIR", unset="OUTPUT's name + .study", option=True
    )
    start: tuple[str, ...] = setting(
        (), "curve file to start from, such as one of an earlier search or a smaller model; may be repeated",
        metavar="FILE", option=True,
    )  # fmt: skip
    algorithm: str = setting("ga", f"algorithm that proposes candidates: {', '.join(OPTIMIZERS)}", metavar="NAME")


SHARED: tuple[type[Settings], ...] = (SearchRun, SearchConfig, ModelConfig, WorkersConfig)
"""Settings that stand before all tables of a ``--config`` file."""


def tables() -> list[tuple[str, str, tuple[Setting, ...]]]:
    """Return the tables of such a file: of each its name, what it is, and its settings."""
    found = [
        (k.section, f"task {k.section}: {k.summary}", (*k.settings(), _weight(k.section))) for k in TASKS.classes()
    ]
    return found + [(k.section, f"algorithm {k.section}: {k.summary}", k.settings()) for k in OPTIMIZERS.classes()]


def known_settings() -> dict[str, Setting]:
    """Return all settings by their dotted names."""
    shared = {one.dotted: one for kind in SHARED for one in kind.settings()}
    return shared | {one.dotted: one for _, _, settings in tables() for one in settings}


def _weight(task: str) -> Setting:
    """Return what a task's table holds beside the task's own settings."""
    known: Any = {"key": "weight", "name": "weight", "section": task, "kind": float}
    return Setting("weight of this task in the mean over tasks", 1.0, metavar="W", above=0.0, **known)


class Words(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A text that a shell completes from a list; `Gathered` checks it."""

    name = "text"

    def __init__(self, words: Callable[[], Iterable[str]]) -> None:
        self._words = words

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the words that begin so."""
        return [CompletionItem(word) for word in self._words() if word.startswith(incomplete)]


class Gathered:
    """All settings given; options go before the file. Raises `LropeError`: one is unknown, given twice, or not used."""

    def __init__(self, values: dict[str, Any], used: Sequence[type[Settings]], command: str) -> None:
        """Take the values of `config_options` and `options_of` out of a command's, whose settings are ``used``."""
        self._known = known_settings()
        path, sets = values.pop("config"), values.pop("set")
        self.given: dict[str, Given] = {} if path is None else read_config(path, self._known)
        said: dict[str, Given] = {}
        for text in sets:
            key, equals, value = text.partition("=")
            if not equals:
                raise LropeError(f"--set {text}: give NAME=VALUE, such as kv.probes=20")
            if key not in self._known:
                raise no_such(f"--set {text}", key, self._known)
            self._say(said, key, Given(f"--set {text}", value, text=True))
        for one in (one for kind in used for one in kind.settings() if one.option):
            value = values.pop(one.name, None)
            if value not in (None, ()):
                listed = isinstance(value, tuple)
                where = one.flag if listed else f"{one.flag} {value}"
                self._say(said, one.dotted, Given(where, list(value) if listed else value, text=not listed))
        tasks = self.given | said
        self.tasks: tuple[str, ...] = tuple(tasks["task"].read(self._known["task"])) if "task" in tasks else ("kv",)
        for name in self.tasks:
            chosen(TASKS, name, tasks.get("task"))
        check_once(self.tasks)
        for name in _task_options():
            for task, given in self._own(name, values.pop(name, ())).items():
                self._say(said, f"{task}.{name}", given)
        self._check_used(said, used, command)
        self.given |= said

    @staticmethod
    def _say(said: dict[str, Given], key: str, given: Given) -> None:
        if key in said:
            raise LropeError(f"{said[key].where}, {given.where}: both set {key}; leave out one of them")
        said[key] = given

    def _own(self, name: str, texts: Sequence[str]) -> dict[str, Given]:
        """Return what an option gives to each task: to all that take it, or to one (``TASK=VALUE``); the last wins."""
        flag = f"--{name.replace('_', '-')}"
        takers = [task for task in self.tasks if any(one.name == name for one in TASKS[task].settings())]
        found: dict[str, Given] = {}
        own = [text for text in texts if "=" in text and text.partition("=")[0] in TASKS]
        for text in (text for text in texts if text not in own):
            if name == "data" and (n := len(self.tasks)) > 1:
                last = (takers or self.tasks)[-1]
                raise LropeError(f"--data {text}: which of the {n} tasks is it for? give --data {last}={text}")
            if not takers:
                check_owned(self.tasks[0], name)
            found |= {task: Given(f"{flag} {text}", text, text=True) for task in takers}
        for text in own:
            task, _, value = text.partition("=")
            self._check_asked(task, f"{flag} {text}")
            check_owned(task, name)
            found[task] = Given(f"{flag} {text}", value, text=True)
        return found

    def _check_asked(self, task: str, given: str) -> None:
        if task not in self.tasks:
            asked = " and ".join(self.tasks)
            raise LropeError(f"{given}: no --task {task} is given, only {asked}; add it or leave this out")

    def _check_used(self, said: Mapping[str, Given], used: Sequence[type[Settings]], command: str) -> None:
        """Refuse settings of the command line that the command does not use; a file may serve several commands."""
        searches = SearchConfig in used
        shared = {one.dotted for kind in used for one in kind.settings()}
        algorithm = said.get("algorithm", self.given.get("algorithm"))
        name = "ga" if algorithm is None else algorithm.value
        for key, given in said.items():
            section = self._known[key].section
            if section in TASKS:
                self._check_asked(section, given.where)
            elif not searches and (section in OPTIMIZERS or key not in shared):
                raise LropeError(f"{given.where}: {command} does not use it; leave it out")
            elif section in OPTIMIZERS and section != name:
                raise LropeError(f"{given.where}: algorithm {name} does not use it; leave it out, or set algorithm")

    def make(self, kind: type[S], *positional: Any, **others: Any) -> S:
        """Return settings of ``kind``; see `made`."""
        return made(kind, self.given, *positional, **others)

    def task(self, seed: int) -> TaskConfig | TaskMix:
        """Return the task that is asked, or the mix. Raises `LropeError`: wrong values, or values that conflict."""
        parts: list[tuple[TaskConfig, float]] = []
        for name in self.tasks:
            weight = self.given.get(f"{name}.weight")
            if weight is not None and weight.text and len(self.tasks) == 1:
                raise LropeError(f"{weight.where}: there is no other task to weigh {name} against; leave it out")
            config = made(TASKS[name], self.given, seed=seed)
            parts.append((config, 1.0 if weight is None else weight.read(_weight(name))))
        return parts[0][0] if len(parts) == 1 else TaskMix(tuple(parts))

    def search(self, seed: int) -> SearchConfig:
        """Return the settings of the search, without curves yet. Raises `LropeError`: wrong or conflicting values."""
        algorithm = self.given.get("algorithm")
        name = "ga" if algorithm is None else algorithm.read(self._known["algorithm"])
        kind = chosen(OPTIMIZERS, name, algorithm)
        return self.make(SearchConfig, seed=seed, algorithm=made(kind, self.given))


class SettingsCommand(click.Command):
    """A command that says where an option of older versions has gone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options. Raises `LropeError`: one that there was once."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            moved = where_it_went(error.option_name, words)
            if moved and not any(param.name == "set" for param in self.params):
                moved = f"{ctx.info_name} does not use it any more; leave it out"
            if moved is None or ctx.resilient_parsing:
                raise
            raise LropeError(f"{error.option_name}: {moved}") from None


_DERIVED = {
    "--lag": "is 8 now, whatever the number of workers; to keep more of them busy, give --set ga.lag=N",
    "--racing-fraction": "is chosen automatically now; leave it out, or give --set racing_fraction=F",
    "--finalists": "is chosen automatically now; leave it out, or give --set finalists=N",
    "--weight": "is now --set TASK.weight=W, such as kv.weight=2",
    "--no-chat-template": "is now --set chat_template=false",
    "--depths": "is now --set kv.probes=N",
    "--verbose": "is now --set verbose=true",
}


def where_it_went(option: str, words: Sequence[str] = ()) -> str | None:
    """Return what an option of older versions is called now, if it was one; ``words`` may say whose it is."""
    if option in _DERIVED:
        return _DERIVED[option]
    found = [one for one in known_settings().values() if one.flag == option]
    if not found:
        return None
    one = next((one for one in found if one.section in words), found[0])
    return f"is now --set {one.dotted}={one.metavar or 'VALUE'}"


def all_of(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Declare several options, in their order."""

    def declare(function: Function) -> Function:
        for one in reversed(options):
            function = one(function)
        return function

    return declare


def options_of(*kinds: type[Settings]) -> Callable[[Function], Function]:
    """Declare the options that settings have of their own; `Gathered` takes their values."""
    return all_of(*[_option_of(one) for kind in kinds for one in kind.settings() if one.option])


def _option_of(one: Setting) -> Callable[[Any], Any]:
    text = one.text
    kind: Any = FILE if one.metavar in ("FILE", "DIR") else click.STRING
    if one.name == "task":
        kind = Words(lambda: TASKS)
        text = f"{one.text}. {'; '.join(f'{kind.section}: {kind.summary}' for kind in TASKS.classes())}"
    shown = one.unset if one.default is None else ",".join(one.default) if one.repeated else one.default
    text = f"{text} ({shown})" if shown != "" else text
    return option(one.flag, one.name, metavar=one.metavar, type=kind, multiple=one.repeated, help=text)


def _task_options() -> dict[str, list[tuple[str, Setting]]]:
    """Return the options that tasks have of their own, each with the tasks that take it."""
    found: dict[str, list[tuple[str, Setting]]] = {}
    for kind in TASKS.classes():
        for one in kind.settings():
            if one.option:
                found.setdefault(one.name, []).append((kind.section, one))
    return found


def _task_option(settings: Sequence[tuple[str, Setting]]) -> Callable[[Any], Any]:
    texts: dict[str, list[str]] = {}
    for task, one in settings:
        texts.setdefault(f"{one.text} ({one.unset})", []).append(task)
    one = settings[0][1]
    shown = "; ".join(f"{', '.join(tasks)}: {text}" for text, tasks in texts.items())
    kind = FILE if one.metavar == "FILE" else click.STRING
    return option(one.flag, one.name, metavar=one.metavar, type=kind, multiple=True, help=shown)


task_options = all_of(*[_task_option(settings) for settings in _task_options().values()])
"""The options of tasks; `Gathered` takes their values."""

_SET = "any setting that search --print-config lists, such as kv.probes=20 or rope_scaling=yarn; may be repeated"
_NAMES = Words(lambda: (f"{name}=" for name in known_settings()))
config_options = all_of(
    option("--config", metavar="FILE", type=FILE, help="read settings from a TOML file; options and --set override it"),
    option("--set", metavar="NAME=VALUE", type=_NAMES, multiple=True, help=_SET),
)
"""The options that reach every setting; `Gathered` takes their values."""


def data_files(task: TaskConfig | TaskMix) -> dict[str, str | None]:
    """Return the files that tasks read, by the option that gave them, as `check_output` takes its inputs."""
    parts = TaskMix.of(task).tasks
    return {"--data" if len(parts) == 1 else f"--data {part.name}": part.file for part in parts}


def check_study(directory: str | os.PathLike[str]) -> None:
    """Raise `LropeError` where a study cannot be: at a file's place."""
    if Path(directory).exists() and not Path(directory).is_dir():
        raise LropeError(f"--study {directory}: is a file; give a directory")
