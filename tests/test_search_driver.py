"""The search as a whole on a synthetic model: honest splits, racing, kill and resume, any order of results."""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.synthetic import Landscape, noise
from support.virtual_workers import VirtualExecutor

from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.errors import LropeError
from lrope_search import SearchConfig, optimizer_config
from lrope_search.optimizers.protocol import Candidate, Optimizer, Score
from lrope_search.results.objective import Objective
from lrope_search.scores import GUARD, ContextScore, DivergenceScore, Evaluator, Job, ProbeScore
from lrope_search.study.conclude import SearchOutcome
from lrope_search.study.plan import planned_evaluations
from lrope_search.study.progress import Progress
from lrope_search.study.racing import Race, Racing
from lrope_search.study.run import run_search
from lrope_search.study.store import Study
from lrope_search.workers.protocol import LocalExecutor

SETTINGS = SearchConfig(
    seed=3, max_evaluations=44, search_contexts=3, racing_fraction=0.5, validation_contexts=4, test_contexts=12,
    finalists=3,
)  # fmt: skip


class Recorder:
    """Passes evaluations on and remembers them."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self.n_layer = evaluator, evaluator.n_layer
        self.jobs: list[Job] = []

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        self.jobs.append(Job(factors, split, index))
        return self._evaluator.evaluate(factors, split, index)

    def divergence(self, factors: tuple[float, ...]) -> DivergenceScore:
        self.jobs.append(Job(factors, GUARD, 0))
        return self._evaluator.divergence(factors)


class Bent(Landscape):
    """A landscape whose log-probabilities are ``bend(as it has them, factors)``."""

    def __init__(self, bend: Callable[[float, tuple[float, ...]], float], seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._bend = bend

    def log_probability(self, factors: tuple[float, ...], context: object) -> float:
        return self._bend(super().log_probability(factors, context), factors)


def uneven(job: Job) -> float:
    """Log-normal around 1 with a spread of e: one evaluation in twenty takes five times as long as the median."""
    return math.exp(noise("duration", job))


def workers(n: int, evaluator: Evaluator | None = None) -> Callable[[object], VirtualExecutor]:
    """``n`` workers whose results come in an order that nobody can foresee."""
    return lambda _: VirtualExecutor(evaluator or Landscape(), n, lambda job: random.random())


def search(
    directory: Path, evaluator: Evaluator | None = None, settings: SearchConfig = SETTINGS, **options
) -> SearchOutcome:
    executor = options.pop("executor", LocalExecutor)(evaluator or Landscape())
    with Study(directory, {"task": "synthetic", "search": settings.identity()}) as study:
        return run_search(executor, study, settings, Progress(study.log, quiet=True), **options)


def same_best(a: Path, b: Path) -> bool:
    return (a / "best.json").read_bytes() == (b / "best.json").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    search(directory)
    return directory


def test_finds_a_gain_and_reports_it_from_unseen_contexts(tmp_path: Path) -> None:
    land = Landscape()
    recorder = Recorder(land)
    outcome = search(tmp_path, recorder, architecture="synthetic")
    assert outcome.verdict.recommended and outcome.winner is not None
    assert re.match("gain .* on 12 unseen contexts; best uniform factor", outcome.verdict.text)

    # the report is right, by an independent sum over the same contexts
    identity, factors = (1.0,) * land.n_layer, outcome.winner.factors
    gains = [
        land.evaluate(factors, "test", i).accuracy - land.evaluate(identity, "test", i).accuracy for i in range(12)
    ]
    assert outcome.summary.table is not None
    comparison = outcome.summary.table.comparisons["curve"]
    assert comparison.accuracy_gain.mean == pytest.approx(sum(gains) / 12)
    assert [row.depth for row in comparison.by_depth] == [0.0, 0.25, 0.5, 0.75, 1.0]

    # the winner is the best of the finalists on validation
    sides = {job.factors for job in recorder.jobs if job.split == "validation"}
    validation = {s: sum(land.evaluate(s, "validation", i).log_probability for i in range(4)) for s in sides}
    assert identity in sides and len(sides) == 5 and max(sides, key=lambda side: validation[side]) == factors

    # the document is what was measured
    best = CurveFile.load(tmp_path / "best.json")
    assert best == outcome.best
    assert best.layer_factors == best.factors_for(land.n_layer) == factors
    assert (best.architecture, best.block_count) == ("synthetic", land.n_layer)
    results = best.provenance["results"]
    assert results["verdict"] == outcome.verdict.text and results["candidates"] == 44
    assert results["test"]["accuracy_gain"][0] == pytest.approx(sum(gains) / 12, abs=1e-6)
    assert best.provenance["config"]["search"]["seed"] == 3


def test_splits_stay_apart_and_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    recorder = Recorder(Landscape())
    outcome = search(tmp_path, recorder)
    splits = [job.split for job in recorder.jobs]
    assert splits == sorted(splits, key=["search", "validation", "test"].index)  # one worker does nothing early
    assert len(set(recorder.jobs)) == len(recorder.jobs)
    searched = {job.factors for job in recorder.jobs if job.split == "search"}
    assert len(searched) == 44 == len(outcome.candidates)
    assert len({job.factors for job in recorder.jobs if job.split == "test"}) == 3  # base, uniform, winner
    sizes = {"search": 3, "validation": 4, "test": 12}
    assert {(j.split, j.index) for j in recorder.jobs} == {(s, i) for s, n in sizes.items() for i in range(n)}


def test_the_plan_is_about_what_a_search_takes(tmp_path: Path) -> None:
    for settings in (SETTINGS, replace(SETTINGS, racing_fraction=1.0, uniform_factors=(1.05,), finalists=1)):
        recorder = Recorder(Landscape())
        outcome = search(tmp_path / f"{settings.racing_fraction}", recorder, settings)
        taken = {s: sum(job.split == s for job in recorder.jobs) for s in ("search", "validation", "test")}
        planned = planned_evaluations(settings)
        assert planned["search"] == pytest.approx(taken["search"], rel=0.35 if settings.racing_fraction < 1.0 else 0.0)
        assert planned["test"] == taken["test"]
        assert planned["validation"] >= taken["validation"]
        assert outcome.stopped_by == "evaluations"


def test_a_model_that_nothing_helps_gets_no_recommendation(tmp_path: Path) -> None:
    flat = Bent(lambda _, factors: -0.9 - 20.0 * sum(abs(math.log(s)) for s in factors) / len(factors))
    outcome = search(tmp_path, flat)
    assert outcome.summary.table is not None and "curve" not in outcome.summary.table.totals
    assert outcome.winner is None and not outcome.verdict.recommended
    assert "no curve beat the base model" in outcome.verdict.text
    best = CurveFile.load(tmp_path / "best.json")
    assert set(best.factors_for(12)) == {1.0}
    assert best.provenance["results"]["recommended"] is False
    assert best.provenance["results"]["test"]["base_accuracy"] == pytest.approx(
        sum(flat.evaluate((1.0,) * 12, "test", i).accuracy for i in range(12)) / 12
    )


def test_a_gain_on_search_contexts_only_is_not_recommended(tmp_path: Path) -> None:
    """Pure noise: the best of many is good by luck, and validation and test know nothing of it."""
    outcomes = []
    for seed in range(6):
        noisy = Bent(lambda plain, _: -0.9 + 0.3 * (plain * 1e4 % 1.0 - 0.5), seed)
        outcomes.append(search(tmp_path / str(seed), noisy, replace(SETTINGS, seed=seed, max_evaluations=20)))
    assert sum(outcome.candidates[0][1][1] > 0.02 for outcome in outcomes) >= 4
    assert sum(outcome.verdict.recommended for outcome in outcomes) <= 1  # 2.5 % each by the interval


@pytest.mark.parametrize("n_workers", [2, 4, 30])
def test_neither_workers_nor_the_order_of_results_matter(tmp_path: Path, whole: Path, n_workers: int) -> None:
    random.seed(5)
    search(tmp_path, executor=workers(n_workers))
    for name in ("best.json", "candidates.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    # what was evaluated too is only what might have been needed
    lines = [(d / "evaluations.jsonl").read_text().splitlines() for d in (tmp_path, whole)]
    assert set(lines[0]) >= set(lines[1]) and lines[0] != lines[1]
    assert all('"split":"search"' not in line for line in set(lines[0]) - set(lines[1]))


@pytest.mark.parametrize(("lag", "utilisation"), [(8, 0.93), (16, 0.98)])
def test_no_worker_idles_longer_than_one_evaluation(tmp_path: Path, lag: int, utilisation: float) -> None:
    settings = replace(SETTINGS, max_evaluations=120, search_contexts=4, algorithm=optimizer_config("ga", lag=lag))
    executor = VirtualExecutor(Landscape(), 4, uneven)
    search(tmp_path, settings=settings, executor=lambda evaluator: executor)
    searches = [span for span in executor.spans if span.job.split == "search"]
    last = max(span.start for span in searches)
    assert max((to - since for since, to in executor.gaps if to <= last), default=0.0) <= max(
        s.end - s.start for s in searches
    )
    assert executor.busy(last) > utilisation
    # validation and test begin while the last candidates are out
    others = [span for span in executor.spans if span.job.split != "search"]
    assert min(span.start for span in others) < max(span.end for span in searches)


def test_what_is_needed_goes_before_what_may_be(tmp_path: Path) -> None:
    """A worker with something urgent to do never does something else; so one worker does nothing in vain."""
    executor = VirtualExecutor(Landscape(), 1, uneven)
    search(tmp_path, executor=lambda evaluator: executor)
    alone = {span.job for span in executor.spans}
    recorder = Recorder(Landscape())
    search(tmp_path / "local", recorder)
    assert alone == set(recorder.jobs)


def test_what_the_guard_measured_is_said(tmp_path: Path) -> None:
    free = search(tmp_path / "free", Landscape(), replace(SETTINGS, max_kl=9.0), guard_contexts=1)
    assert free.winner is not None
    kl = max(free.summary.guard.values())
    assert kl == pytest.approx(max(abs(math.log(s)) for s in free.winner.factors))
    results = free.best.provenance["results"]["guard"]
    assert results == {"max_kl": 9.0, "passed_over": 0, "short": round(kl / 2.0, 6), "long": round(kl, 6)}
    assert "; KL on ordinary text 0." in free.verdict.text


def test_the_guard_looks_at_whoever_is_validated(tmp_path: Path) -> None:
    recorder, loose = Recorder(Landscape()), replace(SETTINGS, max_kl=9.0)
    outcome = search(tmp_path, recorder, loose, guard_contexts=1)
    assert outcome.winner is not None
    by_split = {split: {j.factors for j in recorder.jobs if j.split == split} for split in ("validation", GUARD)}
    assert by_split["validation"] == by_split[GUARD] | {(1.0,) * recorder.n_layer}
    assert len([job for job in recorder.jobs if job.split == GUARD]) == len(by_split[GUARD])
    assert {job.index for job in recorder.jobs if job.split == GUARD} == {0}
    random.seed(1)
    search(tmp_path / "many", settings=loose, executor=workers(6, Landscape()), guard_contexts=1)
    assert same_best(tmp_path / "many", tmp_path)


def test_candidates_that_yield_nan_lose_and_all_are_listed_in_the_order_of_asking(tmp_path: Path) -> None:
    fragile = Bent(lambda plain, factors: math.nan if max(factors) > 1.06 else plain)
    settings = replace(SETTINGS, max_evaluations=80)  # the layer scan is ruined, all of it
    outcome = search(tmp_path, fragile, settings)
    assert outcome.candidates[-1][1][1] == -math.inf
    assert outcome.winner is not None and max(outcome.winner.factors) <= 1.06
    search(tmp_path, fragile, settings)  # and the study can be read again
    records = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(80))
    scores = {candidate.id: (candidate, score) for candidate, score in outcome.candidates}
    for record in records:
        candidate, (contexts, fitness) = scores[record["id"]]
        assert (record["contexts"], float(record["fitness"])) == (contexts, fitness)
        assert record["origin"] == candidate.origin and tuple(record["factors"]) == candidate.factors
        points = record["control_points"]
        assert (None if points is None else tuple(map(tuple, points))) == candidate.control_points
    assert any(record["fitness"] == "-inf" for record in records)


def test_a_finished_search_runs_again_without_evaluating(tmp_path: Path) -> None:
    search(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("best.json", "evaluations.jsonl", "config.json")}
    saved: list[bytes] = []

    class Watch(Study):
        def save_best(self, best: CurveFile) -> None:
            super().save_best(best)
            saved.append((self.directory / "best.json").read_bytes())

    recorder = Recorder(Landscape())
    with Watch(tmp_path, {"task": "synthetic", "search": SETTINGS.identity()}) as study:
        run_search(LocalExecutor(recorder), study, SETTINGS, Progress(quiet=True))
    assert recorder.jobs == []
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert saved == [before["best.json"]]  # replay never sets it back


def command(body: str, *arguments: object) -> list[str]:
    """A program that searches as this file does, and its arguments."""
    head = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return [sys.executable, "-c", f"{head}import test_search_driver as t\n{body}", *map(str, arguments)]


SLOWLY = """
import time
class Slow(t.Landscape):
    def evaluate(self, factors, split, index):
        time.sleep(0.004)
        return super().evaluate(factors, split, index)
t.search(Path(sys.argv[1]), Slow())
"""


def test_killed_at_any_instant_it_resumes_to_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    total = len((whole / "evaluations.jsonl").read_text().splitlines())
    evaluations, best = tmp_path / "evaluations.jsonl", tmp_path / "best.json"
    resumed_from = []
    for kill_at in (1, 25, total // 2, total - 14):
        with subprocess.Popen(command(SLOWLY, tmp_path)) as process:
            deadline = time.monotonic() + 30.0
            while not evaluations.exists() or evaluations.read_bytes().count(b"\n") < kill_at:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            process.kill()
        resumed_from.append(evaluations.read_bytes().count(b"\n"))
        if best.exists():
            CurveFile.load(best)  # always whole
    assert resumed_from == sorted(resumed_from) and resumed_from[-1] < total
    assert best.exists() and best.read_bytes() != (whole / "best.json").read_bytes()
    with evaluations.open("ab") as file:
        file.write(b'{"factors":[1.0,')

    recorder = Recorder(Landscape())
    search(tmp_path, recorder)
    assert len(recorder.jobs) == total - resumed_from[-1]
    assert same_best(tmp_path, whole)
    assert sorted(evaluations.read_text().splitlines()) == sorted(
        (whole / "evaluations.jsonl").read_text().splitlines()
    )


@pytest.mark.slow
def test_killed_at_random_instants_with_workers_it_resumes_to_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    """Twenty kills of two workers' search, each after a random time from its first result on."""
    random.seed(11)
    evaluations, best = tmp_path / "evaluations.jsonl", tmp_path / "best.json"
    total = len((whole / "evaluations.jsonl").read_text().splitlines())
    n_kills = n_finished = 0
    while n_kills < 20:
        before = evaluations.stat().st_size if evaluations.exists() else 0
        if before and evaluations.read_bytes().count(b"\n") > total - 8:  # begin again
            for name in ("evaluations.jsonl", "best.json"):
                (tmp_path / name).unlink()
            before = 0
        with subprocess.Popen(command(PROCESSES, tmp_path)) as process:
            while process.poll() is None and (not evaluations.exists() or evaluations.stat().st_size == before):
                time.sleep(0.001)
            time.sleep(random.uniform(0.0, 0.08))
            if process.poll() is None:
                process.kill()
                n_kills += 1
        n_finished += process.returncode == 0
        if best.exists():
            CurveFile.load(best)
    assert n_finished <= 3
    assert subprocess.run(command(PROCESSES, tmp_path)).returncode == 0
    assert same_best(tmp_path, whole)
    assert (tmp_path / "candidates.jsonl").read_bytes() == (whole / "candidates.jsonl").read_bytes()


PROCESSES = """
from lrope_search.workers.processes import ProcessExecutor
from support.worker_evaluators import Workers
with ProcessExecutor(Workers(seconds=0.002), 2) as executor:
    t.search(Path(sys.argv[1]), executor=lambda _: executor)
"""

FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    t.search(Path(sys.argv[1]))
except t.LropeError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_no_more_room_for_any_file_loses_nothing(tmp_path: Path, whole: Path) -> None:
    """Files may grow so far and no further, in mid-line too, as on a full disk; then there is room again."""
    sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
    limits = [100, sizes["candidates.jsonl"] // 2, sizes["candidates.jsonl"] - 1, sizes["evaluations.jsonl"] - 200]
    for limit in sorted(limits):
        result = subprocess.run(command(FULL, tmp_path, limit), capture_output=True, text=True)
        assert result.returncode == 1 and "cannot be written (File too large)" in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1
        evaluations = tmp_path / "evaluations.jsonl"
        assert not evaluations.exists() or evaluations.read_bytes()[-1:] in (b"", b"\n")
    search(tmp_path)
    for name in ("best.json", "candidates.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


class Faulty(Recorder):
    """Raises ``fault`` once, as the evaluation after ``after`` others."""

    def __init__(self, fault: type[BaseException], after: int) -> None:
        super().__init__(Landscape())
        self._fault, self._after = fault, after

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        if len(self.jobs) == self._after:
            raise self._fault
        return super().evaluate(factors, split, index)


@pytest.mark.parametrize(
    ("fault", "raised", "message"),
    [(KeyboardInterrupt, KeyboardInterrupt, None),
     (MemoryError, LropeError, r"^memory ran out over the evaluation of search \d; .* resumes$")],
)  # fmt: skip
def test_interrupted_it_leaves_the_best_so_far_and_a_free_study(
    tmp_path: Path, whole: Path, fault: type[BaseException], raised: type[BaseException], message: str | None
) -> None:
    with pytest.raises(raised, match=message):
        search(tmp_path, Faulty(fault, after=40))
    results = CurveFile.load(tmp_path / "best.json").provenance["results"]
    assert results["search"]["contexts"] == 3 and results["search"]["fitness"] >= 0.0 and "test" not in results
    search(tmp_path)
    assert same_best(tmp_path, whole)


def test_what_is_left_follows_what_racing_takes_and_best_json_never_gets_worse(tmp_path: Path) -> None:
    totals: list[int] = []
    fitness: list[float] = []

    class Counted(Progress):
        def expect(self, total: int) -> None:
            super().expect(total)
            totals.append(total)

    class Watched(Study):
        def save_best(self, best: CurveFile) -> None:
            super().save_best(best)
            results = json.loads((self.directory / "best.json").read_text())["provenance"]["results"]
            fitness.append(results["search"]["fitness"])

    recorder = Recorder(Landscape())
    with Watched(tmp_path, {}) as study:
        run_search(LocalExecutor(recorder), study, SETTINGS, Counted(quiet=True))
    assert totals[-1] == len(recorder.jobs)
    late = totals[len(totals) // 2 : -1]
    assert all(total == pytest.approx(totals[-1], rel=0.25) for total in late)
    assert len(fitness) >= 3
    assert fitness[:-1] == sorted(fitness[:-1])  # the last one was chosen on validation


def test_hours_end_the_search(tmp_path: Path) -> None:
    outcome = search(tmp_path, settings=replace(SETTINGS, max_hours=1e-9))
    assert outcome.stopped_by == "hours" and outcome.candidates == () and outcome.winner is None
    assert CurveFile.load(tmp_path / "best.json").block_count == 12
    # the limit is no part of the config: without it the study goes on
    assert search(tmp_path).stopped_by == "evaluations"


def test_an_exhausted_algorithm_or_a_budget_of_one_ends_the_search(tmp_path: Path) -> None:
    outcome = search(
        tmp_path / "narrow", Landscape(n_layer=1), replace(SETTINGS, bounds=(1.0, 1.002), max_evaluations=400)
    )
    assert outcome.stopped_by == "converged" and len(outcome.candidates) <= 3
    outcome = search(tmp_path / "one", settings=replace(SETTINGS, max_evaluations=1))
    assert outcome.winner is None and outcome.uniform is None
    assert [c.origin for c, _ in outcome.candidates] == ["identity"]


def test_a_base_model_that_yields_nan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LropeError, match="no finite log-probabilities"):
        search(tmp_path, Bent(lambda *_: math.nan))


class Slopes:
    """Straight lines up to ``tops``, one after the other, no uniform factors among them."""

    lag = 2

    def __init__(self, tops: Sequence[float] = tuple(1.01 + i / 100.0 for i in range(9))) -> None:
        self.tops, self.n = tops, 0
        self.told: list[Score] = []

    def ask(self) -> Candidate | None:
        if self.should_stop() or self.n == min(len(self.tops), len(self.told) + self.lag):
            return None
        curve = Curve(((0.0, 1.0), (1.0, self.tops[self.n])))
        self.n += 1
        return Candidate(self.n - 1, curve, tuple(curve.factors(12).round(9).tolist()), "slope")

    def tell(self, candidate: Candidate, score: Score) -> None:
        assert candidate.id == len(self.told)
        self.told.append(score)

    def should_stop(self) -> bool:
        return len(self.told) == len(self.tops)


def test_another_algorithm_fits_in(tmp_path: Path) -> None:
    slopes = Slopes()
    algorithm: Optimizer = slopes
    outcome = search(tmp_path, algorithm=algorithm)
    assert outcome.stopped_by == "converged" and len(outcome.candidates) == 9 == len(slopes.told)
    assert outcome.uniform is None and outcome.winner is not None
    outcome = search(tmp_path / "harmful", Bent(lambda _, factors: -max(factors)), algorithm=Slopes())
    assert outcome.winner is None
    assert set(outcome.best.factors_for(12)) == {1.0}


def test_the_base_model_is_told_in_full_whatever_the_race_makes_of_it(tmp_path: Path) -> None:
    """Better curves come first, the identity at last, which no race would let go on."""
    last = Slopes([1.05, 1.0375, 1.025, 1.0125, 1.0])
    outcome = search(tmp_path, Bent(lambda _, factors: -2.0 + max(factors)), algorithm=last)
    assert last.told[-1] == (SETTINGS.search_contexts, 0.0)
    assert [score for candidate, score in outcome.candidates if set(candidate.factors) == {1.0}] == [last.told[-1]]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_evaluations", 0), ("max_evaluations", 1.5), ("test_contexts", 0), ("max_kl", -0.1), ("max_kl", True),
        ("algorithm", "annealing"), ("seed", -1), ("max_hours", 0.0), ("racing_fraction", 0.0),
        ("racing_fraction", 1.5), ("bounds", (1.1, 2.0)), ("bounds", (1.0, 1.0)), ("bounds", (0.5,)),
        ("uniform_factors", (1.1, -1.0)), ("middle_weight", math.inf), ("confidence", 1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(LropeError, match=rf"^({option}|--{option.replace('_', '-')}) "):
        SearchConfig(**{option: value})


def test_settings_of_an_optimizer_out_of_range_are_named() -> None:
    for option, value in (("lag", 0), ("population", -1), ("width", math.nan), ("width", 0.0)):
        with pytest.raises(LropeError, match=rf"^ga.{option} "):
            optimizer_config("ga", **{option: value})


def test_racing_is_derived_from_the_contexts_and_a_study_keeps_its_own() -> None:
    settled = [SearchConfig(search_contexts=n).settled(20) for n in (2, 7, 8, 40)]
    assert [(s.racing_first, s.racing_fraction) for s in settled] == [(1, 1.0), (1, 1.0), (1, 0.3), (5, 0.3)]
    assert SearchConfig(search_contexts=16).settled(20, n_tasks=4).racing_fraction == 1.0
    before = {"search": {"racing_first": 1, "racing_fraction": 0.5}}
    assert SearchConfig(search_contexts=8).settled(20, kept=before).racing_fraction == 0.5
    assert SearchConfig(search_contexts=8, racing_fraction=0.25).settled(20, kept=before).racing_fraction == 0.25


def context(index: int, *log_probabilities: float) -> ContextScore:
    probes = [ProbeScore(i / (len(log_probabilities) - 1), log_p, False) for i, log_p in enumerate(log_probabilities)]
    return ContextScore("search", index, tuple(probes), 1, 0.0)


def test_fitness_is_the_paired_difference() -> None:
    objective = Objective([context(0, -1.0, -3.0, -1.0), context(1, -5.0, -5.0, -5.0)])
    assert objective.fitness([context(0, -1.0, -1.5, -1.0)]) == pytest.approx(0.5)
    assert objective.fitness([context(1, -5.3, -5.0, -5.0), context(0, -1.0, -1.5, -1.0)]) == pytest.approx(0.2)
    assert objective.fitness([context(0, -1.0, math.nan, -1.0)]) == -math.inf
    middle = Objective([context(0, -1.0, -3.0, -1.0)], middle_weight=3.0)
    assert middle.fitness([context(0, -1.0, -1.5, -1.0)]) == pytest.approx(4 * 1.5 / 6)
    assert middle.fitness([context(0, -2.5, -3.0, -1.0)]) == pytest.approx(-1.5 / 6)


def test_racing_rungs() -> None:
    assert Racing(4).stops() == (1, 2, 4)
    assert Racing(4, fraction=1.0).stops() == (4,)
    assert Racing(1).stops() == (1,)
    assert Racing(7, first=2, fraction=0.3).stops() == (2, 7)
    assert Racing(4).expected_evaluations(16) == 16 + 8 + 8
    assert Racing(4, fraction=1.0).expected_evaluations(16) == 64


@given(st.data(), st.sampled_from([(1, 1, 0.5), (4, 1, 0.5), (7, 2, 0.3), (4, 1, 1.0)]))
def test_who_goes_on_depends_on_no_order(data: st.DataObject, rule: tuple[int, int, float]) -> None:
    """And it is what the rule says, worked out candidate by candidate from all scores."""
    racing = Racing(*rule, window=5)
    stops = racing.stops()
    n = data.draw(st.integers(1, 12))
    levels = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0])
    table = {(i, stop): data.draw(levels) for i in range(n) for stop in stops}

    expected: dict[int, tuple[int, float]] = {}
    climbing = list(range(n))
    for stop in stops:
        above = []
        for place, i in enumerate(climbing):
            window = [table[j, stop] for j in climbing[max(0, place - 4) : place + 1]]
            better = sum(value > table[i, stop] for value in window)
            top = better < math.ceil(racing.fraction * len(window)) and table[i, stop] > -math.inf
            if stop == stops[-1] or not top:
                expected[i] = (stop, table[i, stop])
            else:
                above.append(i)
        climbing = above

    race = Race(racing)
    known, unseen = set(), [(i, race.enter(i).stop) for i in range(n)]
    assert {stop for _, stop in unseen} == {stops[0]}
    while unseen:
        known.add(unseen.pop(data.draw(st.integers(0, len(unseen) - 1))))
        for i, contexts in race.advance(lambda i, stop: table[i, stop] if (i, stop) in known else None):
            assert contexts.start in stops
            unseen.append((i, contexts.stop))
    assert race.scores == expected


def test_progress_on_a_terminal_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("lrope_search.study.progress.time.monotonic", lambda: clock[0])
    logged: list[str] = []
    plain, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for stream in (plain, terminal):
        clock[0] = 100.0
        progress = Progress(logged.append, stream=stream)
        progress.start(100)
        for _ in range(60):
            progress.advance(replayed=True)
        for _ in range(10):
            clock[0] += 3.0
            progress.advance()
        progress.best("best +0.1")
        # 10 in 30 seconds: the 60 replayed are no speed
        assert progress.status() == "70/100 evaluations, 20.0 a minute, 01:30 left"
        bar = progress._bar
        assert (bar and (bar.n, bar.initial)) == ((70, 60) if stream is terminal else None)
        progress.line("generation 1")
        progress.close()
    assert plain.getvalue() == "generation 1\n"
    assert logged == ["generation 1"] * 2
    assert "70/100" in terminal.getvalue() and "best +0.1" in terminal.getvalue()


def test_the_log_tells_the_story(whole: Path) -> None:
    lines = [line.split(" ", 1)[1] for line in (whole / "log.txt").read_text().splitlines()]
    assert lines[0].startswith("up to 44 candidates: ")
    assert any(re.match(r"\d+/44 candidates, best \+0\.\d+ nats \(\w+\), \d+/\d+ evaluations", line) for line in lines)
    assert lines[-1].startswith("gain ")
