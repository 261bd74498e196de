"""The command line, run as its users run it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf_fixtures import LAYERS, names, write_model

from lrope_gguf import CurveFile, read_factors
from lrope_gguf.cli import COMMANDS, main

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
        (("bake",), "invalid choice"),
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


def test_light_commands_import_nothing_heavy(model: Path) -> None:
    run("write", model, "--uniform", "1.5")
    code = (
        "import sys; from lrope_gguf.cli import main; status = main(sys.argv[1:]);"
        "print(sorted({'numpy', 'scipy', 'lrope_search'} & set(sys.modules)), status)"
    )
    for arguments in (("show", model), ("write", model, "--uniform", "1.25"), ("remove", model)):
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
        def run(_: object) -> int:
            raise error

        monkeypatch.setattr("lrope_gguf.commands.show.run", run)

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
    assert len(names(tmp_path)) == 2
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


def test_a_terminal_without_unicode(model: Path) -> None:
    run("write", model, "--factors", "1,1.25,0.8,1")
    done = run("show", model, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "????" in done.stdout and "1.25" in done.stdout
