"""Models in stores that other programs fill: found by the names that those give them, and never changed.

`llama-server -hf` and `hf download` share the Hugging Face cache: ``models--USER--REPO/snapshots/COMMIT/x.gguf`` is a
link to ``blobs/SHA256``, and ``refs/main`` names the commit. Ollama and others keep ``blobs/sha256-...``. Whoever reads
such a file trusts that it has the content of its hash, and all names of that content share it.

Which file a name means is llama.cpp's rule (``common/hf-cache.cpp``, and ``find_best_model`` in
``common/download.cpp``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lrope_gguf.errors import LropeError
from lrope_gguf.text import command_line

STORES = (
    ("the Hugging Face cache", re.compile(r"/(models|datasets|spaces)--[^/]+/(blobs|snapshots)/")),
    ("the store of Ollama", re.compile(r"/blobs/sha256[-:][0-9a-f]{64}$")),
    ("the store of Docker", re.compile(r"/blobs/sha256/[0-9a-f]{64}$")),
    ("Git LFS's store", re.compile(r"/lfs/objects/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{64}$")),
    ("git-annex's store", re.compile(r"/annex/objects/")),
)
"""Content-addressed stores, and what a path into one looks like."""

HUB = (
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub"),
)
"""Variables that say where the Hugging Face cache is, and the folder there; the first that is set counts."""

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
"""The quantizations that a repository's name alone stands for, in this order; else its first model."""

_WORD = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?::([A-Za-z0-9_.-]+))?")
_COMMIT = re.compile(r"[0-9a-fA-F]{40}")
_SPLIT = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})", re.IGNORECASE)
_QUANT = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)
_NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")


def keeper(path: str | os.PathLike[str]) -> str | None:
    """The content-addressed store in which a file lies, itself or through links; None where in none."""
    places = [Path(place).as_posix() for place in (Path(path).absolute(), os.path.realpath(path))]
    return next((name for name, shape in STORES if any(map(shape.search, places))), None)


def check_changeable(path: str | os.PathLike[str]) -> None:
    """Check that a file may be changed or replaced. Raises `LropeError`: it lies in a content-addressed store."""
    store = keeper(path)
    if store is not None:
        name = reference(path)
        which = ["-m", os.fspath(path)] if name is None else ["-hf", name]
        server = command_line(["llama-server", *which, "--rope-layer-factors", "best.json"])
        raise LropeError(
            f"{path}: is in {store}, where other programs trust that a file has the content of its hash; "
            f"write a copy elsewhere with --output, or leave the file as it is and run {server}"
        )


def caches() -> list[Path]:
    """The Hugging Face caches: llama.cpp's own first, then that of `hf`, if it is another."""
    found = [Path(own)] if (own := os.environ.get("LLAMA_CACHE")) else []
    hub = next((Path(value, rest) for name, rest in HUB if (value := os.environ.get(name))), None)
    with suppress(RuntimeError):  # no home at all
        hub = (hub or Path("~", HUB[-1][1])).expanduser()
    return found + ([] if hub is None or hub in found else [hub])


def find_model(name: str) -> str:
    """The file that a name means: a path, or ``user/repo[:quant]`` of a model in a cache.

    A file of that very name goes first. Nothing is ever downloaded.

    Returns:
        The name as it is unless it names a model of a cache; of a split model the first shard.

    Raises:
        LropeError: ``user/repo[:quant]`` is neither.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match[2] is None and name.endswith(".gguf")):  # such as models/x.gguf
        return name
    with suppress(OSError):
        if Path(name).exists():
            return name
    repo, quant = match[1], match[2]
    there: list[str] = []
    for cache, files in _listings(repo):
        picked = _pick(list(files), quant)
        if picked is not None:
            path = files[picked]
            if not path.exists():
                raise LropeError(f"{name}: its download is incomplete, {path} is missing; {_bring(repo, quant)}")
            return str(path)
        stems = [(name, _QUANT.search(_shard(name)[0])) for name in files if _pick([name], None)]
        quants = ", ".join(match[1].upper() if match else name for name, match in stems)
        there.append(f"{cache} has only {quants or 'other files'} of it")
    looked = (
        " and ".join(there) or f"this model is not in {' or '.join(dict.fromkeys(map(str, caches() + _old_caches())))}"
    )
    raise LropeError(f"{name}: no such file, and {looked}; {_bring(repo, quant)}")


def reference(path: str | os.PathLike[str]) -> str | None:
    """What ``llama-server -hf`` calls a file of its cache: ``user/repo:quant``; None where it would take another."""
    place = Path(path).absolute()
    for cache in caches()[:1]:
        with suppress(ValueError):
            folder, snapshots, commit, *parts = place.relative_to(cache.absolute()).parts
            repo, name = folder.removeprefix("models--").replace("--", "/", 1), "/".join(parts)
            if snapshots == "snapshots" and _commit(cache / folder) == commit and _NAME.fullmatch(repo):
                files = list(_snapshot(cache / folder))
                stem = _shard(Path(name).name)[0]
                cuts = [cut.end() for cut in re.finditer("[-.]", stem)]
                for quant in [*(stem[cut:] for cut in reversed(cuts)), None]:
                    if _pick(files, quant) == name:
                        return repo if quant is None else f"{repo}:{quant.upper()}"
    return None


def model_name(path: str | os.PathLike[str]) -> str:
    """A model file's name without what says that it is one: its ending and the number of the shard."""
    return _shard(Path(path).name)[0]


def _listings(repo: str) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Where a repository is, and its files there by their names in it."""
    for cache in caches():
        files = _snapshot(cache / f"models--{repo.replace('/', '--')}")
        if files:
            yield cache, files
    prefix = f"{repo.replace('/', '_')}_"
    for cache in _old_caches():
        with suppress(OSError):
            files = {p.name[len(prefix) :]: p for p in sorted(cache.iterdir()) if p.name.startswith(prefix)}
            if files:
                yield cache, files


def _old_caches() -> list[Path]:
    """Where llama.cpp kept ``USER_REPO_FILE`` before it took the layout of Hugging Face."""
    own, base = os.environ.get("LLAMA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):
        return [Path(own)] if own else [(Path(base) if base else Path("~/.cache").expanduser()) / "llama.cpp"]
    return []


def _commit(folder: Path) -> str | None:
    """The commit of ``refs/main``, or else of the first branch."""
    refs = folder / "refs"
    names = sorted((p.name for p in refs.iterdir()), key=lambda name: (name != "main", name)) if refs.is_dir() else []
    for name in names:
        with suppress(OSError, UnicodeDecodeError, IndexError):
            commit = (refs / name).read_text(encoding="ascii").splitlines()[0]
            if _COMMIT.fullmatch(commit):
                return commit
    return None


def _snapshot(folder: Path) -> dict[str, Path]:
    """The files of a repository's snapshot, in order."""
    with suppress(OSError):
        commit = _commit(folder)
        if commit is not None:
            root = folder / "snapshots" / commit
            paths = sorted(path for path in root.rglob("*") if path.is_symlink() or path.is_file())
            return {path.relative_to(root).as_posix(): path for path in paths}
    return {}


def _pick(names: Sequence[str], quant: str | None) -> str | None:
    """The file that llama.cpp takes for a quant, or for none: of a split model its first shard."""
    models = [
        name
        for name in names
        if name.endswith(".gguf")
        and not any(word in name.rpartition("/")[2] for word in _NO_MODELS)
        and _shard(name)[1] == 1
    ]
    for wanted in DEFAULT_QUANTS if quant is None else (quant,):
        for name in models:
            if re.search(rf"{re.escape(wanted)}[.-]", name, re.IGNORECASE):
                return name
    return models[0] if models and quant is None else None


def _shard(name: str) -> tuple[str, int]:
    """A file's name without ending and number, and that number: 1 for a file that is no shard."""
    stem = name.removesuffix(".gguf")
    match = _SPLIT.fullmatch(stem)
    return (stem, 1) if match is None else (match[1], int(match[2]))


def _bring(repo: str, quant: str | None) -> str:
    """The commands that download a model, in words."""
    server = command_line(["llama-server", "-hf", repo if quant is None else f"{repo}:{quant}"])
    return f"get it with {server} or {command_line(['hf', 'download', repo])} FILE"
