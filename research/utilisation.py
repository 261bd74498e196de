"""A plan on paper: how busy up to 1000 workers are, what lag they need, and what that costs in foresight.

The search is the real one (`run_search`), its workers are virtual: an evaluation takes virtual time, drawn from a
log-normal distribution of mean 1 whose spread (the standard deviation of the logarithm) is 0 where all take the same
time, and 1 where one in twenty takes five times the median and more.

    python research/utilisation.py busy
    python research/utilisation.py target

`busy`: share of the workers' time that they are at work until the last candidate is begun, by lag in multiples of the
workers; candidates are worth a random number, which is what racing sees at its most even. `target`: evaluations and
time that the genetic algorithm takes on synthetic landscapes until its best candidate is worth a share of the optimum.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from landscapes import HELD_OUT, TUNING, Landscape
from options import numbers, words
from scipy.special import ndtri

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.virtual_workers import VirtualExecutor

from lrope_gguf.curve import Curve, CurveFile
from lrope_search import SearchConfig, optimizer_config
from lrope_search.optimizers.protocol import Candidate, Score
from lrope_search.scores import ContextScore, DivergenceScore, Evaluation, Job, ProbeScore
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study

CONTEXTS = 4


def uniform(*key: object) -> float:
    """A number between 0 and 1, the same for the same key everywhere."""
    return float((struct.unpack("<Q", hashlib.sha256(repr(key).encode()).digest()[:8])[0] + 0.5) / 2.0**64)


def duration(job: Job, spread: float) -> float:
    key = (hash(job.factors), job.split, job.index)
    return math.exp(spread * float(ndtri(uniform(*key))) - spread**2 / 2.0)


class PaperStudy(Study):
    def record(self, job: Job, score: Evaluation) -> None:
        """Forget the result: the pipeline has it."""

    def record_candidate(self, candidate: Candidate, score: Score) -> None:
        """Forget the candidate."""

    def save_best(self, best: CurveFile) -> None:
        """Forget the curve."""


class RandomWorth:
    """Candidates are worth a random number; what they are is all the same."""

    n_layer = 1

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        worth = 0.0 if factors == (1.0,) else uniform(factors, split, index) - 1.0
        return ContextScore(split, index, (ProbeScore(0.5, worth, True),), 1, 1.0)

    def divergence(self, factors: tuple[float, ...]) -> DivergenceScore:
        raise NotImplementedError


class Anything:
    """An optimizer that proposes a new uniform factor whenever it may."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._asked = self._told = 0
        self._curve = Curve(((0.0, 1.0), (1.0, 1.0)))

    def ask(self) -> Candidate | None:
        if self._asked - self._told >= self.lag:
            return None
        self._asked += 1
        return Candidate(self._asked - 1, self._curve, (1.0 + self._asked * 1e-6,), "any")

    def tell(self, candidate: Candidate, score: Score) -> None:
        self._told += 1

    def should_stop(self) -> bool:
        return False


@dataclass(frozen=True)
class Usage:
    """How busy the workers are until the last candidate is begun, and how long it takes from then to the end."""

    busy: float
    end: float


def usage(n_workers: int, lag: int, spread: float, rounds: int) -> Usage:
    settings = SearchConfig(max_evaluations=rounds * n_workers, search_contexts=CONTEXTS, racing_fraction=0.5,
                            algorithm=optimizer_config("ga", lag=lag))  # fmt: skip
    executor = VirtualExecutor(RandomWorth(), n_workers, lambda job: duration(job, spread))
    with tempfile.TemporaryDirectory() as directory, PaperStudy(Path(directory), {}) as study:
        run_search(executor, study, settings, Progress(quiet=True), algorithm=Anything(lag))
    last = max(span.start for span in executor.spans if span.job.split == "search" and span.job.index == 0)
    return Usage(executor.busy(last), executor.now - last)


def busy(args: argparse.Namespace) -> None:
    """Table of utilisation."""
    print(f"share of time at work, percent, until the last of {args.rounds} candidates a worker is begun;")
    print(f"{CONTEXTS} search contexts, the better half goes on\n")
    print(f"{'workers':>7} {'spread':>7}" + "".join(f"{f'lag {m:g}x':>9}" for m in args.multiples) + f"{'the end':>9}")
    for n in args.workers:
        for spread in args.spreads:
            found = [usage(n, max(1, round(m * n)), spread, args.rounds) for m in args.multiples]
            cells = "".join(f"{100.0 * one.busy:>9.1f}" for one in found)
            print(f"{n:>7} {spread:>7g}{cells}{found[-1].end:>9.1f}", flush=True)
    print("\nthe end: time from there to the verdict, in evaluations, with the largest lag")


class OnLandscape:
    def __init__(self, landscape: Landscape) -> None:
        self.n_layer = landscape.n_layer
        self._landscape = landscape

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        """Score: what a context shows on the search's, nothing elsewhere."""
        gain = 0.0 if set(factors) == {1.0} or split != "search" else self._landscape.gain(factors, index)
        return ContextScore(split, index, (ProbeScore(0.5, gain - 10.0, True),), 1, 1.0)

    def divergence(self, factors: tuple[float, ...]) -> DivergenceScore:
        raise NotImplementedError


class Reached(Exception):  # noqa: N818
    """The target; what it took."""


class Watch(PaperStudy):
    """Ends the search as soon as its best candidate is worth the target."""

    def __init__(self, directory: Path, landscape: Landscape, executor: VirtualExecutor, share: float) -> None:
        super().__init__(directory, {})
        self._landscape, self._executor = landscape, executor
        self._target = share * landscape.true_gain(tuple(np.exp(landscape.target).tolist()))
        self._best: Score = (0, -math.inf)

    def record_candidate(self, candidate: Candidate, score: Score) -> None:
        if score > self._best:
            self._best = score
            if self._landscape.true_gain(candidate.factors) >= self._target:
                raise Reached


@dataclass(frozen=True)
class Run:
    """Candidates, evaluations and time to the target; infinite if it was not reached."""

    candidates: float
    evaluations: float
    time: float


def run_to_target(kind: str, seed: int, n_workers: int, lag: int, budget: int, share: float) -> Run:
    landscape = Landscape(kind, seed)
    executor = VirtualExecutor(OnLandscape(landscape), n_workers, lambda job: duration(job, 0.25))
    settings = SearchConfig(seed=seed, max_evaluations=budget, search_contexts=CONTEXTS, racing_fraction=0.5,
                            algorithm=optimizer_config("ga", lag=lag))  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, Watch(Path(directory), landscape, executor, share) as study:
        try:
            run_search(executor, study, settings, Progress(quiet=True))
        except Reached:
            searched = [span for span in executor.spans if span.job.split == "search"]
            candidates = len({span.job.factors for span in searched}) - 1
            return Run(candidates, len(searched), executor.now)
    return Run(math.inf, math.inf, math.inf)


def target(args: argparse.Namespace) -> None:
    """Table of what a lag costs."""
    print(f"genetic algorithm until its best candidate is worth {args.share:.0%} of the optimum, medians of")
    print(
        f"{len(args.kinds) * args.seeds} runs ({', '.join(args.kinds)}; seeds from {args.first_seed}), "
        f"{CONTEXTS} search contexts,"
    )
    print(f"spread 0.25; of those that reached it within {args.budget} candidates, or {args.most} times the workers\n")
    print(f"{'workers':>7} {'lag':>6} {'candidates':>11} {'evaluations':>12} {'time':>7} {'faster':>7} {'reached':>8}")
    alone = math.nan
    for n, lag in args.settings:
        runs = [
            run_to_target(kind, seed, n, lag, max(args.budget, args.most * n), args.share)
            for kind in args.kinds
            for seed in range(args.first_seed, args.first_seed + args.seeds)
        ]
        time = statistics.median_high(run.time for run in runs)
        alone = time if math.isnan(alone) else alone
        candidates = statistics.median_high(run.candidates for run in runs)
        evaluations = statistics.median_high(run.evaluations for run in runs)
        reached = sum(math.isfinite(run.time) for run in runs) / len(runs)
        print(
            f"{n:>7} {lag:>6} {candidates:>11.0f} {evaluations:>12.0f} {time:>7.1f} {alone / time:>7.1f} "
            f"{reached:>8.0%}",
            flush=True,
        )
    print("\ntime: in evaluations of mean length; faster: than one worker with the first lag")


def reals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def pairs(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(lag)) for n, _, lag in (part.partition(":") for part in text.split(","))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("busy", help=busy.__doc__)
    first.add_argument("--workers", metavar="N,...", type=numbers, default=[4, 16, 64, 1000])
    first.add_argument("--spreads", metavar="S,...", type=reals, default=[0.0, 0.25, 1.0])
    first.add_argument("--multiples", metavar="M,...", type=reals, default=[1.0, 2.0, 3.0, 4.0])
    first.add_argument("--rounds", metavar="N", type=int, default=20, help="candidates a worker (%(default)s)")
    first.set_defaults(function=busy)
    second = commands.add_parser("target", help=target.__doc__)
    second.add_argument("--settings", metavar="WORKERS:LAG,...", type=pairs,
                        default=pairs("1:8,4:8,8:16,32:64,128:256,512:1024,1000:2000"))  # fmt: skip
    second.add_argument("--kinds", metavar="KIND,...", type=words, default=["late", "wave"],
                        help=f"of {','.join((*TUNING, *HELD_OUT))} (%(default)s)")  # fmt: skip
    second.add_argument("--seeds", metavar="N", type=int, default=5, help="of each kind (%(default)s)")
    second.add_argument("--first-seed", metavar="N", type=int, default=1000)
    second.add_argument("--share", metavar="S", type=float, default=0.6)
    second.add_argument("--budget", metavar="N", type=int, default=400)
    second.add_argument("--most", metavar="N", type=int, default=8)
    second.set_defaults(function=target)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
