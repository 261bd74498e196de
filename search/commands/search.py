"""`lrope-gguf search`: find the layer factors with which a model answers best from a long context."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrope_gguf import __version__
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import read_model

from ..evaluator import TeacherForcedEvaluator
from ..executor import Job, LocalExecutor
from ..model import binding_version
from ..progress import Progress
from ..search import SearchOutcome, SearchSettings, run_search
from ..study import Study
from ..table import depth_table
from .options import add_model_arguments, add_task_arguments, fit_task, open_model, open_task, task_config

_DEFAULTS = SearchSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--output", metavar="FILE", default="best.json", help="curve file to write (%(default)s)")
    parser.add_argument(
        "--study", metavar="DIR", help="keep results here, and resume from them (OUTPUT's name + .study)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the search would cost, and stop")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--max-evaluations", metavar="N", type=int, default=_DEFAULTS.max_evaluations,
                      help="candidates to try (%(default)s); a finished study continues with more")  # fmt: skip
    cost.add_argument("--max-hours", metavar="H", type=float, help="begin no generation after so many hours")
    for split, use in (("search", "compare candidates"), ("validation", "choose the winner"), ("test", "measure")):
        cost.add_argument(f"--{split}-contexts", metavar="N", type=int, default=getattr(_DEFAULTS, f"{split}_contexts"),
                          help=f"contexts to {use} on (%(default)s)")  # fmt: skip
    cost.add_argument("--finalists", metavar="N", type=int, default=_DEFAULTS.finalists,
                      help="best candidates that go on to validation (%(default)s)")  # fmt: skip
    cost.add_argument("--racing-fraction", metavar="F", type=float, default=_DEFAULTS.racing_fraction,
                      help="share of a generation that sees further contexts; 1: all (%(default)s)")  # fmt: skip
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--bounds", metavar="LOW,HIGH", type=_pair, default=_DEFAULTS.bounds,
                           help="range of the factors ({:g},{:g})".format(*_DEFAULTS.bounds))  # fmt: skip
    algorithm.add_argument("--degree", metavar="N", type=int, default=_DEFAULTS.degree,
                           help="degree of the Bézier curve (%(default)s)")  # fmt: skip
    algorithm.add_argument("--population", metavar="N", type=int, default=_DEFAULTS.population,
                           help="candidates of the first generation (%(default)s)")  # fmt: skip
    algorithm.add_argument("--offspring", metavar="N", type=int, default=_DEFAULTS.offspring,
                           help="candidates of each later generation (%(default)s)")  # fmt: skip
    algorithm.add_argument("--width", metavar="W", type=float, default=_DEFAULTS.width,
                           help="first width of mutation, as a logarithm of the factors (%(default)s)")  # fmt: skip
    algorithm.add_argument("--middle-weight", metavar="W", type=float, default=_DEFAULTS.middle_weight,
                           help="weigh the middle 1 + W times as much as the ends (%(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Search, validate, test; write the winner and say what it gains."""
    settings = SearchSettings(
        seed=args.seed,
        max_evaluations=args.max_evaluations,
        max_hours=args.max_hours,
        search_contexts=args.search_contexts,
        validation_contexts=args.validation_contexts,
        test_contexts=args.test_contexts,
        finalists=args.finalists,
        racing_fraction=args.racing_fraction,
        degree=args.degree,
        bounds=args.bounds,
        population=args.population,
        offspring=args.offspring,
        width=args.width,
        middle_weight=args.middle_weight,
    )
    output = Path(args.output)
    directory = Path(args.study) if args.study else output.with_name(f"{output.stem}.study")
    outcome = search(args, settings, directory, dry_run=args.dry_run)
    if outcome is None:
        return 0
    outcome.best.save(output)
    print(outcome_text(outcome))
    if outcome.winner is None:
        print(f"{output}: holds the base model's factors, all 1")
    else:
        print(f"{output}: written; next: lrope-gguf write {args.model} --curve {output}")
    return 0


def search(
    args: argparse.Namespace, settings: SearchSettings, directory: Path, *, dry_run: bool = False
) -> SearchOutcome | None:
    """Run a study on the model and the task of the options; None after a dry run.

    Raises:
        LropeError: see `run_search`, `Study` and the options.
    """
    info = read_model(args.model)
    task = open_task(args)
    for split in ("search", "validation", "test"):
        size, wanted = task.size(split), getattr(settings, f"{split}_contexts")
        if size is not None and wanted > size:
            raise LropeError(f"--{split}-contexts {wanted}: the data has {size} for this; ask for fewer")
    with open_model(args) as model:
        task = fit_task(task, args, model)
        evaluator = TeacherForcedEvaluator(model, task, answer_prefix=args.answer_prefix)
        config = {
            "model": {"fingerprint": info.fingerprint(), "architecture": info.architecture, "name": info.name},
            "task": task_config(args) | {"answer_lead": evaluator.lead},
            "search": settings.config(),
            "versions": {"lrope-gguf": __version__, "llama-cpp-python": binding_version()},
        }
        with Study(directory, config) as study:
            progress = Progress(study.log)
            # the base model on the first search context: needed anyway, and shows how fast this machine is
            job = Job((1.0,) * evaluator.n_layer, "search", 0)
            score = study.lookup(job)
            if score is None:
                score = evaluator.evaluate(job.factors, job.split, job.index)
                study.record(job, score)
            n_evaluations = sum(settings.planned_evaluations().values())
            hours = n_evaluations * score.seconds / 3600.0
            progress.line(
                f"at most {n_evaluations} evaluations of {score.n_tokens} tokens: about {_duration(hours)} at "
                f"{score.n_tokens / score.seconds:.0f} tokens/s; results go to {directory}"
            )
            if dry_run:
                return None
            try:
                return run_search(
                    LocalExecutor(evaluator),
                    study,
                    settings,
                    progress,
                    architecture=info.architecture,
                    block_count=info.block_count,
                )
            except KeyboardInterrupt:
                progress.line(f"stopped; the best curve so far is {directory / 'best.json'}; the same command resumes")
                raise


def outcome_text(outcome: SearchOutcome) -> str:
    """The test in words and by depth, and the factors found."""
    sides = {"base": outcome.base_test}
    if outcome.uniform is not None and outcome.uniform_test is not None:
        sides[f"uniform {outcome.uniform.factors[0]:g}"] = outcome.uniform_test
    if outcome.winner_test is not None:
        sides["curve"] = outcome.winner_test
    return f"{depth_table(sides)}\n\n{outcome.verdict.text}"


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair of numbers such as 0.5,4") from None
    return low, high


def _duration(hours: float) -> str:
    if hours >= 1.0:
        return f"{hours:.1f} hours"
    return f"{60.0 * hours:.0f} minutes" if hours >= 1.0 / 60.0 else f"{3600.0 * hours:.0f} seconds"
