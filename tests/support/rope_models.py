"""Tiny random models, each as a GGUF file (written by the `gguf` package) and as the configuration of its reference."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import ArrayLike, NDArray

from support.gguf_fixtures import add_key, finish
from support.rope_reference import Array, Config, Factors, Reference, Rope

Weights = dict[str, NDArray[np.float32]]

N_VOCAB, N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, N_LAYER = 96, 64, 4, 2, 16, 64, 6
WINDOW = 12
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, N_VOCAB, 150)]
FACTORS = [1.0, 1.3, 0.8, 2.5, 1.07, 3.1]
# of KV heads: two layers have heads that agree
HEAD_FACTORS = ((1.0, 1.3), (0.8, 2.5), (1.5, 1.5), (3.1, 0.6), (1.0, 1.0), (1.07, 0.93))

# how the architectures differ in their tensors
_BIASES = ("qwen2", "qwen2vl")
_QK_NORMS = ("gemma3", "qwen3", "qwen3vl")
_FUSED = ("phi3", "neo-bert")
_NO_OUTPUT = ("gemma3", "eurobert", "neo-bert")


@dataclass(frozen=True, eq=False)
class TinyModel:
    """One kind of model: its name in the tests, architecture, reference, extra metadata and tensors.

    ``n_ctx`` is the context size that the reference describes: LongRoPE chooses its divisors by it.
    """

    name: str
    arch: str
    config: Config
    metadata: tuple[tuple[str, Any], ...] = ()
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    n_ctx: int = 512
    # attention scores of a few units: what stands where must matter
    gain: float = 1.8

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values, and the two halves of the feed-forward network, share a matrix."""
        return self.arch in _FUSED

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        norm = "enc.output_norm.weight" if self.arch == "neo-bert" else "output_norm.weight"
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (c.n_vocab, c.n_embd), norm: (c.n_embd,)}
        if self.arch not in _NO_OUTPUT:
            shapes["output.weight"] = (c.n_vocab, c.n_embd)
        for il in range(c.n_layer):
            b = f"blk.{il}."
            if self.fused:
                shapes[f"{b}attn_qkv.weight"] = ((c.n_head + 2 * c.n_head_kv) * c.head_dim, c.n_embd)
            for name, heads in () if self.fused else (("q", c.n_head), ("k", c.n_head_kv), ("v", c.n_head_kv)):
                shapes[f"{b}attn_{name}.weight"] = (heads * c.head_dim, c.n_embd)
                if self.arch in _BIASES:
                    shapes[f"{b}attn_{name}.bias"] = (heads * c.head_dim,)
            shapes[f"{b}attn_output.weight"] = (c.n_embd, c.n_head * c.head_dim)
            shapes[f"{b}attn_norm.weight"] = shapes[f"{b}ffn_norm.weight"] = (c.n_embd,)
            shapes[f"{b}ffn_up.weight"] = ((2 if self.fused else 1) * c.n_ff, c.n_embd)
            if not self.fused:
                shapes[f"{b}ffn_gate.weight"] = (c.n_ff, c.n_embd)
            shapes[f"{b}ffn_down.weight"] = (c.n_embd, c.n_ff)
            if self.arch in _QK_NORMS:
                shapes[f"{b}attn_q_norm.weight"] = shapes[f"{b}attn_k_norm.weight"] = (c.head_dim,)
            if c.gemma:
                shapes[f"{b}post_attention_norm.weight"] = shapes[f"{b}post_ffw_norm.weight"] = (c.n_embd,)
        return shapes

    def weights(self) -> Weights:
        rng = np.random.default_rng(20260923)
        c = self.config
        result = {}
        for name, shape in self._shapes().items():
            if "norm" in name:
                value = 1.0 + 0.1 * rng.standard_normal(shape)
                if "post_ffw" in name:
                    # float16 GELU of ggml's CPU backend: a value at a rounding boundary may fall either side
                    value *= 0.03
            elif name.startswith("token_embd"):
                value = rng.standard_normal(shape) / (np.sqrt(c.n_embd) if c.gemma else 1.0)
            else:
                gain = self.gain if any(f".attn_{part}." in name for part in ("q", "k", "qkv")) else 1.0
                value = gain * rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4.0)
            result[name] = value.astype(np.float32)
        return result | self.tensors

    def reference(self, factors: Factors | None = None, scales: ArrayLike | None = None) -> Reference:
        return Reference(self.config, self.weights(), factors, scales)

    def write(self, path: Path, factors: list[float] | None = None, weights: Weights | None = None) -> Path:
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
        add_metadata(writer, self)
        if factors is not None:
            writer.add_array(f"{self.arch}.rope.scaling.layer_factors", [float(f) for f in factors])
        return finish(writer, self.weights() if weights is None else weights)


def add_attention(writer: gguf.GGUFWriter, c: Config) -> None:
    """Add the keys of grouped-query attention with RoPE and RMSNorm, which all these architectures share."""
    writer.add_head_count_kv(c.n_head_kv)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.ropes[0].n_rot)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_freq_base(c.ropes[-1].base)


def add_metadata(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    for key, value in model.metadata:
        add_key(writer, f"{model.arch}.{key}", value)


_folder = tempfile.TemporaryDirectory(prefix="rope-models-")


def file_of(model: TinyModel, factors: list[float] | None = None) -> Path:
    path = Path(_folder.name, f"{model.name}{'' if factors is None else '-' + '-'.join(map(str, factors))}.gguf")
    return path if path.exists() else model.write(path, factors)


def expected(model: TinyModel, factors: Sequence[float] | None = None) -> Array:
    """The reference's logits for `TOKENS`; those of a prefix are a prefix of them."""
    return _expected(model, tuple(factors or [1.0] * model.config.n_layer))


@cache
def _expected(model: TinyModel, factors: tuple[float, ...]) -> Array:
    return model.reference(factors).decode(TOKENS)


def by_name(model: TinyModel) -> str:
    return model.name


def _config(*ropes: Rope, windows: tuple[int | None, ...] | None = None, **other: bool) -> Config:
    return Config(N_VOCAB, N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, ropes, windows or (None,) * len(ropes), **other)


_NORMAL = Rope(HEAD_DIM)
_NEOX = replace(_NORMAL, neox=True)

LLAMA = TinyModel("llama", "llama", _config(*[_NORMAL] * N_LAYER))
QWEN2 = TinyModel("qwen2", "qwen2", _config(*[replace(_NEOX, base=1e6)] * N_LAYER))
QWEN3 = TinyModel("qwen3", "qwen3", _config(*[replace(_NEOX, base=1e6)] * N_LAYER))
LINEAR = TinyModel(
    "llama-linear", "llama", _config(*[replace(_NORMAL, freq_scale=0.5)] * N_LAYER),
    (("rope.scaling.type", "linear"), ("rope.scaling.factor", 2.0)),
)  # fmt: skip


def _gemma3(name: str, freq_scale: float, *metadata: tuple[str, Any]) -> TinyModel:
    """Every sixth layer is global, with the base and scale of the file; the others see a window and have neither."""
    is_global = [il % 6 == 5 for il in range(N_LAYER)]
    ropes = (replace(_NEOX, base=1e6 if g else 10000.0, freq_scale=freq_scale if g else 1.0) for g in is_global)
    config = _config(*ropes, windows=tuple(None if g else WINDOW for g in is_global), gemma=True)
    return TinyModel(name, "gemma3", config, (("attention.sliding_window", WINDOW), *metadata))


GEMMA3 = _gemma3("gemma3", 1.0)
GEMMA3_LINEAR = _gemma3("gemma3-linear", 0.125, ("rope.scaling.type", "linear"), ("rope.scaling.factor", 8.0))


def _yarn(
    name: str, factor: float, arch: str = "llama", attn: float | None = None, log_multiplier: float | None = None,
    divisors: tuple[float, ...] | None = None, rope: Rope = _NORMAL, metadata: tuple[tuple[str, Any], ...] = (),
) -> TinyModel:  # fmt: skip
    """A model with YaRN.

    The magnitude that llama.cpp means is ``attn * m(1) / m(log_multiplier)``, m(x) = 1 + 0.1 x ln(factor); without a
    multiplier the divisor is 1 (arXiv 2309.00071 and DeepSeek's ``mscale_all_dim``).
    """
    divisor = 1.0 + 0.1 * (log_multiplier or 0.0) * np.log(factor)
    rope = replace(
        rope, freq_scale=1.0 / factor, ext_factor=1.0, attn_factor=(1.0 if attn is None else attn) / divisor,
        n_ctx_orig=256, divisors=divisors,
    )  # fmt: skip
    metadata += (
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", factor),
        ("rope.scaling.original_context_length", 256),
    )
    if attn is not None:
        metadata += (("rope.scaling.attn_factor", attn),)
    if log_multiplier is not None:
        metadata += (("rope.scaling.yarn_log_multiplier", log_multiplier),)
    tensors = {} if divisors is None else {"rope_freqs.weight": np.array(divisors, np.float32)}
    return TinyModel(name, arch, _config(*[rope] * N_LAYER), metadata, tensors)


# exact in float32
_LLAMA3 = (1.0, 1.0, 1.25, 2.0, 3.5, 6.0, 8.0, 8.0)
_SHORT = (1.0, 1.0625, 1.125, 1.25, 1.5, 1.75, 2.0, 2.5)
_LONG = (1.0, 1.25, 2.0, 4.0, 7.5, 12.0, 20.0, 32.0)

YARN = _yarn("yarn-4", 4.0)
YARN_1 = _yarn("yarn-1", 1.0)
YARN_2 = _yarn("yarn-2", 2.0, attn=0.7)
YARN_8 = _yarn("yarn-8", 8.0)
YARN_NEOX = _yarn("yarn-neox-4", 4.0, "qwen2", rope=replace(_NEOX, base=1e6))
YARN_PARTIAL = _yarn("yarn-partial", 4.0, "phi3", rope=replace(_NEOX, n_rot=8))
# magnitude exactly 1: llama.cpp's context shift multiplies every key by the magnitude once more, so that only
# such a model can be shifted without damage
YARN_UNIT = _yarn("yarn-unit", 4.0, "qwen2", attn=float(1.0 / (1.0 + 0.1 * np.log(4.0))), rope=_NEOX)
YARN_LOG = _yarn("yarn-log-1", 8.0, "mistral3", log_multiplier=1.0)
YARN_LOG_HALF = _yarn("yarn-log-half", 8.0, "mistral3", attn=1.2, log_multiplier=0.5)
LLAMA3 = TinyModel(
    "llama3", "llama", _config(*[replace(_NORMAL, divisors=_LLAMA3)] * N_LAYER),
    tensors={"rope_freqs.weight": np.array(_LLAMA3, np.float32)},
)  # fmt: skip
LLAMA3_YARN = _yarn("llama3-yarn", 4.0, divisors=_LLAMA3)


def _longrope(name: str, long: bool, n_rot: int = HEAD_DIM, attn: float = 1.0) -> TinyModel:
    """Phi-3 with LongRoPE: the long divisors where the context is larger than the original one."""
    short, longer = _SHORT[: n_rot // 2], _LONG[: n_rot // 2]
    rope = replace(_NEOX, n_rot=n_rot, divisors=longer if long else short, attn_factor=attn)
    return TinyModel(
        name,
        "phi3",
        _config(*[rope] * N_LAYER),
        (
            ("rope.scaling.type", "longrope"),
            ("rope.scaling.original_context_length", 512),
            ("rope.scaling.attn_factor", attn),
        ),
        {
            "rope_factors_short.weight": np.array(short, np.float32),
            "rope_factors_long.weight": np.array(longer, np.float32),
        },
        n_ctx=1024 if long else 512,
    )


LONGROPE_SHORT = _longrope("longrope-short", long=False)
LONGROPE_LONG = _longrope("longrope-long", long=True)
LONGROPE_ATTN = _longrope("longrope-attn", long=True, attn=1.19)
# eight of the sixteen dimensions of a head turn, the others do not
PARTIAL = _longrope("longrope-partial", long=True, n_rot=8)

# M-RoPE: two pairs follow the time, three the height, three the width
_MROPE = replace(_NEOX, base=1e6, component=(0, 0, 1, 1, 1, 2, 2, 2))
_SECTIONS = ("rope.dimension_sections", [2, 3, 3, 0])
MROPE = TinyModel("qwen2vl", "qwen2vl", _config(*[_MROPE] * N_LAYER), (_SECTIONS,))
MROPE_YARN = _yarn("qwen2vl-yarn", 4.0, "qwen2vl", rope=_MROPE, metadata=(_SECTIONS,))
# interleaved: time, height, width, time, ... as long as each has pairs left
IMROPE = TinyModel(
    "qwen3vl", "qwen3vl", _config(*[replace(_NEOX, base=1e6, component=(0, 1, 2, 0, 1, 2, 0, 1))] * N_LAYER),
    (("rope.dimension_sections", [3, 3, 2, 0]),),
)  # fmt: skip

UNSCALED = (LLAMA, QWEN2, QWEN3, LINEAR, GEMMA3, GEMMA3_LINEAR, LLAMA3)
LONGROPE = (LONGROPE_SHORT, LONGROPE_LONG, LONGROPE_ATTN, PARTIAL)
YARNS = (YARN, YARN_1, YARN_2, YARN_8, YARN_NEOX, YARN_PARTIAL, YARN_UNIT, YARN_LOG, YARN_LOG_HALF, LLAMA3_YARN)
MULTI = (MROPE, MROPE_YARN, IMROPE)
MODELS = (*UNSCALED, *LONGROPE, *YARNS, *MULTI)
SHIFTABLE = tuple(m for m in MODELS if m not in MULTI and abs(m.config.ropes[0].magnitude - 1.0) < 1e-6)


def _wide(head_dim: int) -> TinyModel:
    """A model with wide heads, for caches that are quantized in blocks of 32."""
    ropes = (Rope(head_dim),) * N_LAYER
    config = Config(N_VOCAB, N_EMBD, 2, 1, head_dim, N_FF, ropes, (None,) * N_LAYER)
    # gentle: each layer multiplies the noise of a quantized cache by its attention's gain
    return TinyModel(f"wide-{head_dim}", "llama", config, gain=1.0)


# llama.cpp stores quantized keys of heads of 64 through a Hadamard rotation, those of heads of 32 as they are
WIDE_32, WIDE_64 = _wide(32), _wide(64)

_ENCODER = (("attention.causal", False),)
EUROBERT = TinyModel(
    "eurobert", "eurobert", _config(*[_NEOX] * N_LAYER, causal=False), (*_ENCODER, ("pooling_type", 1))
)
NEOBERT = TinyModel("neo-bert", "neo-bert", _config(*[_NORMAL] * N_LAYER, causal=False), _ENCODER)
