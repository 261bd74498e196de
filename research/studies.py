"""The kept studies, one compressed archive each in research/studies/.

    python research/studies.py list
    python research/studies.py unpack [NAME ...] [--to build/studies]
    python research/studies.py pack FOLDER ... [--to research/studies]
    python research/studies.py pictures

An unpacked study is a folder that `lrope-gguf report` and `search --study` open like any other. Packing leaves out what
`report` makes (pages, pictures, logs), and rounds log-probabilities and seconds to six decimals: no page tells more
than four, and the archive is half as large. Factors and depths, which say what was asked, stay as they are. The same
folder always gives the same bytes. `pictures` makes those pictures of studies again that a page shows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import lzma
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from lrope_gguf import cli
from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes

ROOT = Path(__file__).resolve().parents[1]
ARCHIVES = ROOT / "research" / "studies"
UNPACKED = ROOT / "build" / "studies"
ENDING = ".tar.xz"
KEPT = (".json", ".jsonl")
DECIMALS = 6
"""Of log-probabilities (nats a token) and seconds in an archive."""
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]
"""What xz makes least of: text, whose next byte depends on the one before and not on where it stands."""
PICTURES = {
    "docs/accuracy-by-depth.png": ("qwen2.5-coder-0.5b-100-keys-layers", "report-accuracy.png"),
    "research/pictures/qwen2.5-coder-0.5b-scan.png": ("qwen2.5-coder-0.5b-100-keys-layers", "report-scan.png"),
    "research/pictures/smollm2-135m-accuracy.png": ("smollm2-135m-240-words-layers", "report-accuracy.png"),
    "research/pictures/smollm2-135m-scan.png": ("smollm2-135m-240-words-layers", "report-scan.png"),
}
"""What the pages show, of which study, and which picture of its report."""
LARGEST = 64 << 20
"""Bytes of an unpacked study, above which an archive is refused."""


def archived(folder: Path = ARCHIVES) -> dict[str, Path]:
    return {path.name.removesuffix(ENDING): path for path in sorted(folder.glob(f"*{ENDING}"))}


def rounded(data: bytes, path: Path) -> bytes:
    """Return an ``evaluations.jsonl`` with log-probabilities and seconds rounded to `DECIMALS`.

    Raises `LropeError`: a line is damaged; ``path`` stands for the file in the message.
    """
    lines = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            record = json.loads(line)
            record["seconds"] = round(record["seconds"], DECIMALS)
            for probe in record["probes"]:
                if not isinstance(probe[1], str):  # an infinity or NaN, in words
                    probe[1] = round(probe[1], DECIMALS)
        except (ValueError, TypeError, KeyError, IndexError):
            raise LropeError(f"{path}: line {number} is damaged; delete that line") from None
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def packed(study: Path) -> bytes:
    """Return a study's archive."""
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
            if path.name == "evaluations.jsonl":
                data = rounded(data, path)
            # nothing of who packed it, and when
            info = tarfile.TarInfo(f"{study.name}/{path.name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), filters=FILTERS)


def unpack(archive: Path, to: Path = UNPACKED) -> Path:
    """Unpack a study below ``to`` and return its folder. One that is there already stays as it is."""
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


def draw(name: str, picture: str, target: Path) -> None:
    """Make a picture of a kept study's report, in few colours, which take a quarter of the bytes."""
    from PIL import Image  # comes with matplotlib

    with tempfile.TemporaryDirectory() as folder:
        study = unpack(archived()[name], Path(folder))
        with contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["report", str(study)])
        if status or not (study / picture).is_file():
            raise LropeError(f"{name}: its report has no {picture}")
        few = Image.open(study / picture).convert("RGB").quantize(24, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        few.save(buffer, "PNG", optimize=True)
    atomic_write_bytes(target, buffer.getvalue())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("list", help="names and sizes")
    taken = parts.add_parser("unpack", help="all studies, or those that are named")
    taken.add_argument("names", nargs="*", metavar="NAME")
    taken.add_argument("--to", type=Path, default=UNPACKED, metavar="FOLDER")
    kept = parts.add_parser("pack", help="folders of studies")
    kept.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    kept.add_argument("--to", type=Path, default=ARCHIVES, metavar="FOLDER")
    parts.add_parser("pictures", help="make the pictures of the pages")
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
        elif args.part == "pictures":
            for target, (name, picture) in PICTURES.items():
                draw(name, picture, ROOT / target)
                print(target)
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
