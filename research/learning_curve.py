"""How many questions until a gain is seen: interval and power over growing samples of unseen contexts.

Asks a large pool of contexts that no search saw, without factors, under the best uniform factor, under the searched
curve, and, for small gains, at shares of the way (`--towards`) from either of the first two to the curve, in the
factors' logarithms. Then draws samples from the pool, without replacement, and tells of each number of contexts and
questions how wide the 95 % interval is, how often it excludes zero, and what the variance components (sample.md)
lead one to expect. Usage:

    python research/learning_curve.py MODEL [--curve FILE] [--pool 200] [task, search and model options as of search]
    python research/learning_curve.py --study DIR [--contexts 6 8 12 15] [--questions 5 11]

Without `--curve` a search with `--search-seed` finds one first. The best uniform factor is the one of
`--uniform-factors` with the highest log-probability on validation contexts. `--study` takes the answers of a kept
study's test, or those of `eval --study`, in place of a model's.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from options import (
    add_model_options,
    add_search_options,
    add_task_options,
    head,
    model_of,
    row,
    search_of,
    task_of,
)
from scipy import stats

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model
from lrope_search import measure, search
from lrope_search.commands.curve_files import factors_of_curve
from lrope_search.report.reading import read_study
from lrope_search.results.comparison import contexts_needed
from lrope_search.results.intervals import Interval, Strata, mean_interval
from lrope_search.results.intervals import draws as resampled
from lrope_search.results.variation import components
from lrope_search.sample import Components
from lrope_search.scores import ContextScore, Factors
from lrope_search.study.store import Study, holds_search, parse_evaluations

Scores: TypeAlias = dict[str, Sequence[ContextScore]]
"""Of each side, every context's answers."""
Asked: TypeAlias = tuple[str, Scores, list[tuple[str, str]]]
"""Where answers come from, the answers, and which side is held against which."""

CONFIDENCE, POWER = 0.95, 0.8
LEAST = contexts_needed(CONFIDENCE)
_RESAMPLES = 2000
_MOST_CONTEXTS = 100_000
MEASURES = {"accuracy": (100.0, "points", 1), "log-probability": (1.0, "nats", 4)}
"""Of each measure, its scale, the unit that this gives, and the digits that are written."""


@dataclass(frozen=True)
class Gain:
    """What one side gains over another, question by question.

    Attributes:
        name: Of what over what.
        differences: Shape (2, contexts, questions): in accuracy (-1 to 1) and in log-probability, nats a token;
            questions by depth.
        varies: The variance components of either.
    """

    name: str
    differences: NDArray[np.float64]
    varies: tuple[Components, Components]


def gain_over(name: str, base: Sequence[ContextScore], other: Sequence[ContextScore]) -> Gain:
    """Return what ``other`` gains over ``base``."""
    asked = [[(score.split, score.index, [probe.depth for probe in score.probes]) for score in side]
             for side in (base, other)]  # fmt: skip
    if asked[0] != asked[1] or not base or len({len(score.probes) for score in base}) > 1:
        raise LropeError(f"{name}: not the same questions on both sides, as many in every context")
    sides = (base, other)
    log_p = [np.array([[p.log_probability for p in score.probes] for score in side]) for side in sides]
    correct = [np.array([[float(p.correct) for p in score.probes] for score in side]) for side in sides]
    both = [components(_correctness(base), _correctness(other)), components(base, other)]
    if both[0] is None or both[1] is None:
        raise LropeError(f"{name}: needs two questions in a context, and answers of finite probability")
    return Gain(name, np.array([correct[1] - correct[0], log_p[1] - log_p[0]]), (both[0], both[1]))


def _correctness(scores: Sequence[ContextScore]) -> list[ContextScore]:
    """The scores with the correctness in place of the log-probability."""
    return [
        replace(score, probes=tuple(replace(p, log_probability=float(p.correct)) for p in score.probes))
        for score in scores
    ]


def without_depth(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return standard deviations within contexts, of what is left when every stratum's mean over contexts is taken out.

    Args:
        differences: Shape (2, contexts, questions), as `Gain` has them, of two contexts and questions at the least.
    """
    n, most = differences.shape[1:]
    left = differences - differences.mean(axis=1, keepdims=True)
    left -= left.mean(axis=2, keepdims=True)
    return np.asarray(np.sqrt((left**2).sum(axis=(1, 2)) / ((n - 1) * (most - 1))))


def towards(factors: Factors, target: Factors, share: float) -> Factors:
    """Return the factors that lie this share of the way to the target, in logarithms."""
    return tuple(
        math.exp((1.0 - share) * math.log(a) + share * math.log(b)) for a, b in zip(factors, target, strict=True)
    )


def draw(
    rng: np.random.Generator, pool: tuple[int, int], contexts: int, questions: int
) -> tuple[NDArray[np.int_], ...]:
    """Draw contexts and questions of each from a pool of so many, without replacement.

    One question comes from each of ``questions`` equal strata by depth, as `lrope_search.tasks.task.places` asks them.

    Returns:
        Indices of shapes (contexts, 1) and (contexts, questions).
    """
    if not (1 <= contexts <= pool[0] and 1 <= questions <= pool[1]):
        raise ValueError(f"{contexts} x {questions} of a pool of {pool[0]} x {pool[1]}")
    edges = np.arange(questions + 1) * pool[1] // questions
    which = rng.permutation(pool[0])[:contexts, None]
    return which, rng.integers(edges[:-1], edges[1:], size=(contexts, questions))


def over_contexts(values: NDArray[np.float64], seed: int = 0, resamples: int = 10_000) -> tuple[Interval, Interval]:
    """Return the intervals of the means of one accuracy and one log-probability a context, shape (2, contexts).

    Contexts are resampled (`mean_interval`): what `compare` does where enough answers differ.
    """
    contexts = np.arange(values.shape[1])
    strata = Strata(np.zeros_like(contexts), np.ones(1))
    counts = resampled(strata, seed, resamples)
    accuracy, log_p = (mean_interval(side, contexts, counts, CONFIDENCE, strata) for side in values)
    return accuracy, log_p


def excludes_zero(interval: Interval) -> bool:
    return interval.low > 0.0 or interval.high < 0.0


@dataclass(frozen=True)
class Seen:
    """What samples of one size show of a gain in one measure: mean half-width and share that excludes zero."""

    half_width: float
    power: float


def sampled(gain: Gain, contexts: int, questions: int, draws: int, seed: int) -> tuple[Seen, Seen]:
    """Draw samples of a size and return what they show, in accuracy and in log-probability."""
    rng = np.random.default_rng([seed, contexts, questions])
    found: list[tuple[Interval, Interval]] = []
    for number in range(draws):
        which, places = draw(rng, gain.differences.shape[1:], contexts, questions)
        found.append(over_contexts(gain.differences[:, which, places].mean(axis=2), number, _RESAMPLES))
    accuracy, log_p = zip(*found, strict=True)
    return _summary(accuracy), _summary(log_p)


def _summary(intervals: Sequence[Interval]) -> Seen:
    return Seen(
        float(np.mean([(one.high - one.low) / 2.0 for one in intervals])),
        float(np.mean([excludes_zero(one) for one in intervals])),
    )


def expected(varies: Components, gain: float, contexts: int, questions: int) -> Seen:
    """Return what the components lead one to expect of Student's t interval over normal means of contexts."""
    freedom, error = contexts - 1, varies.standard_error(contexts, questions)
    if error == 0.0:
        return Seen(0.0, float(gain != 0.0))
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2.0, freedom))
    shrunk = math.sqrt(2.0 / freedom) * math.exp(math.lgamma(contexts / 2.0) - math.lgamma(freedom / 2.0))
    shift = abs(gain) / error  # a sample's standard deviation is on average ``shrunk`` times the true one
    beyond = stats.nct.sf(quantile, freedom, shift) + stats.nct.cdf(-quantile, freedom, shift)
    return Seen(quantile * error * shrunk, min(1.0, float(np.nan_to_num(beyond, nan=1.0))))


def needed(varies: Components, gain: float, questions: int) -> int | None:
    """Return the fewest contexts with an expected power of 80 %; None if that takes more than a hundred thousand."""
    low, high = LEAST - 1, LEAST
    while expected(varies, gain, high, questions).power < POWER:
        low, high = high, 2 * high
        if high > _MOST_CONTEXTS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if expected(varies, gain, middle, questions).power < POWER else (low, middle)
    return high


def measured(args: argparse.Namespace) -> Asked:
    model, task = model_of(args), task_of(args)
    if args.curve is not None:
        curve = factors_of_curve(args.curve, read_model(model.path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = search(model, task, search_of(args, args.search_seed), Path(folder, "study")).summary.factors
        assert found is not None
        curve = found
    uniform = {f"uniform {factor:g}": (factor,) * len(curve) for factor in args.uniform_factors}
    chosen = measure(model, task, uniform, contexts=args.validation_contexts, split="validation").table.totals
    best = max(uniform, key=lambda name: chosen[name].log_probability)
    origins = {"base": (1.0,) * len(curve), best: uniform[best]}
    sides = {best: uniform[best], "curve": curve}
    pairs = [("curve", name) for name in origins]
    for share in args.towards:
        for name, factors in origins.items():
            side = f"{100 * share:g} % of the way from {name}"
            sides[side] = towards(factors, curve, share)
            pairs.append((side, name))
    scores = measure(model, task, sides, contexts=args.pool, split="test").scores
    listed = ", ".join(f"{factor:.3f}" for factor in curve)
    return f"{args.model}, factors {listed}", dict(scores), pairs


def kept(directory: Path, most: int | None = None) -> Asked:
    """Return what was asked in the test of a kept study, or under ``eval --study``.

    Contexts are those of base and curve, the first so many at ``most``; sides that saw fewer are left out.
    """
    path = directory / "evaluations.jsonl"
    tests: dict[Factors, dict[int, ContextScore]] = {}
    for job, score in parse_evaluations(path.read_bytes(), path)[0] if path.exists() else ():
        if job.split == "test" and isinstance(score, ContextScore):
            tests.setdefault(job.factors, {})[job.index] = score
    names = _searched(directory) if holds_search(Study.kept(directory, "config")) else _names(tests)
    sides = {name: tests[side] for side, name in names.items() if side in tests}
    if not {"base", "curve"} <= sides.keys():
        raise LropeError(f"{directory}: holds no test of a curve beside the base model; give a study that has ended")
    shared = sorted(sides["base"].keys() & sides["curve"].keys())[:most]
    scores: Scores = {name: [side[i] for i in shared] for name, side in sides.items() if side.keys() >= set(shared)}
    return str(directory), scores, [("curve", name) for name in scores if name != "curve"]


def _searched(directory: Path) -> dict[Factors, str]:
    """Return the names of what a search has tested; none if it has not ended."""
    study = read_study(directory)
    if not study.finished or study.factors is None:
        return {}
    names = {(1.0,) * len(study.factors): "base"}
    if study.uniform is not None:
        names[study.uniform.factors] = study.uniform.name
    names.setdefault(study.factors, "curve")
    return names


def _names(sides: Iterable[Factors]) -> dict[Factors, str]:
    """Return what sides of a measurement are called: by their factors, and curves as they came."""
    names: dict[Factors, str] = {}
    n_curves = 0
    for side in sides:
        if len(set(side)) == 1:
            names[side] = "base" if side[0] == 1.0 else f"uniform {side[0]:g}"
            continue
        n_curves += 1
        names[side] = "curve" if n_curves == 1 else f"curve {n_curves}"
    return names


def tables(gain: Gain, sizes: Sequence[tuple[int, int]], asked: Sequence[int], draws: int, seed: int) -> Iterator[str]:
    """Yield the lines of a gain's table of these sizes, and what 80 % power takes with so many ``asked`` a context."""
    n, most = gain.differences.shape[1:]
    intervals = over_contexts(gain.differences.mean(axis=2))
    yield f"## {gain.name}\n"
    left = without_depth(gain.differences)
    for (name, (scale, unit, digits)), one, varies, rest in zip(
        MEASURES.items(), intervals, gain.varies, left, strict=True
    ):
        form = f".{digits}f"
        mean, low, high = (format(scale * value, "+" + form) for value in (one.mean, one.low, one.high))
        within, between = (scale * math.sqrt(value or 0.0) for value in (varies.within, varies.between))
        yield (
            f"{name}: {mean} {unit} [{low}, {high}] on the pool's {n} x {most}; standard deviation "
            f"{within:{form}} over the questions of a context ({scale * rest:{form}} without what the depth alone "
            f"decides), {between:{form}} between contexts"
        )
    heads = [f"{name}, {unit}" if name == "half-width" else name for _, unit, _ in MEASURES.values()
             for name in ("half-width", "expected", "power", "expected")]  # fmt: skip
    yield f"\n{head('contexts x questions', *heads)}"
    enough: dict[tuple[str, int], int] = {}
    for contexts, questions in sizes:
        cells = [f"{contexts} x {questions}{'*' if 2 * contexts > n else ''}"]
        found = sampled(gain, contexts, questions, draws, seed)
        for (name, (scale, _, digits)), seen, one, varies in zip(
            MEASURES.items(), found, intervals, gain.varies, strict=True
        ):
            hoped = expected(varies, one.mean, contexts, questions)
            cells += [f"{scale * value:.{digits}f}" for value in (seen.half_width, hoped.half_width)]
            cells += [f"{100 * value:.0f} %" for value in (seen.power, hoped.power)]
            if seen.power >= POWER:
                enough[name, questions] = min(contexts, enough.get((name, questions), contexts))
        yield row(cells)
    yield f"\ncontexts for a power of {100 * POWER:.0f} %, as drawn (of those in the table) and as expected:"
    for name, one, varies in zip(MEASURES, intervals, gain.varies, strict=True):
        for questions in asked:
            drawn = enough.get((name, questions), "none is enough") if questions <= most else "more than there are"
            hoped_for = needed(varies, one.mean, questions) or f"above {_MOST_CONTEXTS}"
            yield f"- {name}, {questions} questions a context: {drawn}, expected {hoped_for}"
    yield ""


def sizes_of(args: argparse.Namespace, pool: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the numbers of contexts and questions that are asked for and can be drawn."""
    if min(args.contexts) < LEAST:
        raise LropeError(f"--contexts {min(args.contexts)}: too few for an interval; give at least {LEAST}")
    if min(args.questions) < 1 or args.draws < 1:
        raise LropeError("--questions, --draws: give at least 1")
    sizes = [(n, m) for m in args.questions for n in args.contexts if n <= pool[0] and m <= pool[1]]
    if not sizes:
        raise LropeError(f"--contexts, --questions: the pool has {pool[0]} x {pool[1]}; ask for fewer")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--study", metavar="DIR", type=Path, help="take the answers of a kept study's test")
    parser.add_argument("--curve", metavar="FILE", help="factors in place of a search's")
    parser.add_argument("--towards", metavar="S", type=float, nargs="+", default=[0.25], help="for small gains (0.25)")
    parser.add_argument("--pool", metavar="N", type=int, default=200, help="contexts to ask (%(default)s)")
    parser.add_argument("--contexts", metavar="N", type=int, nargs="+", default=[6, 9, 15, 25, 40, 60, 100])
    parser.add_argument("--questions", metavar="N", type=int, nargs="+", default=[11, 53], help="of each context")
    parser.add_argument("--draws", metavar="N", type=int, default=300, help="samples of each size (%(default)s)")
    parser.add_argument("--search-seed", metavar="N", type=int, default=0)
    add_search_options(parser)
    add_model_options(parser)
    add_task_options(parser)
    args = parser.parse_args()
    if (args.model is None) == (args.study is None):
        parser.error("give either MODEL or --study")
    try:
        sizes_of(args, (sys.maxsize, sys.maxsize))  # better known now
        where, scores, pairs = measured(args) if args.study is None else kept(args.study)
        gains = [gain_over(f"{side} over {base}", scores[base], scores[side]) for side, base in pairs]
        sizes = sizes_of(args, gains[0].differences.shape[1:])
    except LropeError as error:
        parser.exit(1, f"{error}\n")
    print(f"{where}\n\n{_accuracies(scores)}; {args.draws} draws of each size, seed {args.seed}; "
          "*: more than half of the pool, so that draws overlap\n")  # fmt: skip
    for gain in gains:
        for line in tables(gain, sizes, args.questions, args.draws, args.seed):
            print(line, flush=True)


def _accuracies(scores: Mapping[str, Sequence[ContextScore]]) -> str:
    return ", ".join(f"{name} {100 * np.mean([one.accuracy for one in side]):.1f} %" for name, side in scores.items())


if __name__ == "__main__":
    main()
