"""How much memory a model with its context will take, from the file's header alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import GGUFFile

from .model import MAX_OUTPUTS
from .settings import CACHE_TYPES

_F16, _F32 = 2, 4  # bytes: of masks, and of all that is computed
_CELLS = 256  # llama_context pads a context to as many
_GEMMA3N_KV_LAYERS = 20  # src/models/gemma3n.cpp: no key says so


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes, predicted. ``weights`` are the file's pages, which processes on one machine share on a CPU."""

    weights: int
    kv_cache: int
    compute: int

    @property
    def per_worker(self) -> int:
        """What each process needs for itself where the weights are shared."""
        return self.kv_cache + self.compute

    @property
    def total(self) -> int:
        """What one process needs in all."""
        return self.weights + self.per_worker

    def of_workers(self, n_workers: int, *, shared_weights: bool = True) -> int:
        """What ``n_workers`` processes need together; on GPUs weights are not shared."""
        return n_workers * self.per_worker + self.weights * (1 if shared_weights else n_workers)


def memory_needed(
    path: Path | str,
    n_ctx: int,
    *,
    n_seq: int = 12,
    n_batch: int = 512,
    flash_attention: bool = True,
    cache_types: tuple[str, str] = ("f16", "f16"),
    score_on_device: bool = False,
) -> MemoryNeeded:
    """Predict what `Model` on ``path`` takes with a context of ``n_ctx`` tokens for ``n_seq`` sequences.

    ``cache_types``: of keys and values, of `CACHE_TYPES`. Sliding-window layers keep all tokens (``swa_full``), as
    `Model.reserve` has it.
    The cache is exact for attention (llama_kv_cache); of recurrent layers and indexers, and of the buffers for
    computing, it is an estimate, rather too large than too small.

    Raises:
        LropeError: the file is missing, damaged or no model, or a shard of it is missing.
    """
    with GGUFFile(path) as gguf:
        header = _Header(gguf)
        cells = -(-n_ctx // _CELLS) * _CELLS
        return MemoryNeeded(
            weights=_weights(gguf),
            kv_cache=header.cache(cells, n_seq, flash_attention, cache_types),
            compute=header.compute(
                cells, max(n_seq, MAX_OUTPUTS), n_batch, n_seq, flash_attention, cache_types, score_on_device
            ),
        )


def check_cache_types(path: Path | str, cache_types: tuple[str, str]) -> None:
    """Refuse types of cached keys and values that llama.cpp refuses for the model on ``path``, before it is loaded.

    Raises:
        LropeError: the model cannot have them; see also `memory_needed`.
    """
    if cache_types == ("f16", "f16"):
        return
    with GGUFFile(path) as gguf:
        header = _Header(gguf)
        of_k, of_v = cache_types
        if (header.latent or header.arch == "deepseek4") and of_k != of_v:
            raise LropeError(
                f"--cache-type-k {of_k}: {path} keeps values in its keys, and --cache-type-v says {of_v}; "
                "give both the same type"
            )
        if header.arch == "grok" and CACHE_TYPES[of_v][0] > 1:
            raise LropeError(
                f"--cache-type-v {of_v}: needs flash attention, which llama.cpp lacks for models like {path}; "
                "give f16, bf16 or f32"
            )
        for part, kind, lengths in (("k", of_k, header.k_lengths), ("v", of_v, header.v_lengths)):
            block = CACHE_TYPES[kind][0]
            for length in lengths:
                if length % block and header.arch != "grok":
                    raise LropeError(
                        f"cache_type_{part} {kind}: has blocks of {block} numbers, but the heads of "
                        f"{path} have {length}; give f16, bf16 or f32"
                    )


class _Header:
    def __init__(self, gguf: GGUFFile) -> None:
        self._gguf = gguf
        self.arch = gguf.text("general.architecture") or ""
        self.n_layer = self._number("block_count", 0)
        if not self.n_layer:
            raise LropeError(f"{gguf.path}: its header names no number of layers; is it a model?")
        self.n_embd = self._number("embedding_length", 0)
        self.heads = self._layers("attention.head_count", 1)
        self.kv_heads = self._layers("attention.head_count_kv", self.heads)
        self.n_ff = max(self._layers("feed_forward_length", 4 * self.n_embd))
        tokens = gguf.entries.get("tokenizer.ggml.tokens")
        self.n_vocab = self._number("vocab_size", 0) if tokens is None else tokens.length
        # heads of windowed layers may be smaller or larger; where both occur, the larger counts
        whole = self.n_embd // max(1, *self.heads)
        self.k_lengths, self.v_lengths = (
            (self._number(f"attention.{part}_length", whole), self._number(f"attention.{part}_length_swa", 0))
            for part in ("key", "value")
        )
        self.k_length, self.v_length = max(self.k_lengths), max(self.v_lengths)
        self.latent = self._number("attention.key_length_mla", 0) > 0  # values are views of the keys

    def cache(self, cells: int, n_seq: int, flash_attention: bool, types: tuple[str, str]) -> int:
        rows_k = [heads * self.k_length for heads in self.kv_heads]
        rows_v = [heads * self.v_length for heads in self.kv_heads]
        if not flash_attention:  # transposed values are as wide in all layers
            rows_v = [max(rows_v)] * self.n_layer
        if self.latent:
            rows_v = [0] * self.n_layer
        indexer = self._number("attention.indexer.key_length", 0)
        every = self._number("full_attention_interval", 0)
        shared = _GEMMA3N_KV_LAYERS if self.arch == "gemma3n" else self.n_layer
        own = min(self.n_layer - self._number("attention.shared_kv_layers", 0), shared)
        of_k = of_v = state = 0  # numbers
        for layer in range(self.n_layer):
            if self.kv_heads[layer] == 0 or (every and (layer + 1) % every):
                state += self._state()
            elif layer < own:
                of_k += rows_k[layer] + indexer
                of_v += rows_v[layer]
        per_cell = 0
        for numbers, kind in zip((of_k, of_v), types, strict=True):
            block, size = CACHE_TYPES[kind]
            per_cell += numbers * size // block
        return cells * per_cell + n_seq * state * _F32

    def _state(self) -> int:
        """Numbers of one sequence that a recurrent layer keeps (llama_hparams::n_embd_r and n_embd_s)."""
        inner, size = self._number("ssm.inner_size", 0), self._number("ssm.state_size", 0)
        groups = self._number("ssm.group_count", 0)
        convolution = max(self._number("ssm.conv_kernel", 1) - 1, 0) * (inner + 2 * groups * size)
        short = self.n_embd * max(self._number("shortconv.l_cache", 1) - 1, 0)
        return convolution + inner * size + short

    def compute(
        self,
        cells: int,
        n_outputs: int,
        n_batch: int,
        n_seq: int,
        flash_attention: bool,
        types: tuple[str, str],
        score_on_device: bool,
    ) -> int:
        """Bytes of the compute and output buffers.

        Memory is used again from layer to layer, so that the largest moment counts: either some layer, or the logits,
        which llama.cpp then copies to a buffer of their own, or makes probabilities of if they are scored there.
        """
        n_outputs = min(n_outputs, n_batch)
        experts = self._number("expert_used_count", 0) * self._number("expert_feed_forward_length", self.n_ff)
        shared = self._number("expert_shared_feed_forward_length", 0)
        heads = max(self.heads)
        attention = heads * (self.k_length + 2 * self.v_length) + max(self.kv_heads) * (self.k_length + self.v_length)
        wide = max(self.n_ff, experts + shared, self._number("ssm.inner_size", 0) * 4)
        masks = cells * (_F16 if flash_attention else _F32) * (2 if self._number("attention.sliding_window", 0) else 1)
        scores = 0 if flash_attention else heads * cells * _F32
        a_layer = n_batch * (_F32 * (4 * self.n_embd + max(attention, 3 * wide)) + masks + scores)
        for kind, length in zip(types, (self.k_length, self.v_length), strict=True):
            if flash_attention and kind == "f32":  # its kernels want float16 (llm_graph_context::build_attn_mha)
                a_layer += cells * max(self.kv_heads) * length * _F16
        logits = n_outputs * _F32 * self.n_vocab
        a_row = n_batch * _F32 * 3 * self.n_embd
        initial = n_seq * _F32 * self.n_vocab  # rows to read that a new context has room for
        if score_on_device:
            largest = max(a_layer, 2 * logits + a_row) + initial
        else:
            largest = max(a_layer, logits + a_row) + max(logits, initial)
        return largest * 21 // 20  # the small inputs of the graph

    def _number(self, key: str, default: int) -> int:
        value = self._gguf.integer(f"{self.arch}.{key}")
        return default if value is None else value

    def _layers(self, key: str, default: int | list[int]) -> list[int]:
        """The values of a key that is one number or one for each layer."""
        values = default if isinstance(default, list) else [default] * self.n_layer
        found = self._gguf.integers(f"{self.arch}.{key}", self.n_layer)
        if found is not None:
            return list(found)
        number = self._gguf.integer(f"{self.arch}.{key}")
        return values if number is None else [number] * self.n_layer


def _weights(gguf: GGUFFile) -> int:
    """Bytes of tensor data in all shards."""
    total = gguf.size - gguf.data_start
    n_shards = gguf.integer("split.count") or 1
    first = f"-00001-of-{n_shards:05}.gguf"
    if n_shards > 1 and gguf.path.name.endswith(first):
        stem = gguf.path.name.removesuffix(first)
        for shard in range(2, n_shards + 1):
            other = gguf.path.with_name(f"{stem}-{shard:05}-of-{n_shards:05}.gguf")
            if not other.is_file():
                raise LropeError(f"{other}: no such file, but {gguf.path} is the first of {n_shards} shards; get it")
            total += other.stat().st_size
    return total
