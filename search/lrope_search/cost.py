"""Cost and precision of a search, reported before it begins."""

from __future__ import annotations

from collections.abc import Iterator

from lrope_gguf.errors import LropeError

from .evaluation.evaluator import Facts
from .evaluation.memory import MemoryNeeded
from .results.variation import variation_text
from .sample import Components, cheapest


def memory_text(memory: MemoryNeeded, n_workers: int) -> str:
    """Say what the workers will take."""
    workers = "the worker" if n_workers == 1 else f"each of {n_workers} workers"
    return f"memory: {_size(memory.weights)} for the model and {_size(memory.per_worker)} for {workers}"


def check_memory(memory: MemoryNeeded, n_workers: int, free: int | None) -> None:
    """Refuse workers on processors, who share the weights, if they need more than is ``free`` (None: unknown)."""
    needed = memory.of_workers(n_workers)
    if free is None or needed <= free:
        return
    most = (free - memory.weights) // max(memory.per_worker, 1)
    advice = f"give at most {most}" if most >= 1 else "give smaller contexts or free some memory"
    raise LropeError(
        f"--workers {n_workers}: need {_size(needed)} ({_size(memory.weights)} for the model, "
        f"{_size(memory.per_worker)} for each worker), but {_size(free)} are free; {advice}"
    )


def precision(found: Components, contexts: int, facts: Facts, n_tokens: int, measured_with: str) -> Iterator[str]:
    """Say how well ``contexts`` contexts of ``n_tokens`` tokens tell candidates apart, and what twice as well costs."""
    probes = facts.n_probes
    yield f"{variation_text(found, contexts, probes)}; measured with {measured_with}"
    probe_cost = (n_tokens - facts.longest) / max(probes - 1, 1)
    if found.within == 0.0 or probe_cost <= 0.0:
        return
    tokens, how = contexts * n_tokens, ""
    if facts.n_places > probes:
        error, cost = found.standard_error(contexts, probes) / 2.0, facts.longest - probe_cost
        most = facts.n_places
        contexts, probes = cheapest(found, error, places=most, context_cost=cost, probe_cost=probe_cost)
        how = f"--set TASK.probes={probes}, "
    else:
        contexts *= 4
    times = contexts * (facts.longest + (probes - 1) * probe_cost) / tokens
    yield f"half that error: {how}--set search_contexts={contexts}, {times:.1f} times the tokens per candidate"


def duration(hours: float) -> str:
    """Return hours in the unit that suits."""
    if hours >= 1.0:
        return f"{hours:.1f} hours"
    return f"{60.0 * hours:.0f} minutes" if hours >= 1.0 / 60.0 else f"{3600.0 * hours:.0f} seconds"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
