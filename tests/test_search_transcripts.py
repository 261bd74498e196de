"""What the search commands say, word for word: a transcript each, with numbers left out and rows alike once.

``LROPE_WRITE_TRANSCRIPTS=1`` writes them anew.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

import pytest

from lrope_gguf.cli import main

HERE = Path(__file__).parent / "transcripts"
MODEL = Path(__file__).parent.parent / "models" / "lrope-kv.gguf"
ASK = "--keys 120 --set kv.identifiers=word --set kv.probes=10 --threads 1"
SMALL = "--max-evaluations 12 --max-kl 100 --set search_contexts=1 --set validation_contexts=2 --set test_contexts=6"
COMMANDS = {
    "help": ["search --help"],
    "search": [
        f"search model.gguf {ASK} {SMALL} --dry-run",
        f"search model.gguf {ASK} {SMALL} --set ga.width=0.3",
        f"search model.gguf {ASK} {SMALL} --set ga.width=0.2",
    ],
    "eval": [
        f"eval model.gguf {ASK} --contexts 6 --uniform 1.2 --generate",
        f"eval model.gguf {ASK} --contexts 1 --uniform 1.2 --factors 1,1.2,1",
    ],
}
NEEDS_NO_MODEL = ("help",)
"""Of these, numbers stay."""


def scrubbed(text: str, *, numbers: bool) -> str:
    """The text with its numbers left out, which machines make differently, and with what depends on their width."""
    if numbers:
        return text
    text = re.sub(r"[▁▂▃▄▅▆▇█]+", "~", text)
    text = re.sub(r"(?<![\w.])[-+]?\d[\d.,:]*\d|(?<![\w.])[-+]?\d", "#", text)
    text = re.sub(r" (seconds|minutes|hours|KB|MB|GB)\b", " unit", text)
    # on so few contexts another library may judge otherwise; tests/test_statistics.py has the words
    text = re.sub(r"^(gain|not recommended)\b.*# unseen contexts.*$", "(verdict)", text, flags=re.MULTILINE)
    lines = [re.sub(r" {2,}", "  ", line.rstrip()) for line in text.splitlines()]
    kept = [re.sub(r"-{4,}", "----", line) for line in lines]
    # how often it says how far it is, and whether there is something to write, depends on what it finds
    kept = [line for line in kept if not re.match(r"#/# candidates|# candidates|test context|next: ", line)]
    return "".join(f"{line}\n" for line, _ in itertools.groupby(kept))  # of rows alike one


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in NEEDS_NO_MODEL else pytest.mark.native) for name in COMMANDS]
)
def test_what_commands_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copyfile(MODEL, "model.gguf")
    said = ""
    for command in COMMANDS[name]:
        status = main(command.split())
        out, err = capsys.readouterr()
        told = "".join(scrubbed(text, numbers=name in NEEDS_NO_MODEL) for text in (err, out) if text)
        said += f"$ lrope-gguf {command}\n{told}(status {status})\n\n"
    said = said.replace(str(tmp_path), "DIR")
    path = HERE / f"{name}.txt"
    if os.environ.get("LROPE_WRITE_TRANSCRIPTS"):
        path.write_text(said, encoding="utf-8")
    assert said == path.read_text(encoding="utf-8")
