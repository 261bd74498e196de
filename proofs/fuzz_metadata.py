"""Hostile GGUF files against the patched loader, under AddressSanitizer and UndefinedBehaviorSanitizer.

python proofs/fuzz_metadata.py                      build with sanitizers, run all cases and 10,000 mutants
python proofs/fuzz_metadata.py --mutants 100000 --minutes 60 --seed 7

Structured cases are bad in one known way: the loader must refuse them with a message that names the key and, for a
bad value, the layer. Mutants are files whose header was damaged at random: they may load or be refused. Each file is
loaded, used and freed in a process of its own (fuzz_loader.cpp); a signal, a report of a sanitizer, a leak or an
allocation above 512 MB is a crash. A file that crashes goes to the unpatched library too: what crashes there in the
same way is llama.cpp's own, everything else is ours, and the exit status tells.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import native_build
from support.commands import CommandError, run, script, table
from support.hostile_metadata import (
    DAMAGED,
    Case,
    Outcome,
    complaint,
    mutants,
    parse_output,
    seed_model,
    structured_cases,
)
from support.rope_models import YARN

# a report ends the process. NDEBUG as in a release build. Without enum: llama.cpp's reader loads the types of a file
# into enumerations and checks them afterwards, so that every file with an unknown type would end there.
FLAGS = (
    "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=enum "
    "-fno-sanitize-recover=undefined"
)
OPTIONS = (
    "CMAKE_BUILD_TYPE=None", f"CMAKE_C_FLAGS={FLAGS}", f"CMAKE_CXX_FLAGS={FLAGS}", "GGML_NATIVE=OFF",
    "GGML_OPENMP=OFF", "GGML_LLAMAFILE=OFF", "GGML_CPU_REPACK=OFF", "LLAMA_BUILD_COMMON=OFF", "LLAMA_BUILD_TOOLS=OFF",
    "LLAMA_BUILD_SERVER=OFF",
)  # fmt: skip
ENVIRONMENT = {
    "ASAN_OPTIONS": "exitcode=99:detect_leaks=1:max_allocation_size_mb=512:allocator_may_return_null=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "GGML_NO_BACKTRACE": "1",
}
BATCH = 100
REASONS = 30  # lines of the table of refusals


def drive(driver: Path, cases: Sequence[Case]) -> list[Outcome]:
    """Run ``cases`` through a driver."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.gguf" for i in range(len(cases))]
        for path, case in zip(paths, cases, strict=True):
            path.write_bytes(case.file)
        result = subprocess.run(
            [driver], input="".join(f"{path}\n" for path in paths).encode(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=ENVIRONMENT,
        )  # fmt: skip
    outcomes = parse_output(result.stdout.decode(errors="replace"))
    if result.returncode or len(outcomes) != len(paths):
        raise CommandError(f"{driver} ended with status {result.returncode} after {len(outcomes)} files")
    return [outcomes[str(path)] for path in paths]


def build_driver(source: Path, work: Path) -> Path:
    """Build the library of ``source`` and the driver on it, both with sanitizers."""
    libraries = native_build.build(source, work / "build", ["llama"], OPTIONS)
    driver = work / "fuzz_loader"
    stock = [] if "llama_set_rope_layer_factors" in (source / "include" / "llama.h").read_text() else ["-DLROPE_STOCK"]
    includes = [f"-I{source / folder}" for folder in ("include", "ggml/include")]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base"]
    code = native_build.PROJECT / "proofs" / "fuzz_loader.cpp"
    run(["c++", "-std=c++17", *FLAGS.split(), *stock, *includes, code, "-o", driver, *link])
    return driver


def reason(message: str) -> str:
    """The kind of a refusal: its first message, with numbers, types and names taken out."""
    first = next((part for part in message.split("; ") if part), "(no message)")
    text = re.sub(r"^.*error loading model: ", "", first)
    text = re.sub(r"'[^']*'|(?<=not found in model: ).*", "'...'", text)
    text = re.sub(r"\S*/\S*\.gguf", "FILE", text)
    text = re.sub(r"(?<=type )([uif]\d+|bool|str|arr)\b", "TYPE", text)
    return re.sub(r"-?\b(nan|inf|\d[\d.]*(e[+-]?\d+)?)\b", "N", text)[:160]


@dataclass
class Results:
    cases: list[tuple[Case, Outcome]]
    crashes: list[tuple[Case, Outcome]]

    def add(self, cases: Sequence[Case], outcomes: Sequence[Outcome]) -> None:
        """Take the results of a batch; only crashes keep their files."""
        for case, outcome in zip(cases, outcomes, strict=True):
            if outcome.verdict == "crash":
                self.crashes.append((case, outcome))
            self.cases.append((replace(case, file=b""), outcome))


def run_all(driver: Path, cases: Iterator[Case], jobs: int, deadline: float) -> Results:
    """Run batches of ``cases`` in ``jobs`` threads until they or the time end."""
    results, started, last = Results([], []), time.monotonic(), 0.0
    with ThreadPoolExecutor(jobs) as pool:
        while time.monotonic() < deadline:
            batches = [batch for _ in range(jobs) if (batch := list(itertools.islice(cases, BATCH)))]
            if not batches:
                break
            for batch, outcomes in zip(batches, pool.map(lambda batch: drive(driver, batch), batches), strict=True):
                results.add(batch, outcomes)
            elapsed = time.monotonic() - started
            if elapsed - last > 10:
                last = elapsed
                print(f"{len(results.cases)} files, {len(results.crashes)} crashes, {elapsed:.0f} s", flush=True)
    return results


def tables(results: Results, stock: Sequence[Outcome]) -> str:
    """Markdown tables of the outcomes, the refusals and the crashes."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    refusals: dict[str, Counter[bool]] = defaultdict(Counter)
    for case, outcome in results.cases:
        by_kind[case.kind][outcome.verdict] += 1
        if outcome.verdict == "refused":
            refusals[reason(outcome.message)][case.kind == DAMAGED] += 1
    stock_crashes: Counter[str] = Counter()
    origins: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (case, outcome), other in zip(results.crashes, stock, strict=True):
        stock_crashes[case.kind] += other.verdict == "crash"
        origin = "llama.cpp" if same_crash(outcome, other) else "ours"
        origins[outcome.signature, origin].append(f"{case.kind}, {case.name}")
    counts = {kind: [n.total(), n["ok"], n["refused"], n["crash"], stock_crashes[kind]] for kind, n in by_kind.items()}
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [(kind, *numbers) for kind, numbers in counts.items()]
    parts = [table(("kind", "files", "loaded", "refused", "crashes patched", "of them stock too"), rows)]
    if refusals:
        common = sorted(refusals.items(), key=lambda item: -item[1].total())
        lines = [(text, n[False], n[True]) for text, n in common[:REASONS]]
        parts.append(table(("refusal", "structured cases", DAMAGED), lines))
        parts.append(f"and {len(common[REASONS:])} rarer ones")
    if origins:
        ranked = sorted(origins.items(), key=lambda item: -len(item[1]))
        found = [(what, origin, len(names), names[0]) for (what, origin), names in ranked]
        parts.append(table(("crash", "whose", "files", "for example"), found))
    return "\n\n".join(parts)


def same_crash(patched: Outcome, stock: Outcome) -> bool:
    return stock.verdict == "crash" and stock.signature == patched.signature


def keep_crashes(results: Results, folder: Path) -> None:
    """Write the files that crashed, each with its report, for study."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, (case, outcome) in enumerate(results.crashes):
        (folder / f"{i:04}.gguf").write_bytes(case.file)
        (folder / f"{i:04}.txt").write_text(f"{case.kind}, {case.name}\n{outcome.message}\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutants", type=int, default=10_000, metavar="N", help="damaged files (default: 10000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the damage (default: 1)")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after that time (default: 30)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument("--work", type=Path, default=native_build.WORK / "fuzz", help="folder for builds and crashes")
    parser.add_argument("--patched-driver", type=Path, help="fuzz_loader of an earlier run instead of a build")
    parser.add_argument("--stock-driver", type=Path, help="the same for the unpatched library")
    return parser.parse_args()


def main() -> int:
    """Run everything; 1 if a structured case fails, the time ends early or a crash is not llama.cpp's own."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    driver = args.patched_driver or build_driver(native_build.patched_source(), args.work / "patched")
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        models = [seed_model(Path(folder)), seed_model(Path(folder), YARN)]
        structured = structured_cases(Path(folder))
    damaged = mutants(models, args.seed, args.mutants)
    results = run_all(driver, itertools.chain(structured, damaged), args.jobs, deadline)

    stock: list[Outcome] = []
    if results.crashes:
        keep_crashes(results, args.work / "crashes")
        stock_driver = args.stock_driver or build_driver(native_build.fetch_source(), args.work / "stock")
        stock = drive(stock_driver, [case for case, _ in results.crashes])
    print(f"\n{tables(results, stock)}\n")

    wanted = len(structured) + args.mutants
    complaints = [text for case, outcome in results.cases if (text := complaint(case, outcome))]
    ours = [
        case for (case, outcome), other in zip(results.crashes, stock, strict=True) if not same_crash(outcome, other)
    ]
    for line in complaints:
        print(f"wrong: {line}")
    print(f"{len(results.cases)} of {wanted} files, {len(complaints)} wrong outcomes, {len(ours)} crashes of our own")
    return int(bool(complaints or ours or len(results.cases) < wanted))


if __name__ == "__main__":
    script(main)
