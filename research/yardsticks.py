"""What the search is held against, at equal tokens: other parametrizations, CMA-ES, Optuna's samplers, chance.

    python research/yardsticks.py landscapes [--kinds sparse] [--seeds 30] [--probes 60] [--contexts 1] [--jobs 2]
    python research/yardsticks.py model MODEL [--keys N ...] [--cache FILE] [--study DIR] [--seeds 10]
    python research/yardsticks.py probes [--token-budgets N,...]
    python research/yardsticks.py fit
    python research/yardsticks.py racing [MODEL ...]
    python research/yardsticks.py fidelity MODEL [--keys N] [--short-keys N]

`landscapes` needs no model; an instance is a landscape of its own (`landscapes.py`), and seeds from 1000 on were never
tuned on. `model` runs the same contenders on a real one; with `--cache` nothing is computed twice, so that a run can be
killed and repeated, and `--study` takes over what a search of the same task has evaluated. `probes` holds numbers of
probes an evaluation against each other at equal tokens. `fit` shows what the sparse landscapes are made after, and how
much of the optimum's gain each parametrization can express. `racing` compares numbers of contexts and rates of
successive halving at equal cost, `fidelity` tells whether shorter contexts rank curves as full ones do. `--keep FILE`
keeps runs, so that a table can be made in pieces. Contenders of packages that are missing are left out, in words.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from contenders import CONTENDERS, make_contender, make_space
from landscapes import HELD_OUT, SPARSE, TUNING, Landscape, SparseLandscape
from options import add_problem_options, dispatch, numbers, words
from problems import ModelProblem, Problem, play
from scipy.optimize import minimize
from scipy.stats import spearmanr

from lrope_gguf import LropeError
from lrope_search.optimizers.protocol import Candidate, Optimizer
from lrope_search.optimizers.space import CurveSpace
from lrope_search.study.racing import Racing

CONTEXT_TOKENS, PROBE_TOKENS = 6800, 70
"""Of 100 key-value pairs on Qwen2.5-Coder: a context without questions, and each question with its answer."""

_REACH = 5.0
"""How far samplers that know no width look by default, in widths; no optimum of a sparse landscape lies beyond 4."""


class Instance(Problem, Protocol):
    """A problem that knows its optimum and the size of what is to be gained."""

    @property
    def lack(self) -> float:
        """About what there is to gain, nats."""
        ...

    def optimum(self) -> tuple[float, ...]: ...


def instance(kind: str, seed: int, probes: int) -> Instance:
    return SparseLandscape(seed, probes) if kind == SPARSE else Landscape(kind, seed)


def worths(
    problem: Problem, optimizer: Optimizer, racing: Racing, budgets: Sequence[int],
    judge: Callable[[tuple[float, ...]], float] | None = None, *, by_cost: bool = False,
) -> list[float]:  # fmt: skip
    """Worth of the best candidate after each of ``budgets`` evaluations; one that ended keeps its best.

    ``judge``: what a candidate is worth; None: `Problem.true_gain`. ``by_cost``: budgets are contexts, spent in all.
    """
    judge = judge or problem.true_gain
    at: dict[int, Candidate] = {}
    for n, (best, cost) in enumerate(play(problem, optimizer, racing, max(budgets)), 1):
        spent = cost if by_cost else n
        at |= {budget: best for budget in budgets if budget >= spent}
        if spent >= max(budgets):
            break
    worth = {one.id: judge(one.factors) for one in {one.id: one for one in at.values()}.values()}
    return [worth[at[budget].id] if budget in at else 0.0 for budget in budgets]


Key = tuple[str, str, int, int, int]
"""Contender, kind, seed, contexts and probes of an evaluation."""


def landscape_run(key: Key, budgets: Sequence[int], reach: float) -> list[float]:
    """A contender on an instance: percent of the optimum's gain after each budget."""
    name, kind, seed, contexts, probes = key
    problem = instance(kind, seed, probes)
    optimizer = make_contender(name, problem.n_layer, seed=seed, reach=reach, lack=problem.lack)
    optimum = problem.true_gain(problem.optimum())
    return [100.0 * worth / optimum for worth in worths(problem, optimizer, Racing(contexts, fraction=1.0), budgets)]


class Kept:
    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._known: dict[str, list[float]] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                key, values = json.loads(line)
                self._known[json.dumps(key)] = values

    def run(self, keys: Sequence[Key], budgets: Sequence[int], reach: float, jobs: int) -> list[list[float]]:
        """Return the worths of each run, computing those that are missing."""
        names = [json.dumps([*key, list(budgets), reach]) for key in keys]
        missing = [i for i, name in enumerate(names) if name not in self._known]
        if missing:
            with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
                runs = [pool.submit(landscape_run, keys[i], budgets, reach) for i in missing]
                for i, future in zip(missing, runs, strict=True):
                    self._keep(names[i], future.result())
        return [self._known[name] for name in names]

    def _keep(self, name: str, values: list[float]) -> None:
        self._known[name] = values
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                print(f"[{name}, {json.dumps(values)}]", file=file)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap percentile interval over instances."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (4000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


Rows: TypeAlias = Iterator[tuple[str, list[list[float]]]]
"""Contenders, each with the worths of its runs."""


def print_table(budgets: Sequence[int], rows: Rows, digits: int, heads: Callable[[int], str] = str) -> None:
    """Print a line a contender: mean and interval at each budget, as soon as it is there."""
    width = 28 if digits else 14
    print(f"{'contender':<17}{'runs':>5}" + "".join(f"{heads(n):>{width}}" for n in budgets), flush=True)
    for name, runs in rows:
        cells = []
        for column in zip(*runs, strict=True):
            mean, low, high = interval(column)
            cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        print(f"{name:<17}{len(runs):>5}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def available(names: Sequence[str]) -> list[str]:
    """The contenders whose packages are here; of the others it is said which are missing."""
    there = []
    for name in names:
        try:
            make_contender(name, 4, seed=0)
        except LropeError as error:
            if name not in CONTENDERS:
                raise
            print(f"left out: {error}", file=sys.stderr)
        else:
            there.append(name)
    return there


def landscapes(args: argparse.Namespace) -> None:
    """Tables on landscapes."""
    kept, names = Kept(args.keep), available(args.contenders)
    per = f"{args.contexts} context{'s' * (args.contexts > 1)}"
    for kind in args.kinds:
        reach = args.reach or (_REACH * 0.05 if kind == SPARSE else math.inf)
        seeds = range(args.first_seed, args.first_seed + args.seeds)

        def rows(kind: str = kind, reach: float = reach, seeds: range = seeds) -> Rows:
            for name in names:
                keys = [(name, kind, seed, args.contexts, args.probes) for seed in seeds]
                yield name, kept.run(keys, args.budgets, reach, args.jobs)

        each = f"{per} of {args.probes} probes" if kind == SPARSE else per
        print(f"{kind}: {args.seeds} instances, seeds {seeds[0]} to {seeds[-1]}, an evaluation is {each};")
        print("gain of the best candidate in percent of the optimum's (mean, 95 % interval over instances),")
        print("by evaluations\n")
        print_table(args.budgets, rows(), 0)
        print(flush=True)


def model(args: argparse.Namespace) -> None:
    """A table on a model."""
    problem = ModelProblem(args, args.true_contexts)
    if args.study:
        print(f"{problem.know_study(Path(args.study))} results of {args.study} taken over")
    names = available(args.contenders)
    tokens = args.contexts * problem.n_tokens()
    search = f"{args.contexts} search context{'s' * (args.contexts > 1)}"
    print(f"{Path(args.model).name}: {problem.n_layer} layers; an evaluation is {search},")
    where = (
        f"{args.true_contexts} contexts never searched on" if args.true_contexts else "the search contexts themselves"
    )
    print(f"{tokens} tokens; gain of the best candidate over the base model on {where},")
    print("in nats per answer token (mean, 95 % interval over seeds), by evaluations and their tokens\n")

    def judge(factors: tuple[float, ...]) -> float:
        if args.true_contexts:
            return problem.true_gain(factors)
        return statistics.mean(problem.gain(factors, i) for i in range(args.contexts))

    reach = args.reach or _REACH * args.width

    def rows() -> Rows:
        for name in names:
            runs = []
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                optimizer = make_contender(name, problem.n_layer, seed=seed, width=args.width, reach=reach,
                                           uniform_factors=args.uniform_factors, lack=problem.lack)  # fmt: skip
                runs.append(worths(problem, optimizer, Racing(args.contexts, fraction=1.0), args.budgets, judge))
            yield name, runs

    print_table(args.budgets, rows(), 4, lambda n: f"{n} ({thousands(n * tokens)})")


def thousands(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 999_500 else f"{n / 1e3:.0f}k"


def probes(args: argparse.Namespace) -> None:
    """A table of probes an evaluation at equal tokens, on sparse landscapes."""
    kept = Kept(args.keep)
    (name,) = args.contenders[:1]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    print(f"{SPARSE}, {name}: {args.seeds} instances, seeds {seeds[0]} to {seeds[-1]}; gain of the best candidate in")
    print("percent of the optimum's (mean, 95 % interval over instances), by tokens")
    print(f"at {CONTEXT_TOKENS} a context and {PROBE_TOKENS} a probe\n")

    def rows() -> Rows:
        for contexts, n_probes in ((1, 11), (2, 11), (1, 20), (1, 60), (1, 100), (2, 60), (4, 60)):
            tokens = contexts * (CONTEXT_TOKENS + PROBE_TOKENS * n_probes)
            budgets = [max(1, budget // tokens) for budget in args.token_budgets]
            keys = [(name, SPARSE, seed, contexts, n_probes) for seed in seeds]
            yield f"{contexts} x {n_probes} probes", kept.run(keys, budgets, _REACH * 0.05, args.jobs)

    print_table(args.token_budgets, rows(), 0, thousands)


def fit(args: argparse.Namespace) -> None:
    """What sparse landscapes look like beside what was measured, and what parametrizations can express."""
    single = {0.9: "-0.0130", 1.1: "", 1.2: "+0.0230 to +0.0342", 1.4: "-0.0260"}
    uniform = {0.95: "-0.0107", 1.05: "+0.0040 to +0.0048", 1.1: "+0.0091", 1.25: "-0.50"}
    seen: dict[str, tuple[str, list[float]]] = {}

    def see(what: str, measured: str, value: float) -> None:
        seen.setdefault(what, (measured, []))[1].append(value)

    for seed in range(args.first_seed, args.first_seed + args.seeds):
        one = SparseLandscape(seed)

        def moved(layers: Sequence[int], factor: float, one: SparseLandscape = one) -> tuple[float, ...]:
            return tuple(factor if i in layers else 1.0 for i in range(one.n_layer))

        main, *others = one.helpful
        for factor, measured in single.items():
            see(f"best layer alone at {factor}", measured, one.true_gain(moved([main], factor)))
        for layer in others:
            see("other helpful layer at 1.2", "+0.0038 to +0.0086", one.true_gain(moved([layer], 1.2)))
        for layer in one.harmful:
            see("harmful layer at 1.2", "-0.0563 to -0.0126", one.true_gain(moved([layer], 1.2)))
        quiet = [i for i in range(one.n_layer) if i not in (*one.helpful, *one.harmful)]
        for layer in quiet:
            see("each other layer at 1.2", "-0.0029 to +0.0021", one.true_gain(moved([layer], 1.2)))
        for factor, measured in uniform.items():
            see(f"uniform {factor}", measured, one.true_gain((factor,) * one.n_layer))
        for layer, what, measured in ((main, "best", "0.045 to 0.057"), (quiet[0], "a quiet", "0.010 to 0.032")):
            factors = moved([layer], 1.2)
            errors = [one.gain(factors, context) - one.true_gain(factors) for context in range(30)]
            see(f"deviation a probe, {what} layer at 1.2", measured, float(np.std(errors)) * math.sqrt(one.probes))
        optimum = one.true_gain(one.optimum())
        see("optimum", "at least +0.0342", optimum)
        for name in ("bezier", "knots"):
            measured = "49 to 61" if name == "bezier" else ""  # best curve known over best layer
            see(f"best of {name}, % of the optimum", measured, 100.0 * expressed(name, one) / optimum)
    last = args.first_seed + args.seeds - 1
    print(f"{args.seeds} sparse landscapes, seeds {args.first_seed} to {last}; gains in nats\n")
    print(f"{'':<42}{'5 %':>9}{'median':>9}{'95 %':>9}  measured on Qwen2.5-Coder 0.5B")
    for what, (measured, values) in seen.items():
        digits = 1 if "%" in what else 4
        print(
            f"{what:<42}"
            + "".join(f"{v:>9.{digits}f}" for v in np.quantile(values, [0.05, 0.5, 0.95]))
            + f"  {measured}"
        )


def expressed(name: str, one: SparseLandscape) -> float:
    """About the largest true gain that a parametrization can express: Nelder-Mead from the best of many."""
    space = make_space(name, one.n_layer)
    rng = np.random.default_rng(0)

    def loss(genome: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return -one.true_gain(space.express(space.repair(genome.copy()))[1])

    starts = [space.uniform(factor) for factor in (1.0, 1.05, 1.1)] + [space.smooth(rng, 0.1) for _ in range(300)]
    starts.sort(key=loss)
    return max(
        -float(minimize(loss, start, method="Nelder-Mead", options={"maxfev": 1500}).fun) for start in starts[:4]
    )


def mean_and_error(values: Sequence[float], form: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {form.format(error)}"


def racing(args: argparse.Namespace) -> None:
    """Contexts and rates of successive halving at equal cost."""
    settings = [Racing(n, fraction=1.0) for n in (1, 2, 4, 8)]
    settings += [Racing(n, fraction=fraction) for n in (4, 8) for fraction in (0.5, 0.3)]
    asked = ModelProblem(args, args.true_contexts) if args.model else None
    where, form = "synthetic landscapes: gain in percent of the optimum's", "{:.0f}"
    if asked is not None:
        where = f"{Path(args.model).name}: gain on {args.true_contexts} contexts never searched on, in nats a token"
        form = "{:.4f}"
    print(f"{where},\nalgorithm ga, {args.seeds} seeds (mean, standard error), by contexts evaluated in all\n")
    print(f"{'an evaluation':<28}" + "".join(f"{n:>16}" for n in args.context_budgets))
    for setting in settings:
        runs = []
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for problem in [asked] if asked is not None else [Landscape(kind, seed) for kind in args.kinds]:
                optimizer = make_contender("ga-bezier", problem.n_layer, seed=seed, width=args.width,
                                           uniform_factors=args.uniform_factors)  # fmt: skip
                found = worths(problem, optimizer, setting, args.context_budgets, by_cost=True)
                whole = 1.0 if isinstance(problem, ModelProblem) else problem.true_gain(problem.optimum()) / 100.0
                runs.append([gain / whole for gain in found])
        name = f"{setting.n_contexts} contexts"
        name += f", best {setting.fraction:g} go on" if setting.fraction < 1.0 else ""
        cells = [mean_and_error(column, form) for column in zip(*runs, strict=True)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    functions = {"landscapes": landscapes, "model": model, "probes": probes, "fit": fit, "racing": racing,
                 "fidelity": fidelity}  # fmt: skip
    seeds = {"landscapes": (1000, 30), "probes": (1000, 30), "fit": (0, 100)}
    for name, function in functions.items():
        command = commands.add_parser(name, help=(function.__doc__ or "").rstrip("."))
        first, n = seeds.get(name, (0, 10))
        command.add_argument("--first-seed", metavar="N", type=int, default=first)
        command.add_argument("--seeds", metavar="N", type=int, default=n, help="instances, or runs (%(default)s)")
        if name in ("landscapes", "model", "probes"):
            command.add_argument("--contenders", metavar="NAME,...", type=words, default=list(CONTENDERS),
                                 help=f"of {','.join(CONTENDERS)} (all)")  # fmt: skip
        if name in ("landscapes", "probes"):
            command.add_argument("--jobs", metavar="N", type=int, default=1, help="processes (%(default)s)")
            command.add_argument("--keep", metavar="FILE", help="runs, kept and used again")
        if name in ("landscapes", "model"):
            command.add_argument("--budgets", metavar="N,...", type=numbers, default=[50, 100, 200, 400])
            command.add_argument("--contexts", metavar="N", type=int, default=1, help="search contexts (%(default)s)")
            command.add_argument("--reach", metavar="X", type=float,
                                 help="largest log factor of samplers that know no width (5 widths)")  # fmt: skip
        if name == "landscapes":
            command.add_argument("--probes", metavar="N", type=int, default=60, help="of a context (%(default)s)")
        if name in ("landscapes", "racing"):
            command.add_argument("--kinds", metavar="KIND,...", type=words, default=[SPARSE] if name != "racing" else
                                 list(HELD_OUT), help=f"of {','.join((SPARSE, *TUNING, *HELD_OUT))}")  # fmt: skip
        if name in ("model", "racing", "fidelity"):
            command.add_argument("model", metavar="MODEL", nargs="?" if name == "racing" else None, help="GGUF file")
            add_problem_options(command)
            command.add_argument("--true-contexts", metavar="N", type=int, default=16,
                                 help="to judge by (%(default)s); 0: search contexts, for a replay")  # fmt: skip
        if name == "model":
            command.add_argument("--study", metavar="DIR", help="study of the same task, whose results are taken over")
        if name == "racing":
            command.add_argument("--context-budgets", metavar="N,...", type=numbers, default=[100, 200, 400, 800])
        if name == "fidelity":
            command.add_argument("--short-keys", metavar="N,...", type=numbers, default=[11])
            command.add_argument("--curves", metavar="N", type=int, default=60)
        if name == "probes":
            command.set_defaults(contenders=["ga-both"])
            command.add_argument("--token-budgets", metavar="N,...", type=numbers,
                                 default=[500_000, 1_000_000, 2_000_000, 4_000_000])  # fmt: skip
    dispatch(parser, functions)


if __name__ == "__main__":
    main()
