"""Tiny models of every architecture, replayed in torch and held against what llama.cpp computes.

llama.cpp computes with caches in float32 and without fused attention, the replay the graph with fused attention in
float64: what differs is llama.cpp's rounding to float32, and ggml's tables of activation functions in float16.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError
from lrope_search.gradient.capture import Capture, Graph
from lrope_search.gradient.replay import Replay, Variables
from support.arch_models import N_VOCAB, Fixture, LeanModel, Model, Session, _values

N_TOKENS = 24
EQUAL = 1e-2
"""Of the logits' standard deviation."""


class FixtureWeights:
    """What `lrope_search.gradient.weights.Weights` is to a file."""

    def __init__(self, model: Model, dtype: Any = torch.float64) -> None:
        self.dtype, self.device = dtype, torch.device("cpu")
        self._tensors = model.tensors
        self._values: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            shape = tuple(reversed((*self._tensors[name], 1, 1, 1)[:4]))
            values = _values(name, math.prod(shape)).reshape(shape)
            self._values[name] = torch.from_numpy(values.copy()).to(self.dtype)
        return self._values[name]

    def activation_block(self, name: str) -> int | None:
        return None


def tokens(n: int = N_TOKENS) -> NDArray[np.int32]:
    """Those that `Session.process` computes."""
    return np.array([1 + (7 * i) % (N_VOCAB - 2) for i in range(n)], np.int32)


def capture(model: Any, n: int = N_TOKENS, *, flash: bool = True) -> Graph:
    """The graph of a batch of `tokens`."""
    part = (tokens(n), np.arange(n), np.zeros(n, np.int64), np.ones(n, np.bool_), np.ones(n, np.int64))
    with Capture(model, n_tokens=max(n, 32), flash=flash) as graphs:
        return graphs(part)


class Replayed(NamedTuple):
    """What became of one architecture."""

    error: str
    """Why it cannot be replayed; empty if it was."""
    distance: float
    """The largest difference of logits, in their standard deviations."""
    by_factors: bool
    """Whether the logits have a derivative by any factor."""

    @property
    def verdict(self) -> str:
        if self.error:
            return f"missing: {self.error}"
        return "equal" if self.distance < EQUAL else f"differs by {self.distance:.1e}"


_NO_ROPE = "this model has no RoPE"
_OPERATIONS = {
    "GATED_DELTA_NET": "qwen35 qwen3next qwen35moe bailingmoe3 bailingmoe3-text",
    "SSM_SCAN": "plamo2 falcon-h1 granitehybrid granitehybrid-moe",
    "LIGHTNING_INDEXER": "deepseek32 glm-dsa dots3note hy_v4",
    "DSV4_HC_PRE": "qwen4exp deepseek4",
    "POOL_2D": "minimax-m3",
    _NO_ROPE: (
        "gpt2 mpt starcoder refact bloom mamba mamba2 jamba jais nemotron_h rwkv6 rwkv6qwen2 rwkv7 arwkv7 "
        "nemotron_h_moe kimi-linear kimi-k3 glm5-next baichuan-alibi granite-no-rope granitehybrid-no-rope "
        "graniteswitch-no-rope"
    ),
}
NO_REPLAY = {name: missing for missing, names in _OPERATIONS.items() for name in names.split()}
"""What is missing, by the names of the fixtures."""
NO_FLASH = frozenset(("plm",))
"""llama.cpp aborts where it makes a context with fused attention for them."""


def made(fixture: Fixture, folder: Path) -> Model:
    """The model with all tensors that it can have."""
    return Model(fixture) if fixture.virtual and not fixture.file_first else LeanModel(fixture, folder)


def replayed(fixture: Fixture, folder: Path) -> Replayed:
    """Capture, replay, compare."""
    with made(fixture, folder) as model:
        with Session(model, type_k=0, type_v=0) as session:
            session.process(N_TOKENS)
            vocab = session.lib.llama.llama_model_get_vocab(model.handle)
            shape = N_TOKENS, session.lib.llama.llama_vocab_n_tokens(vocab)
            wanted = np.ctypeslib.as_array(session.lib.llama.llama_get_logits(session.handle), shape).copy()
        try:
            graph = capture(model.handle, flash=fixture.arch not in NO_FLASH)
            replay = Replay(graph, FixtureWeights(model))
            variables = Variables.zeros(graph, dtype=torch.float64)
            got = replay(variables)
        except LropeError as error:
            return Replayed(str(error), math.nan, False)
        usual = np.abs(wanted) < 1e30  # not those of tokens that an architecture never writes
        distance = float(np.abs(got.detach().numpy() - wanted)[usual].max() / wanted[usual].std())
        if not got.requires_grad:
            return Replayed("", distance, False)
        got[:, torch.from_numpy(usual[0])].square().mean().backward()
        grad = variables.factors.grad
        return Replayed("", distance, grad is not None and bool((grad != 0).any()))


def decoders() -> list[str]:
    """Names of the fixtures that are asked for tokens and answer with logits."""
    from support.arch_models import FIXTURES

    embeds = {"llama-embed"}  # its logits are the embeddings
    asked = {name: f for name, f in FIXTURES.items() if f.graphs in ("decoder", "vision") and not f.follows}
    return [name for name in asked if name not in embeds]
