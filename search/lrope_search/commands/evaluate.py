"""`lrope-gguf eval`: base model and layer factors on the same contexts, by depth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from lrope_gguf.commands.options import FILE, Command, Numbers, model_argument
from lrope_gguf.errors import LropeError

from ..scores import ContextScore, Factors
from .options import (
    POSITIVE,
    first_task_options,
    model_config,
    model_options,
    option,
    task_config,
    task_options,
)

if TYPE_CHECKING:
    from ..evaluation.evaluator import Generation
    from ..evaluation.model import Model
    from ..results.table import DepthTable


@click.command("eval", cls=Command)
@model_argument
@option("--curve", metavar="FILE", type=FILE, help="curve file (the factors in MODEL, if it has any)")
@option("--factors", metavar="F0,F1,...", type=Numbers(), help="one factor a layer")
@option("--uniform", metavar="S", type=float, help="the same factor for all layers, as a side of its own")
@first_task_options
@option("--contexts", metavar="N", type=POSITIVE, default=8, help="contexts to ask (8)")
@option("--generate", is_flag=True, help="also let the model write its answers, and score these")
@option("--json", "as_json", is_flag=True, help="print JSON")
@option("--split", type=click.Choice(["search", "validation", "test"]), default="test", heading="Advanced: task",
        help="which contexts (test)")  # fmt: skip
@task_options
@model_options
def command(
    model: str,
    curve: str | None,
    factors: Factors | None,
    uniform: float | None,
    contexts: int,
    split: str,
    generate: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare MODEL, a GGUF file, with layer factors and without on the same contexts, by depth."""
    if curve is not None and factors is not None:
        raise click.UsageError("argument --factors: not allowed with argument --curve")
    how, what = model_config(model, values), task_config(values)

    from lrope_gguf.model_info import read_model

    from ..evaluation.evaluator import TeacherForcedEvaluator
    from ..evaluation.make import open_model, task_for
    from ..results.table import depth_table
    from ..study.progress import Progress
    from ..tasks import make_task, task_identity

    make_task(what).context(split, contexts - 1)  # too few records are better known now
    read_model(model)  # its messages on damaged files are the plainer ones
    with open_model(how) as loaded:
        task = task_for(loaded, what)
        sides = _sides(loaded, model, curve, factors, uniform)
        evaluator = TeacherForcedEvaluator(loaded, task, answer_prefix=what.answer_prefix)
        for given in sides.values():
            loaded.set_factors(given)  # if they are refused, then before hours have passed
        scores: dict[str, list[ContextScore]] = {name: [] for name in sides}
        answers: dict[str, list[tuple[Generation, ...]]] = {name: [] for name in sides}
        progress = Progress()
        progress.start(contexts * len(sides))
        for index in range(contexts):
            for name, given in sides.items():
                scores[name].append(evaluator.evaluate(given, split, index))
                if generate:
                    answers[name].append(evaluator.generate(given, split, index))
                progress.advance()
            progress.line(f"{split} context {index}: {progress.status()}")
        progress.close()
    table = depth_table(scores)
    generated = depth_table({name: _generated(scores[name], answers[name]) for name in sides}) if generate else None
    agreement = _agreement(scores, answers) if generate else None
    n_tokens = sum(score.n_tokens for side in scores.values() for score in side)
    rate = n_tokens / sum(score.seconds for side in scores.values() for score in side)
    if as_json:
        asked = task_identity(what) | {"chat_template": how.chat_template, "split": split}
        document: dict[str, Any] = {
            "model": model,
            "task": asked | {"answer_lead": evaluator.lead},
            "factors": sides,
            **table.json(),
            "tokens": n_tokens,
            "tokens_per_second": rate,
        }
        if generated is not None:
            document["generated"] = generated.json() | {"agreement": agreement}
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"{model}: {table.n_probes} questions on {table.n_contexts} {split} contexts\n\n{table}")
    if generated is not None:
        click.echo(f"\nanswers written by the model; {agreement:.1%} of them agree with the scores above\n")
        click.echo("\n".join(_accuracies(generated)))
    click.echo(f"\n{n_tokens} tokens, {rate:.0f} tokens/s")


def _sides(
    model: Model, path: str, curve: str | None, factors: Factors | None, uniform: float | None
) -> Mapping[str, Factors]:
    """Return the factors of each side; the base model's are all 1, whatever the file holds."""
    from lrope_gguf.commands.write import curve_for
    from lrope_gguf.model_info import read_model

    sides: dict[str, Factors] = {"base": (1.0,) * model.n_layer}
    if curve is not None:
        sides["curve"] = curve_for(curve, read_model(path))[1]
    elif factors is not None:
        if len(factors) != model.n_layer:
            raise LropeError(f"--factors: {len(factors)} numbers, but {path} has {model.n_layer} layers")
        sides["given"] = factors  # "factors" is another key of the JSON
    elif uniform is None and (stored := model.file_factors()) is not None:
        sides["file"] = stored
    if uniform is not None:
        sides[f"uniform {uniform:g}"] = (uniform,) * model.n_layer
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
