"""What a header tells of a model's rotations: whether there are any, and which layers have a sliding window.

Only for what must work without llama.cpp. A search asks the library, which walks its graph (``llama_rope_layers``). A
layer with a sliding window sees no further than that, so its factor cannot reach the middle of a long context. A factor
of a layer without RoPE changes nothing, so such layers need not be known here.
"""

from __future__ import annotations

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


def windows(gguf: GGUFFile, architecture: str, n_layer: int) -> tuple[int | None, ...]:
    """Return each layer's sliding window in tokens; None: it sees all, as where neither file nor architecture tells."""
    window = gguf.integer(f"{architecture}.attention.sliding_window")
    if window is None:
        window = _DEFAULT_WINDOWS.get(architecture, 0)
    if not window or (architecture == "exaone4" and n_layer != 64):
        return (None,) * n_layer
    key = f"{architecture}.attention.sliding_window_pattern"
    flags = gguf.integers(key, n_layer, (*INTEGERS, _BOOL))
    if flags is None:
        period, dense_first = _PERIODS.get(architecture, (1, False))
        period = gguf.integer(key) or period
        dense = 0 if dense_first else period - 1
        flags = tuple(layer % period != dense for layer in range(n_layer))
    return tuple(window if local else None for local in flags)
