"""Make the embedded model's evidence again, and say where it differs from what the pages show.

A command in docs/ or research/ that is marked `<!-- again: N minutes -->` is run as it stands there. Each row of the
tables and each line of the output that follow it, up to the next heading or command, is looked for in what the command
prints, which is kept in --output. Another CPU rounds otherwise, so that a search may take another path there. So a line
of a command that runs a model counts as the same, unless --exact is given, where each gain's interval overlaps the
document's, and every other figure differs by at most a seventh of itself or 15 percent points. A kept study's lines
must be the same to the digit. Exit status 1 if a line differs, with --check only. Usage:

    python research/evidence.py [--list] [--only TEXT] [--jobs 2] [--with NAME] [--check] [--exact]
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_FIGURE = re.compile(rf"({_NUMBER})(?: \[({_NUMBER}), ({_NUMBER})\])?( %)?")
_MARK = re.compile(r"<!-- again: ([\d.]+) minutes?(?:; needs (.*))? -->")


@dataclass(frozen=True)
class Claim:
    """A command of a document, and the lines that it is to print.

    Args:
        document: Its file's name.
        title: The heading above.
        minutes: How long it takes on one thread.
        needs: What must be installed besides; "" if nothing.
        commands: Shell lines, run one after another.
        lines: Rows and lines of output that the document shows.
    """

    document: str
    title: str
    minutes: float
    needs: str
    commands: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def rounds(self) -> bool:
        """Whether a model runs, so that another CPU may give other figures."""
        return any(".gguf" in command or " demo" in command for command in self.commands)


@dataclass(frozen=True)
class Outcome:
    """What a command printed.

    Args:
        seconds: How long it took.
        output: What it printed.
        error: Why it failed; "" if it did not.
        differs: Lines of the document that were not printed, each with the nearest one that was.
        rounded: Likewise, such as another CPU's rounding may make of them.
    """

    seconds: float
    output: str
    error: str
    differs: tuple[tuple[str, str], ...]
    rounded: tuple[tuple[str, str], ...] = ()


def pages() -> list[Path]:
    """The pages that may hold marked commands."""
    return sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "research").glob("*.md"))


def claims(path: Path) -> list[Claim]:
    """Return the marked commands of a Markdown file.

    Raises:
        ValueError: a marker without a command.
    """
    found: list[Claim] = []
    title = ""
    current: tuple[re.Match[str], tuple[str, ...]] | None = None
    lines: list[str] = []
    mark: re.Match[str] | None = None
    block: list[str] | None = None

    def finish() -> None:
        if current is not None:
            at, commands = current
            found.append(Claim(path.name, title, float(at[1]), at[2] or "", commands, tuple(lines)))
            lines.clear()

    for line in path.read_text(encoding="utf-8").splitlines():
        if block is not None and not line.startswith("```"):
            block.append(line)
        elif line.startswith("```"):
            if block is None:
                block = []
                continue
            if mark is not None:
                finish()
                joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(block))
                current, mark = (mark, tuple(joined.splitlines())), None
            elif block and block[0].startswith(("python ", "lrope-gguf ")):
                finish()
                current = None
            elif current is not None:
                lines += [part for part in block if part.strip()]
            block = None
        elif match := _MARK.search(line):
            mark = match
        elif line.startswith("#"):
            finish()
            current, title = None, line.lstrip("# ")
        elif line.startswith("|") and current is not None:
            lines.append(line)
        if mark is not None and block is None and line.strip() and not _MARK.search(line):
            raise ValueError(f"{path}: the marker under {title!r} has no command after it")
    finish()
    return found


def compare(expected: Sequence[str], output: str) -> tuple[tuple[str, str], ...]:
    """Return the expected lines that were not printed, each with the nearest that was; "" if none is like it."""
    printed = [" ".join(line.split()) for line in output.splitlines()]
    differs = []
    for line in expected:
        plain = " ".join(line.split())
        if plain not in printed and not re.fullmatch(r"[|\s:-]+", line):
            differs.append((line, next(iter(difflib.get_close_matches(plain, printed, 1, 0.3)), "")))
    return tuple(differs)


def shape(line: str) -> str:
    """A line without its figures."""
    return _FIGURE.sub(lambda match: "# []" if match[2] else "#", line)


def close(document: str, printed: str) -> bool:
    """Whether two lines are alike but for figures, and these as close as rounding may leave them."""
    names = [line.strip("| ").partition(" | ")[0] for line in (document, printed)]
    if names[0] != names[1] or shape(document) != shape(printed):
        return False
    for (x, low, high, share), (y, floor, ceiling, _) in zip(
        _FIGURE.findall(document), _FIGURE.findall(printed), strict=True
    ):
        if low and (float(ceiling) < float(low) or float(high) < float(floor)):
            return False
        if not low and abs(float(x) - float(y)) > max(15.0 if share else 0.0, abs(float(x)) / 7):
            return False
    return True


def sort(differs: Sequence[tuple[str, str]], output: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return what rounding explains, with the lines that it made, and what it does not.

    Tables follow each other in the document as in the output: a line is looked for after the one before it.
    """
    printed = [" ".join(line.split()) for line in output.splitlines()]
    rounded, others, start = [], [], 0
    for line, near in differs:
        at = next((i for i in range(start, len(printed)) if close(" ".join(line.split()), printed[i])), None)
        if at is None:
            others.append((line, near))
        else:
            rounded.append((line, printed[at]))
            start = at + 1
    return rounded, others


def run(claim: Claim, exact: bool = False) -> Outcome:
    """Run a claim's commands from the project's folder, up to the first that fails."""
    start, output, failure = time.monotonic(), "", ""
    for command in claim.commands:
        words = shlex.split(command)
        known = {"python": [sys.executable], "lrope-gguf": [sys.executable, "-m", "lrope_gguf"]}
        words = [*known.get(words[0], words[:1]), *words[1:]]
        try:
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError as error:
            failure = f"{words[0]}: {error.strerror}"
            break
        output += f"$ {command}\n{done.stdout}"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            failure = f"exit status {done.returncode}: {last}"
            break
    differs = compare(claim.lines, output)
    rounded, others = ([], list(differs)) if exact or not claim.rounds else sort(differs, output)
    return Outcome(time.monotonic() - start, output, failure, tuple(others), tuple(rounded))


def main() -> None:
    """Run what is marked, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what would be run, and how long it takes")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="commands whose document, heading or words have TEXT"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="commands at once (%(default)s)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=ROOT / "build" / "evidence")
    parser.add_argument("--with", metavar="NAME", dest="present", nargs="+", default=[],
                        help="what is installed: commands that need anything else are left out")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit status 1 if a line differs")
    parser.add_argument("--exact", action="store_true", help="let no figure differ, as on the CPU of the documents")
    args = parser.parse_args()
    found = [claim for path in pages() for claim in claims(path)]
    found = [claim for claim in found if args.only in f"{claim.document} {claim.title} {' '.join(claim.commands)}"]
    if not found:
        parser.exit(1, f"no marked command has {args.only!r}\n")
    for claim in found:
        needs = f"; left out without --with {claim.needs}" if claim.needs not in ("", *args.present) else ""
        print(f"{claim.minutes:4.3g} min  {claim.document}, {claim.title}{needs}")
        print("".join(f"          {command}\n" for command in claim.commands), end="")
    found = [claim for claim in found if claim.needs in ("", *args.present)]
    total = sum(claim.minutes for claim in found)
    print(f"commands: {len(found)}, minutes: about {total / args.jobs:.0f}", flush=True)
    if args.list:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    bad = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for i, (claim, outcome) in enumerate(
            zip(found, pool.map(partial(run, exact=args.exact), found), strict=True), 1
        ):
            name = re.sub(r"[^a-z0-9]+", "-", f"{Path(claim.document).stem} {claim.title}".lower()).strip("-")
            kept = args.output / f"{i:02}-{name}.txt"
            kept.write_text(outcome.output, encoding="utf-8")
            same = len(claim.lines) - len(outcome.differs) - len(outcome.rounded)
            verdict = outcome.error or f"{same} of {len(claim.lines)} lines as in the document"
            if outcome.rounded and not outcome.error:
                verdict += f", {len(outcome.rounded)} more within their intervals"
            print(f"[{i}/{len(found)}] {claim.document}, {claim.title}: {outcome.seconds:.0f} s, {verdict}; {kept}")
            for line, near in outcome.differs if not outcome.error else ():
                print(f"  document: {line}\n  printed:  {near or 'nothing like it'}")
            sys.stdout.flush()
            bad += bool(outcome.error or outcome.differs)
    print("all as in the documents" if not bad else f"{bad} of {len(found)} differ")
    if bad and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
