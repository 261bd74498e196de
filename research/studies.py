"""The kept studies, one compressed archive each in research/studies/.

    python research/studies.py list
    python research/studies.py unpack [NAME ...] [--to build/studies]
    python research/studies.py pack FOLDER ... [--to research/studies]

An unpacked study is a folder that `lrope-gguf report` and `search --study` open like any other. Packing leaves out what
`report` makes (pages, pictures, logs), and the same folder always gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes

ROOT = Path(__file__).resolve().parents[1]
ARCHIVES = ROOT / "research" / "studies"
UNPACKED = ROOT / "build" / "studies"
ENDING = ".tar.xz"
KEPT = (".json", ".jsonl")
LARGEST = 64 << 20
"""Bytes of an unpacked study, above which an archive is refused."""


def archived(folder: Path = ARCHIVES) -> dict[str, Path]:
    """The kept studies' archives by name."""
    return {path.name.removesuffix(ENDING): path for path in sorted(folder.glob(f"*{ENDING}"))}


def packed(study: Path) -> bytes:
    """Return a study's archive.

    Raises:
        LropeError: no study, or one that holds a folder or a link.
    """
    if not (study / "config.json").is_file():
        raise LropeError(f"{study}: no study (there is no config.json in it)")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(study.iterdir()):
            if path.suffix not in KEPT:
                continue
            if path.is_symlink() or not path.is_file():
                raise LropeError(f"{path}: is not a regular file")
            data = path.read_bytes()
            # nothing of who packed it, and when
            info = tarfile.TarInfo(f"{study.name}/{path.name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpack(archive: Path, to: Path = UNPACKED) -> Path:
    """Unpack a study below ``to`` and return its folder. One that is there already stays as it is.

    Raises:
        LropeError: damaged, too large, or anything in it but plain files of one folder with the archive's name.
    """
    name = archive.name.removesuffix(ENDING)
    folder = to / name
    if folder.exists():
        return folder
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to, prefix=".unpack-") as aside:
        try:
            with lzma.open(archive) as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise LropeError(f"{archive}: is above {LARGEST >> 20} MiB unpacked")
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    inside = member.name.split("/")
                    if not member.isreg() or len(inside) != 2 or inside[0] != name or inside[1] in ("", ".", ".."):
                        raise LropeError(f"{archive}: {member.name!r} is not a plain file of {name}/")
                    tar.extract(member, aside, filter="data")
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            raise LropeError(f"{archive}: cannot be unpacked: {error}") from None
        if not (Path(aside) / name / "config.json").is_file():
            raise LropeError(f"{archive}: holds no study (there is no config.json in it)")
        shutil.move(Path(aside) / name, folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """List, unpack or pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("list", help="names and sizes")
    taken = parts.add_parser("unpack", help="all studies, or those that are named")
    taken.add_argument("names", nargs="*", metavar="NAME")
    taken.add_argument("--to", type=Path, default=UNPACKED, metavar="FOLDER")
    kept = parts.add_parser("pack", help="folders of studies")
    kept.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    kept.add_argument("--to", type=Path, default=ARCHIVES, metavar="FOLDER")
    args = parser.parse_args(arguments)
    there = archived()
    try:
        if args.part == "list":
            for name, path in there.items():
                print(f"{path.stat().st_size:>9,} bytes  {name}")
        elif args.part == "unpack":
            for name in args.names or there:
                if name not in there:
                    raise LropeError(f"{name}: no kept study has this name; there are {', '.join(there)}")
                print(unpack(there[name], args.to))
        else:
            args.to.mkdir(parents=True, exist_ok=True)
            for folder in args.folders:
                path = args.to / f"{folder.resolve().name}{ENDING}"
                atomic_write_bytes(path, packed(folder))
                print(path)
    except LropeError as error:
        sys.exit(f"studies.py: {error}")


if __name__ == "__main__":
    main()
