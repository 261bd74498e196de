"""A GGUF model in llama.cpp.

Works below llama-cpp-python's ``Llama`` class, on the C functions of ``llama.h``: several sequences in one
KV cache, logits of chosen tokens only, and the patched library's layer factors at run time.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import GGUFFile

from ..machine import physical_cores
from .batch import Batch, Part, Rows, Scores, Tokens
from .binding import can_score, chat_formatter, llama_library, log, pointer, set_options
from .settings import FLOAT_TYPES

_ENCODING_DATE = datetime(2024, 7, 26)  # templates that print today's date must not change a study's prompts
_REFUSED = -2  # llama_set_rope_layer_factors, patches/01-layer-factors/src/llama-rope-layer.cpp
_LOAD_NOTHING = 0  # LLAMA_LOAD_MODE_NONE
CPU_BATCH, GPU_BATCH = 512, 2048  # tokens a batch, by default
MAX_OUTPUTS = 128  # rows of logits a decode may return: bounds memory where the vocabulary is large


class FactorsRefusedError(LropeError):
    """llama.cpp refuses layer factors for what they are: out of its range, or without a solution under YaRN."""


class Model:
    """A model, loaded once, and one llama.cpp context on it.

    The context is made by `reserve`, when the number of tokens is known. All sequences share one KV cache.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_batch: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        flash_attention: bool | None = None,
        chat: bool = True,
        verbose: bool = False,
        llama_options: Mapping[str, Any] | None = None,
        weights: bool = True,
    ) -> None:
        """Load ``path`` (memory-mapped). ``None`` leaves a choice to llama.cpp; ``n_threads``: the physical cores.

        ``n_batch``, if None: `GPU_BATCH` where layers go to a GPU, else `CPU_BATCH`. ``chat``: put prompts into the
        model's chat template, if it has one. ``llama_options``: of its contexts, see `ModelConfig.llama_options`.
        ``weights``: False allocates none of them, nor what a context needs: enough for `memory_size` and `rope_layers`.
        Raises `LropeError` if the model cannot be loaded or has no RoPE.
        """
        self._llama = llama = llama_library()
        self._model: Any = None
        self._context: Any = None
        self._owns_model = True
        self._scoring = False
        self.path = Path(path)
        on_gpu = n_gpu_layers != 0 and llama.llama_supports_gpu_offload()
        self.n_batch = n_batch or (GPU_BATCH if on_gpu else CPU_BATCH)
        self.n_threads = n_threads or physical_cores()
        self.on_gpu = bool(on_gpu)
        self._llama_options = dict(llama_options or {})
        of_k, of_v = (str(self._llama_options.get(f"cache_type_{part}", "f16")) for part in "kv")
        self.cache_types = of_k, of_v
        if flash_attention is None and of_v not in FLOAT_TYPES:
            flash_attention = True  # llama.cpp has no other attention on quantized values
        self._flash_attention, self._n_gpu_layers = flash_attention, n_gpu_layers
        if not self.path.is_file():
            raise LropeError(f"{path}: no such file")
        log.verbose = verbose
        log.clear()
        parameters = llama.llama_model_default_params()
        if n_gpu_layers is not None:
            parameters.n_gpu_layers = n_gpu_layers
        if not weights:
            parameters.no_alloc, parameters.load_mode = True, _LOAD_NOTHING
        self._model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise LropeError(f"{path}: cannot load: {log.reason()}")
        if llama.llama_model_rope_type(self._model) == llama.LLAMA_ROPE_TYPE_NONE:
            self.close()
            raise LropeError(f"{path}: the model has no RoPE, so layer factors cannot change it")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._n_block = int(self._metadata(f"{self._metadata('general.architecture')}.block_count"))
        # what a curve shapes; the patch wants a factor for each block, a multi-token-prediction head's too. As in
        # patches/01-layer-factors/common/rope-layer.cpp: llama.cpp runs some models' layers several times
        self.n_layer = min(self._n_block, int(llama.llama_model_n_layer(self._model)))
        # the output layer goes last, after all the others
        all_on_gpu = n_gpu_layers is None or n_gpu_layers < 0 or n_gpu_layers > self._n_block
        self.logits_on_gpu = all_on_gpu and bool(llama.llama_supports_gpu_offload())
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(llama.llama_model_n_ctx_train(self._model))
        # whether a token may belong to several sequences: a recurrent state belongs to one.
        self.shares_tokens = not (
            llama.llama_model_is_recurrent(self._model) or llama.llama_model_is_hybrid(self._model)
        )
        self.n_ctx = 0
        self._batch = Batch(llama, self.n_batch)
        self._formatter = self._chat_formatter() if chat else None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model; idempotent."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model and self._owns_model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def another_context(self, n_batch: int | None = None) -> Model:
        """Return the same loaded weights with a llama.cpp context of their own, to be closed before this one.

        ``n_batch``: tokens that it computes at once; None: as many as this one.
        """
        other = copy.copy(self)
        other.n_batch = n_batch or self.n_batch
        other._context = None
        other._owns_model = other._scoring = False
        other.n_ctx = 0
        other._batch = Batch(self._llama, other.n_batch)
        return other

    def without_weights(self) -> Model:
        """Return the same model, to be run in the same way, but for its weights: see ``weights``; to be closed."""
        how: Any = {"n_batch": self.n_batch, "n_threads": self.n_threads, "n_gpu_layers": self._n_gpu_layers}
        how |= {"flash_attention": self._flash_attention, "llama_options": self._llama_options}
        return Model(self.path, chat=False, verbose=log.verbose, weights=False, **how)

    def _metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._llama.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode()

    @property
    def handle(self) -> Any:
        """The ``llama_model *``, for another kind of context on it, which must be freed first."""
        return self._model

    @property
    def options(self) -> Mapping[str, Any]:
        """What its contexts are told beside llama.cpp's defaults."""
        return self._llama_options

    # Text

    @property
    def is_chat(self) -> bool:
        """Whether prompts are put into a chat template."""
        return self._formatter is not None

    def _chat_formatter(self) -> Any:
        template = self._llama.llama_model_chat_template(self._model, None)
        if not template:
            return None
        special = (self._llama.llama_vocab_eos(self._vocab), self._llama.llama_vocab_bos(self._vocab))
        eos, bos = (self.text([token], special=True) if token >= 0 else "" for token in special)
        try:
            formatter = chat_formatter(template.decode(), eos=eos, bos=bos)
        except Exception as error:  # no Jinja: Go's syntax, something unclosed, unknown tags or filters, no UTF-8
            self.close()
            raise self._template_error(error) from error
        formatter.strftime_now = _ENCODING_DATE.strftime
        self._bos_text = bos
        return formatter

    def _template_error(self, error: Exception) -> LropeError:
        return LropeError(f"{self.path}: its chat template fails ({error}); use --set chat_template=false")

    def prompt_end(self, prompt: str, n_tokens: int = 8) -> str:
        """Return the text of a prompt's last tokens, control tokens too, as the model sees it before it answers."""
        return self.text(self.tokenize_prompt(prompt)[-n_tokens:], special=True)

    def tokenize_prompt(self, prompt: str, answer: str = "") -> Tokens:
        """Return the tokens of a whole prompt, with BOS where the model wants one, followed by ``answer``.

        ``prompt`` goes through the chat template as the user's message if the model has one.
        """
        if self._formatter is None:
            return self.tokenize(prompt + answer, add_special=True)
        try:
            message = {"role": "user", "content": prompt}
            text: str = self._formatter(messages=[message], enable_thinking=False).prompt
        except Exception as error:  # a template is a program of its own
            raise self._template_error(error) from error
        if self._bos_text and self._llama.llama_vocab_get_add_bos(self._vocab):
            text = text.removeprefix(self._bos_text)  # the tokenizer adds it
        return self.tokenize(text + answer, add_special=True, parse_special=True)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> Tokens:
        """Return the tokens of ``text``, shape (n,); control tokens are only recognised with ``parse_special``.

        ``add_special`` adds what a model wants before a text, never what it wants behind it: the text goes on.
        """
        data = text.encode()
        tokens = np.empty(len(data) + 8, np.int32)
        target = pointer(tokens, self._llama.llama_token)
        n = self._llama.llama_tokenize(self._vocab, data, len(data), target, len(tokens), add_special, parse_special)
        if n < 0:
            raise LropeError(f"{self.path}: cannot tokenize {len(data)} bytes of text: {log.reason()}")
        if add_special and n and self._llama.llama_vocab_get_add_eos(self._vocab):
            n -= int(tokens[n - 1] == self._llama.llama_vocab_eos(self._vocab))
        return tokens[:n].copy()

    def text(self, tokens: Sequence[int] | Tokens, *, special: bool = False) -> str:
        """Return the text of ``tokens``; control tokens appear only with ``special``."""
        buffer = ctypes.create_string_buffer(512)
        pieces = []
        for token in tokens:
            n = self._llama.llama_token_to_piece(self._vocab, int(token), buffer, len(buffer), 0, special)
            pieces.append(buffer.raw[: max(n, 0)])
        return b"".join(pieces).decode("utf-8", "replace")

    def text_start(self) -> tuple[int, ...]:
        """Return the token that begins a text, if the model wants one."""
        bos = int(self._llama.llama_vocab_bos(self._vocab))
        return (bos,) if bos >= 0 and self._llama.llama_vocab_get_add_bos(self._vocab) else ()

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends a generation."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    # Factors

    def set_factors(self, factors: Sequence[float]) -> None:
        """Let layer ``l`` rotate by ``position / factors[l]``. The memory must be empty: keys are cached rotated.

        Raises:
            FactorsRefusedError: llama.cpp refuses these values; those before stay. Model and context decide, nothing
                else.
            LropeError: they are not one a layer, or the memory is not empty.
        """
        values = np.ones(max(self._n_block, len(factors)), np.float32)
        values[: len(factors)] = factors
        log.clear()
        code = self._llama.llama_set_rope_layer_factors(self._context, pointer(values, ctypes.c_float), values.size)
        if code:
            listed = ",".join(f"{factor:g}" for factor in factors)
            kind = FactorsRefusedError if code == _REFUSED else LropeError
            raise kind(f"layer factors {listed}: refused by llama.cpp: {log.reason()}; change them")

    def get_factors(self) -> tuple[float, ...]:
        """Return the active factors, one a layer."""
        values = np.empty(self._n_block, np.float32)
        n = self._llama.llama_get_rope_layer_factors(self._context, pointer(values, ctypes.c_float), values.size)
        if n != values.size:
            raise LropeError(f"{self.path}: llama.cpp sees {n} layers, the metadata {values.size}")
        return tuple(values[: self.n_layer].tolist())

    @functools.cached_property
    def _heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Heads and KV heads of each block, as the header says; 0 where it says nothing."""
        prefix, n = f"{self._metadata('general.architecture')}.attention.head_count", self._n_block
        with GGUFFile(self.path) as gguf:

            def of(key: str, default: tuple[int, ...]) -> tuple[int, ...]:
                one = gguf.integer(key)
                return gguf.integers(key, n) or (default if one is None else (one,) * n)

            heads = of(prefix, (0,) * n)
            return heads, of(f"{prefix}_kv", heads)

    @property
    def n_head(self) -> tuple[int, ...]:
        """Heads of each layer: as many query scales it has."""
        return self._heads[0][: self.n_layer]

    @property
    def n_head_kv(self) -> tuple[int, ...]:
        """KV heads of each layer: as many head factors it has."""
        return self._heads[1][: self.n_layer]

    def set_query_scales(self, rows: Sequence[Sequence[float]] | None) -> None:
        """Multiply the attention logits of head ``h`` of layer ``l`` by ``rows[l][h]``; None: by what the file says.

        The memory must be empty. Raises as `set_factors`, and `LropeError` where the library cannot do it.
        """
        self._set_heads(rows, self._heads[0], "llama_set_query_scales", "query scales", "head")

    def set_head_factors(self, rows: Sequence[Sequence[float]] | None) -> None:
        """Let KV head ``k`` of layer ``l``, and its queries, rotate by ``position / rows[l][k]``; None: as in the file.

        They take the place of the layers' factors, as `set_factors` takes theirs. Raises as `set_query_scales`.
        """
        self._set_heads(rows, self._heads[1], "llama_set_rope_head_factors", "head factors", "KV head")

    def _set_heads(
        self, rows: Sequence[Sequence[float]] | None, n_heads: Sequence[int], name: str, what: str, head: str
    ) -> None:
        """Give rows of numbers to the library's function ``name``, one for each of ``n_heads`` in all blocks."""
        function = getattr(self._llama, name, None)
        if function is None:
            raise LropeError(f"{what}: this llama.cpp lacks their patch; use the library that lrope-gguf builds")
        wanted = tuple(n_heads[: self.n_layer])
        if rows is not None and tuple(map(len, rows)) != wanted:
            shape = " ".join(map(str, wanted))
            raise LropeError(f"{what}: not one a {head}; {self.path} has, layer by layer, {shape} {head}s")
        flat = [value for row in rows or () for value in row]
        values = np.ones(sum(n_heads), np.float32)  # those of a multi-token-prediction head stay so
        values[: len(flat)] = flat
        log.clear()
        if code := function(self._context, None if rows is None else pointer(values, ctypes.c_float), values.size):
            kind = FactorsRefusedError if code == _REFUSED else LropeError
            raise kind(f"{what}: refused by llama.cpp: {log.reason()}; change them")

    def rope_layers(self, n_tokens: int) -> tuple[int, ...]:
        """Return the layers whose factor matters over the whole of a text of ``n_tokens`` tokens. Needs a context.

        That is, without those that rotate nothing, have a shorter window, or attend to another layer's keys.
        """
        layers = np.zeros(self._n_block, np.bool_)
        self._llama.llama_rope_layers(self._context, n_tokens, pointer(layers, ctypes.c_bool), layers.size)
        return tuple(np.flatnonzero(layers[: self.n_layer]).tolist())

    def memory_size(self, *, score_on_device: bool = False) -> tuple[int, int, int, int]:
        """Return the bytes that model and context take, or would take if the model has no weights.

        Weights that the processes of a machine share, other weights, the cache, and what is computed with, the rows of
        logits included. ``score_on_device``: as if `score` was called.
        """
        llama = self._llama
        if score_on_device:
            self._batch.target[:] = 0
            targets = pointer(self._batch.target, llama.llama_token)
            llama.llama_set_score_targets(self._context, targets, self.n_batch)
        sizes = (ctypes.c_size_t * 4)()
        llama.llama_get_memory_size(self._context, sizes)
        if score_on_device and not self._scoring:
            llama.llama_set_score_targets(self._context, None, 0)
        shared, others, cache, compute = sizes
        # a new context has room for a row a sequence; reading logits then makes room for as many as may be asked for
        rows = self._n_seq if score_on_device else min(self._max_outputs, self.n_batch)
        return shared, others, cache, compute + 4 * self.n_vocab * max(rows, self._n_seq)

    # Computing

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from now on."""
        self.n_threads = n_threads
        if self._context:
            self._llama.llama_set_n_threads(self._context, n_threads, n_threads)

    def reserve(self, n_ctx: int, n_seq: int = 1, *, swa_full: bool = True, max_outputs: int = MAX_OUTPUTS) -> None:
        """Make a context of ``n_ctx`` tokens, shared by ``n_seq`` sequences; what an earlier one held is lost.

        ``max_outputs``: rows of logits that one decode may return, and memory is kept for. ``swa_full``: keep all
        tokens of sliding-window layers. A small window cache drops a token only while one sequence holds it
        (``llama_kv_cache::find_slot``): after `copy_sequence` it would be full of the prefix.
        """
        llama = self._llama
        if self._context:
            llama.llama_free(self._context)
            self._context = None
        self._scoring = False
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = self.n_batch
        parameters.n_seq_max = n_seq
        parameters.n_outputs_max = max(max_outputs, n_seq)
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.kv_unified = True
        parameters.swa_full = swa_full
        if self._flash_attention is not None:
            parameters.flash_attn_type = int(self._flash_attention)
        set_options(parameters, self._llama_options)
        log.clear()
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            of_k, of_v = self.cache_types  # most models cannot have others than usual
            types = "" if of_k == of_v == "f16" else f" with cache_type_k={of_k} and cache_type_v={of_v}"
            raise LropeError(f"{self.path}: cannot make a context of {n_ctx} tokens{types}: {log.reason()}")
        self._memory = llama.llama_get_memory(self._context)
        self._max_outputs, self._n_seq = int(parameters.n_outputs_max), n_seq
        self.n_ctx = int(llama.llama_n_ctx(self._context))
        if hasattr(llama, "llama_rope_n_ctx"):
            self.n_ctx_train = int(llama.llama_rope_n_ctx(self._context))  # a scaling of the options has stretched it

    def clear(self, *, data: bool = False) -> None:
        """Empty all sequences; with ``data`` also overwrite the cached keys and values (needed after a NaN)."""
        self._llama.llama_memory_clear(self._memory, data)

    def copy_sequence(self, source: int, target: int) -> None:
        """Let sequence ``target`` share all that ``source`` holds, and nothing else; costs no computation."""
        self._llama.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def prefill(self, tokens: Tokens) -> None:
        """Append ``tokens`` to sequence 0, which is empty, without logits."""
        n = len(tokens)
        for _ in self.decode(tokens, np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.bool_)):
            raise AssertionError("no logits were asked for")

    def synchronize(self) -> None:
        """Wait until all that was given to the devices is computed."""
        self._llama.llama_synchronize(self._context)

    @property
    def can_score(self) -> bool:
        """Whether the library can `score`."""
        return can_score(self._llama)

    def score(self, part: Part, targets: Tokens) -> Iterator[Scores]:
        """Append as `decode` does; yield how likely ``targets`` are, one a wanted token, by the device, if it can."""
        batch, target = self._batch, pointer(self._batch.target, self._llama.llama_token)
        self._scoring = True

        def prepare(rows: slice, of_batch: NDArray[np.bool_]) -> None:
            batch.target[: len(of_batch)][of_batch] = targets[rows]
            # all of them, so that any batch without wanted tokens may follow
            if self._llama.llama_set_score_targets(self._context, target, self.n_batch):
                raise LropeError(f"{self.path}: {log.reason()}")

        for rows in self._decode(part, prepare):
            n = rows.stop - rows.start
            log_p, hit = np.empty(n, np.float32), np.empty(n, np.bool_)
            where = pointer(log_p, ctypes.c_float), pointer(hit, ctypes.c_bool)
            if self._llama.llama_get_scores(self._context, *where, n) != n:
                raise LropeError(f"{self.path}: llama.cpp gave other scores than were asked for")
            yield rows, log_p, hit

    def decode(
        self,
        tokens: Tokens,
        positions: NDArray[Any],
        sequences: NDArray[Any],
        wanted: NDArray[np.bool_],
        n_seq: NDArray[Any] | None = None,
    ) -> Iterator[Rows]:
        """Append ``tokens`` at ``positions`` to ``sequences`` and yield the logits after each ``wanted`` token.

        All arrays have shape (n,). A token is shared by ``n_seq`` sequences, numbered from ``sequences`` on (one if
        not given; see `shares_tokens`). Work is done as the iterator advances, in as few batches as fit.
        """

        def prepare(rows: slice, of_batch: NDArray[np.bool_]) -> None:
            if self._scoring and rows.stop > rows.start:  # it costs new graphs: not for a mere prefill
                self._llama.llama_set_score_targets(self._context, None, 0)
                self._scoring = False

        n_seq = np.ones(len(tokens), np.int64) if n_seq is None else n_seq
        for rows in self._decode((tokens, positions, sequences, wanted, n_seq), prepare):
            address = self._llama.llama_get_logits(self._context)
            yield Rows(rows, np.ctypeslib.as_array(address, (rows.stop - rows.start, self.n_vocab)))

    def _decode(self, part: Part, prepare: Callable[[slice, NDArray[np.bool_]], None]) -> Iterator[slice]:
        """Compute batch by batch, after ``prepare`` of its wanted rows, and yield which these are if there are any."""
        tokens, positions, sequences, wanted, n_seq = part
        batch = self._batch
        seen = np.concatenate(([0], np.cumsum(wanted)))  # wanted rows before each token
        start = 0
        while start < len(tokens):
            fits = int(np.searchsorted(seen, seen[start] + self._max_outputs, side="right")) - 1
            stop = min(start + self.n_batch, fits, len(tokens))
            if stop == len(tokens) - 1 and stop > start + 1:
                stop -= 1  # ggml's attention on a CPU rounds a lone token by the number of threads
            n = stop - start
            batch.token[:n] = tokens[start:stop]
            batch.pos[:n] = positions[start:stop]
            batch.set_sequences(sequences[start:stop], n_seq[start:stop])
            batch.logits[:n] = wanted[start:stop]
            batch.struct.n_tokens = n
            rows = slice(int(seen[start]), int(seen[stop]))
            log.clear()
            prepare(rows, wanted[start:stop])
            code = self._llama.llama_decode(self._context, batch.struct)
            if code == 1:
                raise LropeError(f"{self.path}: more tokens than the context of {self.n_ctx} can hold")
            if code:
                raise LropeError(f"{self.path}: llama.cpp failed to decode (code {code}): {log.reason()}")
            if rows.stop > rows.start:
                yield rows
            start = stop
