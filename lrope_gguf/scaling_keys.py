"""Which RoPE scaling a file is to say, and the keys that say it.

The keys are llama.cpp's, so that a file needs no option, and one of ours, `rope.scaling.dynamic_factor`, which makes
the scaling depend on the context's length. A stock llama.cpp, which aborts on a type that it does not know, finds
"none" or "yarn" there and runs the model without scaling or with static YaRN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_values import Value, Values

KINDS = ("none", "linear", "yarn", "dynamic", "dynamic-yarn")
MAX_SCALE = 1024
TYPE, FACTOR, DYNAMIC = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.dynamic_factor"
ORIGINAL, CONTEXT = "rope.scaling.original_context_length", "context_length"
NAMES = (TYPE, FACTOR, ORIGINAL, CONTEXT, DYNAMIC)
"""All keys that a scaling may take, in the order in which they are written, without their architecture."""

_SECTIONS, _LOG_MULTIPLIER = "rope.dimension_sections", "rope.scaling.yarn_log_multiplier"
_MAX_CONTEXT = 1 << 31
_TYPES = {"linear": "linear", "yarn": "yarn", "dynamic": "none", "dynamic-yarn": "yarn"}


@dataclass(frozen=True)
class Scaling:
    """The scaling to write.

    Args:
        kind: one of `KINDS`; `none` takes away what was written before.
        factor: 1 to 1024; by default `context_length` over the model's own, and 1 for `dynamic`, where it is that of
            the NTK formula. For `dynamic-yarn` the largest factor that it goes up to.
        context_length: tokens, at least `original`; by default `factor` times as many, and for `dynamic` what the
            model has.
        original: tokens that the model was trained on; by default what its file says.

    Raises:
        LropeError: a value out of range, or neither factor nor context length where one of them is needed.
    """

    kind: str
    factor: float | None = None
    context_length: int | None = None
    original: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.kind not in KINDS:
            raise LropeError(f"--rope-scaling {self.kind}: is none of {', '.join(KINDS)}; give one of them")
        if self.factor is not None and not (_is_number(self.factor) and 1 <= self.factor <= MAX_SCALE):
            raise LropeError(f"--rope-scale {self.factor}: is no number from 1 to {MAX_SCALE}; give one")
        length = self.context_length
        lengths = {"--context-length": length, "--yarn-orig-ctx": self.original}
        for option, n in lengths.items():
            if n is not None and not (isinstance(n, int) and _is_number(n) and 0 < n < _MAX_CONTEXT):
                raise LropeError(f"{option} {n}: is no number of tokens from 1 to 2147483647; give one")
        for option, value in (("--rope-scale", self.factor), *lengths.items()):
            if self.kind == "none" and value is not None:
                raise LropeError(f"{option} {value}: means nothing with --rope-scaling none; leave out one of them")
        if self.kind not in ("none", "dynamic") and self.factor is None and length is None:
            raise LropeError(f"--rope-scaling {self.kind}: needs --rope-scale or --context-length; give one of them")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Recipe:
    """A `Scaling` for one model.

    Attributes:
        kind, factor: as in `Scaling`.
        original: tokens of context that the model was trained on.
        context_length: tokens of the scaled context; None where it stays as it is.
        says_original: whether `original` is another number than that of the file.
    """

    kind: str
    factor: float
    original: int
    context_length: int | None
    says_original: bool = False

    def values(self, order: str) -> dict[str, Value]:
        """Names of `NAMES`, in that order, and the values to write."""
        said: dict[str, str | int | float] = {TYPE: _TYPES[self.kind]}
        if self.kind != "dynamic":
            said[FACTOR] = float(self.factor)
        said[ORIGINAL] = self.original
        if self.context_length is not None:
            said[CONTEXT] = self.context_length
        if self.kind.startswith("dynamic"):
            said[DYNAMIC] = float(self.factor)
        return {name: Value.of(order, value) for name, value in said.items()}

    def options(self) -> dict[str, str]:
        """The same as options of `llama-server`, without the dashes."""
        said = {"rope-scaling": self.kind, "rope-scale": f"{self.factor:.9g}"}
        if self.says_original:
            said["yarn-orig-ctx"] = str(self.original)
        return said if self.context_length is None else said | {"ctx-size": str(self.context_length)}


def recipe(scaling: Scaling, values: Values, architecture: str, path: Path) -> Recipe:
    """What a scaling other than `none` comes to for the model with these values.

    Raises:
        LropeError: the model says not enough or cannot have it, or the factor does not reach that far.
    """
    kind, factor, length = scaling.kind, scaling.factor, scaling.context_length
    trained = _length(values, f"{architecture}.{CONTEXT}", path)
    if trained is None:
        raise LropeError(f"{path}: has no {architecture}.{CONTEXT}, which a scaling starts from; give a whole model")
    original = scaling.original or _length(values, f"{architecture}.{ORIGINAL}", path) or trained
    _check_kind(kind, values, architecture, path)
    if length is not None and length < original:
        raise LropeError(f"--context-length {length}: {path} was trained on {original} tokens; give at least as many")
    if kind == "dynamic":
        return Recipe(kind, factor or 1.0, original, length, scaling.original is not None)
    if factor is None:
        factor = (length or original) / original
        if factor > MAX_SCALE:
            raise LropeError(
                f"--context-length {length}: is more than {MAX_SCALE} times the {original} tokens that {path} was "
                f"trained on; give at most {MAX_SCALE * original}"
            )
    reach = round(factor * original)
    if length is not None and length > reach:
        raise LropeError(
            f"--context-length {length}: the factor covers only {reach} tokens ({factor:g} times {original}); give at "
            "most as many, or a larger --rope-scale"
        )
    if length is None and factor > 1:
        if reach >= _MAX_CONTEXT:
            raise LropeError(f"--rope-scale {factor:g}: gives {reach} tokens, above 2147483647; give a smaller one")
        length = reach
    return Recipe(kind, factor, original, length, scaling.original is not None)


def _length(values: Values, key: str, path: Path) -> int | None:
    """A number of tokens; None where there is none."""
    length = values.integer(key)
    if length is not None and not 0 <= length < _MAX_CONTEXT:
        raise LropeError(f"{path}: {key} is {length}, no number of tokens; the file is damaged")
    return length or None


def _check_kind(kind: str, values: Values, architecture: str, path: Path) -> None:
    """Refuse what llama.cpp could not compute, or would compute otherwise than is asked."""
    if values.text(f"{architecture}.{TYPE}") == "longrope":
        raise long_factors_error(path)
    if kind.startswith("dynamic") and values.has(f"{architecture}.{_SECTIONS}"):
        raise LropeError(f"{path}: rotates by M-RoPE, which no dynamic scaling fits; give linear or yarn")
    if kind == "dynamic-yarn" and values.has(f"{architecture}.{_LOG_MULTIPLIER}"):
        raise LropeError(
            f"{path}: has a magnitude of its own for YaRN ({architecture}.{_LOG_MULTIPLIER}), which dynamic YaRN does "
            "not change; give yarn"
        )


def long_factors_error(path: Path) -> LropeError:
    """The refusal of a model with LongRoPE."""
    return LropeError(f"{path}: scales by LongRoPE, whose factors are in the file; give a model without, or no scaling")
