"""The pages: few, short, with links, paths and commands that lead somewhere; and the audit's appendix is complete."""

from __future__ import annotations

import argparse
import csv
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.arch_models import FIXTURES, UNUSABLE

from lrope_gguf.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PRODUCT = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*PRODUCT, ROOT / "CONTRIBUTING.md", *(path for folder in ("curves", "models", "patches", "research")
                                             for path in sorted((ROOT / folder).glob("*.md")))]  # fmt: skip


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_products_pages_are_few_and_short() -> None:
    names = {path.stem for path in PRODUCT}
    assert names == {"README", "search", "tasks", "serve", "dynamic", "metadata-format", "patch", "design", "evidence"}
    assert sum(len(path.read_text(encoding="utf-8").split()) for path in PRODUCT) <= 12_000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    for name in re.findall(r"\b(?:tests|proofs|benchmarks|research|models)/[\w./-]+\.(?:py|cpp|csv|gguf)\b", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words of each command of a page that calls ``program``: in blocks of code, and with arguments in the text."""
    text = page.read_text(encoding="utf-8")
    block = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    code = "\n".join(block.findall(text)).replace("\\\n", "")
    for name, value in re.findall(r'^(\w+)="(.*)"$', code, re.MULTILINE):
        code = code.replace(f"${name}", value)
    lines = [(line, True) for line in code.splitlines()]
    lines += [(one.replace("\n", " "), False) for one in re.findall(r"`([^`]+)`", block.sub("", text))]
    for line, whole in lines:
        if match := re.match(rf"(?:\$ |.* && )?(?:\S*/)?{program} (?!-m |-c )(.*)", line):
            words = shlex.split(match[1], comments=True)
            if whole or not all(word.startswith("-") for word in words[1:]):
                yield words


PAGE = """Say `lrope-gguf show`, or `lrope-gguf show
MODEL`.

```
$ lrope-gguf write M \\
    --quiet  # so
next: lrope-gguf no
S="lrope-gguf search M"
$S --set a=1,\\
2
a && b/lrope-gguf demo
```
"""


def test_a_pages_commands_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    found = [["write", "M", "--quiet"], ["search", "M", "--set", "a=1,2"], ["demo"], ["show", "MODEL"]]
    assert list(commands(tmp_path / "page.md", "lrope-gguf")) == found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ones_that_the_tool_takes(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search, evaluate = (pytest.importorskip(f"lrope_search.commands.{name}") for name in ("search", "evaluate"))
    options = pytest.importorskip("lrope_search.commands.options")
    asked: list[str] = []

    def settings(kinds: Any, name: str) -> Any:
        def callback(**values: Any) -> None:
            gathered = options.Gathered(values, kinds, name)
            gathered.task(0)
            if name == "search":
                gathered.search(0)
            asked.append(name)

        return callback

    monkeypatch.setattr(search.command, "callback", settings(options.SHARED, "search"))
    shared = (options.RunConfig, evaluate.ModelConfig, evaluate.WorkersConfig)
    monkeypatch.setattr(evaluate.command, "callback", settings(shared, "eval"))
    for name in COMMANDS.keys() - {"search", "eval"}:
        command = pytest.importorskip(COMMANDS[name][0]).command
        monkeypatch.setattr(command, "callback", lambda name=name, **values: asked.append(name))
    wanted = [words for words in commands(page, "lrope-gguf") if words and words[0] in COMMANDS]
    for words in wanted:
        # a name in a cache is looked for there, and none is on this machine
        words = [word if not re.fullmatch(r"[\w.-]+/[\w.-]+:\w+", word) else "cached.gguf" for word in words]
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert asked == [words[0] for words in wanted if not {"--help", "--print-config"} & {*words}]
    for name in re.findall(r"--set (?:NAME|TASK\.\w+|(\w[\w.-]*))=", page.read_text(encoding="utf-8")):
        assert not name or name in options.known_settings(), name


class Stop(Exception):  # noqa: N818
    """A script has taken its options."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ones_that_the_scripts_take(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise Stop

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for words in commands(page, "python"):
        script = ROOT / words[0]
        if not script.is_file() or "ArgumentParser" not in script.read_text(encoding="utf-8"):
            continue
        given = [word for word in words[1:] if not re.fullmatch(r"\[.*|.*\]|\$\w+", word)]
        monkeypatch.setattr(sys, "argv", [str(script), *given])
        monkeypatch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Stop:
            continue
        except ModuleNotFoundError as error:
            assert error.name and not error.name.startswith("lrope"), words  # else a library that an extra brings
        except SystemExit as left:
            pytest.fail(f"{' '.join(words)}: {left}")


def test_pages_name_no_place_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(home|root|tmp|work)/", page.read_text(encoding="utf-8")), page


def test_every_architecture_is_in_the_appendix() -> None:
    with (ROOT / "docs" / "architectures.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == FIXTURES.keys() | UNUSABLE.keys()
    bad = [row["model"] for row in rows if not row["verdict"].startswith(("exact", "refused: ", "cannot be loaded: "))]
    assert not bad
    page = (ROOT / "docs" / "patch.md").read_text(encoding="utf-8")
    assert f"{len(rows)} models, 0 problems" in page


def test_the_repository_stays_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    paths = [path for name in names if name and (path := ROOT / name.decode()).is_file()]
    assert sum(path.read_bytes().count(b"\n") for path in paths) <= 70_000
