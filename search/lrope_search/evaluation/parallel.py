"""How to divide the cores: workers side by side, threads of each, and which division is the fastest here and now.

Threads of one worker wait for each other after every operation of the graph. On an idle machine that costs little.
Where other programs want the same cores, a thread that waits for its turn stops all the others, and workers of one
thread each are many times as fast. So it is measured, on the model itself, when a search or a measurement begins. The
choice changes the time alone: batches are the same, and llama.cpp computes the same bits with any number of threads.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ..machine import free_memory
from .memory import memory_needed
from .model import CPU_BATCH, Model

_LEAST, _MOST = 3, 7  # rounds
_SECONDS = 1.0  # after so long, and `_LEAST` rounds, there is no further one; after four times as long, none at all
_TRIAL_SECONDS = 0.03  # computing by one thread, in a trial: longer than the time slices of Linux
_FEWEST_TOKENS = 8
_HOPELESS = 3.0  # so many times slower than the best: not tried again


@dataclass(frozen=True, order=True)
class Parallelism:
    """A division of the cores: ``n_workers`` at work side by side, with ``n_threads`` each."""

    n_workers: int
    n_threads: int

    def __str__(self) -> str:
        threads = "1 thread" if self.n_threads == 1 else f"{self.n_threads} threads"
        return f"1 worker with {threads}" if self.n_workers == 1 else f"{self.n_workers} workers with {threads} each"


Rates = Mapping[Parallelism, float]
"""Tokens per second, of all workers together."""


def divisions(n_cores: int, n_workers: int | None, n_threads: int | None) -> tuple[Parallelism, ...]:
    """Return the divisions that are worth a trial; what the user has said stands (None: nothing).

    ``n_threads`` are those of all workers together. One of a single worker is always among them: every opening begins
    with one. More workers than cores are not worth a trial.
    """
    if n_threads is not None or n_workers is not None:
        n = n_workers or 1
        most = max(1, (n_threads or n_cores) // n)
        threads = [most] if n_threads is not None else _powers(most)
        workers = (1, n) if n <= n_cores else (1,)
        return tuple(dict.fromkeys(Parallelism(w, t) for t in threads for w in workers))
    alone = [Parallelism(1, t) for t in (1, max(1, n_cores // 2), n_cores)]
    full = [Parallelism(w, n_cores // w) for w in _powers(n_cores)]
    return tuple(sorted({*alone, *full}))


def _powers(most: int) -> list[int]:
    """Return the powers of two below ``most``, and itself."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def fastest(rates: Rates, *, start_seconds: float = 0.0, n_tokens: float = float("inf")) -> Parallelism:
    """Return the division that is done first with ``n_tokens``, the one of fewest workers if it is about as fast.

    ``start_seconds``: what it takes until several workers are ready; a single one is there already.
    """

    def seconds(division: Parallelism) -> float:
        computing = 1.0 / rates[division]
        return computing + (start_seconds / n_tokens if division.n_workers > 1 else 0.0)

    best = min(map(seconds, rates))
    return min(division for division in rates if seconds(division) <= 1.1 * best)


def compare_rates(
    choices: Sequence[Parallelism],
    trial: Callable[[Parallelism], float],
    *,
    seconds: float = _SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Parallelism, float]:
    """Return the median rate of each choice over rounds of ``trial``, which returns one rate.

    The choices take turns, so that what else the machine does meets all of them, and of several rounds the median
    counts: a hiccup decides nothing. What is `_HOPELESS` twice, or once for ``seconds``, is not tried again. It takes
    about ``seconds``; four times as long, and the longest round, at most.
    """
    found: dict[Parallelism, list[float]] = {choice: [] for choice in choices}
    going, rates = list(choices), dict[Parallelism, float]()
    begin = clock()
    for n in range(1, _MOST + 1):
        slow = set()
        for choice in going:
            before = clock()
            found[choice].append(trial(choice))
            if clock() - before > seconds:
                slow.add(choice)
        rates = {choice: statistics.median(of_choice) for choice, of_choice in found.items()}
        best = max(rates.values())
        going = [c for c in going if max(found[c]) * _HOPELESS >= best or (n == 1 and c not in slow)]
        elapsed = clock() - begin
        if (len(going) == 1 and n > 1) or elapsed > (seconds if n >= _LEAST else 4.0 * seconds):
            break
    return rates


def measure_rates(model: Model, choices: Sequence[Parallelism]) -> dict[Parallelism, float]:
    """Compute some tokens in every division of ``choices`` and return the rates, in about a second.

    Workers are threads of this process here, each with a context of its own on the loaded model: what they compute and
    how they disturb each other is the same. Divisions whose contexts would take more than half of the free memory are
    left out.
    """
    n_tokens, times = _trial_size(model)
    free = free_memory()
    if free is not None:
        with model.without_weights() as empty, empty.another_context(n_batch=n_tokens) as small:
            needed = memory_needed(small, n_tokens, 1)
        most = free // (2 * max(1, needed.kv_cache + needed.compute))
        choices = [choice for choice in choices if choice.n_workers <= max(1, most)]
    with ExitStack() as stack:
        most = max(choice.n_workers for choice in choices)
        pool = stack.enter_context(ThreadPoolExecutor(most))
        contexts = [stack.enter_context(_small_context(model, n_tokens)) for _ in range(most)]

        def trial(choice: Parallelism) -> float:
            side_by_side = contexts[: choice.n_workers]
            for context in side_by_side:
                context.set_threads(choice.n_threads)
            elapsed = _side_by_side(pool, [_computing(context, n_tokens, times) for context in side_by_side])
            return choice.n_workers * times * n_tokens / elapsed

        return compare_rates(choices, trial)


def _trial_size(model: Model) -> tuple[int, int]:
    """Return how many tokens a worker computes at once in a trial, and how often: about `_TRIAL_SECONDS` of a thread.

    As many at once as in an evaluation, unless that takes too long. One thread finds out: it waits for no other.
    """
    n_tokens, most = 1, min(model.n_batch, CPU_BATCH)
    while True:
        with _small_context(model, n_tokens) as context:
            compute = _computing(context, n_tokens, 1)
            compute()  # pages of the file, first touches
            elapsed = min(timeit.repeat(compute, number=1, repeat=2))
        if n_tokens >= most or elapsed > _TRIAL_SECONDS / 2.0:
            return max(n_tokens, min(_FEWEST_TOKENS, most)), max(1, round(_TRIAL_SECONDS / elapsed))
        n_tokens = min(4 * n_tokens, most)


def _small_context(model: Model, n_tokens: int) -> Model:
    """Return a context with room for ``n_tokens``, of one thread."""
    context = model.another_context(n_batch=n_tokens)
    context.n_threads = 1
    context.reserve(n_tokens, max_outputs=1)
    return context


def _computing(context: Model, n_tokens: int, times: int) -> Callable[[], None]:
    tokens = (np.arange(n_tokens) % context.n_vocab).astype(np.int32)

    def compute() -> None:
        for _ in range(times):
            context.clear()
            context.prefill(tokens)
            context.synchronize()

    return compute


def _side_by_side(pool: Executor, works: Iterable[Callable[[], None]]) -> float:
    """Do all of ``works`` at once and return the seconds until the last is done."""
    first, *others = works
    begin = time.perf_counter()
    waiting = [pool.submit(work) for work in others]
    first()
    for work in waiting:
        work.result()
    return max(time.perf_counter() - begin, 1e-9)
