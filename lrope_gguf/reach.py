"""Whether a model rotates anything, as far as its header tells: layer factors act where a layer rotates.

Which layers do, llama.cpp itself says of a loaded model (``llama_rope_layers``).
"""

from __future__ import annotations

from lrope_gguf.gguf_scan import GGUFFile

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
