"""Tiny random models that can read: the weights of `rope_models` with a small byte-pair tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from support.gguf_fixtures import finish
from support.rope_models import LLAMA, TinyModel, add_attention, add_metadata

# printable ASCII and newline in the byte alphabet of GPT-2, where a blank is Ġ and a newline Ċ
_CHARACTERS = ["Ċ", "Ġ", *map(chr, range(33, 127))]
MERGES = ['" a', 'Ġ "', "e r"]
TOKENS = [*_CHARACTERS, *(merge.replace(" ", "") for merge in MERGES), "<s>", "</s>", "<user>"]
BOS, EOS, USER = (TOKENS.index(token) for token in ("<s>", "</s>", "<user>"))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m.content }}\n{% endfor %}"
    "{% if strftime_now is defined %}{{ strftime_now('%Y') }}\n{% endif %}A:"
)


def readable(model: TinyModel) -> TinyModel:
    return replace(model, config=replace(model.config, n_vocab=len(TOKENS)))


def write_readable(
    path: Path, model: TinyModel = LLAMA, *, context_length: int = 4096, chat_template: str | None = None,
    factors: list[float] | None = None, poison: str | None = None, add_eos: bool = False, n_head_layers: int = 0,
) -> Path:  # fmt: skip
    """Write ``model`` with a tokenizer; the tensor named ``poison`` is full of NaN.

    ``n_head_layers`` are counted besides, as those of a multi-token-prediction head that the file does not hold.
    """
    model = readable(model)
    weights = model.weights()
    if poison is not None:
        weights[poison] = np.full_like(weights[poison], np.nan)
    c = model.config
    writer = _writer(path, model.arch, c.n_layer + n_head_layers, c.n_embd, c.n_ff, c.n_head, context_length)
    if n_head_layers:
        writer.add_nextn_predict_layers(n_head_layers)
    add_attention(writer, c)
    add_metadata(writer, model)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    if add_eos:
        writer.add_add_eos_token(True)
    if factors is not None:
        writer.add_array(f"{model.arch}.rope.scaling.layer_factors", factors)
    return finish(writer, weights)


def write_without_rope(path: Path) -> Path:
    """Write an MPT model: its attention has linear biases (ALiBi) instead of RoPE."""
    n_embd, n_ff = 32, 64
    writer = _writer(path, "mpt", 1, n_embd, n_ff, 4, 256)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    shapes = {
        "token_embd.weight": (len(TOKENS), n_embd), "output_norm.weight": (n_embd,),
        "blk.0.attn_norm.weight": (n_embd,), "blk.0.attn_qkv.weight": (3 * n_embd, n_embd),
        "blk.0.attn_output.weight": (n_embd, n_embd), "blk.0.ffn_norm.weight": (n_embd,),
        "blk.0.ffn_up.weight": (n_ff, n_embd), "blk.0.ffn_down.weight": (n_embd, n_ff),
    }  # fmt: skip
    return finish(writer, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})


def _writer(path: Path, arch: str, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_ctx: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # splits so that a quote and the letters after it may merge
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if i >= BOS else gguf.TokenType.NORMAL for i in range(len(TOKENS))])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    return writer
