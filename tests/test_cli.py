"""The command line, run as its users run it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import lrope_gguf as call
from support.commands import on_a_terminal
from support.gguf_fixtures import LAYERS, names, write_model

import lrope_gguf
from lrope_gguf import CurveFile, LropeError, plan_write, read_factors, write_factors
from lrope_gguf.cli import COMMANDS, main

Completed = subprocess.CompletedProcess[str]


def run(*arguments: object, **environment: str) -> Completed:
    return subprocess.run(
        [sys.executable, "-m", "lrope_gguf", *map(str, arguments)], capture_output=True, text=True, encoding="utf-8",
        timeout=60, env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    )  # fmt: skip


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    path = tmp_path / "best.json"
    points = ((0.0, 1.0), (0.3, 1.4), (1.0, 1.1))
    CurveFile(points, architecture="llama", block_count=LAYERS, provenance={"task": "kv", "seed": 7}).save(path)
    return path


def test_write_show_remove_as_a_program(model: Path) -> None:
    original = model.read_bytes()
    assert run("write", model, "--factors", "1,1.25,0.8,1").returncode == 0
    assert read_factors(model) == pytest.approx((1, 1.25, 0.8, 1))
    shown = run("show", model)
    assert shown.returncode == 0 and "▄█▁▄  0.8 to 1.25" in shown.stdout and shown.stderr == ""
    assert run("remove", model).returncode == 0 and model.read_bytes() == original
    for arguments, message in (((), "give a command"), (("bake",), "No such command 'bake'"), (("show",), "MODEL")):
        done = call(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_help_and_version() -> None:
    shown = run("--help")
    assert shown.returncode == 0 and all(name in shown.stdout for name in COMMANDS)
    assert run("write", "--help").returncode == 0
    version = run("--version")
    assert version.returncode == 0 and version.stdout.startswith("lrope-gguf ")


def test_light_commands_import_nothing_heavy(model: Path, curve: Path) -> None:
    commands = [["show"], ["write", "--uniform", "1.25"], ["write", "--curve", str(curve)], ["show"], ["remove"]]
    code = (
        "import sys; from lrope_gguf.cli import main;"
        f"print([main([command, {str(model)!r}, *rest]) for command, *rest in {commands!r}],"
        "sorted({'numpy', 'scipy', 'lrope_search', 'matplotlib', 'hashlib', 'subprocess', 'asyncio',"
        "'importlib.metadata'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[0, 0, 0, 0, 0] []\n"), done


def test_missing_search_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="tqdm")

    monkeypatch.setattr("lrope_gguf.cli.import_module", missing)
    assert main(["search", "m.gguf"]) == 1
    assert (
        capsys.readouterr().err
        == "lrope-gguf: search: needs the Python package tqdm; pip install 'lrope-gguf[search]'\n"
    )
    assert main(["demo"]) == 1
    assert "'lrope-gguf[demo]'" in capsys.readouterr().err


def test_errors_of_the_system_and_interrupts(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(error: BaseException) -> None:
        def read_model(_: object) -> None:
            raise error

        monkeypatch.setattr("lrope_gguf.commands.show.read_model", read_model)

    raising(OSError(5, "Input/output error", "/dev/x"))
    assert main(["show", str(model)]) == 1
    assert capsys.readouterr().err == "lrope-gguf: /dev/x: Input/output error\n"
    raising(KeyboardInterrupt())
    assert main(["show", str(model)]) == 130
    assert capsys.readouterr().err == "lrope-gguf: interrupted\n"


def test_interrupt_signal_during_a_copy(tmp_path: Path) -> None:
    """SIGINT in the middle of a rewrite: status 130, the old file, no litter."""
    model = write_model(tmp_path / "m.gguf")
    original = model.read_bytes()
    code = (
        "import os, sys, time; from lrope_gguf.cli import main\n"
        "def slow(*a, **k): print('copying', flush=True); time.sleep(30)\n"
        "os.copy_file_range = slow; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "write", str(model), "--uniform", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    assert len(names(tmp_path)) in (1, 2)  # the new file has no name yet where that is possible
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "lrope-gguf: interrupted\n"
    assert model.read_bytes() == original and names(tmp_path) == ["m.gguf"]


def test_closed_pipe_is_quiet(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lrope_gguf", "show", str(model)], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


BAD, FULL = "lrope-gguf: standard output: Bad file descriptor", "No space left on device"
STREAMS = [
    # redirection, command, status, and what the other stream says
    (">&-", "show m.gguf", 1, BAD),
    (">&-", "--help", 1, BAD),
    (">/dev/full", "show m.gguf", 1, FULL),
    (">/dev/full", "write m.gguf --uniform 1.5", 1, FULL),
    ("2>&-", "show m.gguf", 0, "512 tokens"),
    ("2>&-", "write m.gguf", 2, ""),
    ("2>/dev/full", "show none", 1, ""),
    ("<&-", "write m.gguf --uniform 1.1 --dry-run", 0, "would be"),
    (">&- 2>&-", "show m.gguf", 1, ""),
    (">&- 2>&- <&-", "write m.gguf --uniform 2 --quiet", 0, ""),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(("redirection", "command", "status", "said"), STREAMS)
def test_closed_and_full_streams(model: Path, redirection: str, command: str, status: int, said: str) -> None:
    """An output that cannot be written is an error, and no file is written to by mistake for it."""
    original = model.read_bytes()
    shell = f'"$0" -m lrope_gguf {command} {redirection}'
    done = subprocess.run(["sh", "-c", shell, sys.executable], capture_output=True, text=True, cwd=model.parent)
    assert done.returncode == status and "Traceback" not in done.stderr, done
    assert said in done.stdout + done.stderr and bool(said) == bool(done.stdout + done.stderr)
    if command.startswith("write") and "dry" not in command and status < 2:
        assert (read_factors(model) or ())[0] in (1.5, 2)
        main(["remove", str(model), "--quiet"])
    assert model.read_bytes() == original


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize(("seconds", "options", "fails"), [(0.3, [], True), (0.3, ["--quiet"], False), (0, [], False)])
def test_progress_on_a_terminal(model: Path, seconds: float, options: list[str], fails: bool) -> None:
    """A slow copy shows a bar, and an error comes on a line of its own; a fast or quiet one shows nothing."""
    code = (
        "import os, sys, time; from lrope_gguf.cli import main\n"
        "def slow(source, target, count, **k):\n"
        f"    time.sleep({seconds})\n"
        f"    if {fails} and slow.calls > 6: raise OSError(5, 'Input/output error')\n"
        "    slow.calls += 1\n"
        "    data = os.pread(source, min(count, 1000), k['offset_src'])\n"
        "    return os.write(target, data)\n"
        "slow.calls = 0; os.copy_file_range = slow; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "write", str(model), "--uniform", "2", *options]
    status, shown = on_a_terminal(command, "stderr", 100)
    assert status == int(fails)
    if fails:
        assert "1.25e-05 GB  [#" in shown and "%" in shown
        assert shown.splitlines()[-1].startswith("lrope-gguf: ") and "Input/output error" in shown
    else:
        assert shown == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "lrope-gguf"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lrope_gguf "$@"\n')
    program.chmod(0o755)
    files = {"<default>"}  # that bash completes itself
    cases = {
        "": set(COMMANDS), "s": {"show", "search"}, "show ": files, "show --": {"--help", "--json", "--plot"},
        "write m --curve ": files, "write m --factors ": set(), "search m --task m": {"mdqa", "multikey"},
    }  # fmt: skip
    code = (
        'eval "$(_LROPE_GGUF_COMPLETE=bash_source lrope-gguf)"; compopt() { COMPREPLY+=("<$2>"); };'
        'for line in "$@"; do COMP_WORDS=(lrope-gguf $line); [[ $line =~ " "$ || -z $line ]] && COMP_WORDS+=("");'
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _lrope_gguf_completion lrope-gguf;"
        'echo "${COMPREPLY[@]}"; done; complete -p lrope-gguf'
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "--norc", "-c", code, "bash", *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    *found, registered = done.stdout.splitlines()
    assert [set(words.split()) for words in found] == list(cases.values())
    assert registered.endswith("-F _lrope_gguf_completion lrope-gguf")


def completed(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str = "bash"
) -> str:
    for name, value in {"_LROPE_GGUF_COMPLETE": f"{shell}_complete", "COMP_WORDS": f"lrope-gguf {words}"}.items():
        monkeypatch.setenv(name, value)
    # fish has the word that is not complete there
    monkeypatch.setenv("COMP_CWORD", "" if shell == "fish" else str(len(f"{words}x".split())))
    assert main([]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_in_other_shells(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = completed("", monkeypatch, capsys, shell)
    assert all(name in said for name in COMMANDS) and "search, write and serve" in said
    assert "mdqa" in completed("search m --task ", monkeypatch, capsys, shell)


def test_completing_a_command_imports_none() -> None:
    code = (
        "import sys; from lrope_gguf.cli import main; status = main();"
        "print(sorted(name for name in sys.modules if 'commands.' in name or name.startswith('lrope_search')), status)"
    )
    environment = {"_LROPE_GGUF_COMPLETE": "bash_complete", "COMP_WORDS": "lrope-gguf s", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )
    assert done.stdout == "plain,search\nplain,show\n[] 0\n", done


def test_completion_without_the_search_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("lrope_search")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lrope_search", None)  # names are completed without it, options not
    assert completed("", monkeypatch, capsys).split() == [f"plain,{name}" for name in COMMANDS]
    assert completed("search --ke", monkeypatch, capsys).strip() == ""
    assert completed("write m --map", monkeypatch, capsys) == "plain,--mapped-ok\n"


def test_python_api(model: Path) -> None:
    assert set(lrope_gguf.__all__) <= set(dir(lrope_gguf))
    for name in lrope_gguf.__all__:
        value = getattr(lrope_gguf, name)
        if name.islower() and name != "__version__":
            assert "Raises:" in value.__doc__ and "LropeError" in value.__doc__, name
    for function in (plan_write, write_factors):
        with pytest.raises(LropeError, match="2 factors for a model of 4 layers"):
            function(model, [1, 2])


def test_importing_the_package_loads_nothing() -> None:
    root = Path(lrope_gguf.__file__).parent.parent
    code = f"import sys, typing; sys.path.insert(0, {str(root)!r}); before = set(sys.modules); import lrope_gguf;"
    code += "print(sorted(set(sys.modules) - before))"
    # without site-packages, whose hooks for editable installations load modules too
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == "['__future__', 'lrope_gguf']\n", done
