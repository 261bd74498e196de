"""Optimizers against each other: how good a curve is after so many evaluations, and how many reach a target.

Every algorithm is driven as the search drives it (steady state, each with its own lag), sees the same few search
contexts, and is judged by what its best candidate so far is worth on contexts that it never saw. Usage:

    python research/algorithms.py synthetic [--kinds wave,step,far] [--first-seed 1000] [--seeds 10]
    python research/algorithms.py model MODEL [--keys N ...] [--cache FILE] [--first-seed 0] [--seeds 10]
    python research/algorithms.py racing [MODEL ...]
    python research/algorithms.py fidelity MODEL [--keys N] [--short-keys N] [--contexts 8]

`synthetic` needs no model; kinds and seeds of its default were never tuned on (see landscapes.py). `racing` compares
numbers of contexts and rates of successive halving at equal cost. `fidelity` tells whether shorter contexts rank
curves as full ones do. On a model all results go to the cache and are never computed twice; caches of runs with other
seeds or algorithms can be joined with `cat`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from landscapes import HELD_OUT, TUNING, Landscape
from options import add_problem_options, dispatch, model_of, task_of
from scipy.stats import spearmanr

from lrope_gguf import LropeError
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.make import open_model, task_for
from lrope_search.optimizers.make import make_algorithm
from lrope_search.optimizers.protocol import Candidate, Optimizer, Score
from lrope_search.optimizers.settings import OPTIMIZERS, optimizer_config
from lrope_search.optimizers.space import CurveSpace
from lrope_search.study.racing import Race, Racing
from lrope_search.tasks import task_identity

Factors = tuple[float, ...]


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


@dataclass(frozen=True)
class Run:
    """Worth of the best candidate after every evaluation, and the contexts spent by then."""

    gains: tuple[float, ...]
    costs: tuple[int, ...]

    def after(self, n: int) -> float:
        """Worth after ``n`` evaluations; an algorithm that ended keeps its best."""
        return self.gains[min(n, len(self.gains)) - 1]

    def after_cost(self, cost: int) -> float:
        n = sum(spent <= cost for spent in self.costs)
        return self.gains[n - 1] if n else 0.0

    def reached(self, target: float) -> float:
        """Evaluations until the best candidate is worth ``target``; infinite if never."""
        return next((n for n, gain in enumerate(self.gains, 1) if gain >= target), math.inf)


def run(problem: Problem, algorithm: Optimizer, racing: Racing, budget: int, max_cost: float = math.inf) -> Run:
    worth: dict[int, float] = {}
    gains, costs = [], []
    for best, cost in play(problem, algorithm, racing, budget):
        if cost > max_cost:
            break
        if best.id not in worth:
            worth[best.id] = problem.true_gain(best.factors)
        gains.append(worth[best.id])
        costs.append(cost)
    return Run(tuple(gains), tuple(costs))


def synthetic_run(kind: str, seed: int, name: str, racing: Racing, budget: int, max_cost: float) -> tuple[Run, float]:
    landscape = Landscape(kind, seed)
    algorithm = make_algorithm(optimizer_config(name), landscape.n_layer, seed=seed)
    optimum = landscape.true_gain(landscape.optimum())
    return run(landscape, algorithm, racing, budget, max_cost), optimum


def synthetic_runs(
    args: argparse.Namespace, name: str, racing: Racing, max_cost: float = math.inf
) -> dict[str, list[Run]]:
    """All runs of an algorithm by kind of landscape; gains in percent of the optimum's."""
    jobs = [(kind, seed, name, racing, max(args.budgets), max_cost) for kind in args.kinds for seed in seeds(args)]
    runs: dict[str, list[Run]] = {}
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for (kind, *_), (one, optimum) in zip(jobs, pool.map(synthetic_run, *zip(*jobs, strict=True)), strict=True):
            percent = Run(tuple(100.0 * gain / optimum for gain in one.gains), one.costs)
            runs.setdefault(kind, []).append(percent)
    return runs


def synthetic(args: argparse.Namespace) -> None:
    """Tables on landscapes."""
    for name in args.algorithms:
        runs = synthetic_runs(args, name, Racing(args.contexts, fraction=1.0))
        if name == args.algorithms[0]:
            print(
                f"{args.contexts} contexts an evaluation, seeds {args.first_seed} to {args.first_seed + args.seeds - 1}"
            )
            print("gain of the best candidate in percent of the optimum's (mean, standard error), by evaluations;")
            print(f"evaluations until it is {args.target:g} percent (median, share of runs that got there)\n")
            print_header("algorithm", "landscapes", args.budgets)
        everything = [one for kind in args.kinds for one in runs[kind]]
        for kind, group in [*runs.items(), ("all", everything)]:
            print_row(name, kind, group, args.budgets, args.target, "{:.0f}")
        print(flush=True)


def seeds(args: argparse.Namespace) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def make(args: argparse.Namespace, name: str, problem: Problem, seed: int) -> Optimizer:
    """An algorithm for a model, all with the same first curves and widths."""
    uniform = args.uniform_factors
    config = optimizer_config(name, width=args.width)
    return make_algorithm(config, problem.n_layer, seed=seed, uniform_factors=uniform)


def model(args: argparse.Namespace) -> None:
    """Tables on a model."""
    problem = ModelProblem(args, args.true_contexts)
    runs = {
        name: [
            run(problem, make(args, name, problem, seed), Racing(args.contexts, fraction=1.0), max(args.budgets))
            for seed in seeds(args)
        ]
        for name in args.algorithms
    }
    everything = [one for group in runs.values() for one in group]
    # a level that the better half of all runs reaches
    target = statistics.median(one.after(max(args.budgets)) for one in everything)
    print(f"{Path(args.model).name}: {problem.n_layer} layers, {problem.n_tokens()} tokens a context,")
    print(f"{args.contexts} contexts an evaluation, {args.seeds} seeds; gain of the best candidate over the base model")
    print(f"on {args.true_contexts} contexts never searched on, in nats per answer token (mean, standard error), by")
    print(f"evaluations; evaluations until it is {target:.4f}, the median of all runs (median, share that got there)\n")
    print_header("algorithm", "", args.budgets)
    for name, group in runs.items():
        print_row(name, "", group, args.budgets, target, "{:.4f}")


def print_header(first: str, second: str, budgets: Sequence[int]) -> None:
    print(f"{first:<10} {second:<10}" + "".join(f"{n:>16}" for n in budgets) + f"{'to target':>18}")


def print_row(name: str, kind: str, runs: Sequence[Run], budgets: Sequence[int], target: float, form: str) -> None:
    cells = [mean_and_error([one.after(budget) for one in runs], form) for budget in budgets]
    reached = [one.reached(target) for one in runs]
    median = statistics.median_high(reached)
    share = sum(map(math.isfinite, reached)) / len(reached)
    cells.append(f"{f'> {max(budgets)}' if math.isinf(median) else median} ({share:.0%})")
    print(f"{name:<10} {kind:<10}" + "".join(f"{cell:>16}" for cell in cells[:-1]) + f"{cells[-1]:>18}", flush=True)


def mean_and_error(values: Sequence[float], form: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {form.format(error)}"


def compare_racing(args: argparse.Namespace) -> None:
    """Contexts and rates of successive halving at equal cost."""
    settings = [Racing(n, fraction=1.0) for n in (1, 2, 4, 8)]
    settings += [Racing(n, fraction=fraction) for n in (4, 8) for fraction in (0.5, 0.3)]
    problem = ModelProblem(args, args.true_contexts) if args.model else None
    where, form = "synthetic landscapes: gain in percent of the optimum's", "{:.0f}"
    if problem is not None:
        where = f"{Path(args.model).name}: gain on {args.true_contexts} contexts never searched on, in nats a token"
        form = "{:.4f}"
    print(f"{where},\nalgorithm ga, {args.seeds} seeds (mean, standard error), by contexts evaluated in all\n")
    print(f"{'an evaluation':<28}" + "".join(f"{n:>16}" for n in args.context_budgets))
    most = max(args.context_budgets)
    for racing in settings:
        if problem is None:
            args.budgets = [most]
            runs = [one for group in synthetic_runs(args, "ga", racing, most).values() for one in group]
        else:
            runs = [run(problem, make(args, "ga", problem, seed), racing, most, most) for seed in range(args.seeds)]
        name = f"{racing.n_contexts} contexts" + (f", best {racing.fraction:g} go on" if racing.fraction < 1.0 else "")
        cells = [mean_and_error([one.after_cost(n) for one in runs], form) for n in args.context_budgets]
        print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def fidelity(args: argparse.Namespace) -> None:
    """Rank correlation between short and full contexts."""
    rng = np.random.default_rng(0)
    full = ModelProblem(args, args.true_contexts)
    space = CurveSpace(full.n_layer)
    curves = [space.smooth(rng, width) for width in np.geomspace(0.02, 0.2, args.curves)]
    factors = [tuple(space.decode(curve).factors(full.n_layer).tolist()) for curve in curves]
    worth = np.array([full.true_gain(f) for f in factors])
    near = np.argsort(-worth)[: len(worth) // 2]  # the better half: where a search spends its time
    print(f"{Path(args.model).name}: {args.curves} random curves; Spearman correlation of their mean gain on search")
    print(f"contexts with that on {args.true_contexts} validation contexts of {full.n_tokens()} tokens:")
    print("all curves, and the better half of them\n")
    print(f"{'tokens':>8} {'contexts':>9} {'cost in tokens':>15} {'all':>8} {'better half':>12}")
    for keys in [*args.short_keys, args.keys]:
        problem = ModelProblem(argparse.Namespace(**{**vars(args), "keys": keys}), 0)
        for n in (1, 2, 4, 8):
            means = np.array([statistics.mean(problem.gain(f, i) for i in range(n)) for f in factors])
            every, half = (spearmanr(means[who], worth[who]).statistic for who in (np.arange(len(worth)), near))
            tokens = problem.n_tokens()
            print(f"{tokens:>8} {n:>9} {tokens * n:>15} {every:>8.2f} {half:>12.2f}", flush=True)


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    functions = {"synthetic": synthetic, "model": model, "racing": compare_racing, "fidelity": fidelity}
    for name, function in functions.items():
        command = commands.add_parser(name, help=(function.__doc__ or "").rstrip("."))
        command.add_argument("--seeds", metavar="N", type=int, default=10, help="runs (%(default)s)")
        command.add_argument("--algorithms", metavar="NAME,...", type=words, default=list(OPTIMIZERS))
        command.add_argument("--budgets", metavar="N,...", type=numbers, default=[50, 100, 200, 400])
        command.add_argument("--context-budgets", metavar="N,...", type=numbers, default=[100, 200, 400, 800])
        command.add_argument("--contexts", metavar="N", type=int, default=2, help="search contexts (%(default)s)")
        if name != "synthetic":
            nargs = "?" if name == "racing" else None
            command.add_argument("model", metavar="MODEL", nargs=nargs, help="GGUF file")
            add_problem_options(command)
            command.add_argument("--true-contexts", metavar="N", type=int, default=16)
            command.add_argument("--short-keys", metavar="N,...", type=numbers, default=[11])
            command.add_argument("--curves", metavar="N", type=int, default=60)
        if name != "fidelity":
            command.add_argument("--first-seed", metavar="N", type=int, default=0 if name == "model" else 1000)
        if name in ("synthetic", "racing"):
            command.add_argument("--kinds", metavar="KIND,...", type=words, default=list(HELD_OUT),
                                 help=f"of {','.join((*TUNING, *HELD_OUT))} (%(default)s)")  # fmt: skip
            command.add_argument("--jobs", metavar="N", type=int, default=1, help="processes (%(default)s)")
            command.add_argument("--target", metavar="PERCENT", type=float, default=60.0)
    dispatch(parser, functions)


if __name__ == "__main__":
    main()
