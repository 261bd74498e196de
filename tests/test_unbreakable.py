"""Writes that are killed, starved, or disturbed: the old file or the new one, whole, and nothing beside it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFWriter
from support import kill_points
from support.gguf_fixtures import LAYERS, header, names, number_pair, text_pair, write_model

from lrope_gguf import LropeError, files, metadata, read_factors, read_model, remove_factors, write_factors
from lrope_gguf.cli import main
from lrope_gguf.files import locked
from lrope_gguf.metadata import plan_remove, plan_write

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")

FACTORS = (1.0, 1.25, 0.75, 1.5)
CASES = {case.name: case for case in kill_points.CASES}
ROOT = os.name == "posix" and os.geteuid() == 0


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python that runs `code` and has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], *, kill: bool = False) -> int:
    if kill:
        process.kill()
    process.communicate("")
    return process.returncode


@pytest.mark.skipif(not kill_points.can_trace(), reason="processes cannot be traced here")
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_killed_or_failing_at_system_calls(name: str, every: int, tmp_path: Path) -> None:
    bench, offset = kill_points.Bench(CASES[name], tmp_path), len(name) % every
    assert bench.old != bench.new and bench.whole.stops > 60
    results = [bench.kill(stop) for stop in range(1 + offset, bench.whole.stops + 1, every)]
    if kill_points.can_fail():
        for error in (errno.ENOSPC, errno.EIO):
            results += [bench.fail(*fault, error) for fault in bench.faults()[offset::every]]
    assert not [problem for _, found in results for problem in found]
    assert {"old", "new"} <= {state for state, _ in results}


@pytest.mark.skipif(not kill_points.can_trace(), reason="processes cannot be traced here")
@pytest.mark.parametrize("name", ["copy over another file", "longer document", "removal", "folding"])
def test_full_disk_of_any_size(name: str) -> None:
    with kill_points.small_disk() as disk:
        if disk is None:
            pytest.skip("cannot mount here")
        for bench in kill_points.benches((CASES[name],), disk):
            for seen in (True, False):
                results = list(bench.full(disk, seen=seen))
                assert not [problem for _, problems in results for problem in problems]
                assert {state for state, _ in results} == {"old, refused", "new, done"}


def test_a_killed_writers_file_is_removed_by_the_next_and_nothing_else(model: Path) -> None:
    stale = model.with_name(".lrope-0123456789abcdef.tmp")
    stale.write_bytes(b"half")
    alive = model.with_name(".lrope-00000000000000ff.tmp")
    alive.write_bytes(b"half")
    others = [".lrope-x.tmp", ".lrope-0123456789abcdef.tmp.txt", "lrope-0123456789abcdef.tmp"]
    for name in others:
        model.with_name(name).touch()
    model.with_name(".lrope-aaaaaaaaaaaaaaaa.tmp").symlink_to(model.with_name(others[0]))
    with locked(alive):
        write_factors(model, FACTORS)
    assert names(model.parent) == sorted([alive.name, ".lrope-aaaaaaaaaaaaaaaa.tmp", "m.gguf", *others])
    remove_factors(model)
    assert alive.name not in names(model.parent)


def test_output_on_another_device(model: Path) -> None:
    with kill_points.small_disk() as disk:
        if disk is None:
            pytest.skip("cannot mount here")
        assert disk.stat().st_dev != model.stat().st_dev
        original = model.read_bytes()
        result = write_factors(model, FACTORS, output=disk / "o.gguf")
        assert result.bytes_shared == 0 and names(disk) == ["o.gguf"]
        assert plan_write(model, FACTORS, output=disk / "o.gguf").shares is False
        remove_factors(disk / "o.gguf", output=model.with_name("back.gguf"))
        assert model.with_name("back.gguf").read_bytes() == original


@pytest.mark.parametrize("chunk", [0, 50])
def test_no_space_for_a_change_in_place(model: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """As where the blocks are shared: no write succeeds, or only the first part of one; taking it back fails too."""
    write_factors(model, FACTORS)
    before, room = model.read_bytes(), chunk

    def write_what_fits(file: files.FileIO, data: bytes) -> None:
        file.write(data[:room])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metadata, "write_all", write_what_fits)
    with pytest.raises(LropeError, match=r"No space left on device\), nothing was changed; free some space"):
        write_factors(model, FACTORS[::-1])
    assert model.read_bytes() == before

    def write_once(file: files.FileIO, data: bytes) -> None:
        nonlocal room
        room, now = -1, room
        if now >= 0:
            file.write(data)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(metadata, "write_all", write_once)
    with pytest.raises(LropeError, match=r"Input/output error\), its layer factors may be half changed"):
        write_factors(model, FACTORS[::-1])


def test_failed_change_in_place_is_taken_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_factors(model, FACTORS)
    before, fsync = model.read_bytes(), os.fsync

    def fail_once(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(LropeError, match=r"Input/output error\), nothing was changed"):
        write_factors(model, FACTORS[::-1])
    assert model.read_bytes() == before


def test_read_only_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_factors(model, FACTORS)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != model.parent and real(path, mode))
    for call in (remove_factors, lambda path: write_factors(path, FACTORS, output=model.with_name("o.gguf"))):
        with pytest.raises(LropeError, match="its directory is read-only"):
            call(model)
    assert names(model.parent) == ["m.gguf"]
    assert write_factors(model, FACTORS[::-1]).how == "in place"


@pytest.mark.skipif(ROOT, reason="root may write anything")
def test_read_only_file_and_directory_of_a_user(model: Path) -> None:
    model.chmod(0o444)
    with pytest.raises(LropeError, match="is read-only"):
        write_factors(model, FACTORS)
    model.chmod(0o644)
    model.parent.chmod(0o555)
    try:
        with pytest.raises(LropeError, match="its directory is read-only"):
            write_factors(model, FACTORS)
    finally:
        model.parent.chmod(0o755)


WRITER = """
import sys
from lrope_gguf import LropeError, write_factors, remove_factors
print("ready", flush=True)
sys.stdin.readline()
for i in range(8):
    if i % 4 == 3:
        remove_factors(sys.argv[1])
    else:
        write_factors(sys.argv[1], (float(sys.argv[2]) + i,) * 4)
"""


def test_writers_at_once(model: Path) -> None:
    original = model.read_bytes()
    writers = [python(WRITER, model, 10 * i) for i in (1, 2, 3)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    deadline = time.monotonic() + 30
    seen = set()
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        stored = read_factors(model)  # whole at any time
        assert stored is None or len({*stored}) == 1
        seen.add(stored)
    assert [end(writer) for writer in writers] == [0, 0, 0]
    assert len(seen) > 1 and names(model.parent) == ["m.gguf"]
    remove_factors(model)
    assert model.read_bytes() == original


HOLDER = """
import sys
from lrope_gguf.files import locked
with locked(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_the_second_writer_waits_then_refuses(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.read_bytes()
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    holder = python(HOLDER, model)
    output = model.with_name("o.gguf")
    start = time.monotonic()
    for call in (
        lambda: write_factors(model, FACTORS),
        lambda: write_factors(model, FACTORS, output=output),
        lambda: remove_factors(model),
        lambda: plan_write(model, FACTORS),
    ):
        with pytest.raises(LropeError, match="another program is writing it"):
            call()
    assert time.monotonic() - start > 1.2
    assert model.read_bytes() == original and names(model.parent) == ["m.gguf"]
    assert read_model(model).block_count == LAYERS  # readers are not held off
    end(holder, kill=True)
    write_factors(model, FACTORS)


def test_output_is_locked_and_the_model_is_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = model.with_name("o.gguf")
    output.write_bytes(b"old")
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with locked(model, shared=True):
        write_factors(model, FACTORS, output=output)
        with pytest.raises(LropeError, match=r"m\.gguf: another program"):
            write_factors(model, FACTORS)
    with locked(output), pytest.raises(LropeError, match=r"o\.gguf: another program"):
        write_factors(model, FACTORS, output=output)


def test_after_waiting_the_new_file_is_locked_and_changed(model: Path) -> None:
    other = write_model(model.with_name("other"), seed=1)
    expected = other.read_bytes()
    with locked(other):
        with locked(model):
            waiting = threading.Thread(target=write_factors, args=(model, FACTORS))
            waiting.start()
            time.sleep(0.2)
            other.replace(model)
        time.sleep(0.3)
        assert waiting.is_alive() and model.read_bytes() == expected
    waiting.join()
    assert read_factors(model) == FACTORS
    remove_factors(model)
    assert model.read_bytes() == expected


def test_a_file_replaced_between_opening_and_locking_is_not_mistaken(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, lock = write_model(model.with_name("other"), seed=1), files._try_lock
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)

    def replace_then_lock(handle: int, shared: bool = False) -> bool | None:
        if other.exists():
            other.replace(model)
        return lock(handle, shared)

    with locked(other):
        monkeypatch.setattr(files, "_try_lock", replace_then_lock)
        with pytest.raises(LropeError, match="another program"):
            write_factors(model, FACTORS)
    assert write_factors(model, FACTORS).how == "rewritten"


def test_mapped_model(model: Path) -> None:
    user = "import mmap, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=1); print('ready', flush=True)"
    user += "; sys.stdin.readline()"
    first = python(user, model)
    original = model.read_bytes()
    assert write_factors(model, FACTORS).how == "rewritten"  # the process keeps the old file
    end(first, kill=True)
    process = python(user, model)
    before = model.read_bytes()
    for call in (write_factors, plan_write):
        with pytest.raises(LropeError, match=rf"is mapped by \S+ \(process {process.pid}\): .*--output"):
            call(model, FACTORS[::-1])
    assert model.read_bytes() == before
    assert write_factors(model, FACTORS).how == "unchanged"
    assert write_factors(model, FACTORS[::-1], output=model.with_name("o.gguf")).how == "rewritten"
    inode = model.stat().st_ino
    assert main(["write", str(model), "--factors", ",".join(map(str, FACTORS[::-1])), "--mapped-ok", "--quiet"]) == 0
    assert read_factors(model) == FACTORS[::-1] and model.stat().st_ino == inode
    remove_factors(model)
    assert model.read_bytes() == original
    assert write_factors(model, FACTORS).how == "rewritten"
    assert write_factors(model, FACTORS[::-1]).how == "in place"  # the process maps an older file
    end(process, kill=True)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_regular_files_are_replaced(model: Path, tmp_path: Path, kind: str) -> None:
    """`--output /dev/null` must not make a file of it."""
    output = tmp_path / "o.gguf"
    if kind == "pipe":
        os.mkfifo(output)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(output))
    else:
        try:
            os.mknod(output, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:
            pytest.skip("needs the right to make devices")
    link = tmp_path / "link.gguf"
    link.symlink_to(output)
    before = output.stat()
    for path in (output, link):
        for call in (
            lambda path: write_factors(model, FACTORS, output=path),
            lambda path: plan_write(model, FACTORS, output=path),
            lambda path: remove_factors(model, output=path),
            lambda path: files.atomic_write_bytes(path, b"x"),
        ):
            with pytest.raises(LropeError, match=rf"{path}: is not a regular file; name another"):
                call(path)
    assert output.stat() == before and names(tmp_path) == ["link.gguf", "m.gguf", "o.gguf"]


def test_a_copy_is_as_private_as_its_model(model: Path) -> None:
    output = model.with_name("o.gguf")
    for mode, umask, expected in ((0o600, 0o022, 0o600), (0o664, 0o022, 0o644), (0o640, 0o077, 0o600)):
        model.chmod(mode)
        before = os.umask(umask)
        try:
            write_factors(model, FACTORS, output=output)
        finally:
            os.umask(before)
        assert stat.S_IMODE(output.stat().st_mode) == expected
        output.unlink()


def test_hard_links_are_separated_and_that_is_said(model: Path) -> None:
    original, other = model.read_bytes(), model.with_name("other.gguf")
    other.hardlink_to(model)
    result = write_factors(model, FACTORS)
    assert result.notes == plan_notes(2, model)
    assert other.read_bytes() == original and read_factors(model) == FACTORS
    other.unlink()
    other.hardlink_to(model)
    before = model.read_bytes()
    plan, result = plan_write(model, FACTORS[::-1]), write_factors(model, FACTORS[::-1])
    assert plan.how == result.how == "rewritten" and plan.notes == result.notes == plan_notes(2, model)
    assert other.read_bytes() == before
    alone = write_factors(model, FACTORS)
    assert alone.how == "in place" and alone.notes == ()
    other.unlink()
    other.hardlink_to(model)
    before = model.read_bytes()
    result = remove_factors(model, output=other)  # the other name of the very file
    assert result.path == other and result.notes == plan_notes(2, other)
    assert other.read_bytes() == original and model.read_bytes() == before


def plan_notes(links: int, path: Path) -> tuple[str, ...]:
    return (f"{path} had {links} names (hard links); only this one has the new content, the others keep the old",)


def attributes(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if name != "security.selinux"}


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access control list as the kernel stores it: tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACL = acl((1, 6, 2**32 - 1), (2, 4, 1234), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1))


def test_extended_attributes_and_access_control_lists(model: Path) -> None:
    try:
        os.setxattr(model, "user.origin", b"https://example.org/m.gguf")
        os.setxattr(model, "system.posix_acl_access", ACL)
    except OSError:
        pytest.skip("not on this file system")
    mode, kept = model.stat().st_mode, attributes(model)
    assert len(kept) == 2
    write_factors(model, FACTORS)
    assert attributes(model) == kept and model.stat().st_mode == mode
    remove_factors(model)
    assert attributes(model) == kept and model.stat().st_mode == mode


def test_default_list_of_the_directory_is_not_taken_over(model: Path) -> None:
    model.chmod(0o600)
    try:
        os.setxattr(model.parent, "system.posix_acl_default", ACL)
    except OSError:
        pytest.skip("not on this file system")
    write_factors(model, FACTORS)
    assert attributes(model) == {} and stat.S_IMODE(model.stat().st_mode) == 0o600


def test_attributes_that_cannot_be_kept_are_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "listxattr", lambda path: ["user.x"] if path == model else [])
    monkeypatch.setattr(os, "getxattr", lambda *_: b"x")
    monkeypatch.setattr(os, "setxattr", refuse)
    assert write_factors(model, FACTORS).notes == (f"{model}: its extended attribute user.x could not be kept",)


@pytest.mark.skipif(not ROOT, reason="only root gives files away")
def test_owner_is_kept(model: Path) -> None:
    os.chown(model, 1234, 4321)
    model.chmod(0o4640)
    assert write_factors(model, FACTORS).notes == ()
    status = model.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, 0o4640)


@pytest.mark.parametrize("unnamed", [True, False])
def test_the_copy_of_a_private_model_is_private_meanwhile(
    model: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    model.chmod(0o600)
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE")
    with files.replacing(model) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        assert (len(names(model.parent)) == 1) == unnamed
        file.write(b"x")
    assert names(model.parent) == ["m.gguf"] and model.read_bytes() == b"x"


def test_shared_blocks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that shares: with the kernel's rules checked, and the bytes copied."""
    model = write_model(tmp_path / "big.gguf", add=lambda writer: writer.add_string("x", "x" * 30_000))
    expected = write_factors(model, FACTORS, output=tmp_path / "copy.gguf")
    assert expected.bytes_shared == 0 or plan_write(model, FACTORS).shares is not False
    original, wanted = model.read_bytes(), (tmp_path / "copy.gguf").read_bytes()
    cloned = []

    def clone(target: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D
        source, start, length, place = struct.unpack("=qQQQ", argument)
        assert start % 4096 == place % 4096 == 0
        assert length % 4096 == 0 or start + length == os.fstat(source).st_size
        assert os.pwrite(target, os.pread(source, length, start), place) == length
        cloned.append(length)
        return 0

    monkeypatch.setattr("fcntl.ioctl", clone)
    steps: list[tuple[int, int]] = []
    result = write_factors(model, FACTORS, progress=lambda *step: steps.append(step))
    assert result.bytes_shared == sum(cloned) > 0 and model.read_bytes() == wanted
    assert steps[-1] == (len(wanted), len(wanted))
    cloned.clear()
    assert remove_factors(model).bytes_shared == sum(cloned) > 0 and model.read_bytes() == original


def test_plans_know_whether_blocks_will_be_shared(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for clones in (True, False, None):
        monkeypatch.setattr(metadata, "can_share_blocks", lambda *_, clones=clones: clones)
        assert plan_write(model, FACTORS).shares is clones

    def unaligned(writer: GGUFWriter) -> None:
        writer.add_array("llama.rope.scaling.layer_factors", [2.0] * LAYERS)

    monkeypatch.setattr(metadata, "can_share_blocks", lambda *_: True)
    other = write_model(tmp_path / "other.gguf", add=unaligned)  # without these keys, all that follows moves
    assert plan_remove(other).shares is False and plan_write(other, FACTORS).shares is False


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty file system that shares blocks."""
    image, place = tmp_path / "image", tmp_path / "disk"
    image.touch()
    os.truncate(image, 512 << 20)
    place.mkdir()
    if not ROOT or shutil.which(f"mkfs.{request.param}") is None:
        pytest.skip(f"needs the right to mount, and mkfs.{request.param}")
    for command in ([f"mkfs.{request.param}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(place)]):
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("cannot mount here")
    yield place
    subprocess.run(["umount", place], check=False, capture_output=True)


def test_a_file_system_that_shares(model: Path, sharing_disk: Path) -> None:
    """A model larger than the free space is written all the same, for only its header is new."""
    copy, output = sharing_disk / "m.gguf", sharing_disk / "o.gguf"
    shutil.copyfile(model, copy)
    with copy.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(sharing_disk).free * 2 // 3)
        file.seek(0, os.SEEK_END)
        file.write(b"end")
    subprocess.run(["sync", "-f", copy], check=True)  # Btrfs counts its free space when it commits
    size = copy.stat().st_size
    assert shutil.disk_usage(sharing_disk).free < size
    original = kill_points.contents(sharing_disk)
    plan = plan_write(copy, FACTORS)
    result = write_factors(copy, FACTORS)
    assert plan.shares is True and size - 3 * 4096 < result.bytes_shared <= size
    assert read_factors(copy) == FACTORS and names(sharing_disk) == ["m.gguf"]
    assert remove_factors(copy, output=output).bytes_shared > size - 3 * 4096
    assert output.read_bytes() == original["m.gguf"]


MEASURED = """
import os, sys
from lrope_gguf import write_factors
print("ready", flush=True)
if sys.argv[2] == "plain":
    del os.copy_file_range
write_factors(sys.argv[1], (1.5,) * 4)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("how", ["kernel", "plain"])
def test_memory_is_bounded(tmp_path: Path, how: str) -> None:
    model = tmp_path / "m.gguf"
    pairs = text_pair("general.architecture", "llama") + number_pair("llama.block_count", LAYERS)
    pairs += text_pair("x", "x" * (20 << 20))
    model.write_bytes(header(pairs, 3))
    os.truncate(model, 120 << 20)
    process = python(MEASURED, model, how)
    output = process.communicate("")[0]
    assert process.returncode == 0 and int(output) < 64 << 10, output


@pytest.mark.parametrize("in_kernel", [True, False])
def test_progress(model: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1000)
    monkeypatch.setattr(files, "_BUFFER", 1000)
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range")
    steps: list[tuple[int, int]] = []
    result = write_factors(model, FACTORS, progress=lambda *step: steps.append(step))
    assert len(steps) > 5 and steps == sorted(steps)
    assert steps[-1] == (result.bytes_written, result.bytes_written) and {all_ for _, all_ in steps} == {steps[-1][1]}
    steps.clear()
    write_factors(model, FACTORS[::-1], progress=lambda *step: steps.append(step))
    assert not steps


def test_plan_is_what_is_done_and_writes_nothing(model: Path) -> None:
    output = model.with_name("o.gguf")
    for factors, to in ((FACTORS, None), (FACTORS, None), (FACTORS[::-1], None), (FACTORS, output)):
        before = model.stat(), model.read_bytes(), names(model.parent)
        plan = plan_write(model, factors, output=to)
        after = model.stat(), model.read_bytes(), names(model.parent)
        assert before[1:] == after[1:] and before[0].st_mtime_ns == after[0].st_mtime_ns
        result = write_factors(model, factors, output=to)
        assert (plan.path, plan.how, plan.bytes_written, plan.factors, plan.notes) == (
            *(result.path, result.how, result.bytes_written),
            *(result.factors, result.notes),
        )
    for wrong, to in (((1.0,), None), (FACTORS, model.parent), (FACTORS, model.parent / "no" / "o.gguf")):
        messages = set()
        for call in (plan_write, write_factors):
            with pytest.raises(LropeError) as caught:
                call(model, wrong, output=to)
            messages.add(str(caught.value))
        assert len(messages) == 1
