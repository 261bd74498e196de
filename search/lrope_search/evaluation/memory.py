"""How much memory a model with its context takes, asked of llama.cpp, which need not load the weights for it."""

from __future__ import annotations

from dataclasses import dataclass

from .model import Model


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes, predicted. ``weights`` are the file's pages, which processes on one machine share on a CPU.

    ``own_weights`` are those that each process has for itself: on a device, or put into another order for the CPU.
    """

    weights: int
    kv_cache: int
    compute: int
    own_weights: int = 0

    @property
    def per_worker(self) -> int:
        """What each process needs for itself where the weights are shared."""
        return self.own_weights + self.kv_cache + self.compute

    def of_workers(self, n_workers: int) -> int:
        """What ``n_workers`` processes need together that share the weights."""
        return n_workers * self.per_worker + self.weights


def memory_needed(model: Model, n_ctx: int, n_seq: int = 12, *, score_on_device: bool = False) -> MemoryNeeded:
    """Return what ``model`` takes with a context of ``n_ctx`` tokens for ``n_seq`` sequences.

    ``model``: one without weights (`Model.without_weights`); it gets this context, of which nothing is allocated.
    Raises `LropeError`: llama.cpp cannot make such a context.
    """
    model.reserve(n_ctx, n_seq)
    weights, own_weights, kv_cache, compute = model.memory_size(score_on_device=score_on_device)
    return MemoryNeeded(weights, kv_cache, compute, own_weights)
