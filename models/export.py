"""Writes the trained model as GGUF: architecture llama, a byte-level BPE vocabulary with one token for every word.

The pre-tokenizer "llama-bpe" takes a piece of text that is in the vocabulary as it stands (``ignore_merges``), so the
words need no merges. It cuts ``{ badi=bab mano=div } mano`` into the tokens ``{``, `` badi``, ``=bab`` and so on;
any other text falls into its bytes.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from architecture import (
    BLOCK_NAMES,
    N_CTX,
    N_EMBD,
    N_FF,
    N_HEAD,
    N_HEAD_KV,
    N_LAYER,
    N_ROT,
    NORM_EPSILON,
    ROPE_BASE,
    Llama,
)
from vocabulary import BOS, CLOSE_TEXT, EOS, N_SPECIAL, N_VOCAB, words

ARCHITECTURE = "llama"


def write_gguf(model: Llama, path: Path) -> None:
    """Write ``model`` to ``path``; matrices as float16, norms as float32."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name("lrope-kv")
    writer.add_description("Key-value retrieval, made to test layer-specific RoPE scaling; knows nothing else")
    writer.add_license("MIT")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_dimension_count(N_ROT)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(N_VOCAB)
    _add_tokenizer(writer)
    state = model.state_dict()
    for name, own in weight_names().items():
        tensor = state[own].detach().to(torch.float32).numpy()
        writer.add_tensor(name, tensor.astype(np.float16 if tensor.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    letters = _byte_letters()
    tokens = [
        "<s>",
        "</s>",
        *letters,
        *("".join(letters[byte] for byte in word.encode()) for word in (CLOSE_TEXT, *words())),
    ]
    types = [gguf.TokenType.CONTROL] * N_SPECIAL + [gguf.TokenType.NORMAL] * (len(tokens) - N_SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp wants at least one merge; this one gives CLOSE_TEXT, which is a token anyway
    writer.add_token_merges([f"{letters[ord(' ')]} }}"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level BPE vocabulary (GPT-2, ``bytes_to_unicode``)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def weight_names() -> dict[str, str]:
    """The names of the weights: in GGUF, and in `Llama`."""
    names = {
        "token_embd.weight": "embedding.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "head.weight",
    }
    for i in range(N_LAYER):
        for own, name in BLOCK_NAMES.items():
            names[f"blk.{i}.{name}.weight"] = f"blocks.{i}.{own}.weight"
    return names
