"""Speed of `lrope-gguf show`, `write` and folding beside the `gguf` package's scripts and `cp`, all from the shell.

    python benchmarks/metadata_speed.py [--model MODEL] [--rounds 7] [--folder DIR]

Without a model, one of 1.1 GB with a vocabulary of 152 thousand tokens is made. Every command is a process of its own,
its file is in the page cache, what was written before is on the disk, and the order is reversed from round to round.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import random
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tables import command, cpu_model, script, spread, table

from lrope_gguf import CurveFile, read_model
from lrope_gguf.errors import LropeError

PROJECT = Path(__file__).resolve().parent.parent
LAYERS, HEADS, WIDTH = 32, 16, 2048
MEGABYTES, VOCABULARY = 1100, 151_936  # the model that is made where none is given
HEADER, COSTS = ("command", "seconds, median (range)"), ("processor, s", "peak memory, MiB")
SLOW = 3  # rounds of what takes many seconds


class Run(NamedTuple):
    """Wall time, processor time and peak memory of a process."""

    seconds: float
    processor: float
    peak: int


class Arm(NamedTuple):
    """A command with what must be done before it, untimed; in the first `most` rounds only, if it takes long."""

    name: str
    command: list[str]
    prepare: Callable[[], object]
    most: int = 10**6


def measure(command: Sequence[str]) -> Run:
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT
            )
        except OSError as error:
            raise LropeError(f"{command[0]}: {error.strerror}") from None
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace").strip()[-2000:]
            raise LropeError(f"{shlex.join(command)} failed:\n{text}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def compare(arms: Sequence[Arm], rounds: int, what: str) -> dict[str, list[Run]]:
    """Run all arms in turn, after a first round that does not count."""
    results: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    for number in range(rounds + 1):
        for arm in arms if number % 2 else reversed(arms):
            if number > arm.most:
                continue
            arm.prepare()
            run = measure(arm.command)
            if number:
                results[arm.name].append(run)
        print(f"{what}: round {number} of {rounds}", file=sys.stderr)
    return results


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def seconds(runs: Sequence[Run]) -> str:
    return spread([run.seconds for run in runs])


def processor(runs: Sequence[Run]) -> str:
    """Median of the processor times in seconds: what a busy machine does not change much."""
    return f"{statistics.median(run.processor for run in runs):.3f}"


def peak(runs: Sequence[Run]) -> str:
    """The most memory of all runs, in MiB."""
    return f"{max(run.peak for run in runs) / 2**20:.0f}"


def verdict(ratio: float, goal: float, *, least: bool = False) -> str:
    met = ratio >= goal if least else ratio <= goal
    return f"{'at least' if least else 'at most'} {goal:g}: {'met' if met else 'MISSED'}"


# Commands


def ours(*words: str | Path) -> list[str]:
    """`lrope-gguf` as users start it, or as a module where it is not installed."""
    script = Path(sys.executable).with_name("lrope-gguf")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "lrope_gguf"]
    return [*start, *map(str, words)]


def theirs(name: str) -> str | None:
    script = Path(sys.executable).with_name(name)
    return str(script) if script.exists() else shutil.which(name)


def copying(source: Path, target: Path, *options: str) -> list[str]:
    line = f'cp {" ".join(options)} "$1" "$2" && sync "$2"'
    return ["sh", "-c", line, "sh", str(source), str(target)]


def settle(*paths: Path) -> None:
    """Everything written is on the disk, these files are in memory."""
    os.sync()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 20)
            while file.readinto(buffer):
                pass


def fresh_copy(source: Path, target: Path) -> None:
    """Make `target` a copy that shares no blocks with `source` and is as warm."""
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    settle(target)


# Tables


def reading(model: Path, rounds: int) -> str:
    dump = theirs("gguf-dump")
    show = Arm("`lrope-gguf show --json`", ours("show", "--json", model), lambda: settle(model))
    text = Arm("`lrope-gguf show`", ours("show", model), lambda: settle(model))
    floor = Arm("`python -c pass`", [sys.executable, "-c", "pass"], lambda: settle(model))
    arms = [show, text, floor]
    if dump:
        arms.append(Arm("`gguf-dump --no-tensors`", [dump, "--no-tensors", str(model)], lambda: settle(model), SLOW))
    results = compare(arms, rounds, "show")
    base = median(results[show.name])
    rows = []
    for name, runs in results.items():
        goal = ""
        if name.startswith("`gguf-dump"):
            goal = verdict(median(runs) / base, 20, least=True)
        elif name in (show.name, text.name):
            goal = verdict(median(runs), 0.15).replace("0.15", "0.15 s")
        rows.append([name, seconds(runs), f"{median(runs) / base:.2f}", processor(runs), peak(runs), goal])
    result = table([*HEADER, "ratio to show --json", *COSTS, "goal"], rows)
    return result if dump else f"{result}\n\ngguf-dump: skipped, the gguf package is not installed"


def writing(model: Path, folder: Path, rounds: int) -> str:
    """First write and rewrite beside `cp` and `gguf-new-metadata`."""
    names = ("plain", "work", "beside", "written", "copy", "other")
    plain, work, beside, written, copy, other = (folder / f"{name}.gguf" for name in names)
    fresh_copy(model, plain)
    measure(ours("remove", plain))
    fresh_copy(plain, written)
    measure(ours("write", written, "--uniform", "1.5"))
    scales = iter(range(1, 10**6))
    rewrite = ours("write", written, "--uniform", "1")

    def other_factors() -> None:
        rewrite[-1] = f"{1 + next(scales) / 1000:g}"
        settle(written)

    # the same for all that copy, for a disk that has just been written to may be slower
    def without(path: Path) -> Callable[[], None]:
        def prepare() -> None:
            path.unlink(missing_ok=True)
            fresh_copy(plain, work)

        return prepare

    first = Arm("first write", ours("write", work, "--uniform", "1.5"), lambda: fresh_copy(plain, work))
    output = Arm("first write, --output", ours("write", work, "--uniform", "1.5", "--output", beside), without(beside))
    cp = Arm("`cp`, fsync", copying(work, copy), without(copy))
    # what a first write must do at least: the system also gives the old file's blocks back
    replace = Arm("`cp`, fsync, `mv` over the model", copying(work, copy), without(copy))
    replace.command[2] += ' && mv "$2" "$1"'
    again = Arm("rewrite", rewrite, other_factors)
    arms = [first, cp, output, replace, again]
    script = theirs("gguf-new-metadata")
    if script:
        command = [script, "--force", "--general-name", "x", str(work), str(other)]
        arms.append(Arm("`gguf-new-metadata`", command, without(other), SLOW))
    results = compare(arms, rounds, "write")
    for path in (plain, work, beside, written, copy, other):
        path.unlink(missing_ok=True)
    base = median(results[first.name])
    goals = {
        arm.name: verdict(median(results[arm.name]) / median(results[cp.name]), 1.15).replace("1.15", "1.15 times cp")
        for arm in (first, output)
    } | {again.name: verdict(median(results[again.name]), 0.2).replace("0.2", "0.2 s")}
    if script:
        theirs_median = median(results["`gguf-new-metadata`"])
        goals["`gguf-new-metadata`"] = verdict(theirs_median / base, 3, least=True)
    rows = [
        [name, seconds(runs), f"{median(runs) / base:.2f}", processor(runs), peak(runs), goals.get(name, "")]
        for name, runs in results.items()
    ]
    result = table([*HEADER, "ratio to first write", *COSTS, "goal"], rows)
    result += "\n\n" + in_pairs(results, ((first, cp), (output, cp), (first, replace)))
    return result if script else f"{result}\n- gguf-new-metadata: skipped, the gguf package is not installed"


def in_pairs(results: dict[str, list[Run]], pairs: Sequence[tuple[Arm, Arm]]) -> str:
    """Ratios of runs of the same rounds, a line a pair."""
    lines = []
    for mine, yours in pairs:
        ratios = [a.seconds / b.seconds for a, b in zip(results[mine.name], results[yours.name], strict=True)]
        lines.append(
            f"- {mine.name} to {yours.name}, of the same rounds: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return "\n".join(lines)


def folding(model: Path, folder: Path, rounds: int) -> str:
    """Query scales folded and taken out, beside `cp`; where the model has heads that it can be told of."""
    info = read_model(model)
    if info.n_head is None:
        return "fold: skipped, the model does not say how many heads it has"
    plain, work, copy, folded = (folder / f"{name}.gguf" for name in ("plain", "work", "copy", "folded"))
    fresh_copy(model, plain)
    rng = random.Random(3)
    curve = folder / "curve.json"
    CurveFile(query_scales=tuple(tuple(rng.uniform(0.7, 1.4) for _ in range(n)) for n in info.n_head)).save(curve)
    fold = ("--curve", str(curve), "--fold", "--quiet")
    measure(ours("write", plain, *fold, "--output", folded))

    def without(path: Path, source: Path = plain) -> Callable[[], None]:
        def prepare() -> None:
            path.unlink(missing_ok=True)
            fresh_copy(source, work)

        return prepare

    cp = Arm("`cp`, fsync", copying(work, copy), without(copy))
    output = Arm("fold, --output", ours("write", work, *fold, "--output", copy), without(copy))
    first = Arm("fold", ours("write", work, *fold), lambda: fresh_copy(plain, work))
    back = Arm("remove, --output", ours("remove", work, "--output", copy), without(copy, folded))
    arms = [first, cp, output, back]
    results = compare(arms, rounds, "fold")
    same = subprocess.run(["cmp", "-s", plain, copy], check=False).returncode == 0
    base = median(results[cp.name])
    rows = []
    for name, runs in results.items():
        ratio = median(runs) / base
        goal = "" if name == cp.name else verdict(ratio, 1.2)
        rows.append([name, seconds(runs), f"{ratio:.2f}", processor(runs), peak(runs), goal])
    result = table([*HEADER, "ratio to cp", *COSTS, "goal"], rows)
    for path in (plain, work, copy, folded):
        path.unlink(missing_ok=True)
    pairs = in_pairs(results, ((first, cp), (output, cp), (back, cp)))
    return f"{result}\n\n{pairs}\n- the last copy is {'' if same else 'NOT '}the original, byte for byte"


def synthetic(path: Path, megabytes: int, vocabulary: int) -> None:
    """A model of queries and one large tensor, of data that no file system can compress, and of so many tokens."""

    def string(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    def array(key: str, item: int) -> bytes:
        return string(f"tokenizer.ggml.{key}".encode()) + struct.pack("<IIQ", 9, item, vocabulary)

    def words() -> Iterator[str]:
        letters = random.Random(2)
        for number in range(vocabulary):
            yield f"{''.join(letters.choices('etaoinshr', k=letters.randint(1, 12)))}{number % 1000}"

    queries = WIDTH * WIDTH // 32 * 18  # of a layer, as Q4_0
    items = (megabytes * 1_000_000 - LAYERS * queries) // 4
    block = random.Random(1).randbytes(1 << 20)
    finite = bytes(byte & 0x3B for byte in block)  # also where two of them are a float16
    with path.open("wb") as file:  # little by little: the peak memory of the commands begins with that of this process
        file.write(b"GGUF" + struct.pack("<IQQ", 3, LAYERS + 1, 8))
        file.write(string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama"))
        for key, value in (("block_count", LAYERS), ("attention.head_count", HEADS), ("embedding_length", WIDTH)):
            file.write(string(f"llama.{key}".encode()) + struct.pack("<II", 4, value))
        file.write(string(b"tokenizer.ggml.model") + struct.pack("<I", 8) + string(b"gpt2") + array("tokens", 8))
        file.writelines(string(word.encode()) for word in words())
        file.write(array("token_type", 5) + struct.pack("<i", 1) * vocabulary + array("merges", 8))
        file.writelines(string(f"{word[:1]} {word[1:]}".encode()) for word in words())
        for layer in range(LAYERS):
            name = string(f"blk.{layer}.attn_q.weight".encode())
            file.write(name + struct.pack("<IQQIQ", 2, WIDTH, WIDTH, 2, layer * queries))
        file.write(string(b"t") + struct.pack("<IQIQ", 1, items, 0, LAYERS * queries))
        file.write(bytes(-file.tell() % 32))
        for data, size in ((finite, LAYERS * queries), (block, 4 * items)):
            for start in range(0, size, len(data)):
                file.write(data[: size - start])


# Machine


def own_peak() -> int:
    """Peak memory of this process, which a child's counts from on Linux."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def file_system(folder: Path) -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", folder], capture_output=True, text=True, check=False)
        return done.stdout.strip() or "an unknown file system"
    return "an unknown file system"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="GGUF file with layers and RoPE, left as it is (default: made)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of every command (default: 7)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.model is not None and not args.model.is_file():
        parser.error(f"{args.model}: no such file")
    with tempfile.TemporaryDirectory(prefix="metadata-speed-", dir=args.folder) as name:
        folder = Path(name)
        if args.model is None:
            model = folder / "made.gguf"
            synthetic(model, MEGABYTES, VOCABULARY)
        else:
            model = args.model.resolve()
        print(command())
        print(f"{cpu_model()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python ", end="")
        print(f"{platform.python_version()}; model {model.name}, {model.stat().st_size / 1e6:.0f} MB; ", end="")
        print(
            f"files on {file_system(folder)}; load {math.ceil(os.getloadavg()[0] * 10) / 10:g} at the start; ", end=""
        )
        print(f"peak memory below {own_peak() >> 20} MiB, that of this process, cannot be seen\n", flush=True)
        print(f"{reading(model, args.rounds)}\n", flush=True)
        print(f"{writing(model, folder, args.rounds)}\n", flush=True)
        print(folding(model, folder, args.rounds), flush=True)


if __name__ == "__main__":
    script(main)
