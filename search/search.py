"""The search: generations on search contexts, the winner on validation, the gain on test contexts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.errors import LropeError

from .algorithm import Algorithm, Candidate, Score, rank
from .executor import Executor, Job
from .genetic import GeneticAlgorithm
from .objective import Objective, Racing
from .progress import Progress
from .statistics import Comparison, Interval, Verdict, compare, verdict
from .study import Study
from .types import ContextScore

Factors: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class SearchSettings:
    """All options of a search. All but ``max_hours`` decide its result together with model and task.

    Args:
        seed: Seed of the algorithm and of the bootstrap.
        max_evaluations: Distinct candidates to evaluate on search contexts; the identity, which the genetic
            algorithm asks for first, is one of them.
        max_hours: Begin no further generation after so many hours of this run; the one thing that depends
            on time, looked at between generations only. None: no limit.
        search_contexts, validation_contexts, test_contexts: Contexts of each split, indices from 0.
        finalists: Candidates, best by search, that go on to validation beside the base model and the best
            uniform factor.
        racing_first, racing_fraction: See `Racing`.
        middle_weight: See `Objective`.
        degree, bounds, population, parents, offspring, uniform_factors, width: See `GeneticAlgorithm`.
        confidence: Of the bootstrap intervals.

    Raises:
        LropeError: a value out of range.
    """

    seed: int = 0
    max_evaluations: int = 120
    max_hours: float | None = None
    search_contexts: int = 4
    validation_contexts: int = 8
    test_contexts: int = 16
    finalists: int = 4
    racing_first: int = 1
    racing_fraction: float = 0.5
    middle_weight: float = 0.0
    degree: int = 3
    bounds: tuple[float, float] = (0.5, 4.0)
    population: int = 16
    parents: int = 4
    offspring: int = 8
    uniform_factors: tuple[float, ...] = (0.95, 1.05, 1.1, 1.25)
    width: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = ("max_evaluations", "search_contexts", "validation_contexts", "test_contexts", "finalists")
        for name in (*counts, "racing_first", "degree", "population", "parents", "offspring"):
            if getattr(self, name) < 1:
                raise LropeError(f"{_option(name)} {getattr(self, name)}: too few; give at least 1")
        low, high = self.bounds
        ranges = {
            "seed": self.seed >= 0,
            "max_hours": self.max_hours is None or self.max_hours > 0.0,
            "racing_fraction": 0.0 < self.racing_fraction <= 1.0,
            "middle_weight": 0.0 <= self.middle_weight < math.inf,
            "bounds": 0.0 < low <= 1.0 <= high < math.inf and low < high,
            "uniform_factors": all(0.0 < factor < math.inf for factor in self.uniform_factors),
            "width": 0.0 < self.width <= 1.0,
            "confidence": 0.0 < self.confidence < 1.0,
        }
        for name, right in ranges.items():
            if not right:
                raise LropeError(f"{_option(name)} {getattr(self, name)}: out of range; see lrope-gguf search --help")

    def config(self) -> dict[str, Any]:
        """Return what belongs in a study's config: all but ``max_evaluations`` and ``max_hours``.

        These two only say how far to go: a study may be continued with more of either.
        """
        config = dataclasses.asdict(self)
        del config["max_hours"], config["max_evaluations"]
        return config

    def racing(self) -> Racing:
        """Return the racing rule of these settings."""
        return Racing(self.search_contexts, self.racing_first, self.racing_fraction)

    def planned_evaluations(self) -> dict[str, int]:
        """Return the context evaluations (one prefill each) that the search takes at most, by split."""
        search, left = self.search_contexts, self.max_evaluations - 1
        size = max(self.population - 1, len(self.uniform_factors))
        while left > 0:
            size = min(size or self.offspring, left)
            search += self.racing().evaluations(size)
            left -= size
            size = self.offspring
        sides = 2 + bool(self.uniform_factors)
        finalists = min(self.finalists, self.max_evaluations - 1)
        validation = (finalists + sides - 1) * self.validation_contexts
        return {"search": search, "validation": validation, "test": sides * self.test_contexts}


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        best: The document that ``best.json`` holds.
        identity: The base model's factors, 1 for every layer.
        winner: The winner on validation; None if that was the base model.
        uniform: The best uniform factor on search contexts; None if none was tried.
        base_test, uniform_test, winner_test: Scores on the test contexts.
        uniform_comparison, winner_comparison: The same against the base model.
        verdict: Whether to use the curve.
        candidates: Every candidate evaluated with its score, best first.
        stopped_by: ``evaluations``, ``converged`` or ``hours``.
    """

    best: CurveFile
    identity: Factors
    winner: Candidate | None
    uniform: Candidate | None
    base_test: tuple[ContextScore, ...]
    uniform_test: tuple[ContextScore, ...] | None
    winner_test: tuple[ContextScore, ...] | None
    uniform_comparison: Comparison | None
    winner_comparison: Comparison | None
    verdict: Verdict
    candidates: tuple[tuple[Candidate, Score], ...]
    stopped_by: str


def run_search(
    executor: Executor,
    study: Study,
    settings: SearchSettings,
    progress: Progress,
    *,
    algorithm: Algorithm | None = None,
    curves: Sequence[Curve] = (),
    architecture: str | None = None,
    block_count: int | None = None,
) -> SearchOutcome:
    """Search for a curve that beats the base model, and measure its gain honestly.

    Candidates are compared on the ``search`` contexts only; the winner among the best of them, the best
    uniform factor and the base model is chosen on ``validation`` contexts; what is reported comes from
    ``test`` contexts. Meanwhile ``best.json`` of the study holds the best curve so far.

    The result depends on the settings, the model and the task, not on the order in which the executor
    returns results, and not on how often the search was killed and resumed.

    Args:
        executor: Evaluates; stays open.
        study: Holds every result; its config goes into the provenance of ``best.json``.
        settings: Options.
        progress: Shows how far it is.
        algorithm: Fresh optimizer in place of the genetic algorithm.
        curves: Further curves of generation 0 of the genetic algorithm.
        architecture: The model's ``general.architecture``, for ``best.json``.
        block_count: The model's, for ``best.json``; None: ``executor.n_layer``.

    Raises:
        LropeError: the base model's log-probabilities are not finite, or the study cannot be written.
    """
    return _Search(executor, study, settings, progress, architecture, block_count).run(
        algorithm
        or GeneticAlgorithm(
            executor.n_layer,
            degree=settings.degree,
            bounds=settings.bounds,
            population=settings.population,
            parents=settings.parents,
            lag=settings.offspring,
            seed=settings.seed,
            uniform_factors=settings.uniform_factors,
            curves=curves,
            width=settings.width,
        )
    )


class _Search:
    def __init__(
        self,
        executor: Executor,
        study: Study,
        settings: SearchSettings,
        progress: Progress,
        architecture: str | None,
        block_count: int | None,
    ) -> None:
        self.executor, self.study, self.settings, self.progress = executor, study, settings, progress
        self.architecture, self.block_count = architecture, block_count or executor.n_layer
        self.start = time.monotonic()
        self.identity = (1.0,) * executor.n_layer
        self.results: dict[Job, ContextScore] = {}
        straight = tuple((i / settings.degree, 1.0) for i in range(settings.degree + 1))
        self.base = Candidate(-1, Curve(straight, bounds=settings.bounds), self.identity, "identity")
        self.saved: Candidate | None = None
        self.fresh = False  # whether anything since best.json was last looked at was not replayed

    def run(self, algorithm: Algorithm) -> SearchOutcome:
        planned = self.settings.planned_evaluations()
        self.progress.start(sum(planned.values()))
        self.progress.line(f"up to {self.settings.max_evaluations} candidates: " + _plan_text(planned))
        try:
            base = self.evaluate_all([self.identity], "search")[self.identity]
            objective = Objective(base, self.settings.middle_weight)
            if not all(math.isfinite(score.log_probability) for score in base):
                raise LropeError("the base model gives no finite log-probabilities on this task; check model and data")
            self.keep_best([])
            ranking, stopped_by = self.generations(algorithm, objective)
            return self.finish(ranking, stopped_by)
        finally:
            self.progress.close()

    def evaluate(self, jobs: Iterable[Job]) -> dict[Job, ContextScore]:
        """Return the results of ``jobs``, from this run, from the study, or from the executor."""
        jobs = list(dict.fromkeys(jobs))
        missing = []
        for job in (job for job in jobs if job not in self.results):
            score = self.study.lookup(job)
            if score is None:
                missing.append(job)
            else:
                self.results[job] = score
                self.progress.advance(replayed=True)
        for job, score in self.executor.run(missing):
            self.study.record(job, score)
            self.results[job] = score
            self.fresh = True
            self.progress.advance()
        return {job: self.results[job] for job in jobs}

    def evaluate_all(self, sides: Iterable[Factors], split: str) -> dict[Factors, tuple[ContextScore, ...]]:
        """Return the scores of every side on all contexts of ``split``, in their order."""
        contexts = range(getattr(self.settings, f"{split}_contexts"))
        sides = list(dict.fromkeys(sides))
        results = self.evaluate(Job(side, split, i) for side in sides for i in contexts)
        return {side: tuple(results[Job(side, split, i)] for i in contexts) for side in sides}

    def generations(self, algorithm: Algorithm, objective: Objective) -> tuple[list[tuple[Candidate, Score]], str]:
        """Return every candidate evaluated, best first, and what ended it."""
        settings, racing = self.settings, self.settings.racing()
        ranking: list[tuple[Candidate, Score]] = []
        generation = 0
        while (left := settings.max_evaluations - len(ranking)) > 0:
            if settings.max_hours is not None and time.monotonic() - self.start > 3600.0 * settings.max_hours:
                return ranking, "hours"
            candidates = list(itertools.islice(iter(algorithm.ask, None), left))
            if not candidates:
                return ranking, "converged"
            racers = [c for c in candidates if c.factors != self.identity]
            scores = racing.run(racers, self.evaluate, objective) if racers else []
            scores += [(c, (settings.search_contexts, 0.0)) for c in candidates if c.factors == self.identity]
            for candidate, score in sorted(scores, key=lambda item: item[0].id):
                algorithm.tell(candidate, score)
            ranking = sorted([*ranking, *scores], key=rank)
            best, fitness = self.keep_best(ranking)
            text = f"best {fitness:+.4f} nats"
            self.progress.best(text)
            self.progress.line(
                f"generation {generation}: {len(ranking)}/{settings.max_evaluations} candidates, {text} "
                f"({best.origin}), {self.progress.status()}"
            )
            generation += 1
        return ranking, "evaluations"

    def keep_best(self, ranking: list[tuple[Candidate, Score]]) -> tuple[Candidate, float]:
        """Return the best so far, the base model if nothing beats it, and bring ``best.json`` up to date.

        Not during replay, which would set it back.
        """
        best, fitness = next(iter(self.better_than_base(ranking)), (self.base, 0.0))
        if self.fresh and best != self.saved:
            results = {"search": {"contexts": self.settings.search_contexts, "fitness": _number(fitness)}}
            self.study.save_best(self.document(best, results))
            self.saved = best
        self.fresh = False
        return best, fitness

    def better_than_base(self, ranking: list[tuple[Candidate, Score]]) -> list[tuple[Candidate, float]]:
        """Return the candidates with their fitness that saw all search contexts and beat the base model, best first."""
        return [
            (c, fitness)
            for c, (contexts, fitness) in ranking
            if contexts == self.settings.search_contexts and fitness > 0.0
        ]

    def finish(self, ranking: list[tuple[Candidate, Score]], stopped_by: str) -> SearchOutcome:
        """Choose on validation, measure on test."""
        settings = self.settings
        uniform = next((c for c, _ in ranking if len(set(c.factors)) == 1 and c.factors != self.identity), None)
        finalists = [c for c, _ in self.better_than_base(ranking)][: settings.finalists]
        if uniform is not None and uniform not in finalists:
            finalists.append(uniform)

        n_validation, n_test = 1 + len(finalists), 1 + (uniform is not None) + bool(finalists)
        self.progress.expect(
            len(self.results) + n_validation * settings.validation_contexts + n_test * settings.test_contexts
        )
        self.progress.line(
            f"validation: base and {len(finalists)} finalists on {settings.validation_contexts} contexts, "
            f"{self.progress.status()}"
        )
        validated = self.evaluate_all([self.identity, *(c.factors for c in finalists)], "validation")
        objective = Objective(validated[self.identity], settings.middle_weight)
        fitness = {c: objective.fitness(validated[c.factors]) for c in finalists}
        winner = max(finalists, key=lambda c: fitness[c], default=None)  # of equals the best by search
        if winner is not None and not fitness[winner] > 0.0:
            winner = None

        sides = [c.factors for c in (uniform, winner) if c is not None]
        self.progress.line(
            f"test: base and {len(set(sides))} more on {settings.test_contexts} contexts, {self.progress.status()}"
        )
        tested = self.evaluate_all([self.identity, *sides], "test")
        base_test = tested[self.identity]

        def against_base(candidate: Candidate | None) -> Comparison | None:
            if candidate is None:
                return None
            return compare(base_test, tested[candidate.factors], seed=settings.seed, confidence=settings.confidence)

        uniform_comparison, winner_comparison = against_base(uniform), against_base(winner)
        judgement = verdict(
            winner_comparison,
            None if uniform is None or uniform_comparison is None else (uniform.factors[0], uniform_comparison),
        )
        best = winner or self.base
        contexts, search_fitness = dict(ranking).get(best, (settings.search_contexts, 0.0))
        results: dict[str, Any] = {
            "candidates": len(ranking),
            "stopped_by": stopped_by,
            "search": {"contexts": contexts, "fitness": _number(search_fitness)},
            "validation": {"contexts": settings.validation_contexts, "fitness": _number(fitness.get(best, 0.0))},
            "test": _summary(base_test, winner_comparison),
            "recommended": judgement.recommended,
            "verdict": judgement.text,
        }
        if uniform is not None and uniform_comparison is not None:
            results["best_uniform"] = {"factor": uniform.factors[0], "test": _summary(base_test, uniform_comparison)}
        document = self.document(best, results)
        self.study.save_best(document)
        self.study.log(judgement.text)
        return SearchOutcome(
            best=document,
            identity=self.identity,
            winner=winner,
            uniform=uniform,
            base_test=base_test,
            uniform_test=None if uniform is None else tested[uniform.factors],
            winner_test=None if winner is None else tested[winner.factors],
            uniform_comparison=uniform_comparison,
            winner_comparison=winner_comparison,
            verdict=judgement,
            candidates=tuple(ranking),
            stopped_by=stopped_by,
        )

    def document(self, best: Candidate, results: dict[str, Any]) -> CurveFile:
        """Return the curve file of ``best``: no times in it, so that a resumed search writes the same bytes."""
        return CurveFile(
            control_points=best.curve.control_points,
            bounds=best.curve.bounds,
            architecture=self.architecture,
            block_count=self.block_count,
            provenance={"config": self.study.config, "results": results},
        )


def _option(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


def _plan_text(planned: dict[str, int]) -> str:
    return ", ".join(f"{n} {split}" for split, n in planned.items()) + " evaluations of one context each"


def _number(value: float) -> float | None:
    """Six decimals for people; JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None


def _summary(base: Sequence[ContextScore], comparison: Comparison | None) -> dict[str, Any]:
    """Return a comparison as JSON; without one, the base model's accuracy alone."""
    if comparison is None:
        accuracy = math.fsum(score.accuracy for score in base) / len(base)
        return {"contexts": len(base), "base_accuracy": _number(accuracy)}

    def interval(gain: Interval) -> list[float | None]:
        return [_number(gain.mean), _number(gain.low), _number(gain.high)]

    return {
        "contexts": comparison.n_contexts,
        "base_accuracy": _number(comparison.base_accuracy),
        "accuracy": _number(comparison.accuracy),
        "accuracy_gain": interval(comparison.accuracy_gain),
        "log_probability_gain": interval(comparison.log_probability_gain),
        "by_depth": [
            {
                "depth": _number(row.depth),
                "probes": row.n_probes,
                "base_accuracy": _number(row.base_accuracy),
                "accuracy": _number(row.accuracy),
                "accuracy_gain": interval(row.accuracy_gain),
            }
            for row in comparison.by_depth
        ],
    }
