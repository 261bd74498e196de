"""What a change of level costs under dynamic RoPE scaling: seconds beside the prefill before it, and rounding.

Seconds: a prefill of N tokens, N being the length up to which the context is not scaled, then single tokens: the first
of them moves the scaling and turns all cached keys, the others do not. The floor is the time in which the keys are read
and written once at the copy speed of this machine.

Rounding: the level goes up and down again while nothing else changes, so that only the rounding of the turned keys
remains; the divergence of the next tokens from those of an untouched cache of the same type tells it, beside that of
the type itself from an F32 cache. Usage:

    python benchmarks/level_change.py MODEL... [--tokens 2048] [--threads N] [--cache-types f16 q8_0 q4_0]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tables import head, row, script

from lrope_search.evaluation.logits import RowWorkers, kl_divergences
from lrope_search.evaluation.memory import memory_needed
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.settings import CACHE_TYPES
from lrope_search.machine import physical_cores

README = Path(__file__).parent.parent / "README.md"
MORE = 64  # tokens whose distributions are compared
TURNS = (0, 2, 8, 32)


@contextmanager
def opened(path: str, n_tokens: int, kind: str, n_threads: int, scaling: str) -> Iterator[Model]:
    """A model with room for three times so many tokens, scaled beyond them."""
    options = {"rope_scaling": scaling, "yarn_orig_ctx": n_tokens, "cache_type_k": kind}
    with Model(path, n_threads=n_threads, llama_options=options) as model:
        model.reserve(3 * n_tokens, 2)
        yield model


def text_of(model: Model, n_tokens: int) -> NDArray[np.int32]:
    tokens = [*model.text_start(), *model.tokenize(README.read_text())]
    return np.resize(np.array(tokens, np.int32), n_tokens)


def append(
    model: Model, tokens: NDArray[np.int32], start: int, sequence: int = 0, rows: bool = False
) -> NDArray[np.float32]:
    """Decode ``tokens`` from position ``start``; logits of all of them, or none."""
    n = len(tokens)
    wanted = np.full(n, rows)
    parts = [logits.copy() for _, logits in model.decode(tokens, start + np.arange(n), np.full(n, sequence), wanted)]
    model.synchronize()
    return np.concatenate(parts) if parts else np.empty((0, model.n_vocab), np.float32)


def forget(model: Model, sequence: int) -> None:
    model._llama.llama_memory_seq_rm(model._memory, sequence, -1, -1)


def seconds(model: Model, tokens: NDArray[np.int32], start: int) -> float:
    begin = time.perf_counter()
    append(model, tokens, start)
    return time.perf_counter() - begin


def copy_rate() -> float:
    """Bytes a second that this machine copies."""
    source = np.ones(1 << 26, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return len(source) / min(times)


def cost_row(path: str, args: argparse.Namespace, kind: str, rate: float) -> str:
    """Seconds of one change of level."""
    with opened(path, args.tokens, kind, args.threads, args.scaling) as model:
        text = text_of(model, args.tokens + 8)
        changes, shares = [], []
        for _ in range(args.rounds):
            model.clear()
            prefill = seconds(model, text[: args.tokens], 0)
            first = seconds(model, text[args.tokens : args.tokens + 1], args.tokens)
            others = [seconds(model, text[i : i + 1], i) for i in range(args.tokens + 1, args.tokens + 8)]
            changes.append(first - statistics.median(others[1:]))
            shares.append(changes[-1] / prefill)
    # read and written: as much as keys and values of this type are together
    with Model(path, llama_options={"cache_type_k": kind, "cache_type_v": kind}, weights=False) as empty:
        floor = memory_needed(empty, args.tokens, 1).kv_cache / rate
    change, share = statistics.median(changes), statistics.median(shares)
    costs = f"{1e3 * change:.1f} ms", f"{1e3 * floor:.2f} ms", f"{100 * share:.2f} %"
    return row((Path(path).stem, kind, args.tokens, *costs))


def rounding_row(path: str, args: argparse.Namespace, kind: str) -> str:
    """Divergence by the number of times that the keys were turned."""
    rows: dict[int, NDArray[np.float32]] = {}
    n = args.tokens
    with opened(path, n, kind, args.threads, args.scaling) as model:
        text = text_of(model, n - MORE)
        for turns in TURNS:
            model.clear()
            append(model, text, 0)
            for _ in range(turns // 2):
                append(model, text[:1], 2 * n, sequence=1)  # a longer sequence: up
                forget(model, 1)
                append(model, text[:1], 0, sequence=1)  # and, with a short one, down
                forget(model, 1)
            rows[turns] = append(model, text[:MORE], len(text), rows=True)
    with opened(path, n, "f32", args.threads, args.scaling) as model:
        append(model, text, 0)
        exact = append(model, text[:MORE], len(text), rows=True)

    def divergence(base: NDArray[np.float32], other: NDArray[np.float32]) -> str:
        return f"{float(kl_divergences(base, other, RowWorkers(1)).mean()):.2e}"

    turned = [divergence(rows[0], rows[turns]) for turns in TURNS[1:]]
    return row((Path(path).stem, kind, divergence(exact, rows[0]), *turned))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+")
    parser.add_argument("--tokens", metavar="N", type=int, default=2048, help="not scaled up to these (%(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, default=physical_cores())
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    parser.add_argument("--scaling", choices=("dynamic", "dynamic-yarn"), default="dynamic-yarn")
    types = ["f16", "q8_0", "q4_0"]
    parser.add_argument("--cache-types", metavar="T", nargs="+", choices=list(CACHE_TYPES), default=types)
    args = parser.parse_args()
    rate = copy_rate()
    print(head("model", "keys", "tokens", "change of level", "floor", "share of the prefill"))
    for path in args.models:
        for kind in args.cache_types:
            print(cost_row(path, args, kind, rate), flush=True)
    turned = (f"turned {turns} times" for turns in TURNS[1:])
    print(f"\n{head('model', 'keys', 'type against F32', *turned)}")
    for path in args.models:
        for kind in args.cache_types:
            print(rounding_row(path, args, kind), flush=True)


if __name__ == "__main__":
    script(main)
