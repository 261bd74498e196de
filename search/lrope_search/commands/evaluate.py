"""`lrope-gguf eval`: base model and layer factors on the same contexts, by depth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrope_gguf.commands.options import Numbers
from lrope_gguf.commands.write import curve_for
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import read_model

from ..evaluation.evaluator import Generation, TeacherForcedEvaluator
from ..evaluation.model import Model
from ..results.table import DepthTable, depth_table
from ..scores import ContextScore
from ..study.progress import Progress
from ..tasks import SPLITS
from .options import add_model_arguments, add_task_arguments, fit_task, open_model, open_task, positive, task_config

Factors = tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--curve", metavar="FILE", help="curve file (the factors in MODEL, if it has any)")
    what.add_argument(
        "--factors",
        metavar="F0,F1,...",
        type=lambda text: Numbers().convert(text, None, None),
        help="one factor a layer",
    )
    parser.add_argument(
        "--uniform", metavar="S", type=float, help="the same factor for all layers, as a side of its own"
    )
    add_task_arguments(parser)
    parser.add_argument("--contexts", metavar="N", type=positive, default=8, help="contexts to ask (%(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which contexts (%(default)s)")
    parser.add_argument("--generate", action="store_true", help="also let the model write its answers, and score these")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Score base and factors on every context and print both."""
    task = open_task(args)
    task.context(args.split, args.contexts - 1)  # too few records are better known now
    read_model(args.model)  # its messages on damaged files are the plainer ones
    with open_model(args) as model:
        task = fit_task(task, args, model)
        sides = _sides(args, model)
        evaluator = TeacherForcedEvaluator(model, task, answer_prefix=args.answer_prefix)
        for factors in sides.values():
            model.set_factors(factors)  # if they are refused, then before hours have passed
        scores: dict[str, list[ContextScore]] = {name: [] for name in sides}
        generations: dict[str, list[tuple[Generation, ...]]] = {name: [] for name in sides}
        progress = Progress()
        progress.start(args.contexts * len(sides))
        for index in range(args.contexts):
            for name, factors in sides.items():
                scores[name].append(evaluator.evaluate(factors, args.split, index))
                if args.generate:
                    generations[name].append(evaluator.generate(factors, args.split, index))
                progress.advance()
            progress.line(f"{args.split} context {index}: {progress.status()}")
        progress.close()
        lead = evaluator.lead
    table = depth_table(scores)
    generated = (
        depth_table({name: _generated(scores[name], generations[name]) for name in sides}) if args.generate else None
    )
    agreement = _agreement(scores, generations) if args.generate else None
    n_tokens = sum(score.n_tokens for side in scores.values() for score in side)
    rate = n_tokens / sum(score.seconds for side in scores.values() for score in side)
    if args.json:
        document: dict[str, Any] = {
            "model": str(args.model),
            "task": task_config(args) | {"split": args.split, "answer_lead": lead},
            "factors": sides,
            **table.json(),
            "tokens": n_tokens,
            "tokens_per_second": rate,
        }
        if generated is not None:
            document["generated"] = generated.json() | {"agreement": agreement}
        print(json.dumps(document, indent=2))
        return 0
    print(f"{args.model}: {table.n_probes} questions on {table.n_contexts} {args.split} contexts\n\n{table}")
    if generated is not None:
        print(f"\nanswers written by the model; {agreement:.1%} of them agree with the scores above\n")
        print("\n".join(_accuracies(generated)))
    print(f"\n{n_tokens} tokens, {rate:.0f} tokens/s")
    return 0


def _sides(args: argparse.Namespace, model: Model) -> dict[str, Factors]:
    """Return the factors of each side; the base model's are all 1, whatever the file holds."""
    sides: dict[str, Factors] = {"base": (1.0,) * model.n_layer}
    if args.curve is not None:
        sides["curve"] = curve_for(args.curve, read_model(args.model))[1]
    elif args.factors is not None:
        if len(args.factors) != model.n_layer:
            raise LropeError(f"--factors: {len(args.factors)} numbers, but {args.model} has {model.n_layer} layers")
        sides["given"] = args.factors  # "factors" is another key of the JSON
    elif args.uniform is None and (stored := model.file_factors()) is not None:
        sides["file"] = stored
    if args.uniform is not None:
        sides[f"uniform {args.uniform:g}"] = (args.uniform,) * model.n_layer
    return sides


def _generated(scores: Sequence[ContextScore], answers: Sequence[Sequence[Generation]]) -> list[ContextScore]:
    """Return the scores with the written answers' correctness."""
    return [
        replace(score, probes=tuple(replace(p, correct=a.correct) for p, a in zip(score.probes, answer, strict=True)))
        for score, answer in zip(scores, answers, strict=True)
    ]


def _agreement(scores: dict[str, list[ContextScore]], generations: dict[str, list[tuple[Generation, ...]]]) -> float:
    """Return the share of probes where teacher forcing and generation agree."""
    same = [
        probe.correct == answer.correct
        for name in scores
        for score, answers in zip(scores[name], generations[name], strict=True)
        for probe, answer in zip(score.probes, answers, strict=True)
    ]
    return sum(same) / len(same)


def _accuracies(table: DepthTable) -> list[str]:
    return [f"{name}: {100 * cell.accuracy:.1f} %" for name, cell in table.totals.items()]
