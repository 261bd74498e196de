"""The evidence made again: marked commands are found in the documents, and what differs from them is said."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import evidence
import pytest

ROOT = Path(__file__).resolve().parents[2]

PAGE = """# A page

<!-- again: 2 minutes -->
```
python -c "print('| a | 1 |')" \\
    --more
```

A sentence.

| name | value |
|---|---|
| a | 1 |
| b | 2.5 |

```
a line of output
```

```
python -c "not marked"
```

| d | 4 |

## Not marked

| c | 3 |

<!-- again: 0.5 minutes; needs lm-eval -->
```
lrope-gguf demo
python -c ""
```
"""


def test_a_marked_command_has_the_rows_and_the_output_after_it(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    first, second = evidence.claims(tmp_path / "page.md")
    assert (first.title, first.minutes, first.needs) == ("A page", 2.0, "")
    assert first.commands == ("python -c \"print('| a | 1 |')\" --more",)
    assert first.lines == ("| name | value |", "|---|---|", "| a | 1 |", "| b | 2.5 |", "a line of output")
    assert (second.title, second.minutes, second.needs) == ("Not marked", 0.5, "lm-eval")
    assert (second.commands, second.lines) == (("lrope-gguf demo", 'python -c ""'), ())


def test_a_marker_without_a_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("## Title\n<!-- again: 2 minutes -->\nNo command.\n")
    with pytest.raises(ValueError, match=r"page\.md: the marker under 'Title' has no command"):
        evidence.claims(tmp_path / "page.md")


def test_what_differs_is_named_with_the_nearest_line() -> None:
    shown = ["| name | value |", "|---|---|", "| a | 1 |", "| b | 2.5 |"]
    assert evidence.compare(shown, "| name |  value |\n| a | 1 |\n| b | 2.5 |\n") == ()
    assert evidence.compare(shown, "| name | value |\n| a | 1 |\n| b | 2.6 |\n") == (("| b | 2.5 |", "| b | 2.6 |"),)
    assert evidence.compare(["| a | 1 |"], "nothing\n") == (("| a | 1 |", ""),)


CLOSE = {
    "same": ("| a | 15.3 [14.5, 16.1] | 3.3 | 85 % |", True),
    "an interval that overlaps, and figures near": ("| a | 14.0 [13.1, 14.6] | 3.0 | 71 % |", True),
    "an interval beside": ("| a | 13.0 [12.1, 14.4] | 3.3 | 85 % |", False),
    "a figure far off": ("| a | 15.3 [14.5, 16.1] | 2.7 | 85 % |", False),
    "a share far off": ("| a | 15.3 [14.5, 16.1] | 3.3 | 69 % |", False),
    "another name": ("| b | 15.3 [14.5, 16.1] | 3.3 | 85 % |", False),
    "no interval": ("| a | 15.3 | 3.3 | 85 % |", False),
}


@pytest.mark.parametrize(("printed", "expected"), CLOSE.values(), ids=CLOSE)
def test_another_cpus_rounding_is_told_from_a_difference(printed: str, expected: bool) -> None:
    assert evidence.close("| a | 15.3 [14.5, 16.1] | 3.3 | 85 % |", printed) is expected


def test_rows_are_looked_for_in_the_order_of_the_tables() -> None:
    output = "| x | 9 % |\n| y | 99 % |\n| x | 50 % |\n| y | 12 % |\n"
    differs = [("| x | 55 % |", ""), ("| y | 99 % |", "")]
    assert evidence.sort(differs, output) == ([("| x | 55 % |", "| x | 50 % |")], [("| y | 99 % |", "")])


def test_a_kept_studys_figures_are_exact() -> None:
    for command, rounded in (("print('| x | 51 % |')", 0), ("print('| x | 51 % |') # m.gguf", 1)):
        claim = evidence.Claim("p.md", "T", 1.0, "", (f'python -c "{command}"',), ("| x | 50 % |",))
        outcome = evidence.run(claim)
        assert (len(outcome.rounded), len(outcome.differs)) == (rounded, 1 - rounded)
        assert len(evidence.run(claim, exact=True).differs) == 1


def test_the_documents_commands_exist() -> None:
    found = [claim for path in evidence.pages() for claim in evidence.claims(path)]
    assert found
    for claim in found:
        for command in claim.commands:
            words = shlex.split(command)
            assert words[0] == "lrope-gguf" or (words[0] == "python" and (ROOT / words[1]).is_file()), command
        assert claim.lines, f"{claim.document}, {claim.title}: nothing to compare"


def test_a_run_reports_and_keeps_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "research").mkdir()
    page = "## T\n<!-- again: 1 minute -->\n```\npython -c \"print('| a | 1 |')\"\n```\n| a | 1 |\n| b | 2 |\n"
    (tmp_path / "docs" / "page.md").write_text(page)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    page = "<!-- again: 9 minutes; needs lm-eval -->\n```\nno-such-program\n```\n"
    (tmp_path / "research" / "other.md").write_text(page)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--check", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        evidence.main()
    out = capsys.readouterr().out
    assert left.value.code == 1
    assert (
        "left out without --with lm-eval" in out
        and "commands: 1, minutes: about 1" in out
        and "1 of 2 lines as in the document" in out
    )
    assert "document: | b | 2 |" in out and (tmp_path / "out" / "01-page-t.txt").read_text().endswith("| a | 1 |\n")


def test_a_command_that_fails_is_named() -> None:
    claim = evidence.Claim(
        "page.md", "T", 1.0, "", ("python -c \"import sys; sys.exit('no model')\"", "python -c \"print('never')\""), ()
    )
    outcome = evidence.run(claim)
    assert outcome.error == "exit status 1: no model" and "never" not in outcome.output
    missing = evidence.Claim("page.md", "T", 1.0, "", ("no-such-program",), ())
    assert evidence.run(missing).error.startswith("no-such-program: ")
