"""The settings of a search as values: what a worker gets, what ``config.json`` holds, and what a Python user writes.

Frozen, checked when they are made, picklable, and JSON both ways. A value that is wrong is named by its option on the
command line. Nothing here imports NumPy or llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve, Point
from lrope_gguf.errors import LropeError
from lrope_gguf.rope_scaling import KINDS, MAX_FACTOR

from .sample import default_contexts, default_probes

ControlPoints: TypeAlias = tuple[Point, ...]
Start: TypeAlias = ControlPoints | tuple[float, ...]
"""What a search may begin with: the control points of a curve, or a factor for each layer."""

DEFAULT_PAIRS, DEFAULT_DOCUMENTS = 40, 20
"""Of a context: pairs of key and value, documents."""
DEFAULT_LINES, DEFAULT_WORDS = 100, 1000
"""Of a context in which variables are tracked or words counted."""
SPLITS = ("search", "validation", "test")
"""To compare candidates, to choose the winner, to measure it."""
POSITIONS = ("jittered", "even")
"""Where a context's questions stand: at random in equal strata, or the same everywhere; the first is the default."""
DEFAULT_TEMPLATE = "{context}\n\nQuestion: {question}\nAnswer:"
IDENTIFIER_KINDS = ("uuid", "number", "word")
"""Kinds of keys and values of generated contexts; the first is the default."""
UNIFORM_FACTORS = (0.95, 1.05, 1.1, 1.25)
"""Uniform scalings (position interpolation) that every search tries first."""

TASK_FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "kv": frozenset({"data", "context_tokens", "keys", "identifiers", "probes", "positions"}),
        "mdqa": frozenset({"data", "context_tokens", "documents", "probes", "positions"}),
        "jsonl": frozenset({"data", "prompt_template"}),
        "multikey": frozenset({"context_tokens", "keys", "probes", "positions"}),
        "vt": frozenset({"context_tokens", "lines", "probes", "positions"}),
        "cwe": frozenset({"context_tokens", "words"}),
        "fwe": frozenset({"context_tokens", "words"}),
    }
)
"""The tasks, and which fields of `TaskConfig` mean something to each; the rest means something to all."""

SIZES = ("keys", "documents", "lines", "words")
_OF_FILES: Mapping[str, str] = MappingProxyType({"mdqa": "an nq-open file", "jsonl": "your file of questions"})
"""Tasks that cannot be made of a seed, and what they need."""

ALGORITHM_FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "ga": frozenset({"lag", "population", "parents", "width"}),
        "cma-es": frozenset({"population", "width"}),
        "de": frozenset({"population", "width"}),
        "random": frozenset({"lag", "width"}),
        "papers-ga": frozenset({"population", "parents", "width"}),
    }
)
"""The optimizers, and which fields of `SearchConfig` mean something to each beside those that mean something to all."""

PARAMETRIZATIONS = ("both", "bezier", "layers")
"""What candidates are: a Bézier curve over all layers with own factors of a few, the curve alone (the papers' way), or
own factors alone; the first is the default."""

ROPE_SCALINGS = KINDS
"""What ``--rope-scaling`` of the patched llama.cpp takes."""
_SET_BY_DYNAMIC = ("rope_freq_base", "yarn_ext_factor", "yarn_attn_factor")
CACHE_TYPES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "f16": (1, 2), "f32": (1, 4), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20),
        "iq4_nl": (32, 18), "q5_0": (32, 22), "q5_1": (32, 24),
    }
)  # fmt: skip
"""What ``--cache-type-k`` and ``-v`` of llama.cpp take, and of each numbers and bytes a block; the first is the
default."""
_UNSET: Mapping[str, float] = MappingProxyType(
    {
        "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_orig_ctx": 0, "yarn_ext_factor": -1.0,
        "yarn_attn_factor": -1.0, "yarn_beta_slow": -1.0, "yarn_beta_fast": -1.0,
    }
)  # fmt: skip
"""Numbers that say to llama.cpp what None says here: as the model has it (``llama_context_default_params``)."""
_FLOAT32_MAX = 3.4028234663852886e38

EXECUTORS = ("local", "ray")
"""Where workers live: processes of this machine, or actors of a Ray cluster."""

C = TypeVar("C", "ModelConfig", "TaskConfig", "SearchConfig")

Tasks: TypeAlias = "TaskConfig | TaskMix | Sequence[tuple[TaskConfig, float]]"
"""What the model is asked: one task, or several with their weights."""


def option(name: str) -> str:
    """Return the command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ModelConfig:
    """A model and how it is run.

    Args:
        path: GGUF file; of a split model the first shard.
        n_threads: CPU threads; None: the physical cores.
        n_gpu_layers: Layers to keep on the GPU; None: all that fit.
        batch_size: Tokens that llama.cpp computes at once; None: what a study was begun with, and else 512 on the CPU
            and 2048 where layers go to a GPU.
        chat_template: Whether prompts go through the model's own template, if it has one.
        verbose: Show llama.cpp's log.
        rope_scaling: One of `ROPE_SCALINGS`; None, here and below: what the model's file says.
        rope_scale: How many times longer contexts become; 1 over ``rope_freq_scale``, give one of them.
        rope_freq_base, rope_freq_scale: RoPE's base, and the factor of its frequencies.
        yarn_orig_ctx: Tokens of context that the model was trained on.
        yarn_ext_factor, yarn_attn_factor, yarn_beta_slow, yarn_beta_fast: YaRN's, as llama.cpp has them.
        cache_type_k, cache_type_v: Of the cached keys and values, one of `CACHE_TYPES`.

    Raises:
        LropeError: a value out of range.
    """

    path: str
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    batch_size: int | None = None
    chat_template: bool = True
    verbose: bool = False
    rope_scaling: str | None = None
    rope_scale: float | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_orig_ctx: int | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_slow: float | None = None
    yarn_beta_fast: float | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"

    def __post_init__(self) -> None:
        """Check the ranges."""
        object.__setattr__(self, "path", str(self.path))
        for name, value in (("threads", self.n_threads), ("batch_size", self.batch_size)):
            _at_least(name, value, 1)
        _one_of("rope_scaling", self.rope_scaling, (None, *ROPE_SCALINGS))
        for name in ("cache_type_k", "cache_type_v"):
            _one_of(name, getattr(self, name), tuple(CACHE_TYPES))
        for name in ("rope_scale", *_UNSET):
            self._check_number(name)
        if self.rope_scale is not None and self.rope_freq_scale is not None:
            raise LropeError("--rope-scale, --rope-freq-scale: both say how far to scale; leave out one of them")
        for name in ("rope_scale", "rope_freq_scale"):
            if self.rope_scaling == "none" and getattr(self, name) is not None:
                raise LropeError(f"{option(name)}: means nothing with --rope-scaling none; leave out one of them")
        if self.rope_scaling is not None and self.rope_scaling.startswith("dynamic"):
            self._check_dynamic(self.rope_scaling)

    def _check_dynamic(self, scaling: str) -> None:
        """Refuse what the library would refuse (``llama_rope_dynamic_init`` of the patch)."""
        for name in _SET_BY_DYNAMIC:
            if getattr(self, name) != _UNSET[name] and getattr(self, name) is not None:
                raise LropeError(f"{option(name)}: --rope-scaling {scaling} sets it by itself; leave out one of them")
        factors = {"rope_scale": self.rope_scale or 1.0, "rope_freq_scale": 1.0 / (self.rope_freq_scale or 1.0)}
        for name, factor in factors.items():
            if not 1.0 <= factor <= MAX_FACTOR:
                given = getattr(self, name)
                raise LropeError(
                    f"{option(name)} {given:g}: --rope-scaling {scaling} needs a factor from 1 to {MAX_FACTOR}"
                )

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or value == _UNSET.get(name):
            return
        if name == "yarn_orig_ctx":
            right = isinstance(value, int) and 0 < value < 1 << 31
        else:
            least = 0.0 if name.startswith("yarn") else 1.0 / _FLOAT32_MAX
            right = least <= value <= _FLOAT32_MAX
        if not right:
            above = "at least 0" if name.startswith("yarn") and name != "yarn_orig_ctx" else "above 0"
            raise LropeError(f"{option(name)} {value}: out of range; give a number {above}, or leave it out")

    def llama_options(self) -> dict[str, Any]:
        """Return what llama.cpp's context is told beside its defaults, by the names of its options; mostly nothing.

        Two settings that come to the same return the same: ``rope_scale`` becomes ``rope_freq_scale``.
        """
        scale = self.rope_freq_scale if self.rope_scale is None else 1.0 / self.rope_scale
        values = {name: scale if name == "rope_freq_scale" else getattr(self, name) for name in _UNSET}
        options: dict[str, Any] = {} if self.rope_scaling is None else {"rope_scaling": self.rope_scaling}
        options |= {name: value for name, value in values.items() if value not in (None, _UNSET[name])}
        types = {name: getattr(self, name) for name in ("cache_type_k", "cache_type_v")}
        return options | {name: kind for name, kind in types.items() if kind != next(iter(CACHE_TYPES))}

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelConfig:
        """Return what `to_json` wrote.

        Raises:
            LropeError: a field that there is not, or a value out of range.
        """
        return _from_json(cls, value)


@dataclass(frozen=True)
class TaskConfig:
    r"""A task: what the model is asked.

    Args:
        name: One of `TASK_FIELDS`.
        data: File with the contexts; None: made from the seed (of ``kv``; ``mdqa`` and ``jsonl`` need one, the others
            take none).
        keys: Of ``kv`` and ``multikey``, pairs a context; None: 40, or all of a file's record.
        documents: Of ``mdqa``, documents a context; None: 20.
        lines: Of ``vt``, lines a context; None: 100.
        words: Of ``cwe`` and ``fwe``, words a context; None: 1000.
        context_tokens: In place of these: as many as fit into so many tokens of the model.
        identifiers: Of ``kv`` without ``data``, one of `IDENTIFIER_KINDS`; None: the first.
        probes: Of ``kv``, ``mdqa`` and ``multikey``, questions a context; None: as many as see a gain worth finding at
            the least cost (`default_probes`). Of ``vt``, chains a context; None: 1.
        positions: Of the same, where they stand, one of `POSITIONS`; None: the first.
        prompt_template: Of ``jsonl``, the prompt with ``{context}`` and ``{question}``, a new line written ``\n``;
            None: `DEFAULT_TEMPLATE`.
        answer_prefix: Begins all answers, for base models that would not answer in the wanted form by themselves.
        seed: Of all that is random.

    Raises:
        LropeError: values out of range or that do not go together.
    """

    name: str = "kv"
    data: str | None = None
    keys: int | None = None
    documents: int | None = None
    lines: int | None = None
    words: int | None = None
    context_tokens: int | None = None
    identifiers: str | None = None
    probes: int | None = None
    positions: str | None = None
    prompt_template: str | None = None
    answer_prefix: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without a file."""
        if self.data is not None:
            object.__setattr__(self, "data", str(self.data))
        _one_of("task", self.name, tuple(TASK_FIELDS))
        for name in sorted(frozenset().union(*TASK_FIELDS.values()) - TASK_FIELDS[self.name]):
            if getattr(self, name) is not None:
                tasks = " and ".join(f"--task {task}" for task, own in TASK_FIELDS.items() if name in own)
                raise LropeError(f"{option(name)}: means nothing to --task {self.name}; it is for {tasks}")
        if self.context_tokens is not None:
            for name in SIZES:
                if getattr(self, name) is not None:
                    raise LropeError(
                        f"{option(name)}, --context-tokens: both give a context's size; leave out one of them"
                    )
        for name in (*SIZES, "context_tokens", "probes"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        _one_of("positions", self.positions, (None, *POSITIONS))
        if self.name in _OF_FILES and self.data is None:
            raise LropeError(f"--task {self.name}: needs {_OF_FILES[self.name]}; give --data FILE")

    def to_json(self) -> dict[str, Any]:
        """Return the fields that mean something to this task as a JSON object, with the defaults put in."""
        own = {name: getattr(self, name) for name in sorted(TASK_FIELDS[self.name])}
        defaults = {"probes": self._known_probes(), "positions": POSITIONS[0],
                    "prompt_template": escaped(DEFAULT_TEMPLATE),
                    "identifiers": None if self.data else IDENTIFIER_KINDS[0]}  # fmt: skip
        own |= {name: value for name, value in defaults.items() if name in own and own[name] is None}
        return {"name": self.name, **own, "seed": self.seed, "answer_prefix": self.answer_prefix}

    def _known_probes(self) -> int | None:
        """Return the questions of a context if none are asked for; None where file or tokenizer decide."""
        if self.name == "vt":
            return 1
        if self.name not in ("kv", "multikey") or self.context_tokens is not None:
            return None
        keys = self.keys or (DEFAULT_PAIRS if self.data is None else None)
        return None if keys is None else default_probes(keys)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskConfig:
        """Return what `to_json` wrote; it asks the same.

        Raises:
            LropeError: a field that there is not, or values out of range or that do not go together.
        """
        return _from_json(cls, value)


@dataclass(frozen=True)
class TaskMix:
    """Tasks that are asked side by side, with the weight of each; one alone is the task itself.

    Args:
        parts: Tasks with their weights, each task once; kept in the order of `TASK_FIELDS`, so that a mix is the same
            in whatever order its tasks are named.

    Raises:
        LropeError: no task, a task given twice, or a weight that is no positive number.
    """

    parts: tuple[tuple[TaskConfig, float], ...]

    def __post_init__(self) -> None:
        """Check and sort the parts."""
        if not self.parts:
            raise LropeError(f"--task: none given; choose from {', '.join(TASK_FIELDS)}")
        check_once([task.name for task, _ in self.parts])
        for task, weight in self.parts:
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0.0 < weight < math.inf:
                raise LropeError(f"--weight {task.name}={weight}: no positive number; give one such as 2")
        order = list(TASK_FIELDS)
        parts = sorted(((task, float(weight)) for task, weight in self.parts), key=lambda p: order.index(p[0].name))
        object.__setattr__(self, "parts", tuple(parts))

    @classmethod
    def of(cls, tasks: Tasks) -> TaskMix:
        """Return the mix of `Tasks` however they are given.

        Raises:
            LropeError: see the class.
        """
        if isinstance(tasks, TaskMix):
            return tasks
        return cls(((tasks, 1.0),) if isinstance(tasks, TaskConfig) else tuple(tasks))

    @property
    def tasks(self) -> tuple[TaskConfig, ...]:
        """The tasks alone."""
        return tuple(task for task, _ in self.parts)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each task, by name; empty for one task alone, which nothing is weighed against."""
        return {task.name: weight for task, weight in self.parts} if len(self.parts) > 1 else {}

    def check_contexts(self, option: str, n_contexts: int) -> None:
        """Refuse fewer contexts than tasks, which take turns.

        Raises:
            LropeError: names the option.
        """
        if n_contexts < len(self.parts):
            names = " and ".join(task.name for task in self.tasks)
            raise LropeError(
                f"{option} {n_contexts}: too few for {names}, which take turns; give at least {len(self.parts)}"
            )


@dataclass(frozen=True)
class SearchConfig:
    """How to search. All but ``max_hours`` decide the result together with model and task.

    Args:
        seed: Seed of the optimizer and of the bootstrap.
        max_evaluations: Distinct candidates to evaluate on search contexts; the identity, which the genetic
            algorithm asks for first, is one of them.
        max_hours: Ask for no further candidate after so many hours of this run; the one thing that depends
            on time. None: no limit.
        search_contexts, validation_contexts, test_contexts: Contexts of each split, indices from 0. None: so many
            that a gain worth finding shows (`default_contexts`), or all that the data has.
        finalists: Candidates, best by search, that go on to validation beside the base model and the best
            uniform factor.
        racing_first, racing_fraction: See `Racing`; by default there is none (research/algorithms.md has the figures).
        middle_weight: See `Objective`.
        algorithm: One of `ALGORITHM_FIELDS`.
        parametrization: One of `PARAMETRIZATIONS`.
        degree, bounds, uniform_factors, width: Of every optimizer; see `GeneticAlgorithm`. Bounds lie within 1/1024
            and 1024, beyond which llama.cpp takes no factors, with 1 between them.
        lag: Candidates that may be asked for before the first of them is told: what a search on many workers needs
            to keep them busy, and what it costs in foresight. Of those optimizers that have no generations.
        population, parents: Of those optimizers that have them; None: their own.
        max_kl: A finalist that diverges more from the base model on ordinary text is passed over; nats per token.
        confidence: Of the bootstrap intervals.
        start: What to begin with, within these bounds; of ``parametrization="bezier"`` curves of this degree.
        guard_text: File with ordinary text for ``max_kl``; None: the base model writes some.

    Raises:
        LropeError: a value out of range.
    """

    seed: int = 0
    max_evaluations: int = 120
    max_hours: float | None = None
    search_contexts: int | None = None
    validation_contexts: int | None = None
    test_contexts: int | None = None
    finalists: int = 4
    racing_first: int = 1
    racing_fraction: float = 1.0
    middle_weight: float = 0.0
    algorithm: str = "ga"
    parametrization: str = PARAMETRIZATIONS[0]
    degree: int = 3
    bounds: tuple[float, float] = DEFAULT_BOUNDS
    lag: int = 8
    population: int | None = None
    parents: int | None = None
    uniform_factors: tuple[float, ...] = UNIFORM_FACTORS
    width: float = 0.05
    max_kl: float = 0.1
    confidence: float = 0.95
    start: tuple[Start, ...] = ()
    guard_text: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = ("max_evaluations", "search_contexts", "validation_contexts", "test_contexts", "finalists")
        for name in (*counts, "racing_first", "degree", "lag", "population", "parents"):
            _at_least(name, getattr(self, name), 1)
        low, high = self.bounds
        ranges = {
            "seed": self.seed >= 0,
            "max_hours": self.max_hours is None or self.max_hours > 0.0,
            "racing_fraction": 0.0 < self.racing_fraction <= 1.0,
            "middle_weight": 0.0 <= self.middle_weight < math.inf,
            "bounds": 1.0 / MAX_FACTOR <= low <= 1.0 <= high <= MAX_FACTOR and low < high,
            "uniform_factors": all(0.0 < factor < math.inf for factor in self.uniform_factors),
            "width": 0.0 < self.width <= 1.0,
            "max_kl": self.max_kl >= 0.0,
            "confidence": 0.0 < self.confidence < 1.0,
        }
        for field in fields(self):
            number = getattr(self, field.name)
            if isinstance(number, float) and math.isinf(number):
                raise LropeError(f"{option(field.name)} {number}: not finite; give a number, a large one for no limit")
        for name, right in ranges.items():
            if not right:
                raise LropeError(f"{option(name)} {getattr(self, name)}: out of range; see lrope-gguf search --help")
        _one_of("algorithm", self.algorithm, tuple(ALGORITHM_FIELDS))
        _one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        defaults = {field.name: field.default for field in fields(self)}
        for name in sorted(frozenset().union(*ALGORITHM_FIELDS.values()) - ALGORITHM_FIELDS[self.algorithm]):
            if getattr(self, name) != defaults[name]:
                raise LropeError(f"{option(name)}: means nothing to --algorithm {self.algorithm}; leave it out")
        for start in self.start:
            self.started(start)

    def n_contexts(self, split: str) -> int:
        """Return the contexts of ``split``; if they are None still, those of a long context (`settled`)."""
        contexts: int | None = getattr(self, f"{split}_contexts")
        return default_contexts(split, default_probes(2**10)) if contexts is None else contexts

    def settled(self, probes: int, sizes: Mapping[str, int | None] | None = None, n_tasks: int = 1) -> SearchConfig:
        """Return these settings with numbers in place of None.

        Args:
            probes: Questions of a context.
            sizes: The contexts that there are of each split; None: as many as wanted.
            n_tasks: Tasks that take turns, each of which is to show its gain.
        """
        numbers: dict[str, Any] = {}
        for split in SPLITS:
            if getattr(self, f"{split}_contexts") is None:
                most = (sizes or {}).get(split)
                wanted = n_tasks * default_contexts(split, probes)
                numbers[f"{split}_contexts"] = wanted if most is None else max(1, min(wanted, most))
        return replace(self, **numbers)

    def started(self, start: Start, where: str = "--start") -> Curve | tuple[float, ...]:
        """Return a curve or factors to begin with; ``where`` they come from, for messages.

        Raises:
            LropeError: no candidate of this search could be that.
        """
        low, high = self.bounds
        if isinstance(start[0], tuple):
            degree = len(start) - 1
            if degree != self.degree and self.parametrization == "bezier":
                raise LropeError(f"{where}: a curve of degree {degree}; give --degree {degree}")
            try:
                return Curve(start, bounds=self.bounds)
            except LropeError as error:
                raise LropeError(f"{where}: outside --bounds {low:g},{high:g} ({error})") from None
        if self.parametrization == "bezier":
            raise LropeError(
                f"{where}: holds factors but no control points, and --parametrization bezier searches curves alone; "
                "give a curve, or another --parametrization"
            )
        outside = [factor for factor in start if not low <= factor <= high]
        if outside:
            raise LropeError(f"{where}: outside --bounds {low:g},{high:g} (a factor of {outside[0]:g})")
        return start

    def algorithm_options(self) -> dict[str, Any]:
        """Return what the optimizer takes beside seed, degree, bounds and curves; what is None is its own."""
        names = [field.name for field in fields(self) if field.name in ALGORITHM_FIELDS[self.algorithm]]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def identity(self) -> dict[str, Any]:
        """Return what a study is bound to, as ``config.json`` holds it.

        Without ``max_evaluations`` and ``max_hours``, which only say how far to go: a study may be continued with more
        of either. Without ``guard_text``, of which the study notes the content.
        """
        bound = self.to_json()
        for name in ("max_evaluations", "max_hours", "guard_text"):
            bound.pop(name, None)
        return bound

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object; ``start`` and ``guard_text`` only if there are any."""
        values = asdict(self)
        return {key: value for key, value in values.items() if value or key not in ("start", "guard_text")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SearchConfig:
        """Return what `to_json` wrote, or, with defaults for what it leaves out, `identity`.

        Raises:
            LropeError: a field that there is not, or a value out of range.
        """
        return _from_json(cls, value)


@dataclass(frozen=True)
class WorkersConfig:
    """Who does the work. The result of a search does not depend on it.

    Args:
        n_workers: Models at work side by side; None: 1, and on a Ray cluster one for each GPU or node.
        gpus: GPUs to hand out to local workers in turn; none: all that are visible.
        executor: One of `EXECUTORS`.
        ray_address: Of the Ray cluster; None: what the environment names, or a new one.

    Raises:
        LropeError: a value out of range.
    """

    n_workers: int | None = None
    gpus: tuple[str, ...] = ()
    executor: str = "local"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least("workers", self.n_workers, 1)
        _one_of("executor", self.executor, EXECUTORS)


def check_once(tasks: Sequence[str]) -> None:
    """Refuse a task that is named twice.

    Raises:
        LropeError: names it.
    """
    for name in tasks:
        if tasks.count(name) > 1:
            raise LropeError(f"--task {name}: given twice; give each task once")


def escaped(text: str) -> str:
    """A text with its new lines as the command line takes them."""
    return text.replace("\n", "\\n")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise LropeError(f"{option(name)} {value}: too few; give at least {least}")


def _one_of(name: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        choices = ", ".join(filter(None, known))
        raise LropeError(f"{option(name)} {value}: unknown; choose one of {choices}")


def _from_json(config: type[C], value: Mapping[str, Any]) -> C:
    known = {field.name for field in fields(config)}
    for name in value:
        if name not in known:
            raise LropeError(f"{name}: no setting of {config.__name__}; known are {', '.join(sorted(known))}")
    return config(**{name: _frozen(item) for name, item in value.items()})


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
