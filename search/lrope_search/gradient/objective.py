"""Log-probabilities of answers and divergence on ordinary text with their derivatives, and the replay's check."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model

from ..evaluation.batch import MAX_SEQUENCES, Part, Tokens
from ..evaluation.encoding import Encoding
from ..evaluation.model import Model
from ..machine import free_memory
from ..scores import ContextScore, ProbeScore, depth_weight
from .capture import Capture, Graph
from .replay import Replay, Variables, answers
from .rotation import Coherence
from .variables import Heads
from .weights import Weights

Values = NDArray[np.float64]
Tensor = Any

DIVERGENCE_NUMBERS = 1 << 24
"""The most probabilities that are compared on a text: 64 MB in float32, kept of each text."""
_TEXTS_KEPT = 8


class ReplayDisagreesError(LropeError):
    """The replay computes something else than llama.cpp: its derivatives are not to be trusted."""


class Gradient(NamedTuple):
    """A number and its derivatives by natural logarithms, at some factors and scales."""

    value: float
    """Nats."""
    factors: Values
    """By position factors, shape (layers, KV heads)."""
    scales: Values
    """By scales of queries, shape (layers, heads)."""
    probes: tuple[ProbeScore, ...] = ()
    """What the value is the mean of, if questions; depths are left at 0."""
    n_tokens: int = 0
    """Computed: three for each that is differentiated, else one."""


class Objective:
    """A model that is differentiated.

    Args:
        model: In llama.cpp, with its weights in the CPU's memory (``n_gpu_layers=0``); must outlive this.
        weights: The same model's, in torch.
        coherence: Which derivative.
        remat: See `Replay`.
        imitate: See `Replay`.
        scaled: See `Replay`.

    Raises:
        LropeError: llama.cpp makes no such context, or the weights would not fit into free memory.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        *,
        coherence: Coherence | None = None,
        remat: bool = True,
        imitate: bool = False,
        scaled: str = "queries",
    ) -> None:
        self._model, self._weights = model, weights
        self._how: dict[str, Any] = {"coherence": coherence, "remat": remat, "imitate": imitate, "scaled": scaled}
        self._capture: Capture | None = None
        self._room_for(0)
        self._base: dict[tuple[int, bytes], Tensor] = {}

    def __enter__(self) -> Objective:
        """Return it; leaving the block frees its context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the context."""
        if self._capture is not None:
            self._capture.close()

    @property
    def n_layer(self) -> int:
        """Number of layers of the model, of which each has a factor."""
        return self._model.n_layer

    def heads(self) -> Heads:
        """Return which variables there are; computes nothing.

        Raises:
            LropeError: the graph has no RoPE, or an operation that is not known.
        """
        n = 8
        part = np.zeros(n, np.int32), np.arange(n), np.zeros(n, np.int64), np.ones(n, np.bool_), np.ones(n, np.int64)
        heads = self._replay(self._graph(part)).heads
        if not heads.kv:
            raise LropeError(f"{self._model.path}: no layer of this model rotates; no gradients")
        info, layers = read_model(self._model.path), range(self._model.n_layer)
        n_head_kv = info.n_head_kv or [heads.keys.get(layer, heads.kv.get(layer, 0)) for layer in layers]
        n_head = info.n_head or [heads.queries.get(layer, 0) for layer in layers]
        return Heads(heads.kv, heads.queries, n_head_kv[: len(layers)], n_head[: len(layers)])

    def answers(
        self,
        encoding: Encoding,
        factors: Values,
        scales: Values | None = None,
        *,
        differentiate: bool = True,
        middle_weight: float = 0.0,
    ) -> Gradient:
        """Return the mean over questions, by `depth_weight`, of their answers' mean log-probability.

        Args:
            encoding: A context with its questions.
            factors: Natural logarithms, shape (layers, KV heads), or (layers, 1) for all heads of a layer.
            scales: Natural logarithms, shape (layers, heads); None: 0.
            differentiate: Else the derivatives are NaN.
            middle_weight: As of a search.
        """
        graph = self._graph(_part(encoding))
        variables = self._variables(graph, factors, scales)
        owner = torch.from_numpy(encoding.owner).to(self._weights.device)
        gold = torch.from_numpy(encoding.gold).long().to(self._weights.device)
        counts = torch.bincount(owner)
        with torch.set_grad_enabled(differentiate):
            scored = answers(self._replay(graph)(variables), gold)
            means = torch.zeros_like(counts, dtype=scored.log_p.dtype).index_add(0, owner, scored.log_p) / counts
            weights = torch.tensor([depth_weight(d, middle_weight) for d in encoding.depths]).to(means)
            value = (weights * means).sum() / weights.sum()
        wrong = torch.bincount(owner, (~scored.hit).double())
        probes = zip(means.tolist(), (wrong == 0).tolist(), strict=True)
        scores = tuple(ProbeScore(0.0, *probe) for probe in probes)
        return self._gradient(value, variables, differentiate, scores, encoding.n_tokens)

    def divergence(
        self,
        text: Tokens,
        factors: Values,
        scales: Values | None = None,
        *,
        differentiate: bool = True,
        first: int = 0,
    ) -> Gradient:
        """Return the KL divergence from the model as it is, a token, on ``text`` from a position on, with derivatives.

        As `answers` takes them. Of a large vocabulary it is that of fewer tokens, evenly spaced: `DIVERGENCE_NUMBERS`.
        """
        n = len(text)
        rows, n_rows = np.zeros(n, np.bool_), min(n - first, max(1, DIVERGENCE_NUMBERS // self._model.n_vocab))
        rows[np.linspace(first, n - 1, n_rows).astype(int)] = True
        graph = self._graph((np.asarray(text), np.arange(n), np.zeros(n, np.int64), rows, np.ones(n, np.int64)))
        replay = self._replay(graph)
        key = first, np.asarray(text, np.int32).tobytes()
        if key not in self._base:
            while len(self._base) >= _TEXTS_KEPT:
                del self._base[next(iter(self._base))]
            with torch.no_grad():
                self._base[key] = torch.log_softmax(replay(self._variables(graph, np.zeros_like(factors), None)), -1)
        variables = self._variables(graph, factors, scales)
        with torch.set_grad_enabled(differentiate):
            log_p = torch.log_softmax(replay(variables), -1)
            value = functional.kl_div(log_p, self._base[key], reduction="batchmean", log_target=True)
        return self._gradient(value, variables, differentiate, (), n)

    def n_bytes(self, text: Tokens) -> tuple[int, int, int]:
        """Return, without computing it, what a text takes: each layer computed again, all kept, and the inputs."""
        n = len(text)
        last = np.arange(n) == n - 1
        graph = self._graph((text, np.arange(n), np.zeros(n, np.int64), last, np.ones(n, np.int64)))
        again, kept = (Replay(graph, self._weights, remat=remat).n_bytes for remat in (True, False))
        inputs = {source for node in graph.nodes for source in node.sources if source is not None}
        return again, kept, sum(node.data.nbytes for node in inputs if node.data is not None)

    def _variables(self, graph: Graph, factors: Values, scales: Values | None) -> Variables:
        zeros = Variables.zeros(graph, dtype=self._weights.dtype, device=self._weights.device)
        with torch.no_grad():
            for tensor, values in ((zeros.factors, factors), (zeros.scales, scales)):
                if values is not None:
                    tensor.copy_(torch.from_numpy(np.broadcast_to(values, tensor.shape).copy()))
        return zeros

    def _gradient(
        self, value: Tensor, variables: Variables, differentiate: bool, probes: tuple[ProbeScore, ...], n: int
    ) -> Gradient:
        if differentiate:
            value.backward()
        factors, scales = (_derivative(tensor, differentiate) for tensor in (variables.factors, variables.scales))
        return Gradient(float(value.detach()), factors, scales, probes, 3 * n if differentiate else n)

    def _graph(self, part: Part) -> Graph:
        """Capture a batch, in a context that has room for it."""
        sizes = len(part[0]), int(np.count_nonzero(part[3]))
        capture = self._capture
        if capture is None or sizes[0] > capture.n_tokens or sizes[1] > capture.n_outputs:
            if capture is not None:
                capture.close()
                sizes = max(sizes[0], capture.n_tokens), max(sizes[1], capture.n_outputs)
            n_tokens, n_outputs = (size * 11 // 10 for size in sizes)  # others will be a little longer
            self._capture = capture = Capture(
                self._model.handle,
                n_tokens=n_tokens,
                n_outputs=n_outputs,
                n_seq=MAX_SEQUENCES,
                options=self._model.options,
                name=str(self._model.path),
            )
        return capture(part)

    def _replay(self, graph: Graph) -> Replay:
        replay = Replay(graph, self._weights, **self._how)
        self._room_for(replay.n_bytes)
        return replay

    def _free(self) -> int | None:
        """Bytes that torch may still take."""
        device = self._weights.device
        return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()

    def _room_for(self, activations: int) -> None:
        """Refuse what would not fit into memory."""
        free = self._free()
        needed = self._weights.n_bytes_missing + activations
        if free is not None and needed > free:
            raise LropeError(
                f"{self._model.path}: gradients need {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; "
                "ask for shorter contexts, or go without gradients"
            )


def _derivative(tensor: Tensor, differentiated: bool) -> Values:
    """What ``backward`` left: nothing where the graph does not depend on a variable."""
    if tensor.grad is None:
        return np.full(tensor.shape, 0.0 if differentiated else np.nan)
    derivative: Values = tensor.grad.double().cpu().numpy()
    return derivative


def _part(encoding: Encoding) -> Part:
    """A context with its questions, in one batch."""
    tokens, positions, sequences, wanted, n_seq = (
        np.concatenate(arrays) for arrays in zip(encoding.head(), encoding.tail(), strict=True)
    )
    return tokens, positions, sequences, wanted, n_seq


MEAN_WITHIN, SPREAD_WITHIN = 0.05, 0.35
"""How much of llama.cpp's mean (at least 1 nat) and of its spread over questions may be between it and the replay.

llama.cpp rounds activations to 8 bits and sums attention in float16; measured: 0.02 and 0.1.
"""


def check_agrees(replayed: Sequence[ProbeScore], reference: ContextScore) -> None:
    """Hold the replay of a context against llama.cpp's score of it, both with all factors 1.

    Raises:
        ReplayDisagreesError: they differ by more than llama.cpp's rounding.
    """
    ours, theirs = (np.array([probe.log_probability for probe in probes]) for probes in (replayed, reference.probes))
    difference = ours - theirs
    off, scatter = abs(float(difference.mean())), float(difference.std())
    most = MEAN_WITHIN * max(1.0, abs(float(theirs.mean())))
    spread = SPREAD_WITHIN * max(float(theirs.std()), 0.2)
    if not (off <= most and scatter <= spread):
        raise ReplayDisagreesError(
            f"the replay of the model's graph is {off:.2f} nats off llama.cpp, scattered by {scatter:.2f} (at most "
            f"{most:.2f} and {spread:.2f}); its gradients cannot be used"
        )
