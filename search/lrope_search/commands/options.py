"""Options that the search commands share: the model, how it is run, and the task. One place each, with its heading."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lrope_gguf.commands.options import FILE, Option
from lrope_gguf.errors import LropeError

from ..config import (
    CACHE_TYPES,
    DEFAULT_DOCUMENTS,
    DEFAULT_LINES,
    DEFAULT_PAIRS,
    DEFAULT_TEMPLATE,
    DEFAULT_WORDS,
    EXECUTORS,
    IDENTIFIER_KINDS,
    POSITIONS,
    ROPE_SCALINGS,
    TASK_FIELDS,
    ModelConfig,
    TaskConfig,
    TaskMix,
    WorkersConfig,
    check_once,
    escaped,
)
from ..config import option as option_name

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Function = TypeVar("Function", bound=Callable[..., Any])
POSITIVE, NATURAL = click.IntRange(min=1), click.IntRange(min=0)
_KINDS = "uuid: UUIDs, as in the benchmark; number: 6 digits; word: the words of the embedded model"


class Pair(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """Two numbers such as ``0.5,4``."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Read the pair."""
        if isinstance(value, tuple):
            return value
        try:
            low, high = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of numbers such as 0.5,4", param, ctx)
        return low, high


class Names(click.ParamType):  # type: ignore[type-arg]
    """A list of names such as ``0,1``."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read the list."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if not all(names):
            self.fail(f"{value!r} is not a list of GPUs such as 0,1", param, ctx)
        return names


def option(*declarations: str, **attributes: Any) -> Callable[[Function], Function]:
    """Declare an `Option`, under the ``heading`` given or none."""
    return click.option(*declarations, cls=Option, **attributes)


def all_of(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Declare several options, in their order."""

    def declare(function: Function) -> Function:
        for one in reversed(options):
            function = one(function)
        return function

    return declare


_MODEL, _TASK, _WORKERS = "Advanced: model", "Advanced: task", "Advanced: workers"
_LLAMA = "Advanced: as llama-server will be run (names and values are llama.cpp's)"

model_options = all_of(
    option("--threads", metavar="N", type=POSITIVE, heading=_MODEL,
           help="CPU threads of all workers together (as many as are fastest here and now)"),
    option("--n-gpu-layers", metavar="N", type=int, heading=_MODEL, help="layers to keep on the GPU (all that fit)"),
    option("--batch-size", metavar="N", type=POSITIVE, heading=_MODEL,
           help="tokens a batch (512 on the CPU, 2048 where layers go to a GPU)"),
    option("--no-chat-template", is_flag=True, heading=_MODEL, help="give prompts as they are, to a chat model too"),
    option("--verbose", is_flag=True, heading=_MODEL, help="show llama.cpp's log"),
)  # fmt: skip
"""How a model is run; `model_config` takes their values."""

_CACHE_TYPE = click.Choice(list(CACHE_TYPES))

llama_options = all_of(
    option("--rope-scaling", type=click.Choice(ROPE_SCALINGS), heading=_LLAMA, help="RoPE scaling (the model's)"),
    option("--rope-scale", metavar="N", type=float, heading=_LLAMA, help="stretch contexts N times (the model's)"),
    option("--rope-freq-base", metavar="N", type=float, heading=_LLAMA, help="RoPE's base (the model's)"),
    option("--rope-freq-scale", metavar="N", type=float, heading=_LLAMA, help="stretch contexts 1/N times"),
    option("--yarn-orig-ctx", metavar="N", type=int, heading=_LLAMA, help="tokens of its training (the model's)"),
    option("--yarn-ext-factor", metavar="N", type=float, heading=_LLAMA, help="share of extrapolation (1 with YaRN)"),
    option("--yarn-attn-factor", metavar="N", type=float, heading=_LLAMA, help="magnitude (the model's)"),
    option("--yarn-beta-slow", metavar="N", type=float, heading=_LLAMA, help="high correction dimension (the model's)"),
    option("--yarn-beta-fast", metavar="N", type=float, heading=_LLAMA, help="low correction dimension (the model's)"),
    option("--cache-type-k", type=_CACHE_TYPE, default="f16", heading=_LLAMA, help="cached keys (f16)"),
    option("--cache-type-v", type=_CACHE_TYPE, default="f16", heading=_LLAMA,
           help="cached values; quantized ones turn flash attention on (f16)"),
)  # fmt: skip
"""What decides which factors are good besides the model; `model_config` takes their values."""


worker_options = all_of(
    option("--workers", metavar="N", type=POSITIVE,
           help="models at work side by side (as many as are fastest; with GPUs 1; with ray one a GPU, or one a node)"),
    option("--gpus", metavar="ID,...", type=Names(), default=(), heading=_WORKERS,
           help="GPUs to hand out to local workers in turn (all of CUDA_VISIBLE_DEVICES)"),
    option("--executor", type=click.Choice(EXECUTORS), default="local", heading=_WORKERS,
           help="where workers live: processes here, or a Ray cluster (local)"),
    option("--ray-address", metavar="ADDRESS", heading=_WORKERS,
           help="the cluster's (of the environment, or a new one)"),
)  # fmt: skip
"""Who does the work; `workers_config` takes their values."""


class OfTask(click.ParamType):  # type: ignore[type-arg]
    """A value for all tasks, or, as ``TASK=VALUE``, for one of several; a pair of the task, or None, and the value."""

    def __init__(self, kind: click.ParamType) -> None:  # type: ignore[type-arg]
        self.kind = kind
        self.name = kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, Any]:
        """Read the value and whose it is."""
        if isinstance(value, tuple):
            return value[0], value[1]
        task, equals, own = str(value).partition("=")
        named = bool(equals) and task in TASK_FIELDS
        return task if named else None, self.kind.convert(own if named else value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete a value that is not one task's."""
        return self.kind.shell_complete(ctx, param, incomplete)


def task_option(*declarations: str, type: Any = click.STRING, **attributes: Any) -> Callable[[Function], Function]:
    """Declare an option that each of several tasks may have a value of its own for; the last one given counts."""
    if isinstance(type, click.Choice):
        attributes.setdefault("metavar", f"[{'|'.join(type.choices)}]")
    return option(*declarations, type=OfTask(type), multiple=True, **attributes)


first_task_options = all_of(
    option("--task", type=click.Choice(list(TASK_FIELDS)), default=["kv"], multiple=True,
           help="kv: key-value retrieval; mdqa: multi-document question answering; jsonl: your own; multikey: a needle "
                "among needles; vt: variable tracking, cwe, fwe: common and frequent words, all three for eval "
                "--generate (kv); give several to search for all of them, and what is one task's as TASK=VALUE: --data "
                "mdqa=FILE"),
    task_option("--keys", metavar="N", type=POSITIVE,
           help=f"kv, multikey: pairs a context ({DEFAULT_PAIRS}; with --data all of a record)"),
    task_option("--data", metavar="FILE", type=FILE,
           help="JSONL, plain or gzipped. kv: kv-retrieval-*_keys (contexts made from the seed); mdqa: nq-open-* of "
                "the same benchmark; jsonl: a line {context, question, answer: text or list of texts, depth: 0 to 1, "
                "optional}"),
)  # fmt: skip
task_options = all_of(
    option("--weight", metavar="TASK=W", multiple=True, heading=_TASK,
           help="of several tasks: how much one counts, such as mdqa=2 (1)"),
    task_option("--context-tokens", metavar="N", type=POSITIVE, heading=_TASK,
           help="all but jsonl: as many keys, documents, lines or words as fit into N tokens"),
    task_option("--documents", metavar="N", type=POSITIVE, heading=_TASK,
           help=f"mdqa: documents a context ({DEFAULT_DOCUMENTS})"),
    task_option("--lines", metavar="N", type=POSITIVE, heading=_TASK, help=f"vt: lines a context ({DEFAULT_LINES})"),
    task_option("--words", metavar="N", type=POSITIVE, heading=_TASK,
           help=f"cwe, fwe: words a context ({DEFAULT_WORDS})"),
    task_option("--identifiers", type=click.Choice(list(IDENTIFIER_KINDS)), heading=_TASK,
           help=f"kv without --data: what keys and values are; {_KINDS} ({IDENTIFIER_KINDS[0]})"),
    task_option("--probes", "--depths", metavar="N", type=POSITIVE, heading=_TASK,
           help="kv, mdqa, multikey: questions a context (as many as see a gain worth finding at the least cost); vt: "
                "chains (1)"),
    task_option("--positions", type=click.Choice(POSITIONS), heading=_TASK,
           help=f"kv, mdqa, multikey, vt: where they stand: at random, one in each of equal strata, or the same "
                f"everywhere ({POSITIONS[0]})"),
    task_option("--prompt-template", metavar="TEXT", heading=_TASK,
           help=f"jsonl: the prompt, \\n a new line ({escaped(DEFAULT_TEMPLATE)})"),
    task_option("--answer-prefix", metavar="TEXT", heading=_TASK,
           help="begin all answers with this, for base models: ' \"'"),
    option("--seed", metavar="N", type=NATURAL, default=0, heading=_TASK, help="of all that is random (0)"),
)  # fmt: skip
"""What the model is asked; `task_config` takes their values and those of `first_task_options`."""


def model_config(path: str, values: dict[str, Any]) -> ModelConfig:
    """Take the values of `model_options`, and of `llama_options` if it has them, out of a command's.

    Raises:
        LropeError: values out of range or that do not go together.
    """
    own = {field.name: values.pop(field.name) for field in fields(ModelConfig) if field.name in values}
    return ModelConfig(path, n_threads=values.pop("threads"), chat_template=not values.pop("no_chat_template"), **own)


def workers_config(values: dict[str, Any]) -> WorkersConfig:
    """Take the values of `worker_options` out of a command's.

    Raises:
        LropeError: values out of range.
    """
    return WorkersConfig(*(values.pop(name) for name in ("workers", "gpus", "executor", "ray_address")))


def data_files(task: TaskConfig | TaskMix) -> dict[str, str | None]:
    """Return the files that tasks read, by the option that gave them, as `check_output` takes its inputs."""
    parts = TaskMix.of(task).tasks
    return {"--data" if len(parts) == 1 else f"--data {part.name}": part.data for part in parts}


def check_study(directory: str | os.PathLike[str]) -> None:
    """Raise `LropeError` where a study cannot be: at a file's place."""
    if Path(directory).exists() and not Path(directory).is_dir():
        raise LropeError(f"--study {directory}: is a file; give a directory")


def task_config(values: dict[str, Any]) -> TaskConfig | TaskMix:
    """Take the tasks' values out of a command's.

    Raises:
        LropeError: options that do not go together, or one that is for a task that is not there.
    """
    tasks: tuple[str, ...] = values.pop("task")
    check_once(tasks)
    seed = values.pop("seed")
    own: dict[str, dict[str, Any]] = {name: {"seed": seed} for name in tasks}
    for field in (*sorted(frozenset().union(*TASK_FIELDS.values())), "answer_prefix"):
        # a task that does not take the option refuses it in words of its own
        takers = [name for name in tasks if field == "answer_prefix" or field in TASK_FIELDS[name]] or tasks[:1]
        given: tuple[tuple[str | None, Any], ...] = values.pop(field)
        for task, value in sorted(given, key=lambda pair: pair[0] is not None):  # what is one task's own counts more
            if task is None and field == "data" and len(tasks) > 1:
                raise LropeError(f"--data {value}: whose, of {len(tasks)} tasks? say --data {takers[-1]}={value}")
            if task is not None:
                _check_there(tasks, task, f"{option_name(field)} {task}={value}")
            for name in takers if task is None else (task,):
                own[name][field] = value
    weights = _weights(tasks, values.pop("weight"))
    configs = [TaskConfig(name, **fields) for name, fields in own.items()]
    return configs[0] if len(configs) == 1 else TaskMix(tuple((task, weights[task.name]) for task in configs))


def _weights(tasks: tuple[str, ...], given: tuple[str, ...]) -> dict[str, float]:
    """Read ``--weight TASK=W``."""
    weights = dict.fromkeys(tasks, 1.0)
    for text in given:
        task, equals, number = text.partition("=")
        if not equals or task not in TASK_FIELDS:
            raise LropeError(f"--weight {text}: does not say whose; give it as TASK=W, such as {tasks[-1]}=2")
        _check_there(tasks, task, f"--weight {text}")
        if len(tasks) == 1:
            raise LropeError(f"--weight {text}: there is no other task to weigh {task} against; leave it out")
        try:
            weights[task] = float(number)
        except ValueError:
            raise LropeError(f"--weight {text}: {number!r} is no number; give one such as 2") from None
    return weights


def _check_there(tasks: tuple[str, ...], task: str, given: str) -> None:
    if task not in tasks:
        raise LropeError(f"{given}: no --task {task} is given, only {' and '.join(tasks)}; add it or leave this out")
