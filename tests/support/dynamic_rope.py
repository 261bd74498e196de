"""Float64 NumPy reference of dynamic RoPE scaling, written from the papers and docs/dynamic.md, not from the patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from support.llama_direct import Context
from support.rope_models import TinyModel
from support.rope_reference import Array, Factors, Rope

NTK, DYNAMIC_YARN = 4, 5  # of enum llama_rope_scaling_type


@dataclass(frozen=True)
class Scaling:
    """Dynamic scaling: none while ``n <= n_train``, then what the next of a few lengths needs.

    Lengths are ``n_train * 2 ** (level / per_octave)``. NTK-aware scaling raises the base, by the formula of
    dynamic NTK in Hugging Face's ``modeling_rope_utils``; YaRN (arXiv 2309.00071) has the factor ``n / n_train``,
    at most ``factor``
    where that is above 1.
    """

    n_train: int
    yarn: bool = False
    factor: float = 1.0
    per_octave: int = 2

    def level(self, position: int) -> int:
        n = position + 1
        return 0 if n <= self.n_train else int(np.ceil(self.per_octave * np.log2(n / self.n_train) - 1e-9))

    def rope(self, rope: Rope, level: int) -> Rope:
        """The rotation of a layer that has ``rope`` without scaling."""
        ratio = 2.0 ** (level / self.per_octave)
        if level == 0:
            return rope
        if self.yarn:
            factor = min(ratio, self.factor) if self.factor > 1.0 else ratio
            return replace(rope, freq_scale=1.0 / factor, ext_factor=1.0, n_ctx_orig=self.n_train)
        grown = self.factor * ratio - (self.factor - 1.0)
        return replace(rope, base=rope.base * grown ** (rope.n_rot / (rope.n_rot - 2.0)))

    def parts(self, first: int, n: int) -> Iterator[tuple[int, int, int]]:
        """``n`` tokens from position ``first`` as (start, stop, level), cut where the level changes."""
        start = 0
        for i in range(1, n + 1):
            if i == n or self.level(first + i) != self.level(first + start):
                yield start, i, self.level(first + start)
                start = i

    def parameters(self) -> dict[str, Any]:
        return {
            "rope_scaling_type": DYNAMIC_YARN if self.yarn else NTK,
            "rope_freq_scale": 1.0 / self.factor if self.factor != 1.0 else 0.0,
            "yarn_orig_ctx": self.n_train,
        }


class DynamicReference:
    """The reference with a scaling that moves: keys are rotated anew whenever they are looked at."""

    def __init__(self, model: TinyModel, scaling: Scaling, factors: Factors | None = None) -> None:
        self.reference = model.reference(factors)
        self.scaling = scaling
        self._stock = model.config

    def decode(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits, shape (tokens, n_vocab)."""
        cached = self.reference.positions
        first = int(cached[:, 0].max()) + 1 if len(cached) else 0
        logits = []
        for start, stop, level in self.scaling.parts(first, len(tokens)):
            self._set(level)
            logits.append(self.reference.decode(tokens[start:stop]))
        return np.concatenate(logits)

    def _set(self, level: int) -> None:
        # what sees a window never sees far
        pairs = zip(self._stock.ropes, self._stock.windows, strict=True)
        ropes = tuple(self.scaling.rope(rope, level) if window is None else rope for rope, window in pairs)
        self.reference.config = replace(self._stock, ropes=ropes)


def level_of(context: Context) -> int:
    return int(context.lib._lib.llama_rope_dynamic_level(context.context))


def rope_n_ctx(context: Context) -> int:
    """The longest sequence that the rotations of a context are for."""
    return int(context.lib._lib.llama_rope_n_ctx(context.context))
