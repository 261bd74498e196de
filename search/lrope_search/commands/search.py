"""`lrope-gguf search`: find the layer factors with which a model answers best from a long context."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lrope_gguf import __version__
from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import read_model

from ..evaluation.memory import MemoryNeeded
from ..evaluation.model import binding_version
from ..machine import free_memory, physical_cores, visible_gpus
from ..optimizers.registry import ALGORITHMS
from ..report.page import write_report
from ..results.summary import StudySummary
from ..scores import Job
from ..study.interrupt import one_interrupt
from ..study.progress import Progress
from ..study.run import SearchOutcome, SearchSettings, run_search
from ..study.store import Study
from ..workers.processes import ProcessExecutor
from ..workers.protocol import Executor, LocalExecutor
from ..workers.ray_cluster import RayExecutor
from .options import add_model_arguments, add_task_arguments, file_identity, open_task, positive, task_config
from .spec import EvaluatorSpec, Facts, find_out, read_guard_texts

NO_GAIN = 3
"""Exit status of ``--require-gain`` where there is none to recommend."""

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
    parser.add_argument("--require-gain", action="store_true",
                        help=f"end with status {NO_GAIN} unless the gain is significant")  # fmt: skip
    cost = parser.add_argument_group("cost")
    cost.add_argument("--max-evaluations", metavar="N", type=int, default=_DEFAULTS.max_evaluations,
                      help="candidates to try (%(default)s); a finished study continues with more")  # fmt: skip
    cost.add_argument("--max-hours", metavar="H", type=float, help="begin no candidate after so many hours")
    for split, use in (("search", "compare candidates"), ("validation", "choose the winner"), ("test", "measure")):
        cost.add_argument(f"--{split}-contexts", metavar="N", type=int, default=getattr(_DEFAULTS, f"{split}_contexts"),
                          help=f"contexts to {use} on (%(default)s)")  # fmt: skip
    cost.add_argument("--finalists", metavar="N", type=int, default=_DEFAULTS.finalists,
                      help="best candidates that go on to validation (%(default)s)")  # fmt: skip
    cost.add_argument("--racing-fraction", metavar="F", type=float, default=_DEFAULTS.racing_fraction,
                      help="share of the candidates that sees more than a first context; 0.3 is good for four or "
                           "more contexts, 1 shows them to all (%(default)g)")  # fmt: skip
    guard = parser.add_argument_group("guard")
    guard.add_argument("--max-kl", metavar="NATS", type=float, default=_DEFAULTS.max_kl,
                       help="pass over curves that diverge more on ordinary text, per token (%(default)s)")  # fmt: skip
    guard.add_argument("--guard-text", metavar="FILE", help="ordinary text (the base model writes some)")
    workers = parser.add_argument_group("workers")
    workers.add_argument("--workers", metavar="N", type=positive,
                         help="models at work side by side (1; with ray one a GPU, or one a node)")  # fmt: skip
    workers.add_argument("--gpus", metavar="ID,...", type=_names,
                         help="GPUs to hand out to local workers in turn (all of CUDA_VISIBLE_DEVICES)")  # fmt: skip
    workers.add_argument("--executor", choices=["local", "ray"], default="local",
                         help="where workers live: processes here, or a Ray cluster (%(default)s)")  # fmt: skip
    workers.add_argument("--ray-address", metavar="ADDRESS", help="the cluster's (of the environment, or a new one)")
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--algorithm", choices=list(ALGORITHMS), default=_DEFAULTS.algorithm,
                           help="what proposes candidates (%(default)s)")  # fmt: skip
    algorithm.add_argument("--lag", metavar="N", type=int, default=_DEFAULTS.lag,
                           help="candidates out at once: as many as there are workers is fastest, two or three "
                                "times as many keeps them busy (%(default)s)")  # fmt: skip
    algorithm.add_argument("--bounds", metavar="LOW,HIGH", type=_pair, default=_DEFAULTS.bounds,
                           help="range of the factors ({:g},{:g})".format(*_DEFAULTS.bounds))  # fmt: skip
    algorithm.add_argument("--degree", metavar="N", type=int, default=_DEFAULTS.degree,
                           help="degree of the Bézier curve (%(default)s)")  # fmt: skip
    algorithm.add_argument("--start", metavar="FILE", action="append", default=[],
                           help="a curve to begin with, as of an earlier search or of a smaller model; as often as "
                                "you like")  # fmt: skip
    algorithm.add_argument("--population", metavar="N", type=int,
                           help="first candidates, or those of a generation (the algorithm's own)")  # fmt: skip
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
        algorithm=args.algorithm,
        lag=args.lag,
        max_kl=args.max_kl,
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
        hint = _at_the_bounds(outcome.winner.curve)
        if hint is not None:
            print(hint)
        print(f"{output}: written; next: lrope-gguf write {args.model} --curve {output}")
    return NO_GAIN if args.require_gain and not outcome.verdict.recommended else 0


def search(
    args: argparse.Namespace, settings: SearchSettings, directory: Path, *, dry_run: bool = False
) -> SearchOutcome | None:
    """Run a study on the model and the task of the options; None after a dry run.

    Of the options of workers and guard, ``args`` may lack any: they have their defaults.

    Raises:
        LropeError: see `run_search`, `Study` and the options.
    """
    args = argparse.Namespace(**_OPTIONAL | vars(args))
    info = read_model(args.model)
    task = open_task(args)
    for split in ("search", "validation", "test"):
        size, wanted = task.size(split), getattr(settings, f"{split}_contexts")
        if size is not None and wanted > size:
            raise LropeError(f"--{split}-contexts {wanted}: the data has {size} for this; ask for fewer")
    curves = _start_curves(args.start, settings)
    start = {"start": [curve.control_points for curve in curves]} if curves else {}
    guard = {"text": None if args.guard_text is None else file_identity(args.guard_text)}
    memory = free_memory()
    spec = EvaluatorSpec(args, args.guard_text, read_guard_texts(Study.kept(directory, "guard"), directory))
    with one_interrupt(), ExitStack() as stack:
        scout = _scout(args, spec, stack)
        facts = scout.ask(find_out)
        config = {
            "model": {"fingerprint": info.fingerprint(), "architecture": info.architecture, "name": info.name},
            "task": task_config(args) | {"answer_lead": facts.lead},
            "search": settings.config() | start,
            "guard": guard,
            "computing": {"batch_size": args.batch_size, "n_gpu_layers": args.n_gpu_layers},
            "versions": {"lrope-gguf": __version__, "llama-cpp-python": binding_version()},
        }
        place = directory
        if dry_run and not (directory / "config.json").exists():  # no trace that would bind a later run
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrope-")))
        with Study(place, config) as study:
            study.keep("guard", dataclasses.asdict(facts.guard_texts))
            progress = Progress(study.log)
            _estimate(args, settings, study, directory, scout, facts, memory, progress)
            if dry_run:
                return None
            executor = _workers(args, dataclasses.replace(spec, guard_texts=facts.guard_texts), scout, stack)
            outcome = run_search(
                executor,
                study,
                settings,
                progress,
                curves=curves,
                architecture=info.architecture,
                block_count=info.block_count,
                guard_contexts=1,
            )
            progress.line(_report(outcome.summary))
            return outcome


def _report(summary: StudySummary) -> str:
    """Make the study's report; say where it is, or why there is none, for want of which no search fails."""
    try:
        return f"report: {write_report(summary)}"
    except LropeError as error:
        return f"no report: {error}"


_OPTIONAL: dict[str, Any] = {
    "guard_text": None,
    "workers": None,
    "gpus": None,
    "executor": "local",
    "ray_address": None,
    "start": (),
}


def _start_curves(paths: Sequence[str], settings: SearchSettings) -> list[Curve]:
    """Return the curves to begin with.

    Raises:
        LropeError: a file holds none, or one that this search could not find.
    """
    low, high = settings.bounds
    curves = []
    for path in paths:
        curve = CurveFile.load(path).curve
        if curve is None:
            raise LropeError(f"--start {path}: holds factors but no control points; give the curve of a search")
        degree = len(curve.control_points) - 1
        if degree != settings.degree:
            raise LropeError(f"--start {path}: a curve of degree {degree}; give --degree {degree}")
        try:
            curves.append(Curve(curve.control_points, bounds=settings.bounds))
        except LropeError as error:
            raise LropeError(f"--start {path}: outside --bounds {low:g},{high:g} ({error})") from None
    return curves


def _scout(args: argparse.Namespace, spec: EvaluatorSpec, stack: ExitStack) -> Executor:
    """Return an executor of one worker, which sees what the others will need."""
    if args.executor == "ray":
        return stack.enter_context(RayExecutor(spec, 1, address=args.ray_address, n_threads=args.threads))
    if (args.workers or 1) == 1 and not args.gpus:
        return LocalExecutor(stack.enter_context(spec(args.threads)))
    gpus = args.gpus or visible_gpus()
    return stack.enter_context(ProcessExecutor(spec, 1, n_threads=args.threads, gpus=gpus[:1]))


def _workers(args: argparse.Namespace, spec: EvaluatorSpec, scout: Executor, stack: ExitStack) -> Executor:
    """Return the executor of the search: the scout itself if one worker is all."""
    if args.executor == "ray":
        scout.close()
        return stack.enter_context(RayExecutor(spec, args.workers, address=args.ray_address, n_threads=args.threads))
    n_workers = args.workers or 1
    if n_workers == 1:
        return scout
    scout.close()
    n_threads = max(1, (args.threads or physical_cores()) // n_workers)
    return stack.enter_context(ProcessExecutor(spec, n_workers, n_threads=n_threads, gpus=args.gpus or visible_gpus()))


def _estimate(
    args: argparse.Namespace,
    settings: SearchSettings,
    study: Study,
    directory: Path,
    scout: Executor,
    facts: Facts,
    memory: int | None,
    progress: Progress,
) -> None:
    """Say what the search will cost, by the base model on the first search context, which is needed anyway.

    Raises:
        LropeError: the workers do not fit into memory.
    """
    n_workers = args.workers or 1
    gpus = () if args.executor == "ray" else args.gpus or visible_gpus()
    if args.executor == "local":
        if not gpus:
            check_memory(facts.memory, n_workers, memory)
        progress.line(memory_text(facts.memory, n_workers))
    job = Job((1.0,) * scout.n_layer, "search", 0)
    score = study.lookup(job)
    if score is None:
        scout.submit(job)
        _, score = scout.next()
        study.record(job, score)
    # processors are divided between local workers: more of them are no faster in all
    side_by_side = n_workers if args.executor == "ray" else min(n_workers, max(len(gpus), 1))
    n_evaluations = sum(settings.planned_evaluations(guard=True).values())
    hours = n_evaluations * score.seconds / 3600.0 / side_by_side
    on_each = " on each worker" if args.executor == "ray" and args.workers is None else ""
    progress.line(
        f"about {n_evaluations} evaluations of {score.n_tokens} tokens: about {_duration(hours)} at "
        f"{side_by_side * score.n_tokens / max(score.seconds, 1e-9):.0f} tokens/s{on_each}; "
        f"results go to {directory}"
    )
    if args.executor == "local" and not gpus and n_workers > physical_cores():
        progress.line(f"{n_workers} workers on {physical_cores()} processors: fewer would be faster (--workers)")
    lag = settings.algorithm_for(scout.n_layer).lag
    if n_workers > lag:
        progress.line(f"{n_workers} workers, but only {lag} candidates out at once: some will idle (--lag)")


def memory_text(memory: MemoryNeeded, n_workers: int) -> str:
    """Say what the workers will take."""
    return (
        f"memory: {_size(memory.weights)} for the model and {_size(memory.per_worker)} for each worker, "
        f"{n_workers} of them"
    )


def check_memory(memory: MemoryNeeded, n_workers: int, free: int | None) -> None:
    """Refuse workers on processors, who share the weights, if they need more than is ``free`` (None: unknown)."""
    needed = memory.of_workers(n_workers)
    if free is None or needed <= free:
        return
    most = (free - memory.weights) // max(memory.per_worker, 1)
    advice = f"give at most {most}" if most >= 1 else "give smaller contexts or free some memory"
    raise LropeError(
        f"--workers {n_workers}: need {_size(needed)} ({_size(memory.weights)} for the model, "
        f"{_size(memory.per_worker)} for each worker), but {_size(free)} are free; {advice}"
    )


def outcome_text(outcome: SearchOutcome) -> str:
    """The test by depth and the verdict."""
    return f"{outcome.summary.table}\n\n{outcome.summary.verdict}"


def _at_the_bounds(curve: Curve) -> str | None:
    """Say so where the bounds, not the model, have decided a control point."""
    at = sorted({y for _, y in curve.control_points} & set(curve.bounds))
    points = " and ".join(f"{y:g}" for y in at)
    return f"control points lie at the bounds ({points}): wider --bounds may find more" if at else None


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPUs such as 0,1")
    return names


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
