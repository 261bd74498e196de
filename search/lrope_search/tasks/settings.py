"""Base classes of the tasks' settings, and the registry of tasks.

A task is one file, which declares its settings beside the task that they make, and one entry of `TASKS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from lrope_gguf.errors import LropeError

from ..settings import Registry, SettingError, Settings, setting
from .sizing import Count, TokenLimit

if TYPE_CHECKING:
    from .task import Task

POSITIONS = ("jittered", "even")
"""Where a context's questions stand: at random in equal strata, or the same everywhere; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Settings):
    """A task: what the model is asked. `task_config` makes one by its name.

    ``section`` of a subclass is the task's name, ``summary`` what it asks. Raises `LropeError`: values out of range, or
    values that conflict.

    Args:
        answer_prefix: Begins all answers, for base models that would not answer in the wanted form by themselves.
        seed: Of all that is random.
    """

    summary: ClassVar[str] = ""
    wants: ClassVar[str] = ""
    """What its file holds, if it cannot do without one."""

    seed: int = 0
    answer_prefix: str = setting("", "text that begins every answer, for base models, such as ' \"'", metavar="TEXT")

    @property
    def name(self) -> str:
        """The task's name."""
        return self.section

    @property
    def file(self) -> str | None:
        """The file with its contexts, if it reads one."""
        return getattr(self, "data", None)

    def check(self) -> None:
        """Refuse a wrong seed, and a task without the file that it needs."""
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError(("seed",), f"--seed {self.seed}", "give a whole number, 0 or more")
        if self.wants and self.file is None:
            raise SettingError(
                (f"{self.section}.data",), f"--task {self.section}", f"needs {self.wants}; give --data FILE"
            )

    def but(self, **values: Any) -> Self:
        """Return these settings with other values.

        Raises `LropeError`: a setting that this task does not have, or a wrong value.
        """
        for key in values:
            check_owned(self.section, key)
        return replace(self, **values)

    def make(self, count: Count | None = None) -> Task:
        """Return the task; ``count`` tells how many tokens a prompt has, for contexts that are sized by tokens.

        Without it such contexts are as small as they can be: what is wrong with the settings shows without a model.
        Raises `LropeError`: a file that cannot be used, or numbers that do not fit it.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return all that decides the questions as a JSON object, with the defaults put in where they are known."""
        return {"name": self.section} | super().to_json()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` of this task wrote."""
        return super().from_json({key: item for key, item in value.items() if key != "name"})


def probes_setting(text: str, unset: str) -> Any:
    """Declare ``probes``: how many questions a context has."""
    return setting(None, text, metavar="N", least=1, unset=unset)


def positions_setting() -> Any:
    """Declare ``positions``: where they stand."""
    text = "where questions stand: at random in equal parts of a context, or at the same places in all"
    return setting(POSITIONS[0], text, choices=POSITIONS)


AS_NEEDED = "chosen to detect a useful gain at the lowest cost"
"""The questions of a context if none are asked for (`default_probes`)."""


@dataclass(frozen=True, kw_only=True)
class SizedTaskConfig(TaskConfig):
    """A task whose contexts have a size, or take so many tokens.

    ``size`` of a subclass is the field that gives it, ``task`` the class of the task. That takes the size as
    ``n_`` and the field's name, all settings that are not None, the seed, and a `TokenLimit` in place of the size; its
    ``least`` is the smallest size for a question.
    """

    size: ClassVar[str] = ""
    task: ClassVar[Any]

    context_tokens: int | None = setting(
        None, "fill each context up to N tokens", metavar="N", least=1,
        unset="the size is given as a number", option=True,
    )  # fmt: skip

    def check(self) -> None:
        """Refuse two sizes."""
        super().check()
        if self.context_tokens is not None and getattr(self, self.size) is not None:
            raise self.wrong("both give a context's size; leave out one of them", self.size, "context_tokens")

    def make(self, count: Count | None = None) -> Task:
        """Return the task; see `TaskConfig.make`."""
        own = {one.name: getattr(self, one.name) for one in self.settings()}
        tokens, size, _ = own.pop("context_tokens"), own.pop(self.size), own.pop("answer_prefix")
        limit = None if tokens is None or count is None else TokenLimit(tokens, count)
        if tokens is not None and limit is None:
            size = self.task.least * (own.get("probes") or 1)
        given = {name: value for name, value in own.items() if value is not None}
        task: Task = self.task(**{f"n_{self.size}": size}, seed=self.seed, limit=limit, **given)
        return task


TASKS: Registry[TaskConfig] = Registry(
    "task",
    {
        "kv": "lrope_search.tasks.kv:KeyValueConfig",
        "words": "lrope_search.tasks.kv:WordPairsConfig",
        "numbers": "lrope_search.tasks.kv:NumberPairsConfig",
        "mdqa": "lrope_search.tasks.mdqa:MultiDocumentConfig",
        "jsonl": "lrope_search.tasks.jsonl:JsonlConfig",
        "multikey": "lrope_search.tasks.needles:MultiKeyConfig",
        "vt": "lrope_search.tasks.variables:VariableConfig",
        "cwe": "lrope_search.tasks.counting:CommonWordsConfig",
        "fwe": "lrope_search.tasks.counting:FrequentWordsConfig",
    },
)
"""The tasks by their names; a mix keeps this order."""


def task_config(name: str = "kv", **values: Any) -> TaskConfig:
    """Return the settings of the task ``name``; a value of None is the default.

    Example:
        >>> task_config("kv", keys=100).to_json()["identifiers"]
        'uuid'

    Raises:
        LropeError: no such task, a setting that it does not have, or a wrong value.
    """
    kind = TASKS[name]
    given = {key: value for key, value in values.items() if value is not None}
    for key in given:
        check_owned(name, key)
    return kind(**given)


def check_owned(name: str, key: str) -> None:
    """Refuse a setting of another task, or an unknown one. Raises `LropeError`: names the tasks that have it."""
    if key in (one.name for one in fields(TASKS[name])):
        return
    owners = [kind for kind in TASKS.classes() if key in (one.name for one in kind.settings())]
    if not owners:
        known = ", ".join(one.name for one in TASKS[name].settings())
        raise SettingError((f"{name}.{key}",), f"{name}.{key}", f"no such setting; task {name} has {known}")
    label = owners[0].named(key).label if owners[0].named(key).option else key
    *others, last = (kind.section for kind in owners)
    tasks = f"--task {', '.join(others)} or {last}" if others else f"--task {last}"
    raise SettingError((f"{name}.{key}",), label, f"--task {name} does not use it; it is for {tasks}")


Tasks: TypeAlias = "TaskConfig | TaskMix | Sequence[tuple[TaskConfig, float]]"
"""What the model is asked: one task, or several with their weights."""


@dataclass(frozen=True)
class TaskMix:
    """Tasks that are asked side by side, with the weight of each; one alone is the task itself.

    Raises `LropeError`: no task, a task given twice, or a weight that is not a positive number.

    Args:
        parts: Tasks with their weights, each task once; kept in the order of `TASKS`, so that a mix is the same in
            whatever order its tasks are named.
    """

    parts: tuple[tuple[TaskConfig, float], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise LropeError(f"--task: none given; choose from {', '.join(TASKS)}")
        check_once([one.name for one, _ in self.parts])
        for one, weight in self.parts:
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0.0 < weight < math.inf:
                raise SettingError(
                    (f"{one.name}.weight",), f"{one.name}.weight {weight}", "give a positive number such as 2"
                )
        parts = sorted(((one, float(weight)) for one, weight in self.parts), key=lambda part: TASKS.order(part[0].name))
        object.__setattr__(self, "parts", tuple(parts))

    @classmethod
    def of(cls, tasks: Tasks) -> TaskMix:
        """Return the mix of `Tasks` however they are given."""
        if isinstance(tasks, TaskMix):
            return tasks
        return cls(((tasks, 1.0),) if isinstance(tasks, TaskConfig) else tuple(tasks))

    @property
    def tasks(self) -> tuple[TaskConfig, ...]:
        """The tasks alone."""
        return tuple(one for one, _ in self.parts)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each task, by name; empty for one task alone, which nothing is weighed against."""
        return {one.name: weight for one, weight in self.parts} if len(self.parts) > 1 else {}

    def check_contexts(self, option: str, n_contexts: int) -> None:
        """Refuse fewer contexts than tasks, which take turns. Raises `LropeError`: names the option."""
        if n_contexts < len(self.parts):
            names = " and ".join(one.name for one in self.tasks)
            raise LropeError(
                f"{option} {n_contexts}: too few for {names}, each of which needs one; give at least {len(self.parts)}"
            )


def check_once(tasks: Sequence[str]) -> None:
    """Refuse a task that is named twice. Raises `LropeError`: names it."""
    for name in tasks:
        if tasks.count(name) > 1:
            raise LropeError(f"--task {name}: given twice; give each task once")
