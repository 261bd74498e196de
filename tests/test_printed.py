"""What is printed: commands that can be pasted, names that steer no terminal, and curves from where shells put them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.gguf_fixtures import write_model
from support.study_fixtures import make_study

from lrope_gguf import CurveFile, LropeError, read_factors
from lrope_gguf.cli import main
from lrope_gguf.text import command_line, printable
from lrope_search.commands.search import next_command

ROOT = Path(__file__).parent.parent
CURVE = '{"format": "lrope-curve", "version": 1, "layer_factors": [1, 1.2, 1.1, 1]}'

NAMES = [
    "plain", "two words", "it's", 'say "so"', "$HOME `id` $(id)", "a;b&c|d>e", "back\\slash", "*?[a]", "~", "!x",
    "#x", "é ü 漢", "esc\x1b[31mred", "new\nline", "tab\tbell\x07", "quote' and \x1b", "octal\x1b7", "bidi\u202egnp",
    "latin1 \udce9", "-dash",
]  # fmt: skip
"""Of folders and files."""


def pasted(command: str) -> list[str]:
    """The words that bash makes of a command."""
    assert command.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, cwd="/")
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("name", NAMES)
def test_commands_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert pasted(command_line(["x", name, "", "y"])) == ["x", name, "", "y"]
    monkeypatch.chdir(tmp_path)
    model = f"{name}.gguf"
    write_model(tmp_path / "m.gguf").rename(model)
    (tmp_path / f"{name}.json").write_text(CURVE)
    assert pasted(next_command(model, f"{name}.json"))[2:] == [
        f"./{model}" if name.startswith("-") else model,
        "--curve",
        f"{name}.json",
    ]
    commands = {
        ("write", "--curve", f"{name}.json", "--", model): ["llama-server", "-m", model],
        ("write", "--curve", f"{name}.json", "--preset", f"{name}.ini", "--preset-name", "x", "--", f"./{model}"): [
            "llama-server", "--models-preset", f"{name}.ini",
        ],
    }  # fmt: skip
    for command, wanted in commands.items():
        if "--preset" in command and (set(name) & set(";#\n")):
            continue  # which no presets file holds
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.count("\n") == 1 and out[:-1].isprintable()
        assert pasted(out.partition("next: ")[2][:-1]) == wanted


def test_what_a_report_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "it's $HOME \x1b[31m\nred.study"
    make_study(study)
    assert main(["report", str(study)]) == 0
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n"))
    words = ["lrope-gguf", "write", "MODEL", "--curve", str(study / "best.json")]
    assert pasted(out.partition("next: ")[2].partition("\n")[0]) == words


ODD = "x\x1b]owned\x07\x1b[31m\x9b\u202e"
COMMANDS = [
    ("show {}.gguf", 0), ("show none{}.gguf", 1), ("show you/none{}", 1), ("write {}.gguf --curve {}.json", 0),
    ("write {}.gguf --curve {}.json --dry-run", 0), ("write {}.gguf --curve none{}.json", 1),
    ("write {}.gguf --curve {}.gguf", 1), ("write {}.gguf --uniform 1.1 --output none{}/o.gguf", 1),
    ("write {}.gguf --uniform 1.1 --preset {}.ini", 0),
    ("write {}.gguf --uniform 1.1 --preset {}.ini --preset-name {}", 1), ("write {}.gguf --uniform {}", 2),
    ("write {}.gguf --{}", 2), ("{}", 2), ("remove {}.gguf", 0), ("search {}.gguf --output {}.gguf", 1),
    ("search {}.gguf --data none{}", 1), ("search {}.gguf --start {}.gguf", 1), ("eval {}.gguf --task {}", 1),
    ("eval {}.gguf --curve none{}", 1), ("report {}", 1),
]  # fmt: skip


@pytest.mark.parametrize(("command", "status"), COMMANDS)
def test_no_name_steers_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / f"{ODD}.gguf", add=lambda writer: writer.add_author(ODD))
    (tmp_path / f"{ODD}.json").write_text(json.dumps(json.loads(CURVE) | {"provenance": {ODD: ODD}}))
    assert main(command.replace("{}", ODD).split(" ")) == status
    out, err = capsys.readouterr()
    assert out + err and all(line.isprintable() for line in (out + err).split("\n"))
    assert printable(ODD) in out + err or repr(ODD)[1:-1] in err


def test_people_are_told_through_one_function() -> None:
    """`lrope_gguf.text.say`, which lets nothing through that steers a terminal; JSON escapes it by itself."""
    may = {("text.py", "lines"), ("progress.py", "printable(text)"), ("show.py", "")}
    found = set()
    for folder in ("lrope_gguf", "search/lrope_search"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo", "click.secho"):
                    said = ast.unparse(node.args[0]) if node.args else ""
                    if not said.startswith("json.dumps("):
                        found.add((path.name, said))
    assert {said for said in found if not said[1].startswith("shown_in(")} == may


SOURCES = {
    "process substitution": "{write} --curve <(cat best.json)",
    "standard input": "{write} --curve - < best.json",
    "pipe": "cat best.json | {write} --curve -",
    "/dev/stdin": "cat best.json | {write} --curve /dev/stdin",
    "open file": "exec 9< best.json; {write} --curve /dev/fd/9",
    "named pipe": "mkfifo p; cat best.json > p & {write} --curve p",
    "slow pipe": "(head -c 20 best.json; sleep 0.3; tail -c +21 best.json) | {write} --curve -",
}


@pytest.mark.parametrize("line", SOURCES.values(), ids=SOURCES)
def test_curves_come_from_pipes(tmp_path: Path, line: str) -> None:
    write_model(tmp_path / "m.gguf")
    (tmp_path / "best.json").write_text(CURVE)
    write = f"{sys.executable} -m lrope_gguf write m.gguf"
    done = subprocess.run(["bash", "-c", line.format(write=write)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_factors(tmp_path / "m.gguf") == pytest.approx((1, 1.2, 1.1, 1))


BAD = {
    "nothing": ("--curve - < /dev/null", "standard input: is not JSON"),
    "closed": ("--curve - <&-", "standard input: is"),
    "endless": ("--curve /dev/zero", "/dev/zero: is larger than 1 MiB"),
    "endless pipe": ("--curve <(yes)", ": is larger than 1 MiB"),
    "another model's": ("--curve - <<< '{\"format\": \"lrope-curve\", \"version\": 1, \"layer_factors\": [1]}'",
                        "standard input: it has 1 layer_factors, but the model has 4 layers"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_is_no_curve_is_said_in_a_line(tmp_path: Path, options: str, message: str) -> None:
    before = write_model(tmp_path / "m.gguf").read_bytes()
    line = f"{sys.executable} -m lrope_gguf write m.gguf {options}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_a_socket_is_no_curve(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(LropeError, match="s: cannot be read"):
            CurveFile.load(tmp_path / "s")
