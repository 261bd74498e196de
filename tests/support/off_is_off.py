"""What two libraries compute with the same models, logits and graphs, bit for bit.

Each library, in a process of its own, decodes the same tokens: a prompt in batches, single tokens, and tokens after a
context shift.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.commands import CommandError, run, script
from support.llama_direct import log_errors

CONTEXTS = (64, 256)
N_BATCH, N_SINGLE, N_SHIFT = 48, 8, 16


@dataclass(frozen=True)
class Step:
    """One call of llama_decode: its tokens, its graph's nodes, and digests of operations and logits."""

    tokens: int
    nodes: int
    graph: str
    logits: str


@dataclass
class Comparison:
    """What two libraries did with one model and context length."""

    model: str
    n_ctx: int
    stock: list[Step]
    patched: list[Step]

    @property
    def same_graphs(self) -> bool:
        return [(s.tokens, s.nodes, s.graph) for s in self.stock] == [
            (s.tokens, s.nodes, s.graph) for s in self.patched
        ]

    @property
    def same_logits(self) -> bool:
        """All logits of all steps are equal, bit for bit."""
        return [s.logits for s in self.stock] == [s.logits for s in self.patched]


def decode(model_path: Path, n_ctx: int, n_threads: int) -> list[Step]:
    from llama_cpp import llama_cpp as lib

    lib.llama_log_set(log_errors, ctypes.c_void_p(0))
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(model_path).encode(), params)
    if not model:
        raise CommandError(f"{model_path}: not loaded")
    graph = _Graph(lib._lib)
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_BATCH, N_BATCH
    params.n_threads = params.n_threads_batch = n_threads
    params.no_perf = True
    params.cb_eval = graph.callback = lib.ggml_backend_sched_eval_callback(graph.see)
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise CommandError(f"{model_path}: no context")
    memory = lib.llama_get_memory(context)
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    steps: list[Step] = []
    draw = random.Random(n_ctx)

    def step(n_tokens: int, start: int) -> None:
        batch = lib.llama_batch_init(n_tokens, 0, 1)
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = draw.randrange(n_vocab), start + i, 1, 1
            batch.seq_id[i][0] = 0
        graph.reset()
        status = lib.llama_decode(context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise CommandError(f"{model_path}: llama_decode returned {status}")
        logits = ctypes.string_at(lib.llama_get_logits(context), 4 * n_tokens * n_vocab)
        steps.append(Step(n_tokens, graph.nodes, graph.digest.hexdigest(), hashlib.sha256(logits).hexdigest()))

    n_prompt = n_ctx - N_SINGLE
    for start in range(0, n_prompt, N_BATCH):
        step(min(N_BATCH, n_prompt - start), start)
    for start in range(n_prompt, n_ctx):
        step(1, start)
    if memory and lib.llama_memory_can_shift(memory) and lib.llama_memory_seq_rm(memory, 0, 1, 1 + N_SHIFT):
        lib.llama_memory_seq_add(memory, 0, 1 + N_SHIFT, -1, -N_SHIFT)
        step(N_SHIFT, n_ctx - N_SHIFT)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return steps


class _Graph:
    """Counts the nodes that the scheduler computes and hashes their operations, shapes and names in order."""

    def __init__(self, lib: Any) -> None:
        self.lib = lib
        for name, result in (
            ("ggml_op_desc", ctypes.c_char_p),
            ("ggml_get_name", ctypes.c_char_p),
            ("ggml_nbytes", ctypes.c_size_t),
        ):
            getattr(self.lib, name).argtypes, getattr(self.lib, name).restype = [ctypes.c_void_p], result
        self.callback: Any = None
        self.reset()

    def reset(self) -> None:
        self.nodes, self.digest = 0, hashlib.sha256()

    def see(self, tensor: int, ask: bool, _: object) -> bool:
        if ask:
            self.nodes += 1
            name = self.lib.ggml_get_name(tensor)
            self.digest.update(b"%s %d %s\n" % (self.lib.ggml_op_desc(tensor), self.lib.ggml_nbytes(tensor), name))
        return False


def compare(
    models: Sequence[Path], stock: Path, patched: Path, contexts: Sequence[int] = CONTEXTS, n_threads: int = 1
) -> list[Comparison]:
    for folder in (stock, patched):
        if not list(folder.glob("libllama.*")):
            raise CommandError(f"{folder}: no libllama")
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    result = []
    for model in models:
        for n_ctx in contexts:
            command = [sys.executable, "-m", "support.off_is_off", str(model), str(n_ctx), str(n_threads)]
            steps = []
            for folder in (stock, patched):
                output = run(command, env=environment | {"LLAMA_CPP_LIB_PATH": str(folder.resolve())}).stdout
                steps.append([Step(**step) for step in json.loads(output.splitlines()[-1])])
            result.append(Comparison(model.stem, n_ctx, *steps))
    return result


def tiny_models(folder: Path) -> list[Path]:
    """The random models of the tests, one for each kind of RoPE."""
    try:
        from support.rope_models import MODELS
    except ImportError as error:
        raise CommandError(f"the models of the tests need the extra 'test': {error}") from None
    return [model.write(folder / f"{model.name}.gguf") for model in MODELS]


def main() -> None:
    model, n_ctx, n_threads = sys.argv[1:]
    print(json.dumps([vars(step) for step in decode(Path(model), int(n_ctx), int(n_threads))]))


if __name__ == "__main__":
    script(main)
