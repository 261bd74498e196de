"""Options that the search commands share: the model, how it is run, and the task. One place each, with its heading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from lrope_gguf.commands.options import FILE, Option

from ..config import (
    CACHE_TYPES,
    DEFAULT_DOCUMENTS,
    DEFAULT_PAIRS,
    DEFAULT_TEMPLATE,
    IDENTIFIER_KINDS,
    POSITIONS,
    ROPE_SCALINGS,
    TASK_FIELDS,
    ModelConfig,
    TaskConfig,
    escaped,
)

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


_MODEL, _TASK = "Advanced: model", "Advanced: task"
_LLAMA = "Advanced: as llama-server will be run (names and values are llama.cpp's)"

model_options = all_of(
    option("--threads", metavar="N", type=POSITIVE, heading=_MODEL, help="CPU threads (the physical cores)"),
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
_LLAMA_NAMES = ("rope_scaling", "rope_scale", "rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", "yarn_ext_factor",
                "yarn_attn_factor", "yarn_beta_slow", "yarn_beta_fast", "cache_type_k", "cache_type_v")  # fmt: skip

first_task_options = all_of(
    option("--task", type=click.Choice(list(TASK_FIELDS)), default="kv",
           help="kv: key-value retrieval; mdqa: multi-document question answering; jsonl: your own (kv)"),
    option("--keys", metavar="N", type=POSITIVE,
           help=f"kv: pairs a context ({DEFAULT_PAIRS}; with --data all of a record)"),
    option("--data", metavar="FILE", type=FILE,
           help="JSONL, plain or gzipped. kv: kv-retrieval-*_keys (contexts made from the seed); mdqa: nq-open-* of "
                "the same benchmark; jsonl: a line {context, question, answer: text or list of texts, depth: 0 to 1, "
                "optional}"),
)  # fmt: skip
task_options = all_of(
    option("--context-tokens", metavar="N", type=POSITIVE, heading=_TASK,
           help="kv, mdqa: as many keys or documents as fit into N tokens"),
    option("--documents", metavar="N", type=POSITIVE, heading=_TASK,
           help=f"mdqa: documents a context ({DEFAULT_DOCUMENTS})"),
    option("--identifiers", type=click.Choice(list(IDENTIFIER_KINDS)), heading=_TASK,
           help=f"kv without --data: what keys and values are; {_KINDS} ({IDENTIFIER_KINDS[0]})"),
    option("--probes", "--depths", metavar="N", type=POSITIVE, heading=_TASK,
           help="kv, mdqa: questions a context (as many as see a gain worth finding at the least cost)"),
    option("--positions", type=click.Choice(POSITIONS), heading=_TASK,
           help=f"kv, mdqa: where they stand: at random, one in each of equal strata, or the same everywhere "
                f"({POSITIONS[0]})"),
    option("--prompt-template", metavar="TEXT", heading=_TASK,
           help=f"jsonl: the prompt, \\n a new line ({escaped(DEFAULT_TEMPLATE)})"),
    option("--answer-prefix", metavar="TEXT", default="", heading=_TASK,
           help="begin all answers with this, for base models: ' \"'"),
    option("--seed", metavar="N", type=NATURAL, default=0, heading=_TASK, help="of all that is random (0)"),
)  # fmt: skip
"""What the model is asked; `task_config` takes their values and those of `first_task_options`."""


def model_config(path: str, values: dict[str, Any]) -> ModelConfig:
    """Take the values of `model_options`, and of `llama_options` if it has them, out of a command's.

    Raises:
        LropeError: values out of range or that do not go together.
    """
    own = {name: values.pop(name) for name in _LLAMA_NAMES if name in values}
    return ModelConfig(
        path,
        n_threads=values.pop("threads"),
        chat_template=not values.pop("no_chat_template"),
        **{name: values.pop(name) for name in ("n_gpu_layers", "batch_size", "verbose")},
        **own,
    )


def task_config(values: dict[str, Any]) -> TaskConfig:
    """Take the task's values out of a command's.

    Raises:
        LropeError: options that do not go together.
    """
    names = ("data", "keys", "documents", "context_tokens", "identifiers", "probes", "positions", "prompt_template")
    own = {name: values.pop(name) for name in (*names, "answer_prefix", "seed")}
    return TaskConfig(values.pop("task"), **own)
