"""Tiny models of every architecture, made from metadata alone: the library names the tensors, random values fill them.

Each fixture runs all the graphs that its architecture has, with and without factors, and `audit` compares them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from support import llama_direct
from support.graph_nodes import GgmlTensor, Graph, LayerRule, Recorder, RopeNode, by_cache, by_weights, compare

Factors = Sequence[float] | None
Value = None | bool | int | float | str | list[bool] | list[int] | list[float]

N_EMBD, N_HEAD, N_FF, N_VOCAB, N_CTX = 64, 2, 64, 64, 256
HEAD = N_EMBD // N_HEAD
N_LAYER = 6
PROMPT = 9  # tokens: more than two blocks of four for architectures that compress or pool keys
GGUF_TYPES: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bool: ("bool", ctypes.c_bool), int: ("u32", ctypes.c_uint32), float: ("f32", ctypes.c_float),
    str: ("str", lambda text: ctypes.c_char_p(text.encode())),
}  # fmt: skip
MROPE = (8, 40)  # rope types with four positions for each embedding
GGUF_ARRAY_TYPES = {int: (4, np.uint32), float: (6, np.float32), bool: (7, np.int8)}
ABSOLUTE = ("general.", "tokenizer.", "xielu.")  # keys without the architecture's name


def common(n_layer: int) -> dict[str, Value]:
    """The keys that one architecture or another needs; nobody reads those that it does not know."""
    alternating = [il % 2 for il in range(n_layer)]
    return {
        "vocab_size": N_VOCAB, "context_length": N_CTX, "embedding_length": N_EMBD, "features_length": N_EMBD,
        "block_count": n_layer, "leading_dense_block_count": 1, "feed_forward_length": N_FF,
        "use_parallel_residual": False, "logit_scale": 1.0, "residual_scale": 1.5, "full_attention_interval": 2,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD, "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0, "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5, "attention.group_norm_groups": 8, "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 32, "attention.relative_buckets_count": 8, "attention.sliding_window": 32,
        "attention.sliding_window_pattern": [1 - a for a in alternating], "attention.indexer.head_count": 64,
        "attention.indexer.key_length": 128, "attention.indexer.top_k": 8, "attention.indexer.block_size": 4,
        "attention.indexer.kpool": 4, "attention.indexer.kpool_select_tail": True,
        "attention.indexer.local_blocks": 1, "rope.dimension_sections": [HEAD // 4] * 4, "rope.freq_base": 10000.0,
        "time_mix_extra_dim": 32, "time_decay_extra_dim": 32, "attention.decay_lora_rank": 32,
        "attention.iclr_lora_rank": 32, "attention.value_residual_mix_lora_rank": 32, "attention.gate_lora_rank": 32,
        "wkv.head_size": HEAD, "token_shift_count": 2, "posnet.embedding_length": N_EMBD,
        "posnet.block_count": n_layer, "convnext.embedding_length": N_EMBD, "convnext.block_count": n_layer,
        "xielu.alpha_n": 1.0, "xielu.alpha_p": 1.0, "xielu.beta": 1.0, "xielu.eps": 1e-7,
        "ssm.inner_size": 2 * N_EMBD, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": N_HEAD,
        "ssm.group_count": 2, "kda.head_dim": 32, "kda.safe_gate": True, "kda.gate_lower_bound": -5.0,
        "shortconv.l_cache": 3, "attn_res.block_size": 12, "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0, "tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.token_type_count": 2,
    }  # fmt: skip


MOE: dict[str, Value] = {
    "expert_feed_forward_length": N_FF, "expert_shared_feed_forward_length": N_FF // 2, "expert_latent_length": N_FF,
    "interleave_moe_layer_step": 2, "moe_every_n_layers": 2, "expert_count": 2, "expert_used_count": 2,
    "expert_shared_count": 1, "expert_gating_func": 2, "expert_group_scale": 1.0, "experts_per_group": 1,
    "expert_weights_scale": 1.0, "expert_weights_norm": True,
}  # fmt: skip
MLA: dict[str, Value] = {
    "attention.head_count": 1, "attention.head_count_kv": 1, "attention.key_length": 48, "attention.value_length": 32,
    "rope.dimension_count": 16, "attention.key_length_mla": 32, "attention.value_length_mla": 16,
}  # fmt: skip
HYPER: dict[str, Value] = {
    "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 2, "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8, "hyper_connection.magnitude": 2.0, "swiglu_clamp_exp": 10.0,
}  # fmt: skip


@dataclass(frozen=True)
class Fixture:
    name: str
    arch: str
    metadata: dict[str, Value] = field(default_factory=dict)
    n_layer: int = N_LAYER
    graphs: str = "decoder"  # a key of GRAPHS
    without: frozenset[int] = frozenset()  # layers that rotate nothing
    layer_of: LayerRule = by_weights
    target: Fixture | None = None  # the model that a draft model works for
    follows: bool = False  # it rotates with its target's factors and has none of its own
    mtp: bool = False  # a context of the type that runs the appended prediction layers
    needs: tuple[str, ...] = ()  # attention tensors that its graphs cannot do without, though the library loads it
    lacks: tuple[str, ...] = ()  # optional tensors that make it another architecture
    virtual: bool = True  # the library can make it without a file
    shift: bool = True  # the library can shift it: it cannot where one of two caches rotates nothing
    fused: bool = False  # it needs fused QKV
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # those that it must find before it names any

    @property
    def file_first(self) -> bool:
        """Whether it is another model, or none, with every tensor that the library knows."""
        return bool(self.lacks or self.tensors or self.fused)

    def optional(self, tensor: str) -> bool:
        """Whether a lean file does without this tensor, unless the library insists on it."""
        name = re.sub(r"^blk\.\d+\.", "", tensor)
        return name.startswith(("attn_", "rope_", *self.lacks)) and not name.startswith(self.needs or "-")

    def keys(self) -> dict[str, Value]:
        merged = {**common(self.n_layer), **self.metadata}
        present = {k: v for k, v in merged.items() if v is not None}
        return {k if k.startswith(ABSOLUTE) else f"{self.arch}.{k}": v for k, v in present.items()}


Tensors = dict[str, tuple[int, ...]]


class Library:
    """What the fixtures call: the low-level binding, gguf's writer functions and ggml, all from one library."""

    def __init__(self) -> None:
        self.llama = llama_direct.library()
        if self.llama is None:
            raise OSError("no patched library")
        self.raw = self.llama._lib
        self.raw.gguf_init_empty.restype = ctypes.c_void_p

    @contextmanager
    def metadata(self, fixture: Fixture, factors: Factors = None) -> Iterator[ctypes.c_void_p]:
        ctx = ctypes.c_void_p(self.raw.gguf_init_empty())
        self._set(ctx, "general.architecture", fixture.arch)
        for key, value in fixture.keys().items():
            self._set(ctx, key, value)
        if factors is not None:
            self._set(ctx, f"{fixture.arch}.rope.scaling.layer_factors", list(factors))
        yield ctx
        self.raw.gguf_free(ctx)

    def add_tensors(self, ctx: ctypes.c_void_p, tensors: Tensors) -> list[NDArray[np.float32]]:
        """Add tensors and return their values, which must live until the file is written."""
        kept = []
        for name, shape in tensors.items():
            ne = (*shape, 1, 1, 1)[:4]
            nb = (4, *(4 * math.prod(ne[:i]) for i in (1, 2, 3)))
            kept.append(_values(name, math.prod(ne)))
            tensor = GgmlTensor(name=name.encode(), ne=ne, nb=nb, data=kept[-1].ctypes.data)
            self.raw.gguf_add_tensor(ctx, ctypes.byref(tensor))
        return kept

    def _set(self, ctx: ctypes.c_void_p, key: str, value: Value) -> None:
        name = key.encode()
        if isinstance(value, list):
            gguf_type, dtype = GGUF_ARRAY_TYPES[type(value[0])]
            data = np.array(value, dtype)
            pointer = ctypes.c_void_p(data.ctypes.data)
            self.raw.gguf_set_arr_data(ctx, name, gguf_type, pointer, ctypes.c_size_t(len(data)))
        else:
            suffix, argument = GGUF_TYPES[type(value)]
            getattr(self.raw, f"gguf_set_val_{suffix}")(ctx, name, argument(value))


@functools.cache
def library() -> Library:
    return Library()


_POOL = np.random.default_rng(20261123).standard_normal(1 << 16).astype(np.float32) * 0.1


def _values(name: str, n: int) -> NDArray[np.float32]:
    values = np.resize(_POOL, n)
    return -np.abs(values) if "ssm_a" in name else values  # a decay


class Model:
    """A loaded fixture with every tensor that the architecture knows, optional ones too."""

    def __init__(self, fixture: Fixture, factors: Factors = None) -> None:
        self.fixture, self.lib = fixture, library()
        self.tensors: Tensors = {}
        llama = self.lib.llama
        params = llama.llama_model_default_params()
        params.load_mtp = True

        def fill(address: int, _: object) -> None:
            tensor = GgmlTensor.from_address(address)
            assert tensor.type == 0, f"{tensor.name} is not F32"
            name = tensor.name.decode()
            self.tensors[name] = tuple(tensor.ne)
            values = _values(name, math.prod(tensor.ne))
            ctypes.memmove(tensor.data, values.ctypes.data, values.nbytes)

        with self.lib.metadata(fixture, factors) as metadata, llama_direct.errors() as errors:
            callback = llama.llama_model_set_tensor_data_t(fill)
            self.handle: Any = llama.llama_model_init_from_user(metadata, callback, None, params)
        self._check(errors)

    def _check(self, errors: list[str]) -> None:
        if not self.handle:
            raise OSError("".join(errors))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama.llama_model_free(self.handle)


class LeanModel(Model):
    """The same fixture from a file, without optional tensors of attention, and with fused QKV where it can be.

    The graphs of many architectures take other branches then.
    """

    def __init__(self, fixture: Fixture, folder: Path, factors: Factors = None) -> None:
        self.fixture, self.lib = fixture, library()
        known: Tensors = {}
        if fixture.virtual:
            with Model(fixture) as full:
                known = full.tensors
        self.tensors = {n: shape for n, shape in known.items() if not fixture.optional(n)} | fixture.tensors
        path = folder / f"{fixture.name}.gguf"
        demanded: set[str] = set()
        while True:
            errors = self._load(path, factors)
            missing = re.search(r"tensor '(?:blk\.\d+\.)?([^']+)' not found", "".join(errors))
            if self.handle or missing is None:
                break
            added = _of_all_layers(missing[1], known)
            if missing[1] == "attn_q.weight" and missing[1] not in demanded and "blk.0.attn_k.weight" in known:
                added = _fused(added, known)
            else:
                self.tensors = {n: shape for n, shape in self.tensors.items() if n not in _fused(added, known)}
            if missing[1] in demanded and added.keys() <= self.tensors.keys():
                break
            demanded.add(missing[1])
            self.tensors.update(added)
        self._check(errors)

    def _load(self, path: Path, factors: Factors) -> list[str]:
        llama = self.lib.llama
        params = llama.llama_model_default_params()
        params.load_mtp = True
        with self.lib.metadata(self.fixture, factors) as metadata, llama_direct.errors() as errors:
            kept = self.lib.add_tensors(metadata, self.tensors)
            assert self.lib.raw.gguf_write_to_file(metadata, str(path).encode(), False), kept
            self.handle = llama.llama_model_load_from_file(str(path).encode(), params)
        return errors


def open_model(fixture: Fixture, folder: Path, factors: Factors = None) -> Model:
    """The model with every tensor that the library knows, where it can make it so."""
    if fixture.virtual and not fixture.file_first:
        return Model(fixture, factors)
    return LeanModel(fixture, folder, factors)


def _of_all_layers(name: str, known: Tensors) -> Tensors:
    return {n: shape for n, shape in known.items() if re.sub(r"^blk\.\d+\.", "", n) == name}


def _fused(queries: Tensors, known: Tensors) -> Tensors:
    """The queries' tensors with the keys and values of their layers in one."""
    fused: Tensors = {}
    for name, (width, *_) in queries.items():
        parts = [known.get(name.replace("attn_q.", f"attn_{part}.")) for part in "qkv"]
        if "attn_q." in name and None not in parts:
            fused[name.replace("attn_q.", "attn_qkv.")] = (width, sum(part[1] for part in parts if part))
    return fused


class Session:
    def __init__(self, model: Model, target: Session | None = None, **extra: Any) -> None:
        self.model, self.lib, self.fixture, self.target = model, model.lib, model.fixture, target
        llama = self.lib.llama
        self.recorder = Recorder(self.lib.raw, llama.ggml_backend_sched_eval_callback)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = N_CTX, 32, 32
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 0
        params.ctx_type = int(self.fixture.mtp)
        params.ctx_other = target.handle if target is not None else None
        params.cb_eval = self.recorder.callback
        for name, value in extra.items():
            setattr(params, name, value)
        with llama_direct.errors() as errors:
            self.handle: Any = llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise OSError("".join(errors))
        self.memory = llama.llama_get_memory(self.handle)
        self.n_past = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama.llama_free(self.handle)

    def set_factors(self, factors: Factors) -> int:
        self.clear()
        array = None if factors is None else (ctypes.c_float * len(factors))(*factors)
        n = ctypes.c_size_t(0 if factors is None else len(factors))
        return int(self.lib.raw.llama_set_rope_layer_factors(ctypes.c_void_p(self.handle), array, n))

    def clear(self) -> None:
        if self.memory:
            self.lib.llama.llama_memory_clear(self.memory, True)
        self.n_past = 0

    def run(self) -> dict[str, Graph]:
        self.clear()
        graphs = {}
        for name, step in GRAPHS[self.fixture.graphs]:
            if (name != "shift" or self.fixture.shift) and step(self):
                graphs[name] = self.recorder.take()
        return graphs

    def process(self, n: int, *, tokens: bool = True, width: int = 0, encode: bool = False, pos_rows: int = 1) -> bool:
        """Compute a batch of ``n`` tokens, of embeddings of ``width``, or of both."""
        llama, start = self.lib.llama, self.n_past
        inputs: dict[str, Any] = {}
        if tokens:
            inputs["token"] = (ctypes.c_int32 * n)(*[1 + (7 * (start + i)) % (N_VOCAB - 2) for i in range(n)])
        if width:
            inputs["embd"] = (ctypes.c_float * (n * width))(*np.resize(_POOL, n * width).tolist())
        batch = llama_direct.batch_of(n, list(range(start, start + n)) * pos_rows, **inputs)
        status = (llama.llama_encode if encode else llama.llama_decode)(self.handle, batch)
        assert status == 0, f"{self.fixture.name}: status {status}"
        self.n_past += 0 if encode else n
        return True


Step = Callable[[Session], bool]


def _process(n: int, **how: Any) -> Step:
    return lambda s: s.process(n, **how)


def _predict(n: int) -> Step:
    return lambda s: s.process(n, width=s.lib.llama.llama_model_n_embd_out(s.model.handle))


def _rows(width: int | None = None, encode: bool = False) -> Step:
    """Embeddings instead of tokens, as an image encoder makes them, or the features of a target model."""

    def step(s: Session) -> bool:
        llama, model = s.lib.llama, s.model.handle
        rows = 4 if llama.llama_model_rope_type(model) in MROPE else 1
        width_ = width or llama.llama_model_n_embd_inp(model)
        return s.process(PROMPT, tokens=False, width=width_, encode=encode, pos_rows=rows)

    return step


def _target(s: Session) -> bool:
    """The target of a draft model reads the prompt, so that there are keys to attend to."""
    assert s.target is not None
    s.target.clear()
    s.target.process(PROMPT)
    s.target.recorder.take()
    s.n_past = PROMPT
    return False


def _shifted(then: Step) -> Step:
    """Move the cached tokens by three positions: their keys are rotated before the next token is decoded."""

    def step(s: Session) -> bool:
        llama = s.lib.llama
        if not s.memory or not llama.llama_memory_can_shift(s.memory):
            return False
        llama.llama_memory_seq_add(s.memory, 0, 0, -1, 3)
        s.n_past += 3
        return then(s)

    return step


_prompt, _token, _encode = _process(PROMPT), _process(1), _process(PROMPT, encode=True)
_text = (("prompt", _prompt), ("token", _token))
_prediction = (("prompt", _predict(PROMPT)), ("token", _predict(1)), ("shift", _shifted(_predict(1))))
_features = ("encode", _rows(3 * N_EMBD, encode=True))
GRAPHS: dict[str, tuple[tuple[str, Step], ...]] = {
    "decoder": (*_text, ("shift", _shifted(_token))),
    "vision": (*_text, ("image", _rows()), ("shift", _shifted(_token))),
    "encoder": (("encode", _encode),),
    "encoder-decoder": (("encode", _encode), *_text),
    "prediction": _prediction,
    "eagle3": (_features, *_prediction),
    "dflash": (_features, ("inject", _rows(3 * N_EMBD)), ("prompt", _prompt), ("shift", _shifted(_prompt))),
    # the target reads the prompt, the assistant goes on where it stopped
    "assistant": (("target", _target), ("token", _predict(1))),
}


def _names(text: str) -> list[str]:
    return text.split()


# attention and recurrent layers in turn: a layer without key heads is recurrent
MIXED = [N_HEAD if il % 2 == 0 else 0 for il in range(N_LAYER)]
ODD = frozenset(range(1, N_LAYER, 2))
EVEN = frozenset(range(0, N_LAYER, 2))
HYBRID: dict[str, Value] = {"attention.head_count": list(MIXED), "attention.head_count_kv": list(MIXED)}
ONE_HEAD: dict[str, Value] = {key: [n // N_HEAD for n in MIXED] for key in HYBRID}
# the layers that have an indexer of their own
INDEXED: dict[str, Value] = {"attention.indexer.types": [1 - il % 2 for il in range(N_LAYER)]}
ALL = frozenset(range(N_LAYER))
UNSHARED: dict[str, Value] = {"attention.shared_kv_layers": 0}
DELTA_NET: dict[str, Value] = {"ssm.inner_size": 32, "ssm.state_size": 16}


def _named(*groups: tuple[Any, str]) -> dict[str, Any]:
    """The value of each name, from the names of each value."""
    return {name: value for value, names in groups for name in _names(names)}


# layers that rotate nothing
WITHOUT = _named(
    (ALL, "gpt2 mpt refact bloom mamba mamba2 jina-bert-v2 t5 t5encoder jais rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba "
          "wavtokenizer-dec bert nemotron_h nemotron_h_moe kimi-linear kimi-k3 glm5-next starcoder"),
    (ODD, "plamo2 granitehybrid lfm2 lfm2moe bailingmoe3 maple cohere2 cohere2moe muse-glimmer exaone-moe"),
    (EVEN, "qwen3next qwen35 qwen35moe minimax-01 qwen4exp"),
    (frozenset((3,)), "smollm3 afmoe"), (frozenset((0, 4)), "smallthinker"), (frozenset((3, 7)), "llama4"),
)  # fmt: skip
GRAPHS_OF = _named(
    # no cache: the whole text is read at once
    ("encoder", "modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v3 eurobert gemma-embedding dream llada "
                "llada-moe rnd1 bert jina-bert-v2 t5encoder wavtokenizer-dec"),
    ("encoder-decoder", "t5"), ("eagle3", "eagle3"), ("dflash", "dflash"),
    # images
    ("vision", "qwen2vl qwen3vl qwen3vlmoe cogvlm gemma3 gemma3n gemma4 paddleocr hunyuan_vl glm4 glm4moe "
               "deepseek2-ocr mistral3 llama"),
)  # fmt: skip
# what an architecture needs beyond the common keys
METADATA: dict[str, dict[str, Value]] = {
    "arwkv7": {"token_shift_count": 1}, "rwkv6qwen2": {"token_shift_count": 1},
    # hybrids
    "jamba": HYBRID, "plamo2": {**HYBRID, "ssm.group_count": 0}, "granitehybrid": HYBRID, "lfm2moe": HYBRID,
    # no window: all its attention layers would have one, and the library cannot shift the other, empty cache
    "lfm2": {**HYBRID, "attention.sliding_window": None},
    "nemotron_h": {**HYBRID, "feed_forward_length": [0] * 4 + [N_FF] * 2},
    "nemotron_h_moe": {**HYBRID, "feed_forward_length": [0] * 4 + [N_FF] * 2},
    "kimi-linear": {**MLA, **ONE_HEAD}, "kimi-k3": {**MLA, **ONE_HEAD},
    "glm5-next": {
        **MLA, **HYPER, "attention.head_count_kv": [n // N_HEAD for n in MIXED], "attention.key_length": 32,
        "rope.dimension_count": 0,
    },
    "bailingmoe3": {**MLA, **ONE_HEAD, "rope.dimension_sections": [2, 3, 3, 0]},
    "qwen3next": DELTA_NET, "qwen35": DELTA_NET, "qwen35moe": DELTA_NET,
    "qwen4exp": {**HYPER, **DELTA_NET, "attention.compress_ratios": [4] * N_LAYER},
    # compressed keys and indexers
    "deepseek2": MLA, "mistral4": MLA, "deepseek32": MLA, "glm-dsa": MLA, "hy_v4": {**MLA, **HYPER, **INDEXED},
    "dots3note": {
        **MLA, **INDEXED, "attention.sliding_window_pattern": [il % 2 for il in range(N_LAYER)],
        "attention.kv_lora_rank_swa": 32, "attention.key_length_swa": 48, "attention.value_length_swa": 32,
        "attention.key_length_mla_swa": 32, "attention.value_length_mla_swa": 16, "rope.freq_base_swa": 10000.0,
    },
    "minimax-m3": {"attention.indexer.head_count": N_HEAD, "rope.dimension_count": HEAD // 2},
    "deepseek4": {
        **HYPER, "attention.head_count_kv": 1, "attention.key_length": HEAD, "attention.value_length": HEAD,
        "rope.dimension_count": HEAD // 2, "attention.output_group_count": 2, "attention.output_lora_rank": 32,
        "attention.compress_ratios": [0, 0, 4, 128, 4, 128], "attention.compress_rope_freq_base": 160000.0,
        "hash_layer_count": 0, "expert_gating_func": 4,
    },
    "plm": {"attention.key_length": 48, "attention.value_length": 32, "rope.dimension_count": 16},
    # shared keys, repeated layers
    "gemma4": {
        "attention.sliding_window_pattern": [1, 1, 1, 0, 1, 0], "attention.shared_kv_layers": 2,
        "embedding_length_per_layer_input": 16, "attention.key_length_swa": HEAD, "attention.value_length_swa": HEAD,
        "rope.freq_base_swa": 10000.0,
    },
    "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
    "graniteswitch": {
        "adapters.count": 2, "adapters.lora_rank": 4, "adapters.token_ids_activate": [3, 4],
        "adapters.token_ids_substitute": [5, 6], "adapters.router_gain": 1.0,
    },
    "maple": {"swiglu_clamp_exp": 7.0}, "qwen3tts": {"vocab_size": 3072}, "chameleon": {"vocab_size": 10240},
    "eagle3": {"target_layers": [0, 1, 2], "target_hidden_size": N_EMBD},
    "dflash": {"target_layers": [0, 1, 2], "rope.dimension_sections": [0] * 4},
}  # fmt: skip
_QKV = {f"blk.{il}.attn_qkv.weight": (N_EMBD, 3 * N_EMBD) for il in range(N_LAYER)}
OTHER: dict[str, dict[str, Any]] = {
    "llama4": {"n_layer": 8}, "baichuan": {"n_layer": 32},  # the 7B model; all others have linear biases
    "qwen35": {"needs": ("attn_gate", "attn_qkv")}, "qwen35moe": {"needs": ("attn_gate", "attn_qkv")},
    # other branches than a model without weights would take
    "rwkv6qwen2": {"lacks": ("time_mix_first",)}, "kimi-k3": {"needs": ("attn_q_a_norm",)},
    "phi3": {"tensors": _QKV}, "pockettts": {"tensors": _QKV},
    "gemma3n": {"n_layer": 22, "layer_of": by_cache}, "gemma4": {"layer_of": by_cache},
    "hrm_text": {"layer_of": by_cache}, "eagle3": {"n_layer": 1, "target": Fixture("llama", "llama")},
}  # fmt: skip

DENSE = _names(
    "llama deci falcon gpt2 gptneox mpt baichuan starcoder refact bert modern-bert nomic-bert neo-bert "
    "jina-bert-v2 jina-bert-v3 eurobert bloom stablelm qwen qwen2 qwen2vl qwen3 qwen3vl qwen35 phi2 phi3 plamo plamo2 "
    "plamo3 codeshell orion internlm2 minicpm minicpm3 gemma gemma2 gemma3 gemma3n gemma4 gemma-embedding starcoder2 "
    "mamba mamba2 jamba falcon-h1 xverse command-r cohere2 olmo olmo2 muse-glimmer openelm chatglm glm4 bitnet t5 "
    "t5encoder jais jais2 nemotron nemotron_h exaone exaone4 rwkv6 rwkv6qwen2 rwkv7 arwkv7 granite granitehybrid "
    "graniteswitch granite_swa chameleon wavtokenizer-dec plm arcee hunyuan-dense hunyuan_vl smollm3 lfm2 dream "
    "llada seed_oss apertus hrm_text cogvlm pangu-embedded mistral3 eagle3 dflash spark2_5 llama-embed "
    "maincoder talkie nanbeige qwen3tts pockettts ernie4_5 paddleocr"
)
MIXTURES = _names(
    "llama llama4 nomic-bert-moe qwen2moe qwen3moe qwen3next qwen3vlmoe qwen35moe qwen4exp phimoe maple cohere2moe "
    "dbrx olmoe arctic deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 glm4moe glm-dsa nemotron_h_moe exaone-moe "
    "granite granitemoe granitehybrid bailingmoe bailingmoe2 bailingmoe3 dots1 dots3note afmoe laguna ernie4_5-moe "
    "hunyuan-moe hy_v3 hy_v4 gpt-oss lfm2moe smallthinker llada-moe grovemoe minimax-01 minimax-m2 minimax-m3 rnd1 "
    "mistral3 mistral4 mimo2 step35 kimi-linear kimi-k3 glm5-next grok mellum"
)


def _fixture(arch: str, suffix: str = "", *, moe: bool = False, **changes: Any) -> Fixture:
    special = {"without": WITHOUT.get(arch, frozenset()), "graphs": GRAPHS_OF.get(arch, "decoder")}
    metadata = {**(MOE if moe else {}), **METADATA.get(arch, {}), **changes.pop("metadata", {})}
    return Fixture(arch + suffix, arch, metadata, **{**special, **OTHER.get(arch, {}), **changes})


def _looped(node: RopeNode) -> int:
    """The layers of the file run several times, each time with a cache of their own."""
    assert node.cache is not None
    layer = node.cache % N_LAYER
    assert node.shift or node.weights == layer
    return layer


PREDICTING = _names(
    "bailingmoe3 cohere2moe deepseek2 deepseek32 deepseek4 glm-dsa glm4moe hy_v3 mimo2 nemotron_h_moe qwen35 qwen35moe "
    "qwen3next step35"
)
# the last layer is the one that predicts: it has attention
LAST_KV = [1, 0, 1, 0, 1, 1]
PREDICTION: dict[str, dict[str, Any]] = {
    "bailingmoe3": {"metadata": {"attention.head_count": LAST_KV, "attention.head_count_kv": LAST_KV}},
    "cohere2moe": {"shift": False},
    "glm4moe": {"metadata": {"rope.dimension_sections": None}},
    "mimo2": {"fused": True, "shift": False},
    "nemotron_h_moe": {
        "without": ALL,
        "metadata": {key: [2, 0, 2, 0, 0, 2] for key in HYBRID} | {"feed_forward_length": [0, 0, 0, 0, N_FF, 0]},
    },
    # it must find the tensors of the layer in the file, or it counts as any other
    "deepseek4": {
        "shift": False,
        "metadata": {"attention.compress_ratios": [0, 0, 4, 128, 4, 0]},
        "tensors": {
            f"blk.{N_LAYER - 1}.nextn.{name}.weight": shape
            for name, shape in {"eh_proj": (2 * N_EMBD, N_EMBD), "enorm": (N_EMBD,), "hnorm": (N_EMBD,)}.items()
        },
    },
}


def _assistant_tensors(n_embd: int, n_embd_target: int, n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a gemma4 assistant, which the library cannot make without a file."""
    yield "token_embd.weight", (n_embd, N_VOCAB)
    yield "output_norm.weight", (n_embd,)
    yield "nextn.post_projection.weight", (n_embd, n_embd_target)
    yield "nextn.pre_projection.weight", (2 * n_embd_target, n_embd)
    yield "rope_freqs.weight", (HEAD // 2,)
    for il in range(n_layer):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            yield f"blk.{il}.{name}.weight", (n_embd,)
        yield f"blk.{il}.attn_q.weight", (n_embd, HEAD * N_HEAD)
        yield f"blk.{il}.attn_output.weight", (HEAD * N_HEAD, n_embd)
        yield f"blk.{il}.attn_q_norm.weight", (HEAD,)
        yield f"blk.{il}.layer_output_scale.weight", (1,)
        yield f"blk.{il}.ffn_gate.weight", (n_embd, N_FF)
        yield f"blk.{il}.ffn_up.weight", (n_embd, N_FF)
        yield f"blk.{il}.ffn_down.weight", (N_FF, n_embd)


NO_SECTIONS: dict[str, Value] = {"rope.dimension_sections": None}
# names that the library knows without being able to run them, and what it says
UNUSABLE = {"clip": "CLIP cannot be used as main model", "gptj": "unsupported model architecture"}
YARN_KEYS: dict[str, Value] = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
}  # fmt: skip


def names_in_source(source: Path) -> set[str]:
    """The architectures in the table of a llama.cpp source tree."""
    text = (source / "src" / "llama-arch.cpp").read_text()
    table = text.partition("LLM_ARCH_NAMES = {")[2].partition("\n};")[0]
    return set(re.findall(r'^\s*\{ LLM_ARCH_\w+,\s*"([^"]+)"\s*\}', table, re.M)) - {"(unknown)"}


def _variants() -> Iterator[Fixture]:
    """Other branches of architectures that depend on their metadata."""
    for arch in PREDICTING:
        changes = {"graphs": "prediction", "mtp": True, "without": ALL - {N_LAYER - 1}, **PREDICTION.get(arch, {})}
        metadata = {"nextn_predict_layers": 1, **changes.pop("metadata", {})}
        yield _fixture(arch, "-mtp", moe=arch in MIXTURES, metadata=metadata, **changes)
    for arch in ("glm4", "glm4moe", "hunyuan_vl", "bailingmoe3"):
        yield _fixture(arch, "-text", moe=arch in MIXTURES, metadata=NO_SECTIONS, graphs="decoder")
    for arch in ("llama", "gemma3", "gpt-oss", "deepseek2", "hy_v3"):
        yield _fixture(arch, "-yarn", moe=arch in MIXTURES, metadata=YARN_KEYS)
    linear: dict[str, Value] = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    for arch in ("llama", "gemma3"):
        yield _fixture(arch, "-linear", metadata=linear)
    yield _fixture(
        "deepseek2", "-log-mul", moe=True, metadata={**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.0707}
    )
    yield _fixture("phi3", "-longrope", metadata={"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.19})
    yield _fixture("deepseek2", "-no-mla", moe=True, metadata={key: None for key in MLA if "mla" in key})
    yield _fixture("deepseek2", "-lite", moe=True, n_layer=27)
    yield _fixture("baichuan", "-alibi", n_layer=40, without=frozenset(range(40)))
    for arch in ("granite", "granitehybrid", "graniteswitch"):
        off = {**METADATA.get(arch, {}), "rope.scaling.finetuned": False}
        yield _fixture(arch, "-no-rope", metadata=off, without=ALL, shift=False)
    rotating: list[int] = [1 - il % 2 for il in range(N_LAYER)]
    yield _fixture("granite_swa", "-pattern", metadata={"attention.rope_pattern": rotating}, without=ODD, shift=False)
    yield _fixture("nanbeige", "-looped", metadata={"num_loops": 2}, layer_of=_looped)
    yield _fixture("gemma4", "-moe", moe=True)
    yield _fixture("dflash", "-full", metadata={"attention.sliding_window": None})
    yield _fixture("dflash", "-mrope", metadata={"rope.dimension_sections": [HEAD // 2, 0, 0, 0]})
    dspark = {**METADATA["deepseek4"], "attention.compress_ratios": [0] * N_LAYER}
    yield _fixture("dflash", "-dspark", moe=True, metadata={**dspark, "expert_gating_func": 4}, shift=False)
    yield _fixture(
        "gemma4-assistant",
        graphs="assistant",
        target=_fixture("gemma4", n_layer=4, metadata={"attention.sliding_window_pattern": [1, 0, 1, 0], **UNSHARED}),
        layer_of=by_cache,
        follows=True,
        n_layer=4,
        virtual=False,
        tensors=dict(_assistant_tensors(N_EMBD // 2, N_EMBD, 4)),
        metadata={
            "nextn_predict_layers": 4, "embedding_length": N_EMBD // 2, "embedding_length_out": N_EMBD,
            "attention.key_length": HEAD, "attention.value_length": HEAD, "attention.key_length_swa": HEAD,
            "attention.value_length_swa": HEAD, "attention.sliding_window_pattern": [1, 1, 1, 0],
            "rope.freq_base_swa": 10000.0,
        },
    )  # fmt: skip


def _fixtures() -> Iterator[Fixture]:
    for arch in DENSE:
        yield _fixture(arch)
    for arch in MIXTURES:
        yield _fixture(arch, "-moe" if arch in DENSE else "", moe=True)
    yield from _variants()


FIXTURES = {fixture.name: fixture for fixture in _fixtures()}
# distinct factors on both sides of 1
FACTORS = [1.17 + 0.17 * il if il % 3 else 1.0 / (1.3 + 0.02 * il) for il in range(64)]
YARN = {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_orig_ctx": 64}


Graphs = dict[str, Graph]


class RefusedError(Exception):
    """The library accepts no factors for this model."""


def runs(model: Model, *plans: Factors, **extra: Any) -> list[Graphs]:
    """All graphs of the model with each of several factors, None standing for those of the file."""
    follows, found = model.fixture.follows, []
    with ExitStack() as stack:
        s = _open_target(stack, model.fixture, **extra) if follows else _open(stack, model, **extra)
        for factors in plans:
            _set(s, factors)
            if follows:  # the factors of the target count at the time when the context is made
                with Session(model, s, **extra) as draft:
                    found.append(draft.run())
            else:
                found.append(s.run())
    return found


def _open(stack: ExitStack, model: Model, **extra: Any) -> Session:
    target = _open_target(stack, model.fixture, **extra) if model.fixture.target is not None else None
    return stack.enter_context(Session(model, target, **extra))


def _open_target(stack: ExitStack, fixture: Fixture, **extra: Any) -> Session:
    assert fixture.target is not None
    return stack.enter_context(Session(stack.enter_context(Model(fixture.target)), **extra))


def _set(s: Session, factors: Factors) -> None:
    with llama_direct.errors() as errors:
        status = s.set_factors(factors)
    if status != 0:
        raise RefusedError("".join(errors).strip().removeprefix("set_rope_layer_factors: "))


@dataclass(frozen=True)
class Audit:
    """The result of one fixture: the rotations of each graph, and all that is wrong."""

    ropes: dict[str, tuple[RopeNode, ...]]
    problems: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def layers(self) -> frozenset[int]:
        """The layers that rotate something when they compute: a context shift alone proves nothing."""
        found = {layer for nodes in self.ropes.values() for n in nodes if not n.shift for layer in (n.weights, n.cache)}
        return frozenset(layer for layer in found if layer is not None)

    @property
    def verdict(self) -> str:
        if self.problems:
            return f"{len(self.problems)} wrong"
        if self.refusal:
            return f"refused: {self.refusal}"
        return "exact" if self.layers else "no RoPE, but factors are accepted"


def _singular(model: Model, yarn: Graphs) -> Iterator[str]:
    """The layers that accept a factor at which YaRN's parameters have no finite value."""
    fixture, factor = model.fixture, YARN["rope_freq_scale"]
    nodes = [node for graph in yarn.values() for node in graph.ropes()]
    scaled = {fixture.layer_of(n) for n in nodes if n.params.ext_factor != 0.0 and n.params.freq_scale == factor}
    with ExitStack() as stack:
        s = _open(stack, model, **YARN)
        for layer in sorted(scaled):
            try:
                _set(s, [factor if il == layer else 1.5 for il in range(fixture.n_layer)])
                yield f"layer {layer} accepts factor {factor}, which is YaRN's frequency scale"
            except RefusedError:
                pass


def _loads(model: Model, refusal: str) -> Iterator[str]:
    """What is wrong if a file with factors that cannot be used is not refused with the same message."""
    with model:
        try:
            runs(model, None)
            yield "the factors of the file are ignored"
        except OSError as error:
            if refusal not in str(error):
                yield f"the factors of the file are refused with {error}"


def audit(fixture: Fixture, folder: Path) -> Audit:
    """Run every graph of the fixture with and without factors, and check every rotation.

    Four times: with all optional tensors and without, with YaRN, and with the factors in the metadata.
    """
    factors, ones = FACTORS[: fixture.n_layer], [1.0] * fixture.n_layer
    lean: Callable[..., Model] = functools.partial(LeanModel, folder=folder)
    full: Callable[..., Model] = functools.partial(open_model, folder=folder)
    problems: list[str] = []

    def check(what: str, base: Graphs, graphs: Graphs, used: Sequence[float], *, exact: bool = False) -> None:
        if base.keys() != graphs.keys():
            problems.append(f"{what}: graphs {', '.join(graphs)} instead of {', '.join(base)}")
        for name, graph in graphs.items():
            found = compare(base[name], graph, used, fixture.layer_of, exact=exact)
            problems.extend(f"{name}, {what}: {text}" for text in found)

    with full(fixture) as model:
        (base,) = runs(model, None)
        ropes = {name: graph.ropes() for name, graph in base.items()}
        try:
            scaled, unscaled, restored = runs(model, factors, ones, None)
        except RefusedError as refusal:
            return Audit(ropes, tuple(_loads(full(fixture, factors=factors), str(refusal))), str(refusal))
        check("factors", base, scaled, factors)
        check("factors of 1", base, unscaled, ones, exact=True)
        check("no factors again", base, restored, ones, exact=True)
        yarn, scaled_yarn = runs(model, None, factors, **YARN)
        check("YaRN", yarn, scaled_yarn, factors)
        if not fixture.follows:
            problems += _singular(model, yarn)
    with lean(fixture) as model:
        lean_base, lean_scaled = runs(model, None, factors)
        check("lean", lean_base, lean_scaled, factors)
    if not fixture.follows:
        with full(fixture, factors=factors) as model:
            (loaded,) = runs(model, None)
            check("metadata", scaled, loaded, ones, exact=True)
    return Audit(ropes, tuple(problems))
