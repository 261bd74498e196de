"""What derivatives by factors cost, how exact they are, what tasks want of each other, and what an ascent finds.

    python research/gradients.py cost MODEL [task and model options as of search]
    python research/gradients.py memory MODEL --tokens 8192 32768
    python research/gradients.py agree MODEL --contexts 2 [task and model options]
    python research/gradients.py limits MODEL --study DIR [task and model options]
    python research/gradients.py conflicts MODEL --tasks kv:keys=240,identifiers=word vt:lines=40 ... [model options]
    python research/gradients.py ascend MODEL --output FILE [--scale both] [--curve FILE] [--guard STUDY] [task options]
    python research/gradients.py gains MODEL --curve FILE ... --contexts 16 [--guard STUDY] [task and model options]
    ... ascend|gains MODEL --outputs ...

`cost` holds processor seconds of gradients against llama.cpp's own prefill of the same context, and coarse products
against exact ones. `memory` reads graphs and computes nothing. `agree` holds the replay of test contexts
against llama.cpp's scores of them. `limits` holds derivatives with different limits of
coherence against the layer scan of a kept study. `ascend` goes on where FILE ends, and writes what it has found as a
curve file; `gains` judges such files, of heads too, by the replay: on contexts that no search has seen, by task, with
intervals, and their divergence on a study's texts. Both take several tasks as `conflicts` does; an ascent divides each
by its spread. With ``--outputs`` query scales, of curve files too, scale what heads put out instead.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from options import add_model_options, add_task_options, dispatch, gain_text, head, model_of, row, task_of, tasks_of
from scipy.stats import spearmanr

from lrope_gguf.curve import CurveFile
from lrope_gguf.model_info import read_model
from lrope_search import TaskConfig
from lrope_search.commands.curve_files import factors_of_curve
from lrope_search.evaluation.encoding import Encoding
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.make import kept_guard_texts, open_model, task_for
from lrope_search.evaluation.model import Model
from lrope_search.gradient.ascent import AscentConfig
from lrope_search.gradient.climb import Climb, Step, Text, conflicts, fast_products, guarded
from lrope_search.gradient.objective import Objective
from lrope_search.gradient.rotation import Coherence
from lrope_search.gradient.variables import logarithms
from lrope_search.gradient.weights import Weights
from lrope_search.results.comparison import compare
from lrope_search.results.objective import task_scales
from lrope_search.sample import SPLITS
from lrope_search.scores import LAYER_SCAN, SCALES, ContextScore, Factors, rows_of
from lrope_search.study.store import Study

LIMITS = (0.25, 0.5, 1.0, 2.0, 4.0, None)
CPU = torch.device("cpu")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[Model, Weights]]:
    """The model on the CPU, in llama.cpp and in torch."""
    args.n_gpu_layers = 0
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium" if fast_products(CPU) else "highest")
    with open_model(model_of(args)) as model:
        yield model, Weights(model.path)


def evaluator_of(model: Model, config: TaskConfig) -> TeacherForcedEvaluator:
    return TeacherForcedEvaluator(model, task_for(model, config), answer_prefix=config.answer_prefix)


class Stopwatch:
    """Processor and wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._begin = os.times()

    def __str__(self) -> str:
        now, begin = os.times(), self._begin
        return f"{now.user + now.system - begin.user - begin.system:.1f} ({now.elapsed - begin.elapsed:.1f})"


def cost(args: argparse.Namespace) -> None:
    with opened(args) as (model, weights):
        evaluator = evaluator_of(model, task_of(args))
        encoding = evaluator.encoding("search", 0)
        zeros = np.zeros((model.n_layer, 1))
        print(f"{encoding.n_tokens} tokens, {torch.get_num_threads()} threads; processor (wall-clock) seconds\n")
        print(head("computed", "seconds", "value, nats", "cosine with exact products", "length"))
        evaluator.evaluate((1.0,) * model.n_layer, "search", 0)
        watch = Stopwatch()
        value = evaluator.evaluate((1.0,) * model.n_layer, "search", 0).log_probability
        print(row(["llama.cpp's prefill", watch, f"{value:.3f}", "", ""]), flush=True)
        exact = None
        for products in ("exact", "coarse") if fast_products(CPU) else ("exact",):
            torch.set_float32_matmul_precision({"exact": "highest", "coarse": "medium"}[products])
            for name, remat, differentiate in (
                ("forward", False, False),
                ("forward and backward", False, True),
                ("the same, each layer again", True, True),
            ):
                with Objective(model, weights, remat=remat) as objective:
                    if exact is None:
                        objective.answers(encoding, zeros, differentiate=False)  # dequantizes
                        exact = zeros[:, 0]
                    watch = Stopwatch()
                    found = objective.answers(encoding, zeros, differentiate=differentiate)
                seconds, slope = str(watch), found.factors.sum(1)
                exact = slope if differentiate and not exact.any() else exact
                compared = (
                    [f"{cosine(slope, exact):.4f}", f"{np.linalg.norm(slope):.3f}"] if differentiate else ["", ""]
                )
                print(row([f"{name}, {products} products", seconds, f"{found.value:.3f}", *compared]), flush=True)


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def memory(args: argparse.Namespace) -> None:
    with opened(args) as (model, weights):
        print(f"weights {weights.n_bytes / 1e9:.2f} GB\n")
        print(head("tokens", "each layer again, GB", "all kept, GB", "inputs, GB"))
        for n in args.tokens:
            with Objective(model, weights) as objective:
                again, kept, inputs = (size / 1e9 for size in objective.n_bytes(np.zeros(n, np.int32)))
            print(row([n, f"{again:.2f}", f"{kept:.2f}", f"{inputs:.2f}"]), flush=True)


def agree(args: argparse.Namespace) -> None:
    print(head("context", "llama.cpp, nats", "replay", "scatter over questions", "hits alike"))
    with opened(args) as (model, weights), Objective(model, weights) as objective:
        evaluator = evaluator_of(model, task_of(args))
        for i in range(args.contexts):
            theirs = evaluator.evaluate((1.0,) * model.n_layer, "test", i)
            ours = objective.answers(evaluator.encoding("test", i), np.zeros((model.n_layer, 1)), differentiate=False)
            pairs = list(zip(ours.probes, theirs.probes, strict=True))
            scatter = np.std([a.log_probability - b.log_probability for a, b in pairs])
            alike = np.mean([a.correct == b.correct for a, b in pairs])
            values = f"{theirs.log_probability:.3f}", f"{ours.value:.3f}", f"{scatter:.3f}", f"{alike:.0%}"
            print(row([f"test {i}", *values]), flush=True)


def limits(args: argparse.Namespace) -> None:
    candidates = map(json.loads, (args.study / "candidates.jsonl").read_text("utf-8").splitlines())
    moves = []
    for candidate in candidates:
        if candidate["origin"] == LAYER_SCAN:
            log = np.log(candidate["factors"])
            layer = int(abs(log).argmax())
            moves.append((layer, log[layer], candidate["fitness"]))
    layers, by, gain = (np.array(column) for column in zip(*moves, strict=True))
    print(head("limit, wavelengths", "rank correlation", f"right signs of {(abs(gain) > 0.1).sum()}", "mean size"))
    with opened(args) as (model, weights):
        encoding = evaluator_of(model, task_of(args)).encoding("search", 0)
        for limit in LIMITS:
            with Objective(model, weights, coherence=Coherence(limit)) as objective:
                slope = objective.answers(encoding, np.zeros((model.n_layer, 1))).factors.sum(1)
            foretold = slope[layers.astype(int)] * by
            right = int((foretold * gain > 0.0)[abs(gain) > 0.1].sum())
            size = f"{abs(slope).mean():.2f}"
            print(row([limit, f"{spearmanr(foretold, gain).statistic:.2f}", right, size]), flush=True)


def conflicting(args: argparse.Namespace) -> None:
    configs = tasks_of(args)
    gradients = {}
    with opened(args) as (model, weights), Objective(model, weights) as objective:
        for name, config in configs.items():
            evaluator = evaluator_of(model, config)
            found = [
                objective.answers(evaluator.encoding("search", i), np.zeros((model.n_layer, 1)))
                for i in range(args.contexts)
            ]
            gradients[name] = np.mean([one.factors.sum(1) for one in found], axis=0)
            halves = [np.mean([one.factors.sum(1) for one in found[i::2]], axis=0) for i in (0, 1) if i < len(found)]
            alike = f"{cosine(*halves):.2f}" if len(halves) > 1 else "one context"
            value, length = np.mean([one.value for one in found]), np.linalg.norm(gradients[name])
            print(f"{name}: {value:.3f} nats, length {length:.3f}, cosine of the halves {alike}", flush=True)
    print("\n" + head("", *configs))
    for name, cosines in zip(configs, conflicts(gradients), strict=True):
        print(row([name, *(f"{one:+.2f}" for one in cosines)]))


def ascend(args: argparse.Namespace) -> None:
    kept = args.output.read_text("utf-8").splitlines() if args.output.exists() else []
    steps = [Step.from_json(json.loads(line)) for line in kept]
    values = {name: getattr(args, name) for name in asdict(AscentConfig()) if getattr(args, name) is not None}
    texts = texts_of(args.guard)
    with opened(args) as (model, weights), Objective(model, weights, scaled=args.scaled) as objective:
        one, encodings = (1.0,) * model.n_layer, []
        scales: list[float] = []
        for config in tasks_of(args).values():
            evaluator = evaluator_of(model, config)
            scales += task_scales([evaluator.evaluate(one, "search", 0)]).values()
            encodings.append(partial(encoding_of, evaluator, args.first_context - 1))
        climb = Climb(
            objective,
            encodings,
            names=[*tasks_of(args)],
            weights=args.weights or [1.0] * len(scales),
            scales=scales,
            texts=texts,
            layers=range(model.n_layer),
            config=AscentConfig(**values),
            scale=args.scale,
        )
        if steps:
            climb.restore(steps[-1].state)
        while not climb.done:
            watch = Stopwatch()
            steps.append(climb.step())
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(steps[-1].to_json()) + "\n")
            step = steps[-1]
            found = ", ".join(f"{name} {value:.3f}" for name, value in step.gains.items())
            print(
                f"step {step.number}: {found} nats, KL {step.divergence:.4f}, {step.n_tokens} tokens, {watch} s",
                flush=True,
            )
            write_curve(args.curve, climb.factors)
        print(f"{sum(step.n_tokens for step in steps)} tokens, {sum(step.seconds for step in steps):.0f} s")
        write_curve(args.curve, climb.factors)
        for name, factors in (
            ("the last", climb.factors),
            (f"mean of the last {args.mean}", climb.mean([step.state for step in steps[-args.mean :]])),
        ):
            for key, rows in rows_of(factors).items() or [("layer_factors", [factors])]:
                flat = chain.from_iterable(rows)
                print(
                    f"{name}{'' if args.scale == 'layers' else ', ' + key}:", ",".join(f"{value:.4f}" for value in flat)
                )


def encoding_of(evaluator: TeacherForcedEvaluator, before: int, number: int) -> Encoding:
    return evaluator.encoding("search", before + number)


def texts_of(study: Path | None) -> list[Text]:
    guard = kept_guard_texts(Study.kept(study, "guard"), study) if study else None
    return guarded(guard) if guard else []


def write_curve(path: Path | None, factors: Factors) -> None:
    if path is not None:
        rows: Any = rows_of(factors)
        CurveFile(layer_factors=None if rows else tuple(factors), **rows).save(path)


def gains(args: argparse.Namespace) -> None:
    texts, configs = texts_of(args.guard), tasks_of(args)
    with opened(args) as (model, weights), Objective(model, weights, scaled=args.scaled) as objective:
        heads = objective.heads()
        info = read_model(args.model)
        sides = {str(path): logarithms(factors_of_curve(path, info), heads) for path in args.curve}
        base = logarithms((1.0,) * model.n_layer, heads)
        print(head("", "task", "base, nats", "right, %", "gain, nats", "gain, points"))
        for name, config in configs.items():
            evaluator = evaluator_of(model, config)
            encodings = [evaluator.encoding(args.split, args.first_context + i) for i in range(args.contexts)]
            before = scored(objective, encodings, base, args)
            for side, at in sides.items():
                found = compare(before, scored(objective, encodings, at, args))
                nats = np.mean([score.log_probability for score in before])
                points, value = found.accuracy_gain, found.log_probability_gain
                of_base = f"{nats:.3f}", f"{100.0 * found.base_accuracy:.1f}"
                print(
                    row(
                        [
                            side,
                            name,
                            *of_base,
                            gain_text(value, found.enough, 1.0, 3),
                            gain_text(points, found.enough, 100.0, 1),
                        ]
                    ),
                    flush=True,
                )
        for side, at in sides.items() if texts else ():
            found_apart: dict[int, list[float]] = {}
            for text in {id(text): text for text in texts}.values():
                apart = objective.divergence(text.tokens, *at, differentiate=False, first=text.first)
                found_apart.setdefault(text.kind, []).append(apart.value)
            kl = ", ".join(f"{np.mean(of_kind):.4f}" for of_kind in found_apart.values())
            print(f"{side}: KL {kl} on short texts and a long one", flush=True)


def scored(
    objective: Objective, encodings: list[Encoding], at: tuple[NDArray[np.float64], ...], args: argparse.Namespace
) -> list[ContextScore]:
    """What the replay makes of contexts, with depths."""
    scores = []
    for i, encoding in enumerate(encodings):
        found = objective.answers(encoding, *at, differentiate=False)
        probes = tuple(replace(p, depth=depth) for p, depth in zip(found.probes, encoding.depths, strict=True))
        scores.append(ContextScore(args.split, args.first_context + i, probes, found.n_tokens, 0.0))
    return scores


COMMANDS = {
    "cost": cost,
    "memory": memory,
    "agree": agree,
    "limits": limits,
    "conflicts": conflicting,
    "ascend": ascend,
    "gains": gains,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("model")
        add_model_options(command)
        if name != "memory":
            add_task_options(command, several=name in ("conflicts", "ascend", "gains"))
        if name == "memory":
            command.add_argument("--tokens", metavar="N", type=int, nargs="+", default=[8192, 32768])
        elif name == "limits":
            command.add_argument("--study", metavar="DIR", type=Path, required=True)
        elif name in ("agree", "conflicts"):
            command.add_argument("--contexts", metavar="N", type=int, default=2, help="of each task (%(default)s)")
        if name in ("ascend", "gains"):
            command.add_argument("--outputs", dest="scaled", action="store_const", const="outputs", default="queries")
        if name == "ascend":
            command.add_argument("--output", metavar="FILE", type=Path, required=True, help="JSON lines, a step each")
            command.add_argument("--guard", metavar="DIR", type=Path, help="a study whose texts limit divergence")
            command.add_argument("--first-context", metavar="N", type=int, default=0, help="of the split search")
            command.add_argument("--mean", metavar="N", type=int, default=4, help="of how many iterates (%(default)s)")
            command.add_argument("--scale", choices=SCALES, default="layers", help="what moves (%(default)s)")
            command.add_argument("--curve", metavar="FILE", type=Path, help="what the last step led to")
            command.add_argument("--weights", metavar="W", type=float, nargs="+", help="of --tasks (1 each)")
            for option, value in asdict(AscentConfig()).items():
                command.add_argument(f"--{option.replace('_', '-')}", metavar="X", type=type(value))
        elif name == "gains":
            command.add_argument("--curve", metavar="FILE", type=Path, nargs="+", required=True)
            command.add_argument("--split", choices=SPLITS, default="test")
            command.add_argument("--contexts", metavar="N", type=int, default=16, help="of each task (%(default)s)")
            command.add_argument("--first-context", metavar="N", type=int, default=0)
            command.add_argument(
                "--guard", metavar="DIR", type=Path, help="a study on whose texts divergence is measured"
            )
    dispatch(parser, COMMANDS)


if __name__ == "__main__":
    main()
