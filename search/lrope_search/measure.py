"""Layer factors side by side on the same contexts, without a search: model, task and sides in, a table out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrope_gguf.model_info import read_model

from .config import ModelConfig, TaskMix, Tasks
from .evaluation.evaluator import TeacherForcedEvaluator
from .evaluation.generation import Generation
from .evaluation.make import evaluator_parts, open_model
from .results.table import DepthTable, depth_table
from .scores import ContextScore, Factors
from .study.progress import Progress
from .tasks import make_tasks, task_identity


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        asked: The task's identity, the split, and the lead that the model writes.
        sides: The factors of each side, by name; the first, ``base``, is all 1.
        scores: Of each side, every context's answers, one after another.
        table: Accuracy and log-probability by depth.
        generated: The same with the correctness of answers that the model wrote; None if it was not let write.
        agreement: Share of probes that both ways judge alike; None likewise.
        n_tokens: Tokens computed for ``table``.
        seconds: What that took.
    """

    asked: Mapping[str, Any]
    sides: Mapping[str, Factors]
    scores: Mapping[str, Sequence[ContextScore]]
    table: DepthTable
    generated: DepthTable | None
    agreement: float | None
    n_tokens: int
    seconds: float

    def json(self) -> dict[str, Any]:
        """Return everything, for `json.dumps`."""
        document = {
            "task": self.asked,
            "factors": self.sides,
            **self.table.json(),
            "tokens": self.n_tokens,
            "tokens_per_second": self.n_tokens / self.seconds,
        }
        if self.generated is not None:
            document["generated"] = self.generated.json() | {"agreement": self.agreement}
        return document

    def __str__(self) -> str:
        """Return the table, the accuracies of written answers if there are any, and the speed."""
        text = str(self.table)
        if self.generated is not None:
            text += f"\n\nanswers written by the model; {self.agreement:.1%} of them agree with the scores above\n"
            for name, cell in self.generated.totals.items():
                text += f"\n{name}: {100 * cell.accuracy:.1f} %"
        return f"{text}\n\n{self.n_tokens} tokens, {self.n_tokens / self.seconds:.0f} tokens/s"


def measure(
    model: ModelConfig,
    task: Tasks,
    sides: Mapping[str, Factors],
    *,
    contexts: int = 8,
    split: str = "test",
    generate: bool = False,
) -> Measurement:
    """Ask the same contexts under each side's factors and under none.

    Progress goes to the standard error.

    Example:
        >>> from lrope_search import ModelConfig, TaskConfig, measure
        >>> model, factors = ModelConfig("model.gguf"), (1.0,) * 8 + (1.2,) + (1.0,) * 15
        >>> print(measure(model, TaskConfig("kv", keys=100), {"layer 8": factors}))  # doctest: +SKIP

    Args:
        model: The model and how it is run.
        task: What it is asked; several tasks take turns, and their weights (`TaskMix`) are those of the means.
        sides: Factors by name, one for each layer; ``base`` comes of itself, whatever the file holds.
        contexts: How many.
        split: Which: ``search``, ``validation`` or ``test``.
        generate: Also let the model write its answers, and score these.

    Raises:
        LropeError: the model or the task cannot be used, or llama.cpp refuses the factors.
    """
    mix = TaskMix.of(task)
    mix.check_contexts("--contexts", contexts)
    questions = make_tasks(mix)
    for index in range(contexts - len(mix.parts), contexts):
        questions.context(split, index)  # too few records are better known now
    read_model(model.path)  # its messages on damaged files are the plainer ones
    with open_model(model) as loaded:
        sides = {"base": (1.0,) * loaded.n_layer, **sides}
        asked, prefixes = evaluator_parts(loaded, mix)
        evaluator = TeacherForcedEvaluator(loaded, asked, answer_prefix=prefixes)
        for factors in sides.values():
            loaded.set_factors(factors)  # if they are refused, then before hours have passed
        scores: dict[str, list[ContextScore]] = {name: [] for name in sides}
        answers: dict[str, list[tuple[Generation, ...]]] = {name: [] for name in sides}
        progress = Progress()
        progress.start(contexts * len(sides))
        for index in range(contexts):
            for name, factors in sides.items():
                scores[name].append(evaluator.evaluate(factors, split, index))
                if generate:
                    answers[name].append(evaluator.generate(factors, split, index))
                progress.advance()
            progress.line(f"{split} context {index}: {progress.status()}")
        for turn, sample in enumerate(evaluator.samples):
            base = scores["base"][turn :: len(evaluator.samples)]
            written = [a for context in answers["base"][turn :: len(evaluator.samples)] for a in context if a.share]
            if not written and not any(score.accuracy for score in base):
                progress.line(sample.advice(sum(len(score.probes) for score in base)))
        progress.close()
    every = [score for side in scores.values() for score in side]
    return Measurement(
        asked={
            **task_identity(mix, evaluator.leads),
            "chat_template": model.chat_template,
            "split": split,
            **({"llama_options": options} if (options := model.llama_options()) else {}),
        },
        sides=sides,
        scores=scores,
        table=depth_table(scores, weights=mix.weights),
        generated=depth_table({n: _generated(scores[n], answers[n]) for n in sides}, weights=mix.weights)
        if generate
        else None,
        agreement=_agreement(scores, answers) if generate else None,
        n_tokens=sum(score.n_tokens for score in every),
        seconds=sum(score.seconds for score in every),
    )


def _generated(scores: Sequence[ContextScore], answers: Sequence[Sequence[Generation]]) -> list[ContextScore]:
    """Return the scores with the written answers' correctness, or the share of what each should hold."""
    return [
        replace(score, probes=tuple(replace(p, correct=a.share) for p, a in zip(score.probes, answer, strict=True)))
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
