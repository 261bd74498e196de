"""The search: candidates on search contexts, the winner on validation contexts, the gain on test contexts."""

from __future__ import annotations

import bisect
import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.errors import LropeError

from ..config import SearchConfig
from ..optimizers.protocol import Candidate, Optimizer, Score, rank
from ..results.comparison import compare, finite
from ..results.guard import divergences_by_length
from ..results.objective import Objective
from ..results.summary import StudySummary, Trial, summarise
from ..results.table import depth_table
from ..results.verdict import Verdict, verdict
from ..scores import GUARD, ContextScore, DivergenceScore, Factors, Job
from ..workers.protocol import Executor
from .plan import make_optimizer, planned_evaluations, racing
from .progress import Progress
from .racing import Race
from .scheduler import Pipeline, Urgency
from .store import Study

_LINE_EVERY = 8  # candidates without an improvement after which a line says how far it is


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found: its summary, and the optimizer's view that no study keeps.

    Attributes:
        summary: The study, as every report shows it.
        winner: The winner on validation; None if that was the base model.
        uniform: The best uniform factor on search contexts; None if none was tried.
        candidates: Every candidate evaluated with its score, best first.
        stopped_by: ``evaluations``, ``converged`` or ``hours``.
    """

    summary: StudySummary
    winner: Candidate | None
    uniform: Candidate | None
    candidates: tuple[tuple[Candidate, Score], ...]
    stopped_by: str

    @property
    def best(self) -> CurveFile:
        """The document that ``best.json`` holds."""
        assert self.summary.best is not None  # of a search that has ended
        return self.summary.best

    def text(self) -> str:
        """Return the test by depth and the verdict."""
        return f"{self.summary.table}\n\n{self.summary.verdict}"

    @property
    def verdict(self) -> Verdict:
        """Whether to use the curve."""
        return Verdict(self.summary.recommended, self.summary.verdict)


def run_search(
    executor: Executor,
    study: Study,
    settings: SearchConfig,
    progress: Progress,
    *,
    algorithm: Optimizer | None = None,
    architecture: str | None = None,
    block_count: int | None = None,
    guard_contexts: int = 0,
) -> SearchOutcome:
    """Search for a curve that beats the base model, and measure its gain honestly.

    Candidates are compared on the ``search`` contexts only; the winner among the best of them, the best
    uniform factor and the base model is chosen on ``validation`` contexts, unless its divergence on ordinary text
    (``guard``) exceeds ``settings.max_kl``; what is reported comes from ``test`` contexts. Meanwhile ``best.json`` of
    the study holds the best curve so far.

    There are no generations and no waiting at the end of a phase: candidate ``k`` is asked for as soon as all up to
    ``k - lag`` were told, and workers that this leaves idle do what will be needed later. The result depends on the
    settings, the model and the task, not on the number of workers nor on the order in which they return results, and
    not on how often the search was killed and resumed.

    Args:
        executor: Evaluates; stays open.
        study: Holds every result; its config goes into the provenance of ``best.json``.
        settings: Options.
        progress: Shows how far it is.
        algorithm: Fresh optimizer in place of the one of the settings.
        architecture: The model's ``general.architecture``, for ``best.json``.
        block_count: The model's, for ``best.json``; None: ``executor.n_layer``.
        guard_contexts: 1 if the evaluator can measure the `divergence` from the base model, 0 if not.

    Raises:
        LropeError: the base model's log-probabilities are not finite, an evaluation failed, or the study cannot be
            written.
    """
    algorithm = algorithm or make_optimizer(settings, executor.n_layer)
    search = _Search(executor, study, settings, progress, architecture, block_count, guard_contexts)
    return search.run(algorithm)


class _Search:
    def __init__(
        self,
        executor: Executor,
        study: Study,
        settings: SearchConfig,
        progress: Progress,
        architecture: str | None,
        block_count: int | None,
        guard_contexts: int,
    ) -> None:
        self.study, self.settings, self.progress = study, settings, progress
        self.architecture, self.block_count = architecture, block_count or executor.n_layer
        self.guard_contexts = guard_contexts
        self.start = time.monotonic()
        self.identity = (1.0,) * executor.n_layer
        self.pipeline = Pipeline(executor, study, progress)
        self.objectives: dict[int, Objective] = {}  # by number of search contexts
        self.ranking: list[tuple[Candidate, Score]] = []  # all that were told, best first
        straight = tuple((i / settings.degree, 1.0) for i in range(settings.degree + 1))
        self.base = Candidate(-1, Curve(straight, bounds=settings.bounds), self.identity, "identity")
        self.saved: Candidate | None = None
        self.line_due = 0

    def run(self, algorithm: Optimizer) -> SearchOutcome:
        settings = self.settings
        planned = planned_evaluations(settings, guard=bool(self.guard_contexts))
        self.progress.start(sum(planned.values()))
        self.progress.line(f"up to {settings.max_evaluations} candidates: " + _plan_text(planned))
        try:
            self.study.begin_candidates()
            self.pipeline.want(self.jobs(self.identity, "search"), order=-1)
            for order, split in enumerate(("validation", "test")):
                self.pipeline.want(self.jobs(self.identity, split), Urgency.SOON, order)
            stopped_by = self.search(algorithm)
            return self.finish(stopped_by)
        except KeyboardInterrupt:
            self.progress.line(self.interrupted())
            raise
        finally:
            self.progress.close()

    def interrupted(self) -> str:
        """What there is to say after Ctrl-C."""
        best = self.better_than_base()
        found = "none better than the base model"
        if best:
            found = f"the best so far, {best[0][1]:+.4f} nats, is {self.study.directory / 'best.json'}"
        return f"stopped after {len(self.ranking)} candidates, {found}; the same command resumes"

    def jobs(self, factors: Factors, split: str, contexts: range | None = None) -> list[Job]:
        """Return the evaluations of ``factors`` on ``contexts`` of ``split``; None: on all."""
        if contexts is None:
            contexts = range(self.guard_contexts if split == "guard" else getattr(self.settings, f"{split}_contexts"))
        return [Job(factors, split, i) for i in contexts]

    def search(self, algorithm: Optimizer) -> str:
        """Ask, evaluate and tell, candidate by candidate; return what ended it."""
        race = Race(racing(self.settings))
        asked: list[Candidate] = []
        pending: deque[Candidate] = deque()

        def fitness(candidate: int, n_contexts: int) -> float | None:
            return self.fitness(asked[candidate].factors, n_contexts)

        def see(candidate: Candidate, contexts: range) -> None:
            self.pipeline.want(self.jobs(candidate.factors, "search", contexts), order=candidate.id)

        stopped_by = ""
        while True:
            while not stopped_by and len(pending) < algorithm.lag:
                if len(asked) == self.settings.max_evaluations:
                    stopped_by = "evaluations"
                elif self.out_of_time():
                    stopped_by = "hours"
                elif (candidate := algorithm.ask()) is not None:
                    asked.append(candidate)
                    pending.append(candidate)
                    see(candidate, race.enter(candidate.id))
                elif pending:
                    break
                else:
                    stopped_by = "converged"
            if not pending:
                return stopped_by
            if stopped_by or algorithm.should_stop():
                self.look_ahead()
            candidate = pending.popleft()
            while candidate.id not in race.scores:
                for goes_on, contexts in race.advance(fitness):
                    see(asked[goes_on], contexts)
                if candidate.id not in race.scores:
                    self.pipeline.step()
            score = race.scores[candidate.id]
            if candidate.factors == self.identity:
                score = (self.settings.search_contexts, 0.0)  # known without racing
            algorithm.tell(candidate, score)
            self.study.record_candidate(candidate, score)
            bisect.insort(self.ranking, (candidate, score), key=rank)
            self.keep_best()

    def out_of_time(self) -> bool:
        hours = self.settings.max_hours
        return hours is not None and time.monotonic() - self.start > 3600.0 * hours

    def fitness(self, factors: Factors, n_contexts: int) -> float | None:
        """Return the fitness on the first ``n_contexts`` search contexts; None as long as a result is missing."""
        results, contexts = self.pipeline.results, range(n_contexts)
        scores = [results.get(job) for job in self.jobs(factors, "search", contexts)]
        known = [score for score in scores if isinstance(score, ContextScore)]
        if len(known) < n_contexts:
            return None
        if n_contexts not in self.objectives:
            base = [results.get(job) for job in self.jobs(self.identity, "search", contexts)]
            known_base = [score for score in base if isinstance(score, ContextScore)]
            if len(known_base) < n_contexts:
                return None
            if not all(math.isfinite(score.log_probability) for score in known_base):
                raise LropeError("the base model gives no finite log-probabilities on this task; check model and data")
            self.objectives[n_contexts] = Objective(known_base, self.settings.middle_weight)
        return self.objectives[n_contexts].fitness(known)

    def keep_best(self) -> None:
        """Bring ``best.json`` up to date with what was told, and say so.

        Not during replay, which would set it back.
        """
        best, fitness = next(iter(self.better_than_base()), (self.base, 0.0))
        improved = best != self.saved
        if improved and self.pipeline.n_fresh:
            results = {"search": {"contexts": self.settings.search_contexts, "fitness": finite(fitness, 6)}}
            self.study.save_best(self.document(best, results))
            self.saved = best
        text = f"best {fitness:+.4f} nats"
        self.progress.best(text)
        self.progress.expect(self.expected())
        if self.pipeline.n_fresh and (improved or len(self.ranking) >= self.line_due):
            self.line_due = len(self.ranking) + _LINE_EVERY
            self.progress.line(
                f"{len(self.ranking)}/{self.settings.max_evaluations} candidates, {text} ({best.origin}), "
                f"{self.progress.status()}"
            )

    def expected(self) -> int:
        """Return how many evaluations it will be in all, by what racing has taken so far."""
        planned = planned_evaluations(self.settings, guard=bool(self.guard_contexts))
        begun = sum(contexts for _, (contexts, _) in self.ranking)
        left = max(self.settings.max_evaluations - len(self.ranking), 0)
        search = self.settings.search_contexts + begun + math.ceil(left * begun / len(self.ranking))
        return search + sum(n for split, n in planned.items() if split != "search")

    def better_than_base(self) -> list[tuple[Candidate, float]]:
        """Return the candidates with their fitness that saw all search contexts and beat the base model, best first."""
        better = []
        for candidate, (contexts, fitness) in self.ranking:
            if contexts < self.settings.search_contexts or not fitness > 0.0:
                break
            better.append((candidate, fitness))
        return better

    def finalists(self) -> tuple[list[Candidate], Candidate | None]:
        """Return who goes on to validation as it stands, best first, and the best uniform factor among them."""
        uniform = next((c for c, _ in self.ranking if len(set(c.factors)) == 1 and c.factors != self.identity), None)
        finalists = [c for c, _ in self.better_than_base()][: self.settings.finalists]
        if uniform is not None and uniform not in finalists:
            finalists.append(uniform)
        return finalists, uniform

    def look_ahead(self) -> None:
        """While the last candidates are out, let idle workers begin with those that lead."""
        finalists, uniform = self.finalists()
        for order, candidate in enumerate(finalists):
            self.pipeline.want(self.jobs(candidate.factors, "validation"), Urgency.MAYBE, order)
        if uniform is not None:
            self.pipeline.want(self.jobs(uniform.factors, "test"), Urgency.MAYBE, len(finalists))

    def finish(self, stopped_by: str) -> SearchOutcome:
        """Choose on validation, measure on test."""
        settings = self.settings
        finalists, uniform = self.finalists()
        n_test = 1 + (uniform is not None) + bool(finalists)
        self.progress.expect(
            sum(job.split == "search" for job in self.pipeline.results)
            + (1 + len(finalists)) * settings.validation_contexts
            + bool(finalists) * self.guard_contexts
            + n_test * settings.test_contexts
        )
        self.progress.line(
            f"validation: base and {len(finalists)} finalists on {settings.validation_contexts} contexts, "
            f"{self.progress.status()}"
        )
        for candidate in (self.base, *finalists):
            self.pipeline.want(self.jobs(candidate.factors, "validation"))
        if uniform is not None:
            self.pipeline.want(self.jobs(uniform.factors, "test"), Urgency.SOON)
        for order, candidate in enumerate(finalists):
            self.pipeline.want(self.jobs(candidate.factors, "guard"), Urgency.MAYBE, order)
        objective = Objective(self.all_of(self.identity, "validation"), settings.middle_weight)
        fitness = {c: objective.fitness(self.all_of(c.factors, "validation")) for c in finalists}
        winner, divergences = self.choose(finalists, fitness)

        sides = [c.factors for c in (uniform, winner) if c is not None]
        self.progress.line(
            f"test: base and {len(set(sides))} more on {settings.test_contexts} contexts, {self.progress.status()}"
        )
        for side in (self.identity, *sides):
            self.pipeline.want(self.jobs(side, "test"))
        scores = {"base": self.all_of(self.identity, "test")}
        if uniform is not None:
            beside = f"uniform {uniform.factors[0]:g}"
            scores[beside] = self.all_of(uniform.factors, "test")
        if winner is not None:
            scores["curve"] = self.all_of(winner.factors, "test")
        table = depth_table(scores, seed=settings.seed, confidence=settings.confidence)
        curve_gain = table.comparisons.get("curve")
        uniform_gain = over_uniform = None
        if uniform is not None:
            uniform_gain = uniform.factors[0], table.comparisons[beside]
            if winner not in (None, uniform):
                over_uniform = compare(
                    scores[beside], scores["curve"], seed=settings.seed, confidence=settings.confidence
                )
        kl = None if winner is None or winner not in divergences else max(divergences[winner].values())
        judgement = verdict(curve_gain, uniform_gain, kl, over_uniform=over_uniform)
        if winner is None and divergences:
            judgement = Verdict(
                False,
                f"no curve that beats the base model on validation stays within {settings.max_kl:g} nats a token of it "
                "on ordinary text (--max-kl), not recommended",
            )
        best = winner or self.base
        contexts, search_fitness = dict(self.ranking).get(best, (settings.search_contexts, 0.0))
        base_alone = {"contexts": table.n_contexts, "base_accuracy": finite(table.totals["base"].accuracy, 6)}
        results: dict[str, Any] = {
            "candidates": len(self.ranking),
            "stopped_by": stopped_by,
            "search": {"contexts": contexts, "fitness": finite(search_fitness, 6)},
            "validation": {"contexts": settings.validation_contexts, "fitness": finite(fitness.get(best, 0.0), 6)},
            "test": base_alone if curve_gain is None else curve_gain.json(),
            "recommended": judgement.recommended,
            "verdict": judgement.text,
        }
        if uniform_gain is not None:
            results["best_uniform"] = {"factor": uniform_gain[0], "test": uniform_gain[1].json()}
        if over_uniform is not None:
            results["over_uniform"] = over_uniform.json()
        if divergences:
            results["guard"] = {"max_kl": settings.max_kl, "passed_over": len(divergences) - (winner is not None)}
            if winner is not None:
                results["guard"] |= {name: finite(value, 6) for name, value in divergences[winner].items()}
        document = self.document(best, results)
        self.study.save_best(document)
        self.study.log(judgement.text)
        trials = [
            Trial(c.id, c.origin, c.factors, c.curve.control_points, *score)
            for c, score in sorted(self.ranking, key=lambda item: item[0].id)
        ]
        # in the order of config.json, as a report shows it
        config = json.loads(json.dumps(self.study.config, sort_keys=True))
        summary = summarise(self.study.directory, config, document, self.study.results, trials, table)
        return SearchOutcome(summary, winner, uniform, tuple(self.ranking), stopped_by)

    def all_of(self, factors: Factors, split: str) -> list[ContextScore]:
        """Return the scores on all contexts of ``split``, waiting for them."""
        return [score for score in self.pipeline.get(self.jobs(factors, split)) if isinstance(score, ContextScore)]

    def choose(
        self, finalists: Sequence[Candidate], fitness: Mapping[Candidate, float]
    ) -> tuple[Candidate | None, dict[Candidate, dict[str, float]]]:
        """Return the best by validation that the guard lets pass, and the divergences of those that it looked at.

        The winner must beat the base model; of equals the best by search comes first.
        """
        divergences: dict[Candidate, dict[str, float]] = {}
        for candidate in sorted((c for c in finalists if fitness[c] > 0.0), key=lambda c: -fitness[c]):
            if not self.guard_contexts:
                return candidate, divergences
            self.pipeline.want(self.jobs(candidate.factors, "test"), Urgency.MAYBE)
            scores = self.pipeline.get(self.jobs(candidate.factors, GUARD))
            divergences[candidate] = divergences_by_length(s for s in scores if isinstance(s, DivergenceScore))
            worst, limit = max(divergences[candidate].values()), self.settings.max_kl
            if worst <= limit:
                return candidate, divergences
            self.progress.line(
                f"candidate {candidate.id} is passed over: KL divergence {worst:.3g} on ordinary text exceeds "
                f"--max-kl {limit:g}"
            )
        return None, divergences

    def document(self, best: Candidate, results: dict[str, Any]) -> CurveFile:
        """Return the curve file of ``best``: no times in it, so that a resumed search writes the same bytes."""
        return CurveFile(
            control_points=best.curve.control_points,
            layer_factors=best.factors,
            bounds=best.curve.bounds,
            architecture=self.architecture,
            block_count=self.block_count,
            provenance={"config": self.study.config, "results": results},
        )


def _plan_text(planned: dict[str, int]) -> str:
    return "about " + ", ".join(f"{n} {split}" for split, n in planned.items()) + " evaluations of one context each"
