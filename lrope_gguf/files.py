"""Files that are replaced whole or not at all, locked meanwhile, and copied by sharing blocks where that is possible.

A new file has no name until it is whole (`O_TMPFILE`), so that a killed writer leaves nothing behind; where a file
system has no such files, and between giving the name and moving it over the old one, it is called `.lrope-*.tmp` and
locked, and the next write into the directory removes those that nobody holds any more.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from lrope_gguf.errors import LropeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_SECONDS = 5.0
_LOCK_PAUSE = 0.05
_CHUNK = 1 << 24
_BUFFER = 1 << 20
_PIPE = 1 << 16  # Linux copies through a pipe of this size, fastest where each filling lies at a multiple of it
_BLOCK = 4096
_MAX_BLOCK = 1 << 16
_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_TEMPORARY = re.compile(r"\.lrope-[0-9a-f]{16}\.tmp")
# Other file systems, old kernels, and files that are no plain ones: copy_file_range(2), ioctl_ficlonerange(2).
_NO_KERNEL_COPY = frozenset((errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM))
_NO_CLONE = _NO_KERNEL_COPY | {errno.ENOTTY, errno.ETXTBSY}
_NO_TMPFILE = (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NO_LOCK = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def write_error(path: Path, error: OSError, consequence: str) -> LropeError:
    """The one-line message for an operating system error while `path` was being written."""
    advice = {
        errno.ENOSPC: "free some space there, or write to another disk",
        errno.EDQUOT: "free some of your quota, or write to another disk",
        errno.EACCES: "check the permissions of the file and its directory",
        errno.EPERM: "check the permissions of the file and its directory",
        errno.EROFS: "write to another file system",
        errno.EFBIG: "the file is too large for the file system or for the limit of ulimit -f",
        errno.ENAMETOOLONG: "give a shorter name",
        errno.ENOENT: "check that the directory exists",
    }.get(error.errno or 0, "check the disk")
    return LropeError(f"{path}: cannot be written ({error.strerror or error}), {consequence}; {advice}")


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write every byte of `data` to an unbuffered file, however the system splits it."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable, where the system can."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise
    finally:
        os.close(handle)


# Replacing


@contextmanager
def replacing(path: str | os.PathLike[str], notes: list[str] | None = None, *, mode: int = 0o666) -> Iterator[FileIO]:
    """Yield an empty unbuffered file that becomes `path` when the block ends without an error.

    The file is synced and moved over `path` in one step, and the directory is synced. On any error, an interrupt
    included, it is gone and `path` stays as it was. A symbolic link stays and its target is replaced. Of an existing
    file the mode is kept, and the owner and extended attributes (access control lists among them) where permitted;
    where not, `notes` gets a sentence. A new one gets `mode` less the umask. Devices, pipes and the like stay. Raises
    `LropeError`: for every `OSError`, and where something else than a regular file is there.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".lrope-{os.urandom(8).hex()}.tmp")
    consequence = "nothing was changed"
    try:
        check_replaceable(path)
        remove_stale(target.parent)
        before = target.stat() if target.exists() else None
        # nobody else may read the content of a private model meanwhile
        handle, named = _create(temporary, mode if before is None else 0o600)
        with FileIO(handle, "r+b") as file:
            yield file
            if before is not None:
                _keep_attributes(target, before, file, temporary, [] if notes is None else notes)
            os.fsync(handle)
            if not named:
                _name(handle, temporary)
            if os.name != "nt":  # while the lock holds off `remove_stale`
                temporary.replace(target)
        if os.name == "nt":  # open files cannot be moved there
            temporary.replace(target)
        consequence = "the new content is in place, but may not be on the disk yet"
        sync_directory(target.parent)
    except OSError as error:
        raise write_error(Path(path), error, consequence) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_output(
    option: str, output: str | os.PathLike[str], inputs: Mapping[str, str | os.PathLike[str] | None]
) -> None:
    """Check, before any work, that a file can be written to ``output`` and is none of the ``inputs``.

    Args:
        option: What gave the output, for messages.
        output: The file to write.
        inputs: The files that are read, by what gave them; None where nothing did.

    Raises:
        LropeError: it is empty, a folder, one of the inputs (also by way of a link), or its folder is missing or not
            to be written.
    """
    path = Path(output)
    if not os.fspath(output) or path.is_dir():
        raise LropeError(f"{option} {str(output)!r}: is {'a folder' if os.fspath(output) else 'empty'}; name a file")
    for name, given in inputs.items():
        if given is not None and _alike(path, Path(given)):
            raise LropeError(f"{option} {output}: would overwrite the file given as {name}; name another file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise LropeError(f"{option} {output}: its directory does not exist; create it or name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LropeError(f"{option} {output}: you may not write to its directory {folder}; name another file")


def _alike(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there yet
        return one.resolve() == other.resolve()


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise `LropeError` where `path` leads to anything but a regular file or nothing."""
    target = Path(path)
    if target.is_dir():
        raise LropeError(f"{path}: is a directory; name a file")
    if target.exists() and not target.is_file():  # such as /dev/null
        raise LropeError(f"{path}: is not a regular file; name another file")


def _create(temporary: Path, mode: int) -> tuple[int, bool]:
    """A new empty file, locked, and whether it has the name already or none at all."""
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        try:
            handle = os.open(temporary.parent, flags | os.O_TMPFILE, mode)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        else:
            with suppress(OSError):  # it has no name yet that could be taken for stale
                _try_lock(handle)
            return handle, False
    while True:
        handle = os.open(temporary, flags | os.O_CREAT | os.O_EXCL, mode)
        try:
            _try_lock(handle)
            if temporary.exists():  # else taken for stale before it was locked
                return handle, True
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _name(handle: int, temporary: Path) -> None:
    """Give an unnamed file its name."""
    directory = os.open(temporary.parent, os.O_RDONLY)
    try:
        # a directory must be given for Python to call linkat(2), which can follow this link
        os.link(f"/proc/self/fd/{handle}", temporary.name, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def remove_stale(directory: Path) -> None:
    """Remove temporary files whose writers were killed: those that nobody has locked."""
    if fcntl is None:
        return
    with suppress(OSError):
        for entry in directory.iterdir():
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            with suppress(OSError):
                handle = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    if stat.S_ISREG(os.fstat(handle).st_mode):
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        entry.unlink()
                finally:
                    os.close(handle)


def _keep_attributes(target: Path, before: os.stat_result, file: FileIO, temporary: Path, notes: list[str]) -> None:
    """Give the new file what the old one has besides its content."""
    new: int | Path = file.fileno() if hasattr(os, "fchmod") else temporary
    if hasattr(os, "chown"):
        now = os.fstat(file.fileno())
        for owner, group in ((before.st_uid, -1), (-1, before.st_gid)):
            if (owner not in (-1, now.st_uid)) or (group not in (-1, now.st_gid)):
                try:
                    os.chown(new, owner, group)
                except PermissionError:  # only a privileged user may give files away
                    kind, number = ("owner", owner) if group == -1 else ("group", group)
                    notes.append(f"{target}: its {kind} ({number}) could not be kept")
    listed = hasattr(os, "listxattr")
    inherited = _attributes(new) if listed else []
    kept = _attributes(target) if listed else []
    for name in inherited:
        if name not in kept and name != "security.selinux":  # the directory's default access control list
            os.removexattr(new, name)
    os.chmod(new, stat.S_IMODE(before.st_mode))  # noqa: PTH101 (takes an open file too)
    for name in kept:  # after the mode, which would change an access control list
        try:
            os.setxattr(new, name, os.getxattr(target, name))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
                raise
            notes.append(f"{target}: its extended attribute {name} could not be kept")


def _attributes(file: int | Path) -> list[str]:
    """The extended attributes that belong to a file and not to its content."""
    try:
        names = os.listxattr(file)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return []
        raise
    return [name for name in names if name.startswith(("user.", "trusted.", "system.posix_acl_", "security.selinux"))]


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace `path` by `data`: whole, or not at all (see `replacing`)."""
    with replacing(path) as file:
        write_all(file, data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text` in UTF-8: whole, or not at all (see `replacing`)."""
    atomic_write_bytes(path, text.encode())


# Locking


@contextmanager
def locked(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Hold off other writers of `path`, or where `shared` those that do not share; a killed one holds nothing.

    Nothing is locked where no regular file is, or where the file system has no locks. Raises `LropeError`: where
    another writer has not ended after `LOCK_SECONDS`.
    """
    handle = _lock(Path(path), shared)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path, shared: bool) -> int | None:
    deadline = time.monotonic() + LOCK_SECONDS
    while fcntl is not None:
        try:
            handle = _open_regular(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None  # whoever opens it for its content says what is wrong
        except OSError as error:
            raise LropeError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
        if handle is None:
            return None
        try:
            free = _try_lock(handle, shared)
            if free is None and not shared:  # NFS locks only what is open for writing
                with suppress(OSError):
                    writable = _open_regular(path, os.O_RDWR)
                    if writable is not None:
                        os.close(handle)
                        handle = writable
                        free = _try_lock(handle, shared)
            # a writer that ended meanwhile may have moved a new file over this one
            if free is not False and _same(handle, path):
                return handle
        except OSError as error:
            os.close(handle)
            raise LropeError(f"{path}: cannot be locked ({error.strerror}); check the disk") from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() > deadline:
            raise LropeError(f"{path}: another program is writing it; try again when that has finished")
        if free is False:
            time.sleep(_LOCK_PAUSE)
    return None


def _open_regular(path: Path, flags: int) -> int | None:
    if not stat.S_ISREG(path.stat().st_mode):  # sockets cannot be opened, devices may do something
        return None
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    return None


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int, shared: bool = False) -> bool | None:
    """Lock an open file: whether nobody else holds it; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCK:
            return None
        raise
    return True


def mapped_by(path: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Name and number of the other processes that map a file into memory, as far as this user may see them."""
    if not sys.platform.startswith("linux"):
        return []
    real = os.path.realpath(path)
    status = Path(real).stat()
    inode = b" %d " % status.st_ino
    device = b"%02x:%02x" % (os.major(status.st_dev), os.minor(status.st_dev))
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):  # another user's, or ended
            maps = (process / "maps").read_bytes()
            if inode in maps and any(
                # some file systems report another device here than in stat(2)
                fields[4] == inode.strip() and (fields[3] == device or fields[-1] == os.fsencode(real))
                for fields in (line.split(None, 5) for line in maps.splitlines() if inode in line)
            ):
                found.append(((process / "comm").read_text(errors="replace").strip(), int(process.name)))
    return found


# Copying


def append_range(source: FileIO, target: FileIO, start: int, end: int, advance: Callable[[int], None]) -> int:
    """Append the bytes of `source` from `start` to `end` to `target`; return how many of them both share on the disk.

    Blocks are shared where the file system can, else copied inside the kernel where it can. `advance` is called with
    the bytes of each step. `source` is left at any position.
    """
    place = target.seek(0, os.SEEK_END)
    block = block_of(target.fileno())
    shared = 0
    if start % block == place % block:
        first = start + -start % block
        last = end if end == os.fstat(source.fileno()).st_size else end - end % block
        if first < last and _clone(source.fileno(), target.fileno(), first, last, place + first - start):
            shared = last - first
            target.seek(place)
            _copy(source, target, start, first, advance)
            target.seek(place + last - start)
            advance(shared)
            start = last
    _copy(source, target, start, end, advance)
    return shared


def _clone(source: int, target: int, start: int, end: int, place: int) -> bool:
    """Let `target` share the blocks of `source`; False where these files cannot."""
    if fcntl is None or not sys.platform.startswith("linux"):
        return False
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, start, end - start, place))
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def _copy(source: FileIO, target: FileIO, start: int, end: int, advance: Callable[[int], None]) -> None:
    in_kernel = hasattr(os, "copy_file_range")
    place = target.tell()
    while start < end:
        copied, to_multiple = 0, -place % _PIPE or _CHUNK
        if in_kernel:
            try:
                count = min(_CHUNK, end - start, to_multiple)
                copied = os.copy_file_range(source.fileno(), target.fileno(), count, offset_src=start)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
        if not copied:
            source.seek(start)
            data = source.read(min(_BUFFER, end - start, to_multiple))
            if not data:
                raise LropeError(f"{source.name!s}: was shortened while being read, to {start} bytes; try again")
            write_all(target, data)
            copied = len(data)
        _begin_writing(target, place, copied)
        start += copied
        place += copied
        advance(copied)


def _begin_writing(file: FileIO, start: int, length: int) -> None:
    """Let the system write these bytes to the disk while the next are copied, so that fsync(2) finds little to do."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # Linux begins to write dirty pages then, and keeps them: they are not clean yet
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def block_of(handle: int) -> int:
    """The block size of an open file's file system, where it is a sane one."""
    if not hasattr(os, "fstatvfs"):
        return _BLOCK
    size = os.fstatvfs(handle).f_bsize
    return size if size & (size - 1) == 0 and _BLOCK <= size <= _MAX_BLOCK else _BLOCK


def block_size(path: str | os.PathLike[str]) -> int:
    """The block size of the file system on which `path` lies or would lie."""
    try:
        handle = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY)
    except OSError:
        return _BLOCK
    try:
        return block_of(handle)
    finally:
        os.close(handle)


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write into a directory's file system."""
    if not hasattr(os, "statvfs"):
        import shutil  # and with it four compressors, which take longer to load than all else here

        return shutil.disk_usage(directory).free
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def can_share_blocks(source: FileIO, directory: Path) -> bool | None:
    """Whether a new file in `directory` can share blocks with `source`, tried on one without a name; None: unknown."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        handle = os.open(directory, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
    except (OSError, AttributeError):
        return None
    try:
        block = block_of(handle)
        return os.fstat(source.fileno()).st_size >= block and _clone(source.fileno(), handle, 0, block, 0)
    except OSError:
        return False
    finally:
        os.close(handle)
