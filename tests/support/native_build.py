"""Stock and patched llama.cpp: fetch the source, apply the series, build it.

Needs nothing but the standard library: the first build comes before any virtual environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from support.commands import CommandError, progress, run

PROJECT = Path(__file__).resolve().parents[2]
PATCHES = PROJECT / "patches"
WORK = PROJECT / "build" / "proofs"

# like CMakeLists.txt: the commit would be that of this repository, and the interface of the server is a download
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "LLAMA_BUILD_NUMBER=0", "LLAMA_BUILD_COMMIT=unknown",
    "LLAMA_BUILD_COMMON=ON", "LLAMA_BUILD_TOOLS=ON", "LLAMA_BUILD_SERVER=ON", "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_APP=OFF", "LLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip

LIBRARY = ("llama",)
TOOLS = ("llama-bench", "llama-cli", "llama-server", "llama-perplexity")


def pinned() -> tuple[str, str]:
    match = re.search(
        r"^llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})$", (PATCHES / "source.txt").read_text(), re.M
    )
    if match is None:
        raise CommandError("patches/source.txt: no line 'llama-cpp-python==VERSION --hash=sha256:HASH'")
    return match[1], match[2]


def fetch_source(folder: Path = WORK, release: str | None = None) -> Path:
    """Return the unpatched llama.cpp source that a llama-cpp-python release carries, below ``folder``.

    The release is the pinned one if None. An archive that was fetched before, by CMake too, is used again.
    """
    version, digest = pinned()
    release = release or version
    name = f"llama_cpp_python-{release}"
    source = folder / "source" / name / "vendor" / "llama.cpp"
    if not source.is_dir():
        archive = next(iter(_archives(folder, f"{name}.tar.gz", digest if release == version else None)), None)
        archive = archive or _download(folder, release, release == version)
        extract(archive, source.parent.parent)
    # points to a repository that does not exist here
    (source / ".git").unlink(missing_ok=True)
    return source


def _archives(folder: Path, name: str, digest: str | None) -> Iterable[Path]:
    candidates = [folder / name, *PROJECT.glob(f"build/{name}"), *PROJECT.glob(f"build/*/{name}")]
    for path in candidates:
        if path.is_file() and (digest is None or hashlib.sha256(path.read_bytes()).hexdigest() == digest):
            yield path


def _download(folder: Path, release: str, is_pinned: bool) -> Path:
    progress(f"fetching llama-cpp-python {release} with pip")
    folder.mkdir(parents=True, exist_ok=True)
    what = (
        ["--require-hashes", "--requirement", PATCHES / "source.txt"] if is_pinned else [f"llama-cpp-python=={release}"]
    )
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "llama-cpp-python"]
    run([sys.executable, "-m", "pip", "download", *quiet, "--dest", folder, *what])
    return folder / f"llama_cpp_python-{release}.tar.gz"


def extract(archive: Path, top: Path) -> None:
    """Unpack ``archive``, which has one folder at its top, as the folder ``top``: whole or not at all."""
    top.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=top.parent) as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
        (content,) = Path(temporary).iterdir()
        content.rename(top)


def copy_source(source: Path, target: Path) -> Path:
    """Copy a source tree to ``target`` in place of what is there, as new files: no old object passes for theirs."""
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, symlinks=True, copy_function=shutil.copy)
    return target


def patches() -> list[Path]:
    """The folders of the series, in their order; each has a hooks.patch and the files that it adds."""
    return sorted(path.parent for path in PATCHES.glob("*/hooks.patch"))


def added_files(patch: Path) -> dict[str, Path]:
    """The files that a patch adds, by their place in llama.cpp."""
    found = (path for path in sorted(patch.rglob("*")) if path.is_file() and path.name != "hooks.patch")
    return {path.relative_to(patch).as_posix(): path for path in found}


def series_files() -> dict[str, Path]:
    """The files that the series adds, by their place in llama.cpp."""
    return {file: path for patch in patches() for file, path in added_files(patch).items()}


def apply_series(source: Path, n_patches: int | None = None) -> str:
    """Apply patches/ (the first ``n_patches`` of them) to ``source`` with the project's own CMake code.

    Nothing happens where that was done before. Returns what CMake said.
    """
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / "apply.cmake"
        module = PROJECT / "cmake" / "llama-cpp.cmake"
        limit = f"set(LROPE_PATCHES {n_patches})\n" if n_patches else ""
        code.write_text(f'{limit}include("{module}")\nlrope_apply_patches("{source.resolve()}")\n')
        result = run(["cmake", "-P", code], cwd=Path(temporary))
    return result.stdout + result.stderr


def patched_source(folder: Path = WORK, release: str | None = None) -> Path:
    """Return a copy of the source of a release with the present series applied."""
    target = folder / "patched" / (release or pinned()[0]) / "llama.cpp"
    series = [path for path in sorted(PATCHES.rglob("*")) if path.is_file()]
    stamp = target.parent / "series"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in series)).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == digest):
        stamp.unlink(missing_ok=True)
        apply_series(copy_source(fetch_source(folder, release), target))
        stamp.write_text(digest)
    return target


def build(
    source: Path, build_dir: Path, targets: Sequence[str], options: Sequence[str] = (),
    env: Mapping[str, str] | None = None, *, keep_going: bool = False,
) -> Path:  # fmt: skip
    """Configure (``options``: NAME=VALUE, over those of this module) and build; return the folder with the results.

    With ccache, trees that differ in few files share the objects of the others. With ``keep_going``, a target that
    cannot be built stops no other and is no error.
    """
    configure: list[str | Path] = ["cmake", "-S", source, "-B", build_dir]
    configure.append(f"-DCMAKE_PROJECT_INCLUDE={PROJECT / 'cmake' / 'amx.cmake'}")
    environment = dict(env or {})
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    if shutil.which("ccache"):
        configure += ["-DCMAKE_C_COMPILER_LAUNCHER=ccache", "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
        # relative: the same file in another tree is the same object, where both build folders stand beside their tree
        environment |= {"CCACHE_BASEDIR": str(source.resolve().parent), "CCACHE_NOHASHDIR": "1"}
    bin_dir = build_dir.resolve() / "bin"
    configure += [f"-DCMAKE_{kind}_OUTPUT_DIRECTORY={bin_dir}" for kind in ("RUNTIME", "LIBRARY")]
    configure += [f"-D{option}" for option in (*OPTIONS, *options)]
    progress(f"building {', '.join(targets) or 'everything'} in {build_dir}")
    run(configure, env=environment)
    command: list[str | Path] = ["cmake", "--build", build_dir, "--parallel", str(os.cpu_count() or 1)]
    command += ["--target", *targets] if targets else []
    if keep_going:
        command += ["--", "-k", "0"] if shutil.which("ninja") else ["--", "-k"]
    run(command, env=environment, check=not keep_going)
    return bin_dir


def stock_library(folder: Path = WORK, targets: Sequence[str] = LIBRARY, options: Sequence[str] = ()) -> Path:
    """Return the folder of the unpatched library of the pinned source; builds it where it is missing."""
    source = fetch_source(folder)
    return build(source, source.parent / "build", targets, options)


def patched_library(folder: Path = WORK, targets: Sequence[str] = LIBRARY, options: Sequence[str] = ()) -> Path:
    """Return the folder of the patched library of the pinned source; builds it where it is missing or old."""
    source = patched_source(folder)
    return build(source, source.parent / "build", targets, options)
