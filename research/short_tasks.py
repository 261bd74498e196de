"""Do factors harm short questions that people ask models? Multiple choice of BIG-bench, answered with and without them.

    pip download --no-deps bigbench
    python research/short_tasks.py MODEL --curve CURVE [CURVE ...] --data bigbench-1.0.0.tar.gz [--tasks social_iqa ...]

BIG-bench (Srivastava et al., arXiv 2206.04615) is read from the package's archive, which is not unpacked; nothing of it
is kept here. A question is put as its tasks are put to a model without examples. What counts is its
`multiple_choice_grade`: the score of the choice that the model gives the highest probability. Beside it stands the
logarithm of the right choices' share of the probability of all choices, which moves before any answer does. Intervals
are over questions, each of which is a context of its own.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from options import add_model_options, model_of, table

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model
from lrope_search.commands.curve_files import factors_of_curve
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.lead import Lead
from lrope_search.evaluation.make import open_model
from lrope_search.results.comparison import compare
from lrope_search.results.table import with_interval
from lrope_search.sample import SPLITS
from lrope_search.scores import ContextScore, Factors, ProbeScore
from lrope_search.study.interrupt import one_interrupt
from lrope_search.tasks.task import Context, Probe

TASKS = ("social_iqa", "goal_step_wikihow/step_inference", "intent_recognition", "general_knowledge", "hyperbaton")
"""What people do, what a step is for, what somebody wants, what is known, and in which order adjectives stand."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the score of each choice."""

    prompt: str
    choices: Mapping[str, float]


@dataclass(frozen=True)
class Questions:
    """Questions as a task of which each is a context: the choices are fed one by one."""

    questions: Sequence[Question]
    name: str = "bigbench"

    def size(self, split: str) -> int | None:
        return len(self.questions)

    def context(self, split: str, index: int) -> Context:
        question = self.questions[index]
        return Context(split, index, "", tuple(Probe(0.0, question.prompt, choice) for choice in question.choices))

    def calibration(self) -> Context:
        return self.context(SPLITS[0], 0)


def read_task(data: Path, names: Sequence[str], limit: int, seed: int) -> dict[str, list[Question]]:
    """Return ``limit`` questions of each task, chosen by ``seed``, or all that it has."""
    wanted = {f"/benchmark_tasks/{name}/task.json": name for name in names}
    found: dict[str, list[Question]] = {}
    try:
        with tarfile.open(data) as archive:
            for member in archive:
                name = next((name for end, name in wanted.items() if member.name.endswith(end)), None)
                if name is not None:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[name] = questions_of(json.load(file), limit, seed)
                if len(found) == len(wanted):
                    break
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        raise LropeError(
            f"--data {data}: cannot be read ({error}); give the archive of the bigbench package"
        ) from error
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise LropeError(f"--tasks {missing[0]}: {data} has no such multiple choice")
    return {name: found[name] for name in names}


def questions_of(task: Mapping[str, Any], limit: int, seed: int) -> list[Question]:
    """Return questions of a task as BIG-bench's own JSON tasks put them."""
    examples = [example for example in task["examples"] if len(example.get("target_scores", ())) > 1]
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    listed, choice = task.get("append_choices_to_input", True), task.get("choice_prefix", "\n  choice: ")
    found = []
    for example in (examples[i] for i in sorted(chosen.tolist())):
        scores = example["target_scores"]
        choices = "".join(choice + text for text in scores) if listed else ""
        prompt = f"{task.get('task_prefix', '')}{before}{example['input']}{choices}{after}"
        found.append(Question(prompt.rstrip(" "), {text: float(score) for text, score in scores.items()}))
    return found


def answered(evaluator: TeacherForcedEvaluator, questions: Sequence[Question], factors: Factors) -> list[ContextScore]:
    """Return of each question the right choices' share of the probability, and the grade."""
    found = []
    for index, question in enumerate(questions):
        score = evaluator.evaluate(factors, "test", index)
        n_tokens = np.bincount(evaluator.encoding("test", index).owner)
        log_p = np.array([probe.log_probability for probe in score.probes]) * n_tokens
        grades = np.array(list(question.choices.values()))
        share = np.exp(log_p - np.logaddexp.reduce(log_p))
        right = float(np.log(max(float(share[grades == grades.max()].sum()), 1e-12)))
        found.append(ContextScore("test", index, (ProbeScore(0.0, right, float(grades[log_p.argmax()])),), 0, 0.0))
    return found


def short(args: argparse.Namespace) -> None:
    info = read_model(args.model)
    sides = {Path(curve).stem: factors_of_curve(curve, info) for curve in args.curve}
    asked = read_task(args.data, args.tasks, args.questions, args.seed)
    rows, scores = [], {side: list[ContextScore]() for side in ("base", *sides)}
    with open_model(model_of(args)) as model:
        for name, questions in asked.items():
            evaluator = TeacherForcedEvaluator(model, Questions(questions), leads=[Lead(" ", own_tokens=False)])
            of_task = {"base": answered(evaluator, questions, (1.0,) * model.n_layer)}
            of_task |= {side: answered(evaluator, questions, factors) for side, factors in sides.items()}
            rows += rows_of_task(name, of_task)
            for side, found in of_task.items():
                first = len(scores[side])
                scores[side] += [ContextScore("test", first + i, one.probes, 0, 0.0) for i, one in enumerate(found)]
    rows += rows_of_task("all", scores)
    print(table(("task", "questions", "curve", "base, %", "with it, %", "difference, points", "nats"), rows))


def rows_of_task(name: str, scores: Mapping[str, Sequence[ContextScore]]) -> list[list[str]]:
    base = scores["base"]
    rows = []
    for side, other in scores.items():
        if side != "base":
            found = compare(base, other)
            accuracies = [f"{100 * float(np.mean([score.accuracy for score in one])):.1f}" for one in (base, other)]
            gains = (
                with_interval(found, found.accuracy_gain, 100, 1),
                with_interval(found, found.log_probability_gain, 1, 3),
            )
            rows.append([name, str(len(base)), side, *accuracies, *gains])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="GGUF file without factors")
    parser.add_argument("--curve", metavar="FILE", nargs="+", required=True, help="curve files, or names of ours")
    parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="bigbench-1.0.0.tar.gz, from pip")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=TASKS, help="folders of its benchmark_tasks")
    parser.add_argument("--questions", metavar="N", type=int, default=200, help="of each task (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="which ones (%(default)s)")
    add_model_options(parser)
    args = parser.parse_args()
    try:
        with one_interrupt():
            short(args)
    except LropeError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
