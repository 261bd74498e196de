"""What a header tells of attention heads: their numbers, and whether KV heads can have factors of their own."""

from __future__ import annotations

from lrope_gguf.gguf_file import ARRAY, GGUFFile

_MAX_HEADS = 1 << 17  # of all layers; a curve file could not list more
# Keys of latent attention (src/models/*.cpp, llama.cpp 0c1e570): all heads share one rotated part of the key.
_MLA = ("attention.kv_lora_rank", "attention.key_length_mla")


def head_counts(gguf: GGUFFile, architecture: str, n_layer: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The numbers of heads and of KV heads of `n_layer` layers; None where the header does not tell them.

    As llama.cpp takes them (`llama_model_base::load_hparams`): one number for all layers, or an array with one for
    each, whether a layer attends or not; as many KV heads as heads where nothing is said of them.
    """
    n_head = _counts(gguf, f"{architecture}.attention.head_count", n_layer)
    key = f"{architecture}.attention.head_count_kv"
    n_head_kv = _counts(gguf, key, n_layer) if gguf.has(key) else n_head
    return None if n_head is None or n_head_kv is None else (n_head, n_head_kv)


def _counts(gguf: GGUFFile, key: str, n_layer: int) -> tuple[int, ...] | None:
    entry = gguf.entries.get(key)
    if entry is not None and entry.kind == ARRAY:
        counts = gguf.integers(key, n_layer) if entry.length == n_layer else None
    else:
        number = gguf.integer(key)
        counts = None if number is None else (number,) * n_layer
    return None if counts is None or min(counts, default=-1) < 0 or sum(counts) > _MAX_HEADS else counts


def without_head_factors(gguf: GGUFFile, architecture: str) -> str | None:
    """Why KV heads can have no factors of their own, as a sentence's end; None: they can."""
    if gguf.has(f"{architecture}.rope.dimension_sections"):
        return "uses M-RoPE, for which there are no factors of heads; give factors of layers or query scales"
    if any(gguf.has(f"{architecture}.{key}") for key in _MLA):
        return "uses MLA, whose heads share one rotated key; give factors of layers or query scales"
    return None
