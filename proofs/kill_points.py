"""Kill a writer at every system call, and make every system call fail: the old file or the new one, whole.

    python proofs/kill_points.py [--every N] [--folder DIR]

Each case forks a process that writes a small model and stops it by ptrace(2) before and after every system call. One
run for each such stop kills it there (SIGKILL) and then looks: every file must be the old or the new one byte for
byte, nothing else may lie beside it but a temporary file, and a second, undisturbed run must give the new file and
leave nothing else. A second series makes each system call that takes a file fail with ENOSPC or EIO instead
(x86-64 only): then nothing but the files may be left, and the message must be one line. A third runs each case on a
file system in memory of every size from too small to large enough, and once more with the free space seen too late;
that needs the right to mount. Linux only.
"""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.commands import CommandError, script, table
from support.kill_points import Bench, Case, benches, can_fail, can_trace, small_disk

Row = list[tuple[str, list[str]]]


def series(bench: Bench, every: int) -> Iterator[tuple[str, Row]]:
    """Each way to break a case, with what came of it at each point."""
    yield "killed", [bench.kill(stop) for stop in range(1, bench.whole.stops + 1, every)]
    for error in (errno.ENOSPC, errno.EIO) if can_fail() else ():
        yield errno.errorcode[error], [bench.fail(*fault, error) for fault in bench.faults()[::every]]


def file_system(directory: Path) -> str:
    """Kind of the file system of a directory, as `stat` names it."""
    done = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "an unknown file system"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth point")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    if not can_trace():
        raise CommandError("processes cannot be traced here")
    parent = options.folder or Path(tempfile.gettempdir())
    problems: list[str] = []
    total, begin = 0, time.monotonic()
    print(
        f"Files on {file_system(parent)}, the small disk on tmpfs.\n\n{table(['case', 'what', 'points', 'found'], [])}"
    )

    def show(case: Case, what: str, row: Row) -> None:
        nonlocal total
        total += len(row)
        problems.extend(problem for _, found in row for problem in found)
        states = ", ".join(f"{n} {state}" for state, n in sorted(Counter(state for state, _ in row).items()))
        print(f"| {case.name} | {what} | {len(row)} | {states} |", flush=True)

    for bench in benches(parent=parent):
        for what, row in series(bench, options.every):
            show(bench.case, what, row)
    with small_disk() as disk:
        if disk is None:
            print("full disk: skipped, cannot mount here", file=sys.stderr)
        else:
            for bench in benches(parent=disk):
                show(bench.case, "full disk", list(bench.full(disk, seen=True)))
                show(bench.case, "full disk, seen too late", list(bench.full(disk, seen=False)))
    print(f"\n{total} points in {time.monotonic() - begin:.0f} s; wrong: {len(problems)}")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    script(main)
