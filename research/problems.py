"""What optimizers are tried on, and how they are driven: steady state, each with its own lag, as a search does it."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from options import model_of, task_of

from lrope_gguf import LropeError
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.make import open_model, task_for
from lrope_search.optimizers.protocol import Candidate, Optimizer, Score
from lrope_search.scores import Factors
from lrope_search.study.racing import Race, Racing
from lrope_search.tasks import task_identity


class Problem(Protocol):
    """What is searched: gains over the identity, in nats per answer token."""

    n_layer: int

    def gain(self, factors: Factors, context: int) -> float: ...

    def true_gain(self, factors: Factors) -> float: ...


class ModelProblem:
    """A model and a task, with a cache of all results on disk."""

    def __init__(self, args: argparse.Namespace, n_true: int) -> None:
        """Load the model; ``n_true`` validation contexts decide what a curve is worth."""
        loaded = open_model(model_of(args))
        task = task_for(loaded, task_of(args))
        self._evaluator = TeacherForcedEvaluator(loaded, task, answer_prefix=args.answer_prefix)
        self.n_layer, self._n_true = self._evaluator.n_layer, n_true
        self._key = json.dumps(
            [Path(args.model).name, task_identity(task_of(args)) | {"chat_template": not args.no_chat_template}]
        )
        self._known: dict[tuple[Factors, str, int], float] = {}
        self._path = Path(args.cache) if args.cache else None
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                key, factors, split, index, value = json.loads(line)
                if key == self._key:
                    self._known[tuple(factors), split, index] = value

    @property
    def lack(self) -> float:
        """About what there is to gain: how unlikely the base model finds the answers of a search context, in nats."""
        return -self._value((1.0,) * self.n_layer, "search", 0)

    def know_study(self, directory: Path) -> int:
        """Take over what a search of the same task has evaluated, and return how many results that were."""
        mine = json.loads(self._key)[1]
        try:
            theirs = json.loads((directory / "config.json").read_text(encoding="utf-8"))["task"]
            lines = (directory / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError, KeyError) as error:
            raise LropeError(f"--study {directory}: no study ({error}); give the directory of a search") from error
        for name in mine:
            if theirs.get(name) != mine[name]:
                raise LropeError(f"--study {directory}: {name} is {theirs.get(name)} there and {mine[name]} here")
        n = 0
        for line in map(json.loads, lines):
            if line["split"] in ("search", "validation"):
                value = statistics.mean(probe[1] for probe in line["probes"])
                self._known[_rounded(tuple(line["factors"])), line["split"], line["index"]] = value
                n += 1
        return n

    def gain(self, factors: Factors, context: int) -> float:
        return self._difference(factors, "search", context)

    def true_gain(self, factors: Factors) -> float:
        """Mean difference to the base model on the validation contexts."""
        return statistics.mean(self._difference(factors, "validation", i) for i in range(self._n_true))

    def n_tokens(self) -> int:
        return self._evaluator.n_tokens("search", 0)

    def _difference(self, factors: Factors, split: str, index: int) -> float:
        return self._value(factors, split, index) - self._value((1.0,) * self.n_layer, split, index)

    def _value(self, factors: Factors, split: str, index: int) -> float:
        rounded = _rounded(factors)
        key = (rounded, split, index)
        if key not in self._known:
            self._known[key] = self._evaluator.evaluate(rounded, split, index).log_probability
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    print(json.dumps([self._key, *key, self._known[key]]), file=file)
        return self._known[key]


def _rounded(factors: Factors) -> Factors:
    return tuple(round(factor, 3) for factor in factors)  # as fine as the algorithms tell curves apart


def play(problem: Problem, algorithm: Optimizer, racing: Racing, budget: int) -> Iterator[tuple[Candidate, int]]:
    """Drive ``algorithm`` for ``budget`` candidates; after each yield the best so far and the contexts it all cost."""
    pending: deque[Candidate] = deque()
    best: tuple[Score, Candidate] | None = None
    race = Race(racing)
    n_asked = cost = 0
    while n_asked < budget or pending:
        candidate = algorithm.ask() if n_asked < budget and len(pending) < algorithm.lag else None
        if candidate is not None:
            pending.append(candidate)
            n_asked += 1
            continue
        if not pending:
            return
        candidate = pending.popleft()
        gains: list[float] = []
        contexts: range | None = race.enter(candidate.id)
        while contexts is not None:
            gains += [problem.gain(candidate.factors, i) for i in contexts]
            further = race.advance(partial(_mean, gains))
            contexts = next((more for _, more in further), None)
        cost += len(gains)
        score = race.scores.pop(candidate.id)
        algorithm.tell(candidate, score)
        if best is None or score > best[0]:
            best = score, candidate
        yield best[1], cost


def _mean(gains: list[float], _: int, n: int) -> float:
    return statistics.mean(gains[:n])
