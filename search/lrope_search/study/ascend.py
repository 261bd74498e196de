"""The stage of a search that follows derivatives: its steps, kept one by one, and what they propose."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lrope_gguf.errors import LropeError

from ..results.summary import AscentStep
from ..scores import Factors, n_changed, numbers_of, read_factors, rows_of, tuned, with_numbers
from .plan import N_PROPOSALS, PRUNED
from .progress import Progress
from .store import Journal, Study, json_object

NAME = "ascent.jsonl"


class Measured(Protocol):
    """What a step found: a `Step` of the room of derivatives."""

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON: ``number``, ``gains``, ``divergence``, ``n_tokens``, ``seconds``, ``state`` and more."""


class Climber(Protocol):
    """What makes the steps: a `Climb`."""

    @property
    def done(self) -> bool:
        """Whether all are made."""

    @property
    def factors(self) -> Factors:
        """Where it stands."""

    @property
    def at_bound(self) -> tuple[int, ...]:
        """Layers at a bound."""

    def step(self) -> Measured:
        """Make one. Raises `LropeError`: it cannot."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that left this state."""


@dataclass(frozen=True)
class Trail:
    """The steps of a study.

    Attributes:
        steps: What each found, and in ``factors`` where it led.
        ended: Why there are no more of them, if that is not that all were made.
    """

    steps: tuple[Mapping[str, Any], ...]
    ended: str | None

    @classmethod
    def of(cls, directory: Path) -> Trail:
        """Return what the study in ``directory`` keeps. Raises `LropeError`: the file is damaged."""
        return cls._read(Journal(directory / NAME, json_object), directory)

    @classmethod
    def _read(cls, journal: Journal[dict[str, Any]], directory: Path) -> Trail:
        records = journal.records
        ended = next((str(record["ended"]) for record in records if "ended" in record), None)
        steps = tuple(record for record in records if "ended" not in record)
        for number, step in enumerate(steps, start=1):
            if step.get("number") != number or not _sound(step):
                raise LropeError(
                    f"{directory / NAME}: step {number} is damaged; delete the file (all steps are then made again) "
                    "or choose another study directory"
                )
        return cls(steps, ended)

    def proposals(self, bounds: tuple[float, float]) -> list[Factors]:
        """Return factors worth trying: on the way, at its end, the mean of its end, and half of it, the end first.

        Of each start. The last steps go back and forth, which a mean takes out. Half the way (of logarithms) costs a
        quarter of the divergence and keeps most of the gain. Where heads have their own, also the end with those alone
        that it moves most (`PRUNED`): what few heads carry harms less.
        """
        paths: dict[int, list[Factors]] = {}
        for step in self.steps:
            paths.setdefault(_start(step), []).append(read_factors(step))
        found = [_within(factors, bounds) for path in paths.values() for factors in _worth(path)]
        return [factors for factors in dict.fromkeys(found) if n_changed(factors)]

    def points(self) -> tuple[AscentStep, ...]:
        """Return the steps as a report shows them."""
        return tuple(
            AscentStep(dict(step["gains"]), step["divergence"], step["n_tokens"], step["seconds"])
            for step in self.steps
        )

    def summary(self) -> dict[str, Any]:
        """Return what ``best.json`` says of it."""
        found: dict[str, Any] = {"steps": len(self.steps), "tokens": self.n_tokens}
        return found | ({} if self.ended is None else {"ended": self.ended})

    @property
    def n_tokens(self) -> int:
        """Computed by all steps."""
        return sum(step["n_tokens"] for step in self.steps)


def _worth(path: Sequence[Factors]) -> list[Factors]:
    """Return what is worth trying of one way, rounded to 1e-4."""
    n, end = len(path), path[-1]
    logs = [[math.log(value) for value in numbers_of(factors)] for factors in path[-max(2, n // 5) :]]
    mean = [math.exp(math.fsum(of_one) / len(logs)) for of_one in zip(*logs, strict=True)]
    found = [
        end,
        with_numbers(end, mean),
        path[max(0, round(2 * n / 3) - 1)],
        with_numbers(end, map(math.sqrt, numbers_of(end))),
        path[max(0, round(n / 3) - 1)],
    ]
    assert len(found) == N_PROPOSALS
    if rows_of(end):
        found += [pruned(end, share) for share in PRUNED]
    return [with_numbers(factors, (round(value, 4) for value in numbers_of(factors))) for factors in found]


def _within(factors: Factors, bounds: tuple[float, float]) -> Factors:
    """Return factors of layers and of KV heads within bounds, which are not for query scales."""
    low, high = bounds
    clipped = with_numbers(factors, (min(max(value, low), high) for value in numbers_of(factors)))
    queries = {name: rows for name, rows in rows_of(factors).items() if name == "query_scales"}
    return tuned(clipped, rows_of(clipped) | queries)


def pruned(factors: Factors, share: float) -> Factors:
    """Return factors with this share of its changed numbers, those farthest from 1, and 1 for all others."""
    logs = [abs(math.log(value)) for value in numbers_of(factors)]
    least = sorted(logs, reverse=True)[max(1, round(share * n_changed(factors))) - 1]
    return with_numbers(
        factors, (value if log >= least else 1.0 for value, log in zip(numbers_of(factors), logs, strict=True))
    )


def _sound(step: Mapping[str, Any]) -> bool:
    try:
        numbers = [step["divergence"], step["n_tokens"], step["seconds"], *_gains(step)]
        return bool(read_factors(step)) and _start(step) >= 0 and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _start(step: Mapping[str, Any]) -> int:
    """Which start a step belongs to."""
    return int(step["state"].get("start", 0))


def _gains(step: Mapping[str, Any]) -> Sequence[float]:
    return list(step["gains"].values())


def ascend(
    study: Study,
    n_steps: int,
    opened: Callable[[], AbstractContextManager[Climber]],
    progress: Progress,
    *,
    until: float = math.inf,
) -> Trail:
    """Make the steps that the study lacks, each on disk before the next begins.

    What goes wrong in them ends them, for good, and no search: that is one line, and kept. The climber is not opened
    where nothing is left to do.

    Args:
        study: Keeps them, in ``ascent.jsonl``.
        n_steps: In all.
        opened: Opens the climber.
        progress: Shows each.
        until: Begin no step after this time (`time.monotonic`); a later call then makes the rest.

    Raises:
        LropeError: the study cannot be read or written.
    """
    journal = Journal(study.directory / NAME, json_object)
    trail = Trail._read(journal, study.directory)
    again = "" if trail.ended is None else f"; to try them again, delete {study.directory / NAME}"
    if trail.ended is None and len(trail.steps) < n_steps:
        n_tokens = trail.n_tokens
        try:
            with closing(_steps(opened, trail, n_steps, until, progress)) as records:
                for record in records:
                    journal.append(record)
                    if "ended" not in record:
                        progress.advance()
                        n_tokens += record["n_tokens"]
                        _say(record, n_tokens, progress)
        except KeyboardInterrupt:
            progress.line(f"stopped after {len(journal.records)} of {n_steps} steps; the same command resumes")
            raise
        finally:
            progress.close()
        trail = Trail._read(journal, study.directory)
    if trail.ended is not None:
        after = f"after {len(trail.steps)} steps: " if trail.steps else ""
        progress.line(f"without {'further ' if after else ''}gradients: {after}{trail.ended}{again}")
    elif trail.steps and not trail.proposals((0.0, math.inf)):
        progress.line("gradients moved no factor; the search goes on without them")
    return trail


def _steps(
    opened: Callable[[], AbstractContextManager[Climber]], trail: Trail, n_steps: int, until: float, progress: Progress
) -> Generator[dict[str, Any], None, None]:
    """Yield what is to be kept of each step that is left, or why there is none."""
    try:
        with opened() as climb:
            progress.start(n_steps, "step")
            for _ in trail.steps:
                progress.advance(replayed=True)
            if trail.steps:
                climb.restore(trail.steps[-1]["state"])
            for _ in range(len(trail.steps), n_steps):
                if climb.done or time.monotonic() > until:
                    break
                step = climb.step().to_json() | {"factors": climb.factors, **rows_of(climb.factors)}
                if not _sound(step):
                    raise LropeError(f"step {step['number']} found something else than numbers")
                yield step
            if climb.at_bound:
                layers = ", ".join(map(str, climb.at_bound))
                progress.line(
                    f"gradients moved layers {layers} to the bounds; wider ones may find more: --set bounds=LOW,HIGH"
                )
    except LropeError as error:
        yield {"ended": str(error)}
    except MemoryError:
        yield {"ended": "memory ran out"}


def _say(step: Mapping[str, Any], n_tokens: int, progress: Progress) -> None:
    """Say what the last step found, and how far it is: by all of them, ``n_tokens``."""
    each = ", ".join(f"{name} {value:.3f}" for name, value in step["gains"].items())
    progress.best(each)
    progress.line(f"{progress.status()}: log-probability {each}, KL {step['divergence']:.3g}, {n_tokens:,} tokens")
