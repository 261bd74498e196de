"""llama.cpp's own tests on the patched tree and on the unpatched one: every result must be the same.

Builds both trees with their tests (or takes `--stock-build` and `--patched-build`, configured with
-DLLAMA_BUILD_TESTS=ON), runs ctest in each, and some tests more that ctest does not run or runs with a random seed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import native_build
from support.commands import CommandError, progress, run, script, table

# what ctest leaves out: the operations that the series feeds, and every architecture with a fixed seed
EXTRAS = {
    "test-backend-ops -o ROPE": ("test-backend-ops", "test", "-b", "CPU", "-o", "ROPE"),
    "test-backend-ops -o ROPE_BACK": ("test-backend-ops", "test", "-b", "CPU", "-o", "ROPE_BACK"),
    "test-llama-archs -s 1": ("test-llama-archs", "-s", "1"),
}
OPTIONS = ("LLAMA_BUILD_TESTS=ON",)
REASONS = (
    (r"(?:Could not|Unable to) find executable", "was not built"),
    (r"Fixture dependency failed", "needs a test that failed"),
    (r"[Rr]esolve|[Dd]ownload|[Nn]etwork|[Cc]onnect|https?://|curl", "needs a download"),
    (r"[Nn]o module named|ModuleNotFoundError", "needs a Python package"),
    (r"model|\.gguf", "needs a model file"),
)


def build(stock: bool, folder: Path) -> Path:
    """Build a tree with its tests, as far as it can be built, and return the build folder."""
    source = native_build.fetch_source(folder) if stock else native_build.patched_source(folder)
    build_dir = source.parent / "build-tests"
    # one test that does not compile, on both trees, must not stop the others
    native_build.build(source, build_dir, (), OPTIONS, keep_going=True)
    return build_dir


def parse_junit(path: Path) -> dict[str, tuple[str, str]]:
    """Result and output of each test in a file of `ctest --output-junit`."""
    results = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "skipped")), None)
        message = problem.get("message", "") if problem is not None else ""
        result = {"run": "passed", "fail": "failed"}.get(case.get("status", ""), "not run")
        if message == "Timeout":
            result = "timeout"
        results[case.get("name", "")] = (result, message + "\n" + (case.findtext("system-out") or ""))
    return results


def run_ctest(build_dir: Path, exclude: str | None, seconds: int, jobs: int) -> dict[str, tuple[str, str]]:
    """Run ctest; each test may take ``seconds``."""
    junit = build_dir.resolve() / "results.xml"
    junit.unlink(missing_ok=True)
    command: list[str | Path] = ["ctest", "--test-dir", build_dir, "--output-junit", junit]
    command += ["--timeout", str(seconds), "-j", str(jobs), *(("-E", exclude) if exclude else ())]
    output = run(command, check=False)
    if not junit.is_file():
        raise CommandError(f"{build_dir}: ctest wrote no results (CMake 3.21 is needed):\n{output.stderr}")
    return parse_junit(junit)


def run_extras(build_dir: Path, seconds: int) -> dict[str, tuple[str, str]]:
    results = {}
    for name, (tool, *arguments) in EXTRAS.items():
        path = build_dir.resolve() / "bin" / tool
        if not path.is_file():
            results[name] = ("not run", "Could not find executable")
            continue
        try:
            done = run([path, *arguments], check=False, timeout=seconds)
        except CommandError as error:
            results[name] = ("timeout", str(error))
            continue
        # colours, and the times in front of log lines
        output = re.sub(r"\x1b\[[0-9;]*m|^\d+\.\d\d\.\d{3}\.\d{3} ", "", done.stdout, flags=re.M)
        results[name] = ("failed" if done.returncode else "passed", output)
    return results


def differing_output(stock: Mapping[str, tuple[str, str]], patched: Mapping[str, tuple[str, str]]) -> list[str]:
    """Extras that print something else: their seeds are fixed, so even errors must be the same to the last digit."""

    def lines(output: str) -> list[str]:
        return [line for line in output.splitlines() if not re.search(r"\d+(\.\d+)? ?(ms|us|s|GB)\b|0x[0-9a-f]+", line)]

    return [name for name in EXTRAS if lines(stock[name][1]) != lines(patched[name][1])]


def reason(output: str) -> str:
    return next((text for pattern, text in REASONS if re.search(pattern, output)), "unknown") if output else "unknown"


def report(stock: Mapping[str, tuple[str, str]], patched: Mapping[str, tuple[str, str]]) -> tuple[str, bool]:
    names = sorted(stock.keys() | patched.keys())
    missing = ("missing", "")
    rows = [(name, stock.get(name, missing), patched.get(name, missing)) for name in names]
    counts = [Counter(result for result, _ in tree.values()) for tree in (stock, patched)]
    kinds = sorted(counts[0].keys() | counts[1].keys())
    totals = [(kind, counts[0][kind], counts[1][kind]) for kind in kinds]
    different = [(name, a[0], b[0]) for name, a, b in rows if a[0] != b[0]]
    printed = differing_output(stock, patched)
    lines = [table(["result", "stock", "patched"], [*totals, ("**all**", len(stock), len(patched))]), ""]
    lines.append(f"Results that differ: {len(different)}")
    if different:
        lines += ["", table(["test", "stock", "patched"], different)]
    lines.append(f"Tests with fixed seeds whose output differs: {', '.join(printed) or 0}")
    both = [(name, a[0], reason(a[1])) for name, a, b in rows if a[0] == b[0] != "passed"]
    if both:
        lines += ["", table(["not passed on both", "result", "reason"], both)]
    return "\n".join(lines), not different and not printed


def main() -> int:
    """Run the tests of both trees and print the report; exit status 1 if they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stock-build", type=Path, metavar="DIR", help="build folder of the unpatched tree")
    parser.add_argument("--patched-build", type=Path, metavar="DIR", help="build folder of the patched tree")
    parser.add_argument("--output", type=Path, default=native_build.WORK, help="work folder (default: build/proofs)")
    parser.add_argument("--exclude", metavar="REGEX", help="leave these tests of ctest out")
    parser.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="for each test (default: 900)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tests at a time (default: all cores)")
    args = parser.parse_args()
    stock = args.stock_build or build(True, args.output)
    patched = args.patched_build or build(False, args.output)
    for folder in (stock, patched):
        if not (folder / "CTestTestfile.cmake").is_file():
            raise CommandError(f"{folder}: no build folder with tests (-DLLAMA_BUILD_TESTS=ON)")
    results = []
    for folder in (stock, patched):
        progress(f"testing {folder}")
        results.append(run_ctest(folder, args.exclude, args.timeout, args.jobs) | run_extras(folder, args.timeout))
    text, same = report(*results)
    print(text)
    return 0 if same else 1


if __name__ == "__main__":
    script(main)
