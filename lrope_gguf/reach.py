"""How far each layer's RoPE reaches, as far as a model's header tells.

Layer factors act where a layer rotates. A layer of a sliding window sees no further than its window, and some
architectures leave RoPE out of some layers; neither has a say in what stands in the middle of a long context.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrope_gguf.gguf_scan import INTEGERS, GGUFFile

_BOOL = 7  # GGUF_TYPE_BOOL, gguf.h

# Facts of src/models/*.cpp, llama.cpp 0c1e570. A period p has p - 1 windowed layers and then a dense one, or the dense
# one first; a file's own key of the pattern goes before it.
_PERIODS = {
    "afmoe": (4, False), "cohere2": (4, False), "cohere2moe": (4, True), "exaone-moe": (4, False),
    "exaone4": (4, False), "gemma-embedding": (6, False), "gemma2": (2, False), "gemma3": (6, False),
    "gemma3n": (5, False), "gpt-oss": (2, False), "laguna": (4, True), "llama4": (4, False), "mellum": (4, False),
    "modern-bert": (3, True), "muse-glimmer": (4, False), "olmo2": (4, False), "plamo3": (8, False),
    "smallthinker": (4, True),
}  # fmt: skip
_DEFAULT_WINDOWS = {"gemma2": 4096, "exaone-moe": 128, "llama4": 8192}  # where the file names none
# dense layers of these do not rotate, where there are windowed ones
_DENSE_WITHOUT_ROPE = frozenset(("afmoe", "cohere2", "cohere2moe", "exaone4", "llama4", "muse-glimmer", "smallthinker"))
_NO_ROPE_STEPS = {"smollm3": 4}  # every so many layers one does not rotate


def rope_reach(gguf: GGUFFile, architecture: str, n_layer: int) -> tuple[int | None, ...]:
    """Return for each layer how many tokens its rotation reaches: 0 where it has none, None where there is no limit.

    An architecture that is not known here counts as one that rotates everywhere.
    """

    def number(key: str, default: int = 0) -> int:
        value = gguf.integer(f"{architecture}.{key}")
        return default if value is None else value

    window = number("attention.sliding_window", _DEFAULT_WINDOWS.get(architecture, 0))
    if architecture == "exaone4" and n_layer != 64:
        window = 0
    windowed = _windowed(gguf, architecture, n_layer) if window else [False] * n_layer
    kv_heads = gguf.integers(f"{architecture}.attention.head_count_kv", n_layer)
    every, step = number("full_attention_interval"), _NO_ROPE_STEPS.get(architecture, 0)
    reach: list[int | None] = []
    for layer in range(n_layer):
        recurrent = (every > 0 and (layer + 1) % every > 0) or (kv_heads is not None and kv_heads[layer] == 0)
        if recurrent or (step and (layer + 1) % step == 0):
            reach.append(0)
        elif windowed[layer]:
            reach.append(window)
        else:
            reach.append(0 if window and architecture in _DENSE_WITHOUT_ROPE else None)
    return tuple(reach)


def _windowed(gguf: GGUFFile, architecture: str, n_layer: int) -> Sequence[bool]:
    key = f"{architecture}.attention.sliding_window_pattern"
    flags = gguf.integers(key, n_layer, (*INTEGERS, _BOOL))
    if flags is not None:
        return [bool(flag) for flag in flags]
    period, dense_first = _PERIODS.get(architecture, (1, False))
    period = gguf.integer(key) or period
    dense = 0 if dense_first else period - 1
    return [layer % period != dense for layer in range(n_layer)]
