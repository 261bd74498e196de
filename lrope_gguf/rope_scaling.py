"""RoPE scaling: how llama.cpp will rotate a file's layers (`RopeScaling`), and which keys say so (`Scaling`).

Which layer factors are good, and which of them the patched library can apply, depends on the scaling.

The keys to write are llama.cpp's, so that a server needs no option, and one of ours, `rope.scaling.dynamic_factor`,
which makes the scaling depend on the context's length. A stock llama.cpp aborts on a type that it does not know; it
finds "none" or "yarn" beside our key, and runs the model without scaling or with static YaRN.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrope_gguf.curve import MAX_FACTOR as MAX_FACTOR
from lrope_gguf.curve import Rows
from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import Value, Values

_EXT_GAIN_MAX = 32.0  # LLAMA_ROPE_LAYER_EXT_GAIN_MAX of the patch
MAX_SCALE = 1024
_DYNAMIC = {"dynamic": "none", "dynamic-yarn": "yarn"}  # and the type that a file has beside the dynamic factor
_TYPES = {"linear": "linear", "yarn": "yarn", **_DYNAMIC}
KINDS = ("none", *_TYPES)
TYPE, FACTOR, DYNAMIC = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.dynamic_factor"
ORIGINAL, CONTEXT = "rope.scaling.original_context_length", "context_length"
NAMES = (TYPE, FACTOR, ORIGINAL, CONTEXT, DYNAMIC)
"""All keys that a scaling may take, in the order in which they are written, without their architecture."""
_SECTIONS, _LOG_MULTIPLIER = "rope.dimension_sections", "rope.scaling.yarn_log_multiplier"
_MAX_CONTEXT = 1 << 31
# Facts of llama.cpp 0c1e570: who reads which key of YaRN (src/models/*.cpp), and the defaults (src/llama-hparams.h).
_YARN_KEYS = {
    "grok": ("ext_factor", "attn_factor", "beta_fast", "beta_slow"),
    "mistral3": ("beta_fast", "beta_slow"),
}
_YARN_DEFAULTS = {"ext_factor": -1.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
_GROK_BETA_FAST = 8.0
_HUGE = 1e300  # no larger integer need fit into a float
_CLOSE = 1e-6  # float32 numbers, some of them written with fewer digits

_OPTIONS = {
    **{"scaling": "rope_scaling", "freq_base": "rope_freq_base", "freq_scale": "rope_freq_scale"},
    "factor": "rope_scale",
} | {name: f"yarn_{name}" for name in ("orig_ctx", "ext_factor", "attn_factor", "beta_slow", "beta_fast")}
"""What `RopeScaling.json` says, and the option of llama.cpp for it."""


def single(value: float) -> float:
    """The float32 next to ``value``."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def shortest(value: float) -> float:
    """The float64 with the fewest decimal digits that is `value` in float32."""
    try:
        wanted = struct.pack("<f", value)
    except OverflowError:
        return value  # no float32 at all, which `write_factors` refuses
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((decimal for decimal in decimals if struct.pack("<f", decimal) == wanted), value)


def shortest_rows(rows: Rows) -> Rows:
    """`shortest` of each number."""
    return tuple(tuple(map(shortest, row)) for row in rows)


@dataclass(frozen=True)
class RopeScaling:
    """The scaling under which a model's layers rotate.

    Attributes:
        scaling: ``none``, ``linear``, ``yarn``, ``longrope``, ``dynamic`` (NTK) or ``dynamic-yarn``.
        freq_base, freq_scale: RoPE's base, and the factor of all frequencies, a float32 value; the dynamic ones have
            none of the latter.
        orig_ctx: tokens of context that the model was trained on, for YaRN, LongRoPE and the dynamic ones.
        ext_factor: share of YaRN's extrapolation; below 0: 1 with YaRN, 0 without.
        attn_factor, beta_fast, beta_slow: of YaRN.
        factor: of ``dynamic`` that of the NTK formula, of ``dynamic-yarn`` the largest one that it goes up to.
    """

    scaling: str = "linear"
    freq_base: float = 10000.0
    freq_scale: float = 1.0
    orig_ctx: int = 0
    ext_factor: float = -1.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factor: float = 1.0

    @classmethod
    def of(cls, gguf: Values, architecture: str) -> RopeScaling:
        """What a header says, with llama.cpp's defaults for what it leaves out (``llama_model::load_hparams``)."""

        def real(key: str, default: float) -> float:
            value = gguf.scalar(f"{architecture}.{key}")
            return default if value is None else float(value)

        factor = single(real(FACTOR, real("rope.scale_linear", 0.0)))
        yarn = dict(_YARN_DEFAULTS) | ({"beta_fast": _GROK_BETA_FAST} if architecture == "grok" else {})
        for name in _YARN_KEYS.get(architecture, ()):
            yarn[name] = real(f"rope.scaling.yarn_{name}", yarn[name])
        trained = gguf.integer(f"{architecture}.{CONTEXT}") or 0
        original = gguf.integer(f"{architecture}.{ORIGINAL}")
        scaling = gguf.text(f"{architecture}.{TYPE}") or "linear"
        dynamic = gguf.scalar(f"{architecture}.{DYNAMIC}")
        if dynamic is not None:
            scaling = "dynamic-yarn" if scaling == "yarn" else "dynamic"
        return cls(
            scaling=scaling,
            freq_base=real("rope.freq_base", 10000.0),
            freq_scale=1.0 if factor == 0.0 else single(1.0 / factor),
            orig_ctx=trained if original is None else original,
            factor=1.0 if dynamic is None else float(dynamic),
            **yarn,
        )

    def under(self, options: Mapping[str, Any]) -> RopeScaling:
        """The same model in a context with ``options``, by llama.cpp's names; those of no RoPE change nothing."""
        given = {name: options[option] for name, option in _OPTIONS.items() if option in options}
        if "freq_scale" in given:
            given["freq_scale"] = single(given["freq_scale"])
            given.setdefault("factor", _inverse(given["freq_scale"]))
        elif given.get("scaling") in _DYNAMIC:
            # how many times longer the file says that contexts become
            given.setdefault("factor", self.factor if self.scaling in _DYNAMIC else _inverse(self.freq_scale))
        elif "scaling" in given and self.scaling in _DYNAMIC:
            given["freq_scale"] = _inverse(self.factor)
        return replace(self, **given)

    @property
    def _ext_factor(self) -> float:
        if self.ext_factor >= 0.0:
            return self.ext_factor
        return 1.0 if self.scaling in ("yarn", "dynamic-yarn") else 0.0

    @property
    def _freq_scale(self) -> float:
        return 1.0 if self.scaling in ("none", *_DYNAMIC) else self.freq_scale

    @property
    def _freq_scales(self) -> list[float]:
        """All frequency scales that a context can come to, as far as they matter to a layer factor."""
        if self.scaling != "dynamic-yarn":
            return [self._freq_scale]
        steps = [2.0 ** (k / 2) for k in range(1, 2 * int(math.log2(MAX_FACTOR)))]
        return [single(1.0 / step) for step in (*(s for s in steps if s < self.factor), self.factor or math.inf)]

    def json(self) -> dict[str, Any]:
        """The fields that have an effect, as a JSON object: two equal objects rotate alike."""
        plain = self.scaling in ("none", "linear") and self._freq_scale == 1.0
        said: dict[str, Any] = {
            "scaling": "none" if plain else self.scaling,
            "freq_base": self.freq_base,
            "freq_scale": self._freq_scale,
        }
        if self._ext_factor:  # llama.cpp then works the magnitude out by itself
            said |= {name: getattr(self, name) for name in ("orig_ctx", "beta_fast", "beta_slow")}
        else:
            said["attn_factor"] = self.attn_factor
        if self._ext_factor or self.scaling in ("yarn", "dynamic-yarn"):
            said["ext_factor"] = self._ext_factor
        if self.scaling in ("longrope", *_DYNAMIC):
            said["orig_ctx"] = self.orig_ctx
        if self.scaling in _DYNAMIC:
            said["factor"] = self.factor
        return said

    def words(self) -> str:
        """What it is, for people."""
        scaling = str(self.json()["scaling"])
        if scaling in _DYNAMIC:
            beyond = f"up to {self.factor:.6g} times {self.orig_ctx} tokens"
            if scaling == "dynamic":
                factor = "" if self.factor == 1.0 else f", factor {self.factor:.6g}"
                beyond = f"beyond {self.orig_ctx} tokens{factor}"
            return f"dynamic {'NTK' if scaling == 'dynamic' else 'YaRN'} {beyond}; none up to {self.orig_ctx}"
        if scaling not in ("linear", "yarn") or not self._freq_scale:
            return scaling
        name = "YaRN" if scaling == "yarn" else scaling
        return f"{name} up to {1.0 / self._freq_scale:.6g} times {self.orig_ctx} tokens, at any length"

    def refusal(self, factor: float) -> str | None:
        """Why the patched library refuses a layer factor under this scaling, as a sentence's end; None: it does not.

        In float32 as there (``llama_rope_layer_check`` and ``llama_rope_layer_init``), so that both agree on any value.
        """
        s = single(factor)
        if not 1.0 / MAX_FACTOR <= s <= MAX_FACTOR:
            return f"llama.cpp accepts 1/{MAX_FACTOR} to {MAX_FACTOR}; give a factor in that range"
        if s == 1.0 or not self._ext_factor:
            return None
        for fs in self._freq_scales:
            steep = abs(single(1.0 - fs)) > single(_EXT_GAIN_MAX * abs(single(s - fs)))
            if steep or single(1.0 + single(single(0.1) * _log(single(s / fs if fs else math.inf)))) <= 0.0:
                return f"llama.cpp accepts none so close to the model's YaRN frequency scale of {fs:g}; give another"
        return None


def _inverse(value: float) -> float:
    """The float32 next to 1 over ``value``."""
    return single(1.0 / value) if value else math.inf


def _log(value: float) -> float:
    """C's ``logf``."""
    if value <= 0.0 or math.isnan(value):
        return -math.inf if value == 0.0 else math.nan
    return single(math.log(value))


def differences(wanted: object, found: RopeScaling) -> dict[str, tuple[Any, Any]]:
    """Where ``wanted``, a value read from a file that should be of `RopeScaling.json`, differs from what was found.

    Pairs of wanted and found values, by the names of llama.cpp's options for them. Senseless values are passed over.
    """
    if not isinstance(wanted, dict) or wanted.get("scaling") not in (*KINDS, "longrope"):
        return {}
    result: dict[str, tuple[Any, Any]] = {}
    if wanted["scaling"] != (own := found.json()["scaling"]):
        result["rope_scaling"] = (wanted["scaling"], own)
        found = replace(found, scaling=wanted["scaling"])  # what it implies needs no option of its own
    has = found.json()
    for name in (name for name in _OPTIONS if name != "scaling" and name in ("ext_factor", *wanted)):
        value, own = wanted.get(name, 0.0), has.get(name, max(getattr(found, name), 0.0))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE
        if is_number and not math.isclose(value, own, rel_tol=_CLOSE):
            result[_OPTIONS[name]] = (value, own)
    return result


# Writing a scaling


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
        if self.kind not in KINDS:
            raise LropeError(f"--rope-scaling {self.kind}: is unknown; give one of {', '.join(KINDS)}")
        if self.factor is not None and not (_is_number(self.factor) and 1 <= self.factor <= MAX_SCALE):
            raise LropeError(f"--rope-scale {self.factor}: is out of range; give a number from 1 to {MAX_SCALE}")
        length = self.context_length
        lengths = {"--context-length": length, "--yarn-orig-ctx": self.original}
        for option, n in lengths.items():
            if n is not None and not (isinstance(n, int) and _is_number(n) and 0 < n < _MAX_CONTEXT):
                raise LropeError(f"{option} {n}: is out of range; give a whole number of tokens from 1 to 2147483647")
        for option, value in (("--rope-scale", self.factor), *lengths.items()):
            if self.kind == "none" and value is not None:
                raise LropeError(f"{option} {value}: has no effect with --rope-scaling none; leave out one of the two")
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
    """What a scaling but `none` comes to for the model with these values. Raises `LropeError`: it cannot have it."""
    kind, factor, length = scaling.kind, scaling.factor, scaling.context_length
    trained = _length(values, f"{architecture}.{CONTEXT}", path)
    if trained is None:
        raise LropeError(f"{path}: has no {architecture}.{CONTEXT}, which every scaling needs; give a complete model")
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
        raise LropeError(f"{path}: {key} is {length}, which is not a number of tokens; the file is damaged")
    return length or None


def _check_kind(kind: str, values: Values, architecture: str, path: Path) -> None:
    """Refuse what llama.cpp could not compute, or would compute otherwise than is asked."""
    if values.text(f"{architecture}.{TYPE}") == "longrope":
        raise long_factors_error(path)
    if kind.startswith("dynamic") and values.has(f"{architecture}.{_SECTIONS}"):
        raise LropeError(f"{path}: uses M-RoPE, for which there is no dynamic scaling; use linear or yarn")
    if kind == "dynamic-yarn" and values.has(f"{architecture}.{_LOG_MULTIPLIER}"):
        raise LropeError(
            f"{path}: sets the magnitude of YaRN itself ({architecture}.{_LOG_MULTIPLIER}), which dynamic YaRN cannot "
            "follow; use yarn"
        )


def long_factors_error(path: Path) -> LropeError:
    """The refusal of a model with LongRoPE."""
    return LropeError(f"{path}: uses LongRoPE, whose factors are in the file; no other scaling can be written to it")
