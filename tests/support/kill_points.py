"""Kill a writer at a system call, or make a system call fail: the old file or the new one must be there, whole.

A case forks a process that writes a small model and stops it by ptrace(2) before and after every system call. Killed
at a stop (SIGKILL), it must leave every file as the old or the new one byte for byte, nothing else but a temporary
file, and a second, undisturbed run must give the new file and leave nothing else. Where a system call that takes a
file fails instead (x86-64 only), nothing but the files may be left, and the message must be one line; likewise on a
file system in memory that is too small, which needs the right to mount. Linux only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lrope_gguf import CurveFile, LropeError, Scaling, metadata, remove_factors, write_factors
from lrope_gguf.fold import Wanted
from support.foldable import SCALES, write_queries
from support.gguf_fixtures import write_model

TRACEME, CONT, POKEUSER, SYSCALL, SETOPTIONS, SYSCALL_INFO = 0, 7, 6, 24, 0x4200, 0x420E
SYSGOOD, EXITKILL = 1, 1 << 20
AT_ENTRY, AT_EXIT = 1, 2
ORIG_RAX, RAX = 15 * 8, 10 * 8  # offsets in struct user_regs_struct
YIELD = 24  # sched_yield: marks where the write begins and ends
NAMES = {
    **{0: "read", 1: "write", 2: "open", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek", 16: "ioctl", 17: "pread64"},
    **{18: "pwrite64", 21: "access", 73: "flock", 74: "fsync", 77: "ftruncate", 82: "rename", 87: "unlink"},
    **{89: "readlink", 90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 137: "statfs", 138: "fstatfs"},
    **{188: "setxattr", 190: "fsetxattr", 191: "getxattr", 193: "fgetxattr", 194: "listxattr", 196: "flistxattr"},
    **{217: "getdents64", 257: "openat", 262: "newfstatat", 263: "unlinkat", 264: "renameat", 265: "linkat"},
    **{267: "readlinkat", 326: "copy_file_range", 332: "statx", 269: "faccessat", 439: "faccessat2"},
}
FACTORS = (1.0, 1.25, 0.75, 1.1)
HEADS: dict[str, Any] = {"head_factors": ((1.25, 0.75),) * 4, "query_scales": ((1.0, 0.7, 1.3, 1.1),) * 4}
REVERSED: dict[str, Any] = {name: tuple(row[::-1] for row in rows) for name, rows in HEADS.items()}
LONG = CurveFile(layer_factors=FACTORS, provenance="long " * 2000).dumps(compact=True)
TEMPORARY = re.compile(r"\.lrope-[0-9a-f]{16}\.tmp")
DISK, PAGE = 1 << 20, 4096
Files = dict[str, bytes]


class Trace(NamedTuple):
    """What a traced run did.

    Attributes:
        stops: how often it was stopped.
        calls: number of each system call entered between the marks, and at which entry.
        code: exit status (0 done, 1 refused with a message, 2 any other error); -9 where killed.
        message: the error, if any.
    """

    stops: int
    calls: list[tuple[int, int]]
    code: int
    message: str


class Case(NamedTuple):
    """A write to break: how the files are made, and what is done with them."""

    name: str
    prepare: Callable[[Path], object]
    act: Callable[[Path], object]


def _without_unnamed_files(act: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        if hasattr(os, "O_TMPFILE"):
            del os.O_TMPFILE  # in the child alone
        return act(folder)

    return run


def _model(folder: Path) -> Path:
    return write_model(folder / "m.gguf")


def _model_with_factors(folder: Path) -> None:
    write_factors(_model(folder), FACTORS)


def _model_with_scaling(folder: Path) -> None:
    write_factors(_model(folder), FACTORS, scaling=Scaling("yarn", 4))


def _model_of_heads(folder: Path) -> Path:
    return write_model(folder / "m.gguf", keys={"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2})


def _model_with_heads(folder: Path) -> None:
    write_factors(_model_of_heads(folder), **HEADS)


def _model_and_another(folder: Path) -> None:
    _model(folder)
    (folder / "out.gguf").write_bytes(b"another file")


def _write(*factors: Sequence[float], output: str | None = None, **options: Any) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        target = None if output is None else folder / output
        return write_factors(folder / "m.gguf", *factors, output=target, **options)

    return act


def _remove(folder: Path) -> object:
    return remove_factors(folder / "m.gguf")


def _model_of_queries(folder: Path) -> Path:
    return write_queries(folder / "m.gguf")


def _fold(scales: Sequence[Sequence[float]]) -> Callable[[Path], object]:
    return _write(fold=Wanted(tuple(map(tuple, scales)), "best.json", replace=True))


def _folded(folder: Path) -> None:
    _model_of_queries(folder)
    _fold(SCALES)(folder)


# with mapped_ok: without the look at other processes, which takes a few system calls for each of them
CASES = (
    Case("first write", _model, _write(FACTORS)),
    Case("first write, named temporary", _model, _without_unnamed_files(_write(FACTORS))),
    Case("in place", _model_with_factors, _write(FACTORS[::-1], mapped_ok=True)),
    Case("longer document", _model_with_factors, _write(FACTORS, curve_json=LONG)),
    Case("removal", _model_with_factors, _remove),
    Case("copy over another file", _model_and_another, _write(FACTORS, output="out.gguf")),
    Case("scaling", _model, _write(scaling=Scaling("dynamic-yarn", 8))),
    Case(
        "another factor of the scaling, in place",
        _model_with_scaling,
        _write(FACTORS[::-1], scaling=Scaling("yarn", 8), mapped_ok=True),
    ),
    Case("another scaling", _model_with_scaling, _write(scaling=Scaling("dynamic", None, 2048))),
    Case("no scaling", _model_with_scaling, _write(scaling=Scaling("none"))),
    Case("removal of a scaling", _model_with_scaling, _remove),
    Case("numbers of heads", _model_of_heads, _write(**HEADS)),
    Case(
        "scales of queries, in place",
        _model_with_heads,
        _write(mapped_ok=True, **REVERSED),
    ),
    Case("removal of numbers of heads", _model_with_heads, _remove),
    Case("folding", _model_of_queries, _fold(SCALES)),
    Case("other scales than those that are folded", _folded, _fold(SCALES[::-1])),
    Case("removal of folded scales", _folded, _remove),
    Case("new copy", _model, _write(FACTORS, output="out.gguf")),
)


def _ptrace(request: int, process: int, address: int = 0, data: int | ctypes.Array[ctypes.c_char] = 0) -> None:
    call = _LIBC.ptrace
    call.restype = ctypes.c_long
    call.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    pointer = data if isinstance(data, int) else ctypes.addressof(data)
    if call(request, process, address, pointer) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_LIBC = ctypes.CDLL(None, use_errno=True)


def can_trace() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return trace(lambda: None).code == 0
    except OSError:
        return False


def can_fail() -> bool:
    return platform.machine() == "x86_64" and can_trace()


def trace(act: Callable[[], object], *, kill_at: int = 0, fail_at: int = 0, error: int = 0) -> Trace:
    """Run `act` in a child; kill it at stop `kill_at`, or let the system call of entry `fail_at` fail with `error`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(act, writing)
    os.close(writing)
    try:
        return _follow(child, reading, kill_at, fail_at, error)
    finally:
        os.close(reading)


def _child(act: Callable[[], object], writing: int) -> None:
    code, message = 2, ""
    try:
        _ptrace(TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.sched_yield()
        act()
        code = 0
    except LropeError as refusal:
        code, message = 1, str(refusal)
    except BaseException:
        message = traceback.format_exc()
    finally:
        os.sched_yield()
        os.write(writing, message.encode(errors="replace")[:60000])
        os._exit(code)


def _follow(child: int, reading: int, kill_at: int, fail_at: int, error: int) -> Trace:
    info = ctypes.create_string_buffer(88)
    stops = entries = marks = 0
    calls: list[tuple[int, int]] = []
    os.waitpid(child, 0)
    try:
        _ptrace(SETOPTIONS, child, 0, SYSGOOD | EXITKILL)
        passed_on = 0
        while True:
            _ptrace(SYSCALL, child, 0, passed_on)
            status = os.waitpid(child, 0)[1]
            if not os.WIFSTOPPED(status):
                break
            passed_on = 0
            if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
                passed_on = os.WSTOPSIG(status)
                continue
            stops += 1
            if stops == kill_at:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                break
            _ptrace(SYSCALL_INFO, child, len(info), info)
            if info.raw[0] == AT_ENTRY:
                entries += 1
                number = struct.unpack_from("=Q", info.raw, 24)[0]
                marks += number == YIELD
                if marks == 1 and number != YIELD:
                    calls.append((number, entries))
                if entries == fail_at:
                    _ptrace(POKEUSER, child, ORIG_RAX, -1)
            elif entries == fail_at and fail_at:
                _ptrace(POKEUSER, child, RAX, -error)
                fail_at = 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return Trace(stops, calls, os.waitstatus_to_exitcode(status), os.read(reading, 1 << 16).decode(errors="replace"))


def contents(folder: Path) -> Files:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


class Bench:
    """A folder in which one case is broken again and again."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        case.prepare(folder)
        self.old = contents(folder)
        self.reset()
        self.whole = trace(self._act)
        if self.whole.code:
            raise RuntimeError(self.whole.message)
        self.new = contents(folder)

    def _act(self) -> object:
        return self.case.act(self.folder)

    def reset(self) -> None:
        found = contents(self.folder)
        for name in found.keys() - self.old.keys():
            (self.folder / name).unlink()
        for name, data in self.old.items():
            if found.get(name) != data:
                (self.folder / name).write_bytes(data)

    def kill(self, stop: int) -> tuple[str, list[str]]:
        """Kill the case at a stop: which file was found ("old" or "new", "+ temporary"), and what is wrong."""
        self.reset()
        trace(self._act, kill_at=stop)
        found = contents(self.folder)
        litter = {name for name in found if TEMPORARY.fullmatch(name)}
        state, problems = self._state({name: data for name, data in found.items() if name not in litter})
        if litter:
            state += " + temporary"
        again = trace(self._act)
        if again.code:
            problems.append(f"the next write fails: {again.message}")
        elif contents(self.folder) != self.new:
            problems.append(f"after the next write: {sorted(contents(self.folder))}")
        return state, [f"{self.case.name}, killed at stop {stop}: {problem}" for problem in problems]

    def faults(self) -> list[tuple[int, int]]:
        return [(number, entry) for number, entry in self.whole.calls if number in NAMES]

    def fail(self, number: int, entry: int, error: int) -> tuple[str, list[str]]:
        """Let one system call fail: which file was found and how the writer ended, and what is wrong."""
        self.reset()
        done = trace(self._act, fail_at=entry, error=error)
        where = f"{NAMES[number]} (entry {entry}) fails with {errno.errorcode[error]}"
        return self._judge(done, where, litter_allowed=NAMES[number] == "unlink")

    def full(self, disk: Path, *, seen: bool) -> Iterator[tuple[str, list[str]]]:
        """Run the case on the small disk of its folder, at each size from that of its files to one that suffices."""

        def act() -> object:
            if not seen:
                vars(metadata)["free_bytes"] = lambda _: free  # in the child alone
            return self._act()

        free = shutil.disk_usage("/").free
        resize(disk, DISK)
        self.reset()
        least = shutil.disk_usage(disk).used
        for size in range(least, least + 2 * sum(map(len, self.new.values())) + 5 * PAGE, PAGE):
            resize(disk, DISK)
            self.reset()
            resize(disk, size)
            yield self._judge(trace(act), f"{size} bytes of space, {'seen' if seen else 'not seen'} before")
        resize(disk, DISK)

    def _judge(self, done: Trace, where: str, litter_allowed: bool = False) -> tuple[str, list[str]]:
        """Which file was found after a failure and how the writer ended, and what is wrong."""
        found = contents(self.folder)
        problems = []
        temporary = [name for name in found if TEMPORARY.fullmatch(name)]
        if temporary and not litter_allowed:
            problems.append("a temporary file is left")
        state, more = self._state({name: data for name, data in found.items() if name not in temporary})
        problems += more
        if done.code not in (0, 1) or "\n" in done.message:
            problems.append(f"exit status {done.code}: {done.message}")
        elif done.code == 0 and state != "new":
            problems.append("reported as done, but it is not")
        elif done.code == 1 and ("half changed" in done.message or (state == "new") != ("in place" in done.message)):
            problems.append(f"{state} file, but the message is: {done.message}")
        ended = "done" if done.code == 0 else "refused"
        return f"{state}, {ended}", [f"{self.case.name}, {where}: {problem}" for problem in problems]

    def _state(self, found: Files) -> tuple[str, list[str]]:
        if found == self.old:
            return "old", []
        if found == self.new:
            return "new", []
        return "neither", [f"neither the old files nor the new: { {name: len(data) for name, data in found.items()} }"]


def benches(cases: tuple[Case, ...] = CASES, parent: Path | None = None) -> Iterator[Bench]:
    """A bench for each case, in a folder that is removed after use."""
    for case in cases:
        folder = Path(tempfile.mkdtemp(prefix="kill-points-", dir=parent))
        try:
            yield Bench(case, folder)
        finally:
            shutil.rmtree(folder)


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """A file system in memory, for `resize`; None where it cannot be mounted."""
    with tempfile.TemporaryDirectory(prefix="kill-points-") as name:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "kill-points", name]
        try:
            mounted = not subprocess.run(command, check=False, capture_output=True).returncode
        except OSError:
            mounted = False
        try:
            yield Path(name) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", name], check=True)


def resize(disk: Path, size: int) -> None:
    """Give a file system in memory another size in bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
