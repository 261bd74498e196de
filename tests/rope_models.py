"""Tiny random models, each as a GGUF file (written by the `gguf` package) and as the configuration of its reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from rope_reference import Config, Rope

N_VOCAB, N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, N_LAYER = 96, 64, 4, 2, 16, 64, 6
WINDOW = 12


@dataclass(frozen=True)
class TinyModel:
    """One kind of model: its name in the tests, architecture, reference, and extra metadata."""

    name: str
    arch: str
    config: Config
    metadata: tuple[tuple[str, str | float | int], ...] = ()

    def weights(self) -> dict[str, NDArray[np.float32]]:
        rng = np.random.default_rng(20260923)
        c = self.config
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (c.n_vocab, c.n_embd),
            "output_norm.weight": (c.n_embd,),
        }
        if not c.gemma:
            shapes["output.weight"] = (c.n_vocab, c.n_embd)
        for il in range(c.n_layer):
            b = f"blk.{il}."
            for name, heads in (("q", c.n_head), ("k", c.n_head_kv), ("v", c.n_head_kv)):
                shapes[f"{b}attn_{name}.weight"] = (heads * c.head_dim, c.n_embd)
                if self.arch == "qwen2":
                    shapes[f"{b}attn_{name}.bias"] = (heads * c.head_dim,)
            shapes[f"{b}attn_output.weight"] = (c.n_embd, c.n_head * c.head_dim)
            shapes[f"{b}attn_norm.weight"] = shapes[f"{b}ffn_norm.weight"] = (c.n_embd,)
            shapes[f"{b}ffn_gate.weight"] = shapes[f"{b}ffn_up.weight"] = (c.n_ff, c.n_embd)
            shapes[f"{b}ffn_down.weight"] = (c.n_embd, c.n_ff)
            if c.gemma:
                shapes[f"{b}attn_q_norm.weight"] = shapes[f"{b}attn_k_norm.weight"] = (c.head_dim,)
                shapes[f"{b}post_attention_norm.weight"] = shapes[f"{b}post_ffw_norm.weight"] = (c.n_embd,)
        result = {}
        for name, shape in shapes.items():
            if "norm" in name:
                value = 1.0 + 0.1 * rng.standard_normal(shape)
                if "post_ffw" in name:
                    # float16 GELU of ggml's CPU backend: a value at a rounding boundary may fall either side
                    value *= 0.03
            elif name.startswith("token_embd"):
                value = rng.standard_normal(shape) / (np.sqrt(c.n_embd) if c.gemma else 1.0)
            else:
                # attention scores of a few units: what stands where must matter
                gain = 1.8 if ".attn_q." in name or ".attn_k." in name else 1.0
                value = gain * rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4.0)
            result[name] = value.astype(np.float32)
        return result

    def write(self, path: Path, factors: list[float] | None = None) -> Path:
        c = self.config
        writer = gguf.GGUFWriter(path, self.arch)
        writer.add_block_count(c.n_layer)
        writer.add_context_length(4096)
        writer.add_embedding_length(c.n_embd)
        writer.add_feed_forward_length(c.n_ff)
        writer.add_head_count(c.n_head)
        add_attention(writer, c)
        writer.add_vocab_size(c.n_vocab)
        writer.add_tokenizer_model("no_vocab")
        for key, value in self.metadata:
            full = f"{self.arch}.{key}"
            if isinstance(value, str):
                writer.add_string(full, value)
            elif isinstance(value, int):
                writer.add_uint32(full, value)
            else:
                writer.add_float32(full, value)
        if factors is not None:
            writer.add_array(f"{self.arch}.rope.scaling.layer_factors", [float(f) for f in factors])
        for name, value in self.weights().items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def add_attention(writer: gguf.GGUFWriter, c: Config) -> None:
    """Add the keys of grouped-query attention with RoPE and RMSNorm, which all these architectures share."""
    writer.add_head_count_kv(c.n_head_kv)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_freq_base(c.ropes[-1].base)


def _config(*ropes: Rope, windows: tuple[int | None, ...] | None = None, gemma: bool = False) -> Config:
    return Config(
        N_VOCAB, N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, ropes, windows or (None,) * len(ropes), gemma=gemma
    )


_PLAIN = Rope(HEAD_DIM)
# llama.cpp cancels YaRN's own magnitude and applies get_mscale(factor) = 1 + 0.1 ln(factor) once: attn_factor 1
_YARN = replace(_PLAIN, freq_scale=0.25, ext_factor=1.0, n_ctx_orig=64)
_YARN_METADATA = (
    ("rope.scaling.type", "yarn"),
    ("rope.scaling.factor", 4.0),
    ("rope.scaling.original_context_length", 64),
)

LLAMA = TinyModel("llama", "llama", _config(*[_PLAIN] * N_LAYER))
QWEN2 = TinyModel("qwen2", "qwen2", _config(*[replace(_PLAIN, neox=True, base=1e6)] * N_LAYER))
LINEAR = TinyModel(
    "llama-linear",
    "llama",
    _config(*[replace(_PLAIN, freq_scale=0.5)] * N_LAYER),
    (("rope.scaling.type", "linear"), ("rope.scaling.factor", 2.0)),
)
# every sixth layer is global with the base of the file, the others see a window and have a base of their own
GEMMA3 = TinyModel(
    "gemma3",
    "gemma3",
    _config(
        *(replace(_PLAIN, neox=True, base=1e6 if il % 6 == 5 else 10000.0) for il in range(N_LAYER)),
        windows=tuple(None if il % 6 == 5 else WINDOW for il in range(N_LAYER)),
        gemma=True,
    ),
    (("attention.sliding_window", WINDOW),),
)
YARN = TinyModel("llama-yarn", "llama", _config(*[_YARN] * N_LAYER), _YARN_METADATA)
# magnitude exactly 1: llama.cpp's context shift multiplies every key by the magnitude once more, so that only
# such a model can be shifted without damage
YARN_UNIT = TinyModel(
    "qwen2-yarn-unit",
    "qwen2",
    _config(*[replace(_YARN, neox=True, attn_factor=1.0 / (1.0 + 0.1 * np.log(4.0)))] * N_LAYER),
    (*_YARN_METADATA, ("rope.scaling.attn_factor", float(1.0 / (1.0 + 0.1 * np.log(4.0))))),
)

MODELS = (LLAMA, QWEN2, LINEAR, GEMMA3, YARN, YARN_UNIT)
SHIFTABLE = tuple(m for m in MODELS if abs(m.config.ropes[0].magnitude - 1.0) < 1e-6)
FACTORS = [1.0, 1.3, 0.8, 2.5, 1.07, 3.1]
