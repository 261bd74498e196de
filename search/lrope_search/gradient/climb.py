"""The ascent as a search drives it: step by step, several tasks at once, with a limited divergence.

Nothing here needs torch until `open_objective` is entered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

from ..evaluation.batch import Tokens
from ..evaluation.divergence import GuardTexts
from ..evaluation.encoding import Encoding
from ..evaluation.make import open_model
from ..evaluation.settings import ModelConfig
from ..machine import free_memory, physical_cores
from ..scores import Factors
from .ascent import Ascent, AscentConfig, Values
from .variables import Moving

if TYPE_CHECKING:
    from .objective import Gradient, Objective

APART = 0.1
"""Standard deviation of the natural logarithms that a start by chance has."""

LONG_TOKENS = 1024
"""The most tokens of a guard's long text that a step looks at."""

_NEEDED = {"torch": (2, 5), "gguf": (0, 17)}


@dataclass(frozen=True)
class Step:
    """One step of the ascent: where it was measured, what was found there, and the state after it."""

    number: int
    """From 1, over all ascents."""
    log_factors: tuple[float, ...]
    """At which it was measured, one a layer; none where heads have their own (the state before has them)."""
    gains: Mapping[str, float]
    """Mean log-probability of the answers there by task, in nats."""
    divergence: float
    """Of the step's text, in nats a token."""
    price: float
    """Of divergence: how much of the gain the step left for each nat of it."""
    n_tokens: int
    """Computed: three for a forward and backward, one for a forward alone."""
    seconds: float
    state: Mapping[str, Any]
    """What `Climb.restore` takes, for JSON."""

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Step:
        """Return what `to_json` gave.

        Raises:
            LropeError: it is something else.
        """
        try:
            return cls(**{**value, "log_factors": tuple(map(float, value["log_factors"]))})
        except (KeyError, TypeError, ValueError) as error:
            raise LropeError(f"a kept step of the gradient ascent is damaged ({error})") from error


class Text(NamedTuple):
    """Ordinary text, on which divergence is limited."""

    tokens: Tokens
    kind: int = 0
    """The texts of each kind keep the limit by themselves."""
    first: int = 0
    """Of the positions that count."""


def guarded(texts: GuardTexts) -> list[Text]:
    """Return what steps look at in turn: short texts, and after every two the long one, where it goes on after them.

    Query scales change what a model says far into a text more than near its beginning: SmolLM2 135M, 0.045 nats on
    texts of 256 tokens and 0.071 on one of 2,048.
    """
    short = [Text(np.array(text, np.int32)) for text in texts.short]
    first = max(map(len, texts.short))
    if len(texts.long) <= first:
        return short
    long = Text(np.array(texts.long[: max(LONG_TOKENS, first + 1)], np.int32), 1, first)
    return [text for i in range(0, len(short), 2) for text in (*short[i : i + 2], long)]


class Climb:
    """Gradient ascents of several tasks at once, on one factor a layer or on what heads have of their own.

    What rises is the mean over tasks, by ``weights``, of their mean log-probability divided by their scale.

    Args:
        objective: The model.
        encodings: Of each task its context for step 1, 2 ...
        names: Of the tasks.
        weights: Of the tasks, as the user gave them.
        scales: Of the tasks, in nats: how far apart their questions lie (`task_scales`), of a single task too: it makes
            the sizes of steps fit any task.
        texts: On which divergence is limited, one a step in turn (`guarded`).
        layers: Whose factors move; queries may be scaled in all.
        config: Sizes of steps, bounds, and the limit.
        starts: Where the ascents begin, one after the other: factors of all layers, or None: 1, a little off by chance
            from the second on.
        scale: What moves: one of `SCALES`.
        seed: Of that chance.
        middle_weight: How much more the middle of a context counts, as of a search.

    Raises:
        LropeError: nothing does, or heads of a layer cannot be told apart.
    """

    def __init__(
        self,
        objective: Objective,
        encodings: Sequence[Callable[[int], Encoding]],
        *,
        names: Sequence[str],
        weights: Sequence[float],
        scales: Sequence[float],
        texts: Sequence[Text],
        layers: Sequence[int],
        config: AscentConfig,
        starts: Sequence[Factors | None] = (None,),
        scale: str = "layers",
        seed: int = 0,
        middle_weight: float = 0.0,
    ) -> None:
        self._objective, self._encodings, self._texts = objective, tuple(encodings), tuple(texts)
        self._names, self._scales = tuple(names), tuple(scales)
        self._shares = tuple(weight / sum(weights) for weight in weights)
        one, heads = (1.0,) * objective.n_layer, objective.heads()
        self._starts = [Moving(scale, layers, heads, one if start is None else start) for start in starts]
        self._by_chance = [start is None and number > 0 for number, start in enumerate(starts)]
        self._seed, self._config, self._middle_weight = seed, config, middle_weight
        self._of_layers = scale == "layers"
        self._from_base = not any(values.any() for values in self._starts[0].at(self._starts[0].start))
        self._begin(0)

    def _begin(self, number: int) -> None:
        """Stand at the beginning of an ascent."""
        self._number, self._moving = number, self._starts[number]
        at = self._moving.start
        if self._by_chance[number]:
            at = at + APART * np.random.default_rng((self._seed, number)).standard_normal(len(at))
        self._ascent = Ascent(at, self._config, self._moving.queries)

    @property
    def done(self) -> bool:
        """Whether all steps are made, of all ascents."""
        return self._ascent.done and self._number + 1 == len(self._starts)

    @property
    def factors(self) -> Factors:
        """Where it stands, of all layers, rounded to 1e-4."""
        return self._moving.factors(self._ascent.at)

    def mean(self, states: Sequence[Mapping[str, Any]]) -> Factors:
        """Return the mean of where it stood in these states (of logarithms), of all layers, rounded to 1e-4."""
        return self._moving.factors(np.mean([state["at"] for state in states], axis=0))

    @property
    def at_bound(self) -> tuple[int, ...]:
        """Layers of which a position factor has run to a bound; those of query scales cannot be set."""
        return self._moving.layers_of(self._ascent.at_bound & ~self._moving.queries)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that left this state.

        Raises:
            LropeError: it is no such state.
        """
        number = state.get("start", 0)
        if not (isinstance(number, int) and 0 <= number < len(self._starts)):
            raise LropeError(f"the kept state of the gradient ascent is of start {number}, of {len(self._starts)}")
        self._begin(number)
        self._ascent.restore(state)

    def step(self) -> Step:
        """Measure where it stands, and move; where an ascent is done, at the beginning of the next.

        Raises:
            LropeError: a derivative is not a number, or there is no memory; nothing has moved.
        """
        begin = time.perf_counter()
        if self._ascent.done:
            self._begin(self._number + 1)
        number = self._number * self._config.steps + self._ascent.step + 1
        visits = self._config.visits
        context = self._number * math.ceil(self._config.steps / visits) + self._ascent.step // visits + 1
        at = self._moving.at(self._ascent.at)
        try:
            found = [
                self._objective.answers(encode(context), *at, middle_weight=self._middle_weight)
                for encode in self._encodings
            ]
            apart = self._divergence(number, at)
        except (RuntimeError, MemoryError) as error:  # torch has no other for memory of the CPU
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LropeError(f"step {number} of the gradient ascent cannot be computed: {reason}") from error
        slope = self._moving.slope
        total = np.asarray(
            sum(
                share / scale * slope(one.factors, one.scales)
                for share, scale, one in zip(self._shares, self._scales, found, strict=True)
            )
        )
        if apart is None:
            self._ascent.tell(total)
        else:
            text = self._text(number)
            which = next(i for i, other in enumerate(self._texts) if other is text)
            self._ascent.tell(total, apart.value, slope(apart.factors, apart.scales), which, text.kind)
        return Step(
            number=number,
            log_factors=tuple(at[0][:, 0].tolist()) if self._of_layers else (),
            gains={name: one.value for name, one in zip(self._names, found, strict=True)},
            divergence=0.0 if apart is None else apart.value,
            price=self._ascent.price,
            n_tokens=sum(one.n_tokens for one in found) + self._n_of_divergence(number, apart),
            seconds=time.perf_counter() - begin,
            state=self._ascent.state() | ({"start": self._number} if self._number else {}),
        )

    def _n_of_divergence(self, number: int, apart: Gradient | None) -> int:
        """Tokens of the step's text, of the base model too where it is the text's first; the same after a kill."""
        if apart is None:
            return 0
        text = self._text(number)
        before = range(2 if self._from_base else 1, number)
        again = any(self._text(other) is text for other in before)
        return apart.n_tokens + (0 if again else len(text.tokens))

    def _text(self, number: int) -> Text:
        """The text of a step."""
        return self._texts[number % len(self._texts)]

    def _divergence(self, number: int, at: tuple[Values, Values]) -> Gradient | None:
        """Of the step's text; None where it is 0 by definition, or nothing limits it."""
        if not self._texts or not any(values.any() for values in at):
            return None
        text = self._text(number)
        return self._objective.divergence(text.tokens, *at, first=text.first)


def conflicts(gradients: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the cosines between tasks' derivatives, shape (tasks, tasks): below 0, what helps one harms the other."""
    rows = np.array([np.ravel(gradient) for gradient in gradients.values()])
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    cosines: NDArray[np.float64] = rows @ rows.T
    return cosines


@contextmanager
def open_objective(config: ModelConfig, *, device: str | None = None) -> Iterator[Objective]:
    """Load a model in llama.cpp, on the CPU, and its weights in torch.

    Args:
        config: The model and how it is run; its threads are torch's too.
        device: Of torch; None: a GPU that torch has, else the CPU.

    Raises:
        LropeError: torch or gguf is missing or too old, the weights would not fit into memory (said before they are
            loaded), or the graph has no RoPE or an operation that is not known.
    """
    check_installed()
    import torch

    from .objective import Objective
    from .weights import Weights

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cpu":
        torch.set_num_threads(config.n_threads or physical_cores())
    weights = Weights(config.path, device=where)
    _check_fits(Path(config.path), weights.n_bytes if where.type == "cpu" else 0, weights.n_bytes_of_files)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast_products(where) else before)
    try:
        with open_model(replace(config, n_gpu_layers=0)) as model, Objective(model, weights) as objective:
            objective.heads()
            yield objective
    finally:
        torch.set_float32_matmul_precision(before)


def fast_products(device: Any) -> bool:
    """Whether products of operands rounded to bfloat16 (on a GPU: TF32) are the faster ones there."""
    if device.type == "cuda":
        return True
    import torch

    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16", False))


def check_installed() -> None:
    """Raise `LropeError` if a package that gradients need is missing or too old."""
    for name, least in _NEEDED.items():
        wanted = f"{name} {'.'.join(map(str, least))}"
        try:
            __import__(name)
            have = version(name)
        except (ImportError, PackageNotFoundError):
            raise LropeError(f"gradients need {wanted}: pip install 'lrope-gguf[gradient]'") from None
        if tuple(int(part) for part in have.split(".")[:2]) < least:
            raise LropeError(f"gradients need {wanted}, this is {have}: pip install 'lrope-gguf[gradient]'")


def _check_fits(path: Path, in_torch: int, in_llama_cpp: int) -> None:
    """Refuse weights that would not fit, from the header alone."""
    free, needed = free_memory(), in_torch + in_llama_cpp
    if free is not None and needed > free:
        most = free * in_llama_cpp / needed
        raise LropeError(
            f"{path}: gradients need {needed / 1e9:.1f} GB for its weights, {free / 1e9:.1f} GB are free; a file of "
            f"{most / 1e9:.1f} GB would fit"
        )
