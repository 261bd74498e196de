"""The RoPE calls of llama.cpp's graphs, and which of them the series catches.

The series gives llm_graph_context members with the names of ggml's RoPE functions, which hide these. Here they are
declared deleted in a copy of the unpatched source instead: every call that they hide fails to compile. These places
are compared, one by one, with those where the text has such a name.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.commands import CommandError, run, table

# where a call outside of the graphs may stand
ALLOWED = {
    "src/llama-kv-cache.cpp": "context shift: build_rope_shift applies the factor of its layer itself",
    "src/llama-model-loader.cpp": "asks whether a device can run the operation; is never computed",
    "tools/mtmd/": "encoders and generators of images and sound, which have no layer of the language model",
}
STRUCT = re.compile(r"^struct llm_graph_context( final)? \{$", re.M)


@dataclass(frozen=True, order=True)
class Site:
    """One mention of a RoPE function: the call reaches from `line` to `last`."""

    file: str
    line: int
    name: str = field(compare=False)
    last: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}"


@dataclass
class Result:
    """Sites in the text, those of them that fail to compile, and errors that are at no site."""

    sites: list[Site]
    hidden: set[Site]
    unexplained: list[str]
    seconds: float

    @property
    def outside(self) -> list[Site]:
        return [site for site in self.sites if site not in self.hidden]

    @property
    def differences(self) -> list[str]:
        """What must be empty: sites missed without a reason, errors without a site."""
        return [str(site) for site in self.outside if allowed(site) is None] + self.unexplained


def allowed(site: Site) -> str | None:
    return next((start for start in ALLOWED if site.file.startswith(start)), None)


def rope_functions(source: Path) -> list[str]:
    header = source / "ggml/include/ggml.h"
    text = header.read_text() if header.is_file() else ""
    names = re.findall(r"struct ggml_tensor \* +(ggml_rope\w*) *\(\s*struct ggml_context", text)
    if "ggml_rope_ext" not in names:
        raise CommandError(f"{source}: no llama.cpp source (ggml/include/ggml.h has no ggml_rope_ext)")
    return names


def blank(text: str) -> str:
    """Return C++ source with comments and strings blanked out, line breaks kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.S)


def text_sites(file: str, text: str, names: Sequence[str]) -> list[Site]:
    text = blank(text)
    sites = []
    for match in re.finditer(rf"\b(?:{'|'.join(names)})\b", text):
        # the compiler may report any line of a call
        depth, end = 0, match.end()
        for end in range(match.end(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth <= 0 and not text[end].isspace():
                break
        sites.append(Site(file, text.count("\n", 0, match.start()) + 1, match[0], text.count("\n", 0, end) + 1))
    return sites


def source_files(source: Path) -> list[Path]:
    """The files that may build graphs: all but ggml itself, its vendors and the tests."""
    folders = ("src", "common", "tools", "examples", "app")
    files = (path for folder in folders for path in (source / folder).rglob("*"))
    return sorted(path for path in files if path.suffix in (".cpp", ".h", ".hpp", ".c") and path.is_file())


def delete_members(header: Path, names: Sequence[str]) -> None:
    """Declare ``names`` as deleted members of llm_graph_context."""
    text = header.read_text()
    match = STRUCT.search(text)
    if match is None or "ggml_rope" in text or "rope-layer" in text:
        raise CommandError("the source is patched, or its src/llama-graph.h has no 'struct llm_graph_context {'")
    members = "".join(f" ggml_tensor * {name}(...) const = delete;" for name in names)
    # on the line of the brace: line numbers stay
    header.write_text(text[: match.end()] + members + text[match.end() :])


def compile_errors(compiler: Sequence[str], top: Path, file: Path) -> tuple[list[tuple[int, str]], list[str]]:
    """Lines and names of uses of deleted members in ``file``, and all other errors."""
    relative = file.relative_to(top)
    output = run([*compiler, relative], cwd=top, check=False, env={"LC_ALL": "C"}).stderr
    deleted, other = [], []
    for line in output.splitlines():
        if not re.search(r": (?:fatal )?error: ", line):
            continue
        match = re.match(rf"{re.escape(str(relative))}:(\d+):", line)
        name = re.search(r"\b(?:deleted (?:member )?function|function) .*?\b(ggml_rope\w*)", line)
        if match and name and "deleted" in line:
            deleted.append((int(match[1]), name[1]))
        else:
            other.append(line)
    return deleted, other


def prove(source: Path, only: Sequence[str] = (), jobs: int | None = None) -> Result:
    """Compile the files that mention a RoPE function (``only``: those of these names) and compare."""
    start = time.monotonic()
    names = rope_functions(source)
    sites: dict[str, list[Site]] = {}
    for path in source_files(source):
        if not only or path.name in only:
            file = path.relative_to(source).as_posix()
            sites[file] = text_sites(file, path.read_text(errors="replace"), names)
    missing = set(only) - {Path(file).name for file in sites}
    if missing:
        raise CommandError(f"{source}: no file {', '.join(sorted(missing))}")
    units = [file for file, found in sites.items() if found and file.startswith("src/") and file.endswith(".cpp")]

    hidden: set[Site] = set()
    unexplained: list[str] = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        top = Path(temporary)
        shutil.copytree(source / "src", top / "src")
        delete_members(top / "src/llama-graph.h", names)
        compiler = compile_command(source)
        results = pool.map(lambda file: compile_errors(compiler, top, top / file), units)
        for file, (deleted, other) in zip(units, results, strict=True):
            unexplained += other
            for line, name in deleted:
                found = [site for site in sites[file] if site.name == name and site.line <= line <= site.last]
                hidden.update(found)
                if not found:
                    unexplained.append(f"{file}:{line} {name}: error, but no mention in the text")
    return Result([site for found in sites.values() for site in found], hidden, unexplained, time.monotonic() - start)


def compile_command(source: Path) -> list[str]:
    """The compiler, told to report all errors; to be run in the folder of the copy of src/."""
    compiler = os.environ.get("CXX", "c++")
    clang = "clang" in run([compiler, "--version"]).stdout
    includes = [f"-I{source.resolve() / folder}" for folder in ("include", "ggml/include")]
    return [
        compiler, "-std=c++17", "-fsyntax-only", "-w", "-Isrc", f"-f{'error-limit' if clang else 'max-errors'}=0",
        *includes,
    ]  # fmt: skip


def report(result: Result) -> str:
    models = {site.file for site in result.sites if site.file.startswith("src/models/")}
    in_models = sum(site.file in models for site in result.sites)
    per_name = {site.name: 0 for site in sorted(result.sites, key=lambda site: site.name)}
    for site in result.hidden:
        per_name[site.name] += 1
    rows = [
        ("model files with a RoPE call", len(models)),
        ("calls in them, by text", in_models),
        ("calls in them that fail to compile", sum(site.file in models for site in result.hidden)),
        *((f"of these `{name}`", count) for name, count in per_name.items() if count),
        ("calls in other graph files that fail to compile", sum(site.file not in models for site in result.hidden)),
        ("calls elsewhere, each with a reason", sum(allowed(site) is not None for site in result.outside)),
        ("**differences**", len(result.differences)),
    ]
    lines = [table(["", "count"], rows), ""]
    places = [allowed(site) or site.file for site in result.outside]
    elsewhere = [(place, places.count(place), ALLOWED.get(place, "NO REASON")) for place in sorted(set(places))]
    lines.append(table(["elsewhere", "calls", "reason"], elsewhere))
    lines += ["", *(f"difference: {text}" for text in result.differences)]
    return "\n".join(lines).rstrip()
