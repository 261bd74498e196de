"""The first phase of a search: candidates on search contexts, asked for, evaluated and told one by one."""

from __future__ import annotations

import bisect
import math
import time
from collections import deque

from lrope_gguf.errors import LropeError

from ..optimizers.protocol import Candidate, Optimizer, rank
from ..results.intervals import finite
from ..results.objective import Objective
from ..results.variation import typical, variation_text
from ..scores import PROPOSED, Factors
from .plan import most_candidates, planned_evaluations
from .racing import Race
from .scheduler import Urgency
from .state import Run

_VARIED = 6  # candidates after which a line says how well they can be told apart
_LINE_EVERY = 8  # candidates without an improvement after which a line says how far it is


class Exploration:
    """Fills a run's ranking."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._objectives: dict[int, Objective] = {}  # by number of search contexts
        self._saved: Candidate | None = None
        self._line_due = 0

    def search(self, algorithm: Optimizer) -> str:
        """Ask, evaluate and tell, candidate by candidate; return what ended it."""
        run, race = self._run, Race(self._run.settings.racing(self._run.n_tasks))
        asked: list[Candidate] = []
        pending: deque[Candidate] = deque()

        def fitness(candidate: int, n_contexts: int) -> float | None:
            return self._fitness(asked[candidate].factors, n_contexts)

        def see(candidate: Candidate, contexts: range) -> None:
            run.pipeline.want(run.jobs(candidate.factors, "search", contexts), order=candidate.id)

        stopped_by = ""
        while True:
            while not stopped_by and len(pending) < algorithm.lag:
                if len(asked) == run.settings.max_evaluations:
                    stopped_by = "evaluations"
                elif self._out_of_time():
                    stopped_by = "hours"
                elif (candidate := algorithm.ask()) is not None:
                    asked.append(candidate)
                    pending.append(candidate)
                    spared = candidate.origin == PROPOSED  # few, and those near 1 have their use if the best diverge
                    see(candidate, race.enter(candidate.id, spared=spared))
                elif pending:
                    break
                else:
                    stopped_by = "converged"
            if not pending:
                return stopped_by
            if stopped_by or algorithm.should_stop():
                self._look_ahead()
            candidate = pending.popleft()
            while candidate.id not in race.scores:
                for goes_on, contexts in race.advance(fitness):
                    see(asked[goes_on], contexts)
                if candidate.id not in race.scores:
                    run.pipeline.step()
            score = race.scores[candidate.id]
            if candidate.factors == run.identity:
                score = (run.settings.n_contexts("search"), 0.0)  # known without racing
            algorithm.tell(candidate, score)
            run.study.record_candidate(candidate, score)
            bisect.insort(run.ranking, (candidate, score), key=rank)
            if len(run.ranking) == _VARIED and run.pipeline.n_fresh and run.n_tasks == 1:
                self._say_variation()
            self._keep_best()

    def _say_variation(self) -> None:
        run = self._run
        base = run.known(run.identity, run.settings.n_contexts("search")) or []
        sides = []
        for candidate, (contexts, _) in run.ranking:
            scores = run.known(candidate.factors, contexts)
            if candidate.factors != run.identity and scores:
                sides.append((base[:contexts], scores))
        found = typical(sides)
        if found is not None:
            run.progress.line(variation_text(found, len(base), len(base[0].probes)))

    def _out_of_time(self) -> bool:
        hours = self._run.settings.max_hours
        return hours is not None and time.monotonic() - self._run.start > 3600.0 * hours

    def _fitness(self, factors: Factors, n_contexts: int) -> float | None:
        """Return the fitness on the first ``n_contexts`` search contexts; None as long as a result is missing."""
        run = self._run
        known = run.known(factors, n_contexts)
        if known is None:
            return None
        if n_contexts not in self._objectives:
            base = run.known(run.identity, n_contexts)
            if base is None:
                return None
            if not all(math.isfinite(score.log_probability) for score in base):
                raise LropeError("the base model gives no finite log-probabilities on this task; check model and data")
            self._objectives[n_contexts] = run.objective(base)
        return self._objectives[n_contexts].fitness(known)

    def _keep_best(self) -> None:
        """Bring ``best.json`` up to date with what was told, and say so.

        Not during replay, which would set it back.
        """
        run = self._run
        best, fitness = next(iter(run.better_than_base()), (run.base, 0.0))
        improved = best != self._saved
        if improved and run.pipeline.n_fresh:
            results = {"search": {"contexts": run.settings.n_contexts("search"), "fitness": finite(fitness, 6)}}
            run.study.save_best(run.document(best, results))
            self._saved = best
        text = f"best {fitness:+.4f} {run.unit}"
        run.progress.best(text)
        run.progress.expect(self._expected())
        if run.pipeline.n_fresh and (improved or len(run.ranking) >= self._line_due):
            self._line_due = len(run.ranking) + _LINE_EVERY
            run.progress.line(
                f"{len(run.ranking)}/{most_candidates(run.settings)} candidates, {text} ({best.origin}), "
                f"{run.progress.status()}"
            )

    def _expected(self) -> int:
        """Return how many evaluations it will be in all, by what racing has taken so far."""
        run = self._run
        planned = planned_evaluations(run.settings, guard=bool(run.guard_contexts), n_tasks=run.n_tasks)
        begun = sum(contexts for _, (contexts, _) in run.ranking)
        left = max(most_candidates(run.settings) - len(run.ranking), 0)
        search = run.settings.n_contexts("search") + begun + math.ceil(left * begun / len(run.ranking))
        return search + sum(n for split, n in planned.items() if split != "search")

    def _look_ahead(self) -> None:
        """While the last candidates are out, let idle workers begin with those that lead."""
        run = self._run
        finalists, uniform = run.finalists()
        for order, candidate in enumerate(finalists):
            run.pipeline.want(run.jobs(candidate.factors, "validation"), Urgency.MAYBE, order)
        if uniform is not None:
            run.pipeline.want(run.jobs(uniform.factors, "test"), Urgency.MAYBE, len(finalists))
