"""The series on other versions of llama.cpp: does it apply, does it build, do the numerical tests pass.

The sources are those that llama-cpp-python releases carry, and the newest one in xllamacpp's source distribution.
Usage: python proofs/versions.py [RELEASE ...] [--apply-only]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import native_build
from support.commands import CommandError, progress, run, script, table
from support.native_build import PROJECT

RELEASES = ("0.3.36", "xllamacpp")
STRUCTS = ("llama_model_params", "llama_context_params", "llama_batch")
PYTEST = ("-q", "-p", "no:cacheprovider", "-m", "native")

# stands in for the build backend of a package of which only the archive is wanted: pip asks it for name and version
BACKEND = """
import os, pathlib

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name, version = os.environ["LROPE_PACKAGE"].split("==")
    folder = pathlib.Path(directory, f"{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
"""


@dataclass
class Row:
    release: str
    commit: str = ""
    applies: str = ""
    builds: str = ""
    tests: str = ""
    seconds: float = 0.0

    def cells(self) -> list[object]:
        return [self.release, self.commit, self.applies, self.builds, self.tests, f"{self.seconds:.0f}"]


HEADER = ["release", "llama.cpp", "series applies", "library builds", "tests", "seconds"]


def fetch(release: str, folder: Path) -> Path:
    """The unpatched llama.cpp source of a release, or of the newest xllamacpp."""
    return fetch_xllamacpp(folder) if release.startswith("xllamacpp") else native_build.fetch_source(folder, release)


def fetch_xllamacpp(folder: Path) -> Path:
    """The llama.cpp source in the newest source distribution of xllamacpp; nothing of that package is run."""
    output = run([sys.executable, "-m", "pip", "index", "versions", "xllamacpp"]).stdout
    match = re.match(r"xllamacpp \(([\w.]+)\)", output)
    if match is None:
        raise CommandError(f"pip index versions xllamacpp: no version in\n{output}")
    top = folder / "source" / f"xllamacpp-{match[1]}"
    archive = folder / f"{top.name}.tar.gz"
    if not top.is_dir():
        if not archive.is_file():
            download_only(f"xllamacpp=={match[1]}", folder)
        native_build.extract(archive, top)
    return top / "thirdparty" / "llama.cpp"


def download_only(requirement: str, folder: Path) -> None:
    """Let pip download a source distribution without running its build backend, which is setuptools."""
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary, "setuptools")
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "build_meta.py").write_text(BACKEND)
        name = requirement.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", name, "--dest", str(folder), requirement]
        run(command, env={"PYTHONPATH": temporary, "LROPE_PACKAGE": requirement})


def commit_of(release: str, source: Path) -> str:
    """The llama.cpp commit that a release names, in its change log or in our patches/source.txt."""
    if release == native_build.pinned()[0]:
        match = re.search(r"llama\.cpp commit (\w+)", (native_build.PATCHES / "source.txt").read_text())
    elif release.startswith("xllamacpp"):
        match = re.search(r"-(\S+)", source.parent.parent.name)  # its version: it names no commit
    else:
        log = source.parent.parent / "CHANGELOG.md"
        match = re.search(r"/llama\.cpp@(\w+)", log.read_text()) if log.is_file() else None  # the newest comes first
    return match[1] if match else "?"


def apply(source: Path) -> str:
    """Apply the series to ``source`` as the build does; tells how, which patches are left out, or which hunks fail."""
    before = native_build.copy_source(source, source.with_name("before"))
    try:
        said = native_build.apply_series(source)
    except CommandError as error:
        said = " ".join(str(error).split())
        lacks = re.search(r"cannot be used: \S+/(src/\S+ has no \w+)", said)
        failed = [lacks[1]] if lacks else re.findall(r"patch failed: (\S+)", said)
        return f"no: {', '.join(failed) or said}"
    left_out = re.search(r"from (\S+)\s+on\s+are\s+left\s+out:\s+\S+\s+has\s+no\s+(\w+)", said)
    usable = [folder for folder in native_build.patches() if left_out is None or folder.name < left_out[1]]
    with tempfile.NamedTemporaryFile("w", suffix=".patch") as series:
        # one file: git checks the patches of a file one after the other only inside one input
        series.write("\n".join((folder / "hooks.patch").read_text() for folder in usable))
        series.flush()
        exact = _git_apply(before, Path(series.name), "--check")
    shutil.rmtree(before)
    how = "exactly" if exact else "indented otherwise"
    return f"{how}, up to {usable[-1].name} (no {left_out[2]})" if left_out else how


def _git_apply(source: Path, patch: Path, *options: str) -> bool:
    command: list[str | Path] = ["git", "apply", *options, patch]
    # the source may lie inside another repository: this one
    environment = {"GIT_CEILING_DIRECTORIES": str(source.resolve().parent)}
    return run(command, cwd=source, check=False, env=environment).returncode == 0


def struct_fields(header: str, name: str) -> list[tuple[str, str]]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.S)
    match = re.search(rf"struct {name} \{{(.*?)\}};?", text, re.S)
    if match is None:
        raise CommandError(f"llama.h: no struct {name}")
    return [(" ".join(kind.split()), member) for kind, member in re.findall(r"([\w\s*]+?[\s*])(\w+)\s*;", match[1])]


def binding(release: str, source: Path, folder: Path) -> Path:
    """A folder with the Python part of the llama-cpp-python release whose structs are those of ``source``.

    For xllamacpp this is the pinned release, with the members added that llama.h has got since.
    """
    version = native_build.pinned()[0] if release.startswith("xllamacpp") else release
    target = folder / "binding" / release
    if target.is_dir():
        return target
    archive = native_build.fetch_source(folder, version).parent.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        package = Path(temporary, release, "llama_cpp")
        shutil.copytree(archive / "llama_cpp", package)
        old = (native_build.fetch_source(folder, version) / "include/llama.h").read_text()
        add_members(package / "llama_cpp.py", old, (source / "include/llama.h").read_text())
        package.parent.rename(target)
    return target


def add_members(module: Path, old: str, new: str) -> None:
    """Add to the ctypes structs in ``module`` what the new llama.h has and the old one has not."""
    text = module.read_text()
    types = {"size_t": "c_size_t", "bool": "c_bool", "float": "c_float", "int32_t": "c_int32", "uint32_t": "c_uint32"}
    for struct in STRUCTS:
        before, after = struct_fields(old, struct), struct_fields(new, struct)
        added = [field for field in after if field not in before]
        if [field for field in after if field in before] != before or any(kind not in types for kind, _ in added):
            raise CommandError(f"struct {struct} changed in a way that the binding cannot follow: {added}")
        start = text.index(f"class {struct}(ctypes.Structure)")
        for kind, name in added:
            previous = after[after.index((kind, name)) - 1][1]
            match = re.compile(rf'^( *)\("{previous}", .*\),\n', re.M).search(text, text.index("_fields_", start))
            if match is None:
                raise CommandError(f"{module}: no member {previous} in {struct}")
            text = f'{text[: match.end()]}{match[1]}("{name}", ctypes.{types[kind]}),\n{text[match.end() :]}'
    module.write_text(text)


def run_tests(library: Path, bindings: Path, tests: Sequence[str]) -> str:
    """Run the numerical tests with a library and its binding; a summary such as "93 passed"."""
    search = PROJECT / "search"
    with tempfile.TemporaryDirectory() as temporary:
        # the package in the source tree, where it is not installed under its second name
        Path(temporary, "lrope_search").symlink_to(search)
        path = [str(bindings), temporary, str(PROJECT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "LLAMA_CPP_LIB_PATH": str(library.resolve())}
        command = [sys.executable, "-m", "pytest", *PYTEST, *tests]
        output = run(command, cwd=PROJECT, env=env | {"LROPE_REQUIRE_NATIVE": "1"}, check=False).stdout
    lines = output.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            progress(f"  {line}")
    return re.sub(r" in [\d.]+s.*|=", "", lines[-1]).strip() if lines else "no output"


def numerical_tests() -> list[str]:
    """The test modules that compare the library with the reference."""
    return [str(path) for path in sorted((PROJECT / "tests").glob("test_rope_*.py"))]


def all_passed(summary: str) -> bool:
    """Whether the summary of pytest has passed tests and no others that count."""
    return re.fullmatch(r"\d+ passed(, \d+ (skipped|deselected|warnings?))*", summary) is not None


def prove(release: str, args: argparse.Namespace) -> Row:
    progress(release)
    start = time.monotonic()
    row = Row(release)
    try:
        source = fetch(release, args.output)
        row.commit = commit_of(release, source)
        copy = native_build.copy_source(source, args.output / "versions" / release / "llama.cpp")
        row.applies = apply(copy)
        if not args.apply_only and not row.applies.startswith("no:"):
            row.builds = "no"
            library = native_build.build(copy, copy.parent / "build", native_build.LIBRARY)
            row.builds = "yes"
            row.tests = run_tests(library, binding(release, source, args.output), args.tests)
    except CommandError as error:
        progress(f"{release}: {error}")
        row.applies = row.applies or "no: " + str(error).splitlines()[0]
    row.seconds = time.monotonic() - start
    return row


def main() -> int:
    """Print the table; exit status 1 if the series fails on a release."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "releases", nargs="*", default=RELEASES, metavar="RELEASE", help=f"default: {' '.join(RELEASES)}"
    )
    parser.add_argument("--apply-only", action="store_true", help="do not build and test")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="default: tests/test_rope_*.py")
    parser.add_argument("--output", type=Path, default=native_build.WORK, help="work folder (default: build/proofs)")
    args = parser.parse_args()
    args.tests = args.tests or numerical_tests()
    rows = [prove(release, args) for release in args.releases]
    columns = 3 if args.apply_only else len(HEADER)
    print(table(HEADER[:columns], [row.cells()[:columns] for row in rows]))
    bad = [row for row in rows if not row.applies or row.applies.startswith("no:")]
    if not args.apply_only:
        bad += [row for row in rows if not all_passed(row.tests)]
    return 1 if bad else 0


if __name__ == "__main__":
    script(main)
