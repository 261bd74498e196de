"""Hostile GGUF files: mutants of small models against the header scanner, `show`, `write` and `remove`.

    python proofs/fuzz_gguf.py [--files 100000] [--jobs N] [--seed 0] [--keep DIR]

The seeds cover both versions and byte orders, alignments, nested arrays, split models, adapters and files without
tensors; the mutants flip bits, set bytes, lengths and types, splice, cut, repeat and nest. Every file must be read or
refused with one line that names it, within seconds and 64 MiB; where a model is accepted, a part of them is also shown,
written to another file and restored, byte for byte. Anything else is a finding. A mutant depends only on the seed and
its number; `--keep` stores those with findings.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.commands import CommandError, progress, script, table
from support.hostile_gguf import Seed, guarded, load, make_seeds, mutant

MEMORY = 64 << 20
BATCH = 500
EVERY = 4  # of the accepted files, one in so many is shown, written and restored


class _Worker(NamedTuple):
    seeds: list[Seed]
    folder: Path
    memory: int


_worker: _Worker | None = None


def _start(seeds: list[Path], folder: Path) -> None:
    """Load the seeds, run each once, and from then on allow `MEMORY` more."""
    global _worker
    own = folder / str(os.getpid())
    own.mkdir()
    loaded = [load(path) for path in seeds]
    for base in loaded:
        guarded(own / "mutant.gguf", base.data, deep=True)
    _worker = _Worker(loaded, own, _status("VmRSS"))
    if sys.platform == "linux":
        import resource

        limit = _status("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _status(name: str) -> int:
    """A size in /proc/self/status in bytes; 0 on other systems."""
    try:
        match = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) << 10 if match else 0


class _Batch(NamedTuple):
    kinds: Counter[str]
    messages: Counter[str]
    findings: list[tuple[int, str]]
    slowest: float
    memory: int


def _batch(seed: int, numbers: range, every: int) -> _Batch:
    assert _worker is not None
    result = _Batch(Counter(), Counter(), [], 0.0, 0)
    slowest = 0.0
    path = _worker.folder / "mutant.gguf"
    for number in numbers:
        data = mutant(_worker.seeds, seed, number)
        start = time.perf_counter()
        outcome = guarded(path, data, deep=number % every == 0)
        slowest = max(slowest, time.perf_counter() - start)
        result.kinds[outcome.kind] += 1
        if outcome.message:
            result.messages[outcome.message] += 1
        if outcome.finding:
            result.findings.append((number, outcome.finding))
    return result._replace(slowest=slowest, memory=_status("VmHWM") - _worker.memory)


def _run(seeds: list[Path], folder: Path, seed: int, files: int, jobs: int, every: int) -> Iterator[_Batch]:
    batches = [range(start, min(start + BATCH, files)) for start in range(0, files, BATCH)]
    # started afresh: a small process, so that the limit of memory means something
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (seeds, folder)) as pool:
        try:
            yield from pool.map(_batch, [seed] * len(batches), batches, [every] * len(batches))
        except BrokenProcessPool:
            raise CommandError("a process died; the finding is in one of the next batches") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="mutants to try (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a processor)")
    parser.add_argument("--seed", type=int, default=0, help="of all mutants (default: %(default)s)")
    parser.add_argument("--every", type=int, default=EVERY, help="show and write one in so many (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="store files with findings here")
    options = parser.parse_args()
    memory = Path("/dev/shm")  # no disk, so that fsync costs nothing
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        seeds = make_seeds(folder / "seeds")
        kinds: Counter[str] = Counter()
        messages: Counter[str] = Counter()
        findings: list[tuple[int, str]] = []
        slowest, peak, done, start = 0.0, 0, 0, time.perf_counter()
        for batch in _run(seeds, folder, options.seed, options.files, max(1, options.jobs), max(1, options.every)):
            kinds += batch.kinds
            messages += batch.messages
            findings += batch.findings
            slowest, peak = max(slowest, batch.slowest), max(peak, batch.memory)
            done += batch.kinds.total()
            if done % (20 * BATCH) == 0:
                progress(f"{done} files, {len(findings)} findings")
        seconds = time.perf_counter() - start
        if options.keep and findings:
            options.keep.mkdir(parents=True, exist_ok=True)
            loaded = [load(path) for path in seeds]
            for number, _ in findings[:100]:
                (options.keep / f"{options.seed}-{number}.gguf").write_bytes(mutant(loaded, options.seed, number))
    print(f"{done} mutants of {len(seeds)} files, seed {options.seed}: {len(findings)} findings\n")
    print(table(["outcome", "files"], kinds.most_common()))
    print(f"\n{table(['message', 'files'], messages.most_common(25))}\n")
    print(
        f"{done / seconds:.0f} files a second with {options.jobs} processes; slowest {slowest * 1000:.0f} ms; peak "
        f"memory {peak / 2**20:.1f} MiB above the start, limit {MEMORY >> 20} MiB"
    )
    shown: Counter[str] = Counter(re.sub(r"\d+", "N", finding) for _, finding in findings)
    if findings:
        print(f"\n{table(['finding', 'files'], shown.most_common(25))}")
        print("\nfirst: " + "; ".join(f"{number}: {finding}" for number, finding in findings[:5]))
    return 1 if findings else 0


if __name__ == "__main__":
    script(main)
