"""The settings of a model: which file, and how llama.cpp runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lrope_gguf.rope_scaling import KINDS, MAX_FACTOR

from ..settings import SettingError, Settings, setting

_SET_BY_DYNAMIC = ("rope_freq_base", "yarn_ext_factor", "yarn_attn_factor")
CACHE_TYPES: Mapping[str, int] = MappingProxyType(
    {"f16": 1, "f32": 0, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "iq4_nl": 20, "q5_0": 6, "q5_1": 7}
)
"""What ``--cache-type-k`` and ``-v`` of llama.cpp take (enum ggml_type, ggml.h); the first is the default."""
FLOAT_TYPES = ("f16", "f32", "bf16")
"""Those that are not quantized."""
_UNSET: Mapping[str, float] = MappingProxyType(
    {
        "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_orig_ctx": 0, "yarn_ext_factor": -1.0,
        "yarn_attn_factor": -1.0, "yarn_beta_slow": -1.0, "yarn_beta_fast": -1.0,
    }
)  # fmt: skip
"""Numbers that say to llama.cpp what None says here: as the model has it (``llama_context_default_params``)."""
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class ModelConfig(Settings):
    """A model and how it is run; names and values of what begins with rope, yarn or cache are llama.cpp's own.

    Raises `LropeError`: a value out of range, or two that conflict.

    Args:
        path: GGUF file; of a split model the first shard.
    """

    path: str
    n_threads: int | None = setting(
        None, "CPU threads of all workers together", key="threads", metavar="N", least=1,
        unset="the number that is fastest on this machine now", option=True,
    )  # fmt: skip
    n_gpu_layers: int | None = setting(
        None, "layers to keep on the GPU", metavar="N", unset="all that fit", option=True
    )
    batch_size: int | None = setting(
        None, "tokens that llama.cpp computes at once", metavar="N", least=1,
        unset="what a study was begun with, else 512 on the CPU and 2048 where layers go to a GPU",
    )  # fmt: skip
    chat_template: bool = setting(True, "put prompts into the model's own chat template, if it has one")
    verbose: bool = setting(False, "show llama.cpp's log")
    rope_scaling: str | None = setting(None, "RoPE scaling", choices=KINDS, unset="the model's")
    rope_scale: float | None = setting(
        None, "factor by which contexts become longer; give this or rope_freq_scale", metavar="N", unset="the model's"
    )
    rope_freq_base: float | None = setting(None, "RoPE's base", metavar="N", unset="the model's")
    rope_freq_scale: float | None = setting(
        None, "factor of RoPE's frequencies, 1 over rope_scale", metavar="N", unset="the model's"
    )
    yarn_orig_ctx: int | None = setting(
        None, "tokens of context that the model was trained on", metavar="N", unset="the model's"
    )
    yarn_ext_factor: float | None = setting(None, "YaRN's share of extrapolation", metavar="N", unset="1 with YaRN")
    yarn_attn_factor: float | None = setting(None, "YaRN's magnitude", metavar="N", unset="the model's")
    yarn_beta_slow: float | None = setting(None, "YaRN's high correction dimension", metavar="N", unset="the model's")
    yarn_beta_fast: float | None = setting(None, "YaRN's low correction dimension", metavar="N", unset="the model's")
    cache_type_k: str = setting("f16", "type of the cached keys", choices=tuple(CACHE_TYPES))
    cache_type_v: str = setting(
        "f16", "type of the cached values; quantized ones turn flash attention on", choices=tuple(CACHE_TYPES)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        super().__post_init__()

    def check(self) -> None:
        """Refuse values that llama.cpp would refuse or ignore."""
        for name in ("rope_scale", *_UNSET):
            self._check_number(name)
        if self.rope_scale is not None and self.rope_freq_scale is not None:
            raise self.wrong("both say how far to scale; leave out one of them", "rope_scale", "rope_freq_scale")
        for name in ("rope_scale", "rope_freq_scale"):
            if self.rope_scaling == "none" and getattr(self, name) is not None:
                reason = "has no effect with rope_scaling none; leave out one of them"
                raise SettingError((name, "rope_scaling"), name, reason)
        if self.rope_scaling is not None and self.rope_scaling.startswith("dynamic"):
            self._check_dynamic(self.rope_scaling)

    def _check_dynamic(self, scaling: str) -> None:
        """Refuse what the library would refuse (``llama_rope_dynamic_init`` of the patch)."""
        for name in _SET_BY_DYNAMIC:
            if getattr(self, name) != _UNSET[name] and getattr(self, name) is not None:
                reason = f"rope_scaling {scaling} sets it by itself; leave out one of them"
                raise SettingError((name, "rope_scaling"), name, reason)
        factors = {"rope_scale": self.rope_scale or 1.0, "rope_freq_scale": 1.0 / (self.rope_freq_scale or 1.0)}
        for name, factor in factors.items():
            if not 1.0 <= factor <= MAX_FACTOR:
                raise self.wrong(f"rope_scaling {scaling} needs a factor from 1 to {MAX_FACTOR}", name)

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or value == _UNSET.get(name):
            return
        if name == "yarn_orig_ctx":
            right = 0 < value < 1 << 31
        else:
            least = 0.0 if name.startswith("yarn") else 1.0 / _FLOAT32_MAX
            right = least <= value <= _FLOAT32_MAX
        if not right:
            above = "at least 0" if name.startswith("yarn") and name != "yarn_orig_ctx" else "above 0"
            raise self.wrong(f"out of range; give a number {above}, or leave it out", name)

    def llama_options(self) -> dict[str, Any]:
        """Return llama.cpp's options unlike its defaults, by its names; ``rope_scale`` becomes ``rope_freq_scale``."""
        scale = self.rope_freq_scale if self.rope_scale is None else 1.0 / self.rope_scale
        values = {name: scale if name == "rope_freq_scale" else getattr(self, name) for name in _UNSET}
        options: dict[str, Any] = {} if self.rope_scaling is None else {"rope_scaling": self.rope_scaling}
        options |= {name: value for name, value in values.items() if value not in (None, _UNSET[name])}
        types = {name: getattr(self, name) for name in ("cache_type_k", "cache_type_v")}
        return options | {name: kind for name, kind in types.items() if kind != next(iter(CACHE_TYPES))}
