"""Several tasks as one, their contexts by turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from .task import Context, Task


class MixedTask:
    """Contexts of several tasks by turns: of ``k`` tasks, context ``i`` is context ``i // k`` of task ``i % k``."""

    def __init__(self, parts: Sequence[Task]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has before a task runs out of them; None if as many as wanted."""
        sizes = [part.size(split) for part in self.parts]
        ends = [turn + size * len(sizes) for turn, size in enumerate(sizes) if size is not None]
        return min(ends, default=None)

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` of ``split``, with the name of its task. Raises `LropeError`: that has too few."""
        part = self.parts[index % len(self.parts)]
        return replace(part.context(split, index // len(self.parts)), index=index, task=part.name)


AnyTask: TypeAlias = Task | MixedTask


def mixed(parts: Sequence[Task]) -> AnyTask:
    """Return the mix of ``parts``; of one, itself."""
    return parts[0] if len(parts) == 1 else MixedTask(parts)


def parts_of(task: AnyTask) -> tuple[Task, ...]:
    """Return the tasks that a task is mixed of; of one alone, itself."""
    return task.parts if isinstance(task, MixedTask) else (task,)
