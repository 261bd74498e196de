"""How far each layer's RoPE reaches, as far as a model's header tells.

Layer factors act where a layer rotates. A layer of a sliding window sees no further than its window, and some
architectures leave RoPE out of some layers; neither has a say in what stands in the middle of a long context.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrope_gguf.gguf_file import INTEGERS, GGUFFile

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
_DENSE_WITHOUT_ROPE = frozenset(("cohere2", "cohere2moe", "exaone-moe", "exaone4", "maple", "muse-glimmer"))
# recurrent layers between those of attention, in turn
_RECURRENT_BETWEEN = frozenset(("minimax-01", "qwen3next", "qwen35", "qwen35moe", "qwen4exp"))
_EVERY_FOURTH_WITHOUT_ROPE = {"afmoe": 3, "llama4": 3, "smallthinker": 0, "smollm3": 3}  # the first of them
# Architectures whose graphs never rotate: LLAMA_ROPE_TYPE_NONE in llama_model_rope_type() (llama.cpp 0c1e570,
# src/llama-model.cpp; names from src/llama-arch.cpp), and two with learned positions that it gives a rope type
# nevertheless, though src/models/bert.cpp and starcoder.cpp apply none.
_WITHOUT_ROPE = frozenset(
    (
        *("arwkv7", "bloom", "clip", "glm5-next", "gpt2", "gptj", "jais", "jamba", "jina-bert-v2", "kimi-k3"),
        *("kimi-linear", "mamba", "mamba2", "mpt", "nemotron_h", "nemotron_h_moe", "refact", "rwkv6", "rwkv6qwen2"),
        *("rwkv7", "t5", "t5encoder", "wavtokenizer-dec", "bert", "starcoder"),
    )
)
# These take rope.scaling.finetuned as a switch for RoPE (src/models/granite*.cpp).
_ROPE_SWITCH = frozenset(("granite", "granitehybrid", "graniteswitch"))


def has_rope(gguf: GGUFFile, architecture: str, block_count: int | None) -> bool:
    """Return whether anything rotates; an architecture that is not known here counts as one that does."""
    switched_off = architecture in _ROPE_SWITCH and gguf.scalar(f"{architecture}.rope.scaling.finetuned") is False
    # src/models/baichuan.cpp: only the model of 32 layers has RoPE, the larger one has ALiBi
    alibi = architecture == "baichuan" and block_count != 32
    without = gguf.integer(f"{architecture}.rope.dimension_count") == 0
    return not (architecture in _WITHOUT_ROPE or switched_off or alibi or without)


def rope_reach(gguf: GGUFFile, architecture: str, n_layer: int) -> tuple[int | None, ...]:
    """Return for each layer how many tokens its rotation reaches: 0 where it has none, None where there is no limit.

    An architecture that is not known here counts as one that rotates everywhere.
    """

    def number(key: str, default: int = 0) -> int:
        value = gguf.integer(f"{architecture}.{key}")
        return default if value is None else value

    def flags(key: str) -> tuple[int, ...] | None:
        return gguf.integers(f"{architecture}.{key}", n_layer, (*INTEGERS, _BOOL))

    if not has_rope(gguf, architecture, n_layer):
        return (0,) * n_layer
    window = number("attention.sliding_window", _DEFAULT_WINDOWS.get(architecture, 0))
    if architecture == "exaone4" and n_layer != 64:
        window = 0
    windowed = _windowed(gguf, architecture, n_layer) if window else [False] * n_layer
    rotating = [True] * n_layer
    fourth = _EVERY_FOURTH_WITHOUT_ROPE.get(architecture)
    if fourth is not None and (window or architecture in ("afmoe", "smollm3")):
        rotating = [layer % 4 != fourth for layer in range(n_layer)]
    elif architecture in _DENSE_WITHOUT_ROPE and window:
        rotating = list(windowed)
    elif architecture == "granite_swa":
        rotating = [bool(flag) for flag in flags("attention.rope_pattern") or rotating]
    if architecture in _RECURRENT_BETWEEN:
        recurrent = flags("attention.recurrent_layers")
        every = number("full_attention_interval", 8 if architecture == "minimax-01" else 4)
        if recurrent is not None:
            rotating = [not flag for flag in recurrent]
        elif every:
            rotating = [(layer + 1) % every == 0 for layer in range(n_layer)]
    kv_heads = gguf.integers(f"{architecture}.attention.head_count_kv", n_layer)
    if kv_heads is not None:  # a layer without keys is recurrent
        rotating = [rotates and heads > 0 for rotates, heads in zip(rotating, kv_heads, strict=True)]
    return tuple(
        0 if not rotates else window if local else None for rotates, local in zip(rotating, windowed, strict=True)
    )


def _windowed(gguf: GGUFFile, architecture: str, n_layer: int) -> Sequence[bool]:
    key = f"{architecture}.attention.sliding_window_pattern"
    flags = gguf.integers(key, n_layer, (*INTEGERS, _BOOL))
    if flags is not None:
        return [bool(flag) for flag in flags]
    period, dense_first = _PERIODS.get(architecture, (1, False))
    period = gguf.integer(key) or period
    dense = 0 if dense_first else period - 1
    return [layer % period != dense for layer in range(n_layer)]
