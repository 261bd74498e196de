"""Files that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from lrope_gguf.errors import LropeError


def write_error(path: Path, error: OSError, consequence: str) -> LropeError:
    """The one-line message for an operating system error while `path` was being written."""
    advice = {
        errno.ENOSPC: "free some space there, or write to another disk",
        errno.EDQUOT: "free some of your quota, or write to another disk",
        errno.EACCES: "check the permissions of the file and its directory",
        errno.EPERM: "check the permissions of the file and its directory",
        errno.EROFS: "write to another place",
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


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """Yield an empty unbuffered file that becomes `path` when the block ends without an error.

    The file lies beside `path`, is synced and moved over it in one step, and the directory is synced. On any
    error, an interrupt included, it is removed and `path` stays as it was. A symbolic link stays and its target is
    replaced. Mode, and where permitted owner, of an existing file are kept.

    Raises:
        LropeError: for every `OSError`.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".lrope-{os.urandom(8).hex()}.tmp")
    consequence = "nothing was changed"
    try:
        if target.is_dir():
            raise LropeError(f"{path}: is a directory; name a file")
        before = target.stat() if target.exists() else None
        with temporary.open("xb", buffering=0) as file:
            yield file
            if before is not None:
                with suppress(OSError, AttributeError):  # only a privileged user may give files away
                    os.chown(temporary, before.st_uid, before.st_gid)
                temporary.chmod(before.st_mode & 0o7777)
            os.fsync(file.fileno())
        temporary.replace(target)
        consequence = "the new content is in place but perhaps not yet on the disk"
        sync_directory(target.parent)
    except OSError as error:
        raise write_error(Path(path), error, consequence) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace `path` by `data`: whole, or not at all (see `replacing`)."""
    with replacing(path) as file:
        write_all(file, data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text` in UTF-8: whole, or not at all (see `replacing`)."""
    atomic_write_bytes(path, text.encode())
