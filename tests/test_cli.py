"""The command line, run as its users run it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.gguf_fixtures import LAYERS, names, write_model

import lrope_gguf
from lrope_gguf import CurveFile, LropeError, plan_write, read_factors, write_factors
from lrope_gguf.cli import COMMANDS, main
from lrope_gguf.commands.progress import CopyProgress, size

Completed = subprocess.CompletedProcess[str]


def run(*arguments: object, **environment: str) -> Completed:
    return subprocess.run(
        [sys.executable, "-m", "lrope_gguf", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    )


def call(*arguments: object) -> Completed:
    """As `run`, in this process: for what depends on no terminal, signal or encoding."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess([*map(str, arguments)], status, out.getvalue(), err.getvalue())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf")


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    path = tmp_path / "best.json"
    points = ((0.0, 1.0), (0.3, 1.4), (1.0, 1.1))
    CurveFile(points, architecture="llama", block_count=LAYERS, provenance={"task": "kv", "seed": 7}).save(path)
    return path


def assert_error(completed: Completed, message: str, status: int = 1) -> None:
    assert completed.returncode == status, completed
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr and completed.stdout == ""
    if status == 1:
        assert completed.stderr.startswith("lrope-gguf: ") and completed.stderr.count("\n") == 1


def test_write_show_write_remove(model: Path, curve: Path) -> None:
    original = model.read_bytes()
    written = run("write", model, "--curve", curve)
    assert written.returncode == 0 and written.stderr == ""
    size = model.stat().st_size
    assert written.stdout == (
        f"{model}: written ({size} bytes, the whole file); {LAYERS} layer factors from 1.0 to "
        f"{max(CurveFile.load(curve).factors_for(LAYERS)):.8g}; next: llama-server -m {model}\n"
    )
    assert read_factors(model) == pytest.approx(CurveFile.load(curve).factors_for(LAYERS), abs=1e-6)

    shown = run("show", model)
    assert shown.returncode == 0
    for text in ("Tiny", "llama", "512 tokens", "10000", "▁█", "agrees with the factors", "task", "kv", "seed"):
        assert text in shown.stdout
    assert len(shown.stdout.partition("layer  factor\n")[2].splitlines()) == LAYERS

    again = run("write", model, "--factors", "1,1.25,0.8,1")
    assert "written in place" in again.stdout and "4 layer factors from 0.8 to 1.25" in again.stdout
    assert read_factors(model) == pytest.approx((1, 1.25, 0.8, 1))
    assert "unchanged" in run("write", model, "--factors", "1,1.25,0.8,1").stdout
    run("write", model, "--uniform", "1.5")
    assert read_factors(model) == (1.5,) * LAYERS

    removed = run("remove", model)
    assert removed.returncode == 0 and "without layer factors" in removed.stdout
    assert model.read_bytes() == original
    assert "holds no layer factors" in run("remove", model).stdout


def test_stored_curve_is_the_file_with_its_factors(model: Path, curve: Path) -> None:
    run("write", model, "--curve", curve, "--output", model.with_name("o.gguf"))
    stored = CurveFile.loads(str(GGUFReader(model.with_name("o.gguf")).fields["lrope.curve"].contents()), "x")
    given = CurveFile.load(curve)
    assert (stored.control_points, stored.provenance) == (given.control_points, given.provenance)
    assert stored.factors_for(LAYERS) == pytest.approx(given.factors_for(LAYERS), abs=1e-6)
    assert read_factors(model) is None


def test_show_json(model: Path, curve: Path) -> None:
    plain = json.loads(run("show", model, "--json").stdout)
    assert plain["factors"] is None and plain["curve"] is None and plain["curve_agrees"] is None
    assert (plain["architecture"], plain["block_count"], plain["context_length"]) == ("llama", LAYERS, 512)
    run("write", model, "--curve", curve)
    shown = json.loads(run("show", model, "--json").stdout)
    assert shown["factors"] == [pytest.approx(s, rel=1e-7) for s in read_factors(model) or ()]
    assert shown["curve"]["provenance"] == {"task": "kv", "seed": 7} and shown["curve_agrees"] is True


def test_show_tells_when_array_and_curve_disagree(model: Path) -> None:
    run("write", model, "--factors", "1,1.25,0.8,1")
    data = model.read_bytes()
    model.write_bytes(data.replace(struct.pack("<f", 1.25), struct.pack("<f", 1.5)))
    assert "DOES NOT AGREE" in run("show", model).stdout
    assert json.loads(run("show", model, "--json").stdout)["curve_agrees"] is False
    model.write_bytes(data.replace(b'{"format"', b'{"former"'))
    assert "not readable: lrope.curve: its" in run("show", model).stdout
    model.write_bytes(data.replace(struct.pack("<f", 1.25), struct.pack("<f", -1.25)))
    assert "layer factors   not usable" in run("show", model).stdout


def test_show_of_files_that_are_no_models(tmp_path: Path) -> None:
    def adapter(writer: object) -> None:
        writer.add_type("adapter")  # type: ignore[attr-defined]

    lora = run("show", write_model(tmp_path / "lora.gguf", block_count=None, add=adapter))
    assert lora.returncode == 0 and "adapter" in lora.stdout and "not given" in lora.stdout
    vocabulary = run("show", write_model(tmp_path / "v.gguf", tensors=0))
    assert vocabulary.returncode == 0 and "0 tensors" in vocabulary.stdout
    no_rope = run("show", write_model(tmp_path / "g.gguf", architecture="gpt2"))
    assert no_rope.returncode == 0 and "the model uses no RoPE" in no_rope.stdout


def test_show_does_not_steer_the_terminal(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", add=lambda writer: writer.add_string("general.type", "a\x1b[31mred\r\n"))
    assert "\x1b" not in run("show", model).stdout


def test_user_mistakes(model: Path, curve: Path, tmp_path: Path) -> None:
    original = model.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(original[:-200])
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"format": "lrope-curve", "version": 1, "layer_factors": [1, 1, 1]}))
    for_qwen = tmp_path / "qwen.json"
    CurveFile(((0, 1), (1, 1.5)), architecture="qwen2").save(for_qwen)
    for_six = tmp_path / "six.json"
    CurveFile(((0, 1), (1, 1.5)), block_count=6).save(for_six)
    nan = tmp_path / "nan.json"
    nan.write_text('{"format": "lrope-curve", "version": 1, "control_points": [[0, 1], [1, NaN]]}')
    for arguments, message in [
        (("show", tmp_path / "none.gguf"), "no such file"),
        (("show", tmp_path), "is not a regular file"),
        (("show", curve), "is not a GGUF file"),
        (("show", short), "is truncated"),
        (("remove", short), "is truncated"),
        (("write", model, "--curve", tmp_path / "none.json"), "no such file"),
        (("write", model, "--curve", model), "is not UTF-8 text"),
        (("write", model, "--curve", nan), "nan.json: holds NaN"),
        (("write", model, "--curve", other), "it has 3 layer_factors, but the model has 4 layers"),
        (("write", model, "--curve", for_qwen), "is for architecture qwen2"),
        (("write", model, "--curve", for_six), "is for block_count 6"),
        (("write", model, "--factors", "1,2"), "2 factors for a model of 4 layers"),
        (("write", model, "--factors", "1,0,1,1"), "the factor of layer 1 is zero"),
        (("write", model, "--uniform", "nan"), "the factor of layer 0 is NaN"),
        (("write", model, "--uniform", "2", "--output", tmp_path / "no" / "o.gguf"), "its directory does not exist"),
        (("write", tmp_path / "new\nline", "--uniform", "2"), "no such file"),
    ]:
        assert_error(run(*arguments), message)
    assert model.read_bytes() == original
    expected = {"best.json", "m.gguf", "nan.json", "other.json", "qwen.json", "short.gguf", "six.json"}
    assert set(names(tmp_path)) == expected


def test_usage_errors(model: Path) -> None:
    for arguments, message in [
        ((), "give a command"),
        (("bake",), "No such command 'bake'"),
        (("show",), "MODEL"),
        (("write", model), "one of the arguments --curve --factors --uniform is required"),
        (("write", model, "--factors", "1,x"), "'1,x' is not a list of numbers"),
        (("write", model, "--factors", "1", "--uniform", "1"), "not allowed with"),
    ]:
        assert_error(run(*arguments), message, status=2)


def test_help_and_version() -> None:
    shown = run("--help")
    assert shown.returncode == 0 and all(name in shown.stdout for name in COMMANDS)
    assert run("write", "--help").returncode == 0
    version = run("--version")
    assert version.returncode == 0 and version.stdout.startswith("lrope-gguf ")


def test_light_commands_import_nothing_heavy(model: Path, curve: Path) -> None:
    run("write", model, "--uniform", "1.5")
    code = (
        "import sys; from lrope_gguf.cli import main; status = main(sys.argv[1:]);"
        "print(sorted({'numpy', 'scipy', 'lrope_search'} & set(sys.modules)), status)"
    )
    for arguments in (
        *(("show", model), ("write", model, "--uniform", "1.25"), ("write", model, "--curve", curve)),
        *(("show", model), ("remove", model)),
    ):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
        assert done.stdout.endswith("[] 0\n"), done


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


def shell(line: str, *arguments: object) -> Completed:
    """Run `"$@"` with this redirection."""
    command = ["sh", "-c", f'"$@" {line}', "sh", sys.executable, "-m", "lrope_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="no descriptors to close")
def test_output_that_cannot_be_written_is_an_error(model: Path) -> None:
    for arguments in (("show", model), ("show", model, "--json"), ("write", model, "--uniform", "1.5"), ("--help",)):
        assert_error(shell(">&-", *arguments), "lrope-gguf: standard output: Bad file descriptor")
        if Path("/dev/full").exists():
            assert_error(shell(">/dev/full", *arguments), "No space left on device")
    assert read_factors(model) == (1.5,) * LAYERS
    assert shell(">&-", "remove", model, "--quiet").returncode == 0  # says nothing


@pytest.mark.skipif(sys.platform == "win32", reason="no descriptors to close")
def test_a_closed_standard_error_changes_nothing(model: Path) -> None:
    original = model.read_bytes()
    for closed in ("2>&-", "2>&- <&-", "2>/dev/full"):
        shown = shell(closed, "show", model)
        assert shown.returncode == 0 and "512 tokens" in shown.stdout and shown.stderr == ""
        for arguments, status in ((("show", "none"), 1), (("show",), 2), ((), 2), (("write", model), 2)):
            done = shell(closed, *arguments)
            assert (done.returncode, done.stdout, done.stderr) == (status, "", ""), (closed, arguments)
    model.with_name("other").hardlink_to(model)
    done = shell("2>&-", "write", model, "--uniform", "2")
    assert done.returncode == 0 and "hard links" not in done.stdout
    for line in ("2>&- >&-", "2>&- >&- <&-"):
        assert shell(line, "show", model).returncode == 1
        assert shell(line, "remove", model, "--quiet").returncode == 0
        assert model.read_bytes() == original
        assert shell(line, "write", model, "--uniform", "2", "--quiet").returncode == 0


def test_a_terminal_without_unicode(model: Path) -> None:
    run("write", model, "--factors", "1,1.25,0.8,1")
    done = run("show", model, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "?" not in done.stdout and "1.25" in done.stdout
    assert "layer factors   ~#_~  0.8 to 1.25" in done.stdout


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_dry_run_of_write(model: Path, curve: Path, tmp_path: Path) -> None:
    """It says what the real run then does, and changes nothing."""
    keys = ("llama.rope.scaling.layer_factors", "lrope.curve")
    copy = tmp_path / "copy.gguf"
    for arguments, how, verbs in [
        (("--curve", curve), "rewritten", ("add", "add")),
        (("--curve", curve), "unchanged", ("keep", "keep")),
        (("--uniform", "1.5"), "in place", ("replace", "replace")),
        (("--uniform", "1.5", "--output", copy), "rewritten", ("keep", "replace")),
    ]:
        before = snapshot(tmp_path)
        planned = call("write", model, *arguments, "--dry-run")
        assert planned.returncode == 0 and planned.stderr == "" and snapshot(tmp_path) == before
        first, *rest = planned.stdout.splitlines()
        assert [line.split(":")[0] for line in rest] == [f"  {v} {key}" for v, key in zip(verbs, keys, strict=True)]
        done = call("write", model, *arguments)
        target = copy if copy in arguments else model
        if how == "rewritten":
            assert first.startswith(f"{target}: would be a new file of {target.stat().st_size} bytes, ")
            assert f"({target.stat().st_size} bytes, " in done.stdout
        elif how == "in place":
            count = first.removeprefix(f"{model}: would be changed in place, ").removesuffix(" bytes of it")
            assert f"written in place ({count} bytes)" in done.stdout and int(count) >= 1
        else:
            assert first == f"{model}: would stay unchanged" and "unchanged" in done.stdout
    assert call("write", model, "--uniform", "2", "--dry-run", "--quiet").stdout == ""


def test_dry_run_finds_what_would_fail(model: Path, tmp_path: Path) -> None:
    assert_error(call("write", model, "--factors", "1,2", "--dry-run"), "2 factors for a model of 4 layers")
    output = tmp_path / "no" / "o.gguf"
    assert_error(call("write", model, "--uniform", "2", "--output", output, "--dry-run"), "directory does not exist")
    assert_error(call("remove", model, "--output", output, "--dry-run"), "directory does not exist")


def test_dry_run_of_remove(model: Path, tmp_path: Path) -> None:
    plain = model.stat().st_size
    done = call("remove", model, "--dry-run")
    assert done.returncode == 0 and "would stay unchanged" in done.stdout and "holds no layer factors" in done.stdout
    call("write", model, "--uniform", "1.5")
    before = snapshot(tmp_path)
    done = call("remove", model, "--dry-run")
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"{model}: would be a new file of {plain} bytes") and snapshot(tmp_path) == before
    assert rest == ["  remove llama.rope.scaling.layer_factors", "  remove lrope.curve"]
    call("remove", model)
    assert model.stat().st_size == plain


def test_quiet(model: Path) -> None:
    for arguments in (("write", model, "--uniform", "1.5"), ("remove", model), ("remove", model)):
        done = call(*arguments, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_error(call("write", model, "--uniform", "0", "--quiet"), "is zero")


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_notes_go_to_the_standard_error(model: Path) -> None:
    model.with_name("other.gguf").hardlink_to(model)
    for arguments in (("--dry-run",), ("--quiet",)):
        done = call("write", model, "--uniform", "1.5", *arguments)
        assert done.returncode == 0 and "hard links" not in done.stdout
        assert done.stderr.startswith(f"lrope-gguf: note: {model} had 2 names (hard links)")
        assert done.stderr.count("\n") == 1
    assert read_factors(model.with_name("other.gguf")) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_mapped_model(model: Path) -> None:
    call("write", model, "--uniform", "1.5")
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'rb')\n"
        "view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print('mapped', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "mapped\n"
        for extra in ((), ("--dry-run",)):
            assert_error(call("write", model, "--uniform", "1.25", *extra), f"(process {process.pid})")
        assert read_factors(model) == (1.5,) * LAYERS
        assert "written in place" in call("write", model, "--uniform", "1.25", "--mapped-ok").stdout
    assert read_factors(model) == (1.25,) * LAYERS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_of_a_long_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now, stream, total = 0.0, Terminal(), 40 * 10**9
    with CopyProgress(stream=stream, clock=lambda: now) as progress:
        progress(5 * 10**8, total)
        now = 0.5
        progress(10**9, total)
        assert stream.getvalue() == ""  # not before a second
        now = 2.0
        progress(4 * 10**9, total)
        now = 2.01
        progress(4 * 10**9 + 1, total)  # not more than ten times a second
        now = 20.0
        progress(total, total)
    lines = [line.removesuffix("\x1b[K") for line in stream.getvalue().split("\r")]
    assert lines[0] == "" and lines[3] == "" and len(lines) == 4  # cleared at the end
    assert lines[1].endswith(" 10%  4 GB of 40 GB  2 GB/s  0:18 left") and lines[1].startswith("[##")
    assert lines[2].endswith("100%  40 GB of 40 GB  2 GB/s  to disk") and "]" in lines[2]
    assert all(len(line) < 80 for line in lines)


@pytest.mark.parametrize(
    ("stream", "quiet", "seconds"), [(io.StringIO(), False, 9), (Terminal(), True, 9), (Terminal(), False, 0.9)]
)
def test_progress_is_not_shown_where_nobody_looks(stream: io.StringIO, quiet: bool, seconds: float) -> None:
    now, total = 0.0, 10**10
    with CopyProgress(quiet=quiet, stream=stream, clock=lambda: now) as progress:
        for step in range(1, 11):
            now = seconds * step / 10
            progress(total * step // 10, total)
    assert stream.getvalue() == ""


def test_progress_of_a_nearly_done_copy() -> None:
    """What will end within a second of the first chance to show it stays unseen."""
    now, stream = 0.0, Terminal()
    with CopyProgress(stream=stream, clock=lambda: now) as progress:
        now = 1.1
        progress(60, 100)
        assert stream.getvalue() == ""
        progress(40, 100)
        assert stream.getvalue() != ""


def test_progress_fits_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (1, 10, 30, 50, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        now, stream = 0.0, Terminal()
        with CopyProgress(stream=stream, clock=lambda: now) as progress:  # noqa: B023
            now = 2.0
            progress(0, 10**10)
            progress(10**9, 10**10)
        assert all(len(line.removesuffix("\x1b[K")) < max(columns, 2) for line in stream.getvalue().split("\r"))


def test_sizes() -> None:
    shown = {0: "0 B", 999: "999 B", 1000: "1 kB", 253117120: "253 MB", 999_700_000: "1 GB", 4.1e10: "41 GB"}
    assert {count: size(count) for count in shown} == shown and size(5e15) == "5000 TB"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_on_a_terminal(model: Path) -> None:
    """A slow copy shows a bar on the terminal and an error leaves none of it before its message."""
    import pty

    code = (
        "import os, sys, time; from lrope_gguf.cli import main\n"
        "def slow(source, target, count, **k):\n"
        "    time.sleep(0.3)\n"
        "    if slow.calls > 9: raise OSError(5, 'Input/output error')\n"
        "    slow.calls += 1\n"
        "    data = os.pread(source, min(count, 500), k['offset_src'])\n"
        "    return os.write(target, data)\n"
        "slow.calls = 0; os.copy_file_range = slow; sys.exit(main(sys.argv[1:]))"
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "write", str(model), "--uniform", "2"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    out, _ = process.communicate(timeout=60)
    data = os.read(controller, 1 << 16).decode()
    os.close(terminal)
    os.close(controller)
    assert process.returncode == 1 and out == ""
    assert " kB of 12.5 kB" in data and "/s  0:0" in data
    assert "\r\x1b[Klrope-gguf: " in data and "Input/output error" in data


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with some files to complete, and `lrope-gguf` beside it."""
    program = tmp_path / "bin" / "lrope-gguf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lrope_gguf "$@"\n')
    program.chmod(0o755)
    place = tmp_path / "place"
    (place / "models").mkdir(parents=True)
    for name in ("m.gguf", "best.json"):
        (place / name).touch()
    return place


def in_shell(bench: Path, *command: str) -> Completed:
    path = f"{bench.with_name('bin')}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(bench.parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=bench, env=environment, timeout=120
    )
    assert done.returncode == 0 and done.stderr == "", done
    return done


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_in_bash(bench: Path) -> None:
    code = (
        'eval "$(_LROPE_GGUF_COMPLETE=bash_source lrope-gguf)"; compopt() { COMPREPLY+=("<$2>"); };'
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lrope_gguf_completion lrope-gguf;'
        'printf "%s\\n" "${COMPREPLY[@]}"; complete -p lrope-gguf'
    )
    files = {"<default>"}  # that bash completes itself
    for words, expected in [
        (("",), set(COMMANDS)),
        (("s",), {"show", "search"}),
        (("--v",), {"--version"}),
        (("show", ""), files),
        (("show", "--"), {"--help", "--json", "--plot"}),
        (("remove", "m", "--d"), {"--dry-run"}),
        (("write", "m", "--curve", ""), files),
        (("write", "m", "--factors", ""), set()),
        (("none", ""), set(COMMANDS)),
        (("search", "m", "--task", "m"), {"mdqa", "multikey"}),
    ]:
        *found, registered = in_shell(
            bench, "bash", "--norc", "-c", code, "bash", "lrope-gguf", *words
        ).stdout.splitlines()
        assert set(found) - {""} == expected, words
        assert registered.endswith("-F _lrope_gguf_completion lrope-gguf")


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_completion_in_fish(bench: Path) -> None:
    def complete(line: str) -> set[str]:
        code = f"_LROPE_GGUF_COMPLETE=fish_source lrope-gguf | source; complete -C '{line}'"
        return {found.split("\t")[0] for found in in_shell(bench, "fish", "-N", "-c", code).stdout.splitlines()}

    assert complete("lrope-gguf ") == set(COMMANDS)
    assert complete("lrope-gguf show --") == {"--help", "--json", "--plot"}
    assert {"m.gguf", "models/"} <= complete("lrope-gguf show m")
    assert complete("lrope-gguf search --task m") == {"mdqa", "multikey"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_completion_in_zsh(bench: Path) -> None:
    """Typed into a shell of its own, in a pseudo-terminal."""
    driver = r"""
        zmodload zsh/zpty; zpty z zsh -f -i
        wait_for() { local part all; repeat 200; do
            if zpty -r -t z part; then all+=$part; [[ $all == *$1* ]] && break; else sleep 0.05; fi
            done; print -r -- $all }
        zpty -w z 'PS1=; TERM=dumb; autoload -U compinit; compinit -u -D; bindkey "^I" list-choices'
        zpty -w z 'eval "$(_LROPE_GGUF_COMPLETE=zsh_source lrope-gguf)"'
        zpty -w z 'print REA''DY'; wait_for READY
        try() { zpty -w -n z "$1"$'\t'; print -r -- "<$1>"; wait_for "$2"; zpty -w -n z $'\x15' }
        try 'lrope-gguf ' 'search, write and serve'
        try 'lrope-gguf show ' m.gguf
        try 'lrope-gguf show --' '--plot'
    """
    done = in_shell(bench, "zsh", "-f", "-c", driver)
    shown = dict(part.split(">\n", 1) for part in done.stdout.split("\n<lrope-gguf ")[1:])
    assert all(name in shown[""] for name in COMMANDS), shown
    assert "m.gguf" in shown["show "] and "--json" in shown["show --"]


def completed(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    for name, value in {"_LROPE_GGUF_COMPLETE": "bash_complete", "COMP_WORDS": f"lrope-gguf {words}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(f"{words}x".split())))
    assert main([]) == 0
    return capsys.readouterr().out


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
    plan = plan_write(model, [1, 1.25, 0.8, 1])
    assert plan.how == "rewritten" and plan.factors == pytest.approx((1, 1.25, 0.8, 1))
    assert lrope_gguf.read_model(model).factors is None
    result = write_factors(model, [1, 1.25, 0.8, 1])
    assert result.bytes_written == plan.bytes_written == model.stat().st_size
    assert read_factors(model) == result.factors == plan.factors
    lrope_gguf.remove_factors(model)
    assert read_factors(model) is None
    with pytest.raises(LropeError):
        plan_write(model, [1, 2])


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, typing; before = set(sys.modules); import lrope_gguf; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['__future__', 'lrope_gguf']\n", done
