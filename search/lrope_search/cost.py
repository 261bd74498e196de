"""What a search will take, said before it begins: memory, tokens, hours."""

from __future__ import annotations

from lrope_gguf.errors import LropeError

from .evaluation.memory import MemoryNeeded


def memory_text(memory: MemoryNeeded, n_workers: int) -> str:
    """Say what the workers will take."""
    return (
        f"memory: {_size(memory.weights)} for the model and {_size(memory.per_worker)} for each worker, "
        f"{n_workers} of them"
    )


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


def duration(hours: float) -> str:
    """Return hours in the unit that suits."""
    if hours >= 1.0:
        return f"{hours:.1f} hours"
    return f"{60.0 * hours:.0f} minutes" if hours >= 1.0 / 60.0 else f"{3600.0 * hours:.0f} seconds"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
