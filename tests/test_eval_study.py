"""`eval --study` and `--workers`: answers that are kept, several sides, several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_search import ModelConfig, measure, task_config

pytestmark = pytest.mark.native

TASK = ["--set", "kv.identifiers=number", "--keys", "12", "--set", "kv.probes=4", "--threads", "1"]
FACTORS = "1,1,1.3,0.7,1,1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "model.gguf"
    write_readable(path)
    return path


def evaluate(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> dict[str, Any]:
    """What `eval` prints, without its speed."""
    assert main(["eval", str(model), *TASK, "--json", *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    del document["tokens_per_second"]
    return document


def lines(study: Path) -> list[bytes]:
    return (study / "evaluations.jsonl").read_bytes().splitlines()


def test_a_study_goes_on_with_more_sides_and_contexts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "s"
    kept = ["--study", str(study)]
    given = ["--factors", FACTORS]
    first = evaluate(capsys, model, *given, "--contexts", "2", *kept)
    begun = lines(study)
    assert len(begun) == 4
    assert evaluate(capsys, model, *given, "--contexts", "2", *kept) == first
    assert lines(study) == begun
    more = ["--uniform", "1.1", "--uniform", "0.9", "--contexts", "3"]
    both = evaluate(capsys, model, *given, *more, *kept)
    assert lines(study)[:4] == begun and len(lines(study)) == 4 * 3
    assert both == evaluate(capsys, model, *given, *more)  # what was kept is what is measured
    assert sorted(both["beside"]) == ["uniform 0.9", "uniform 1.1"]
    # contexts of one seed and split are the same, however many are asked for
    assert evaluate(capsys, model, *given, "--contexts", "2") == first


def test_workers_change_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--factors", FACTORS, "--uniform", "1.1", "--contexts", "3"]
    study = tmp_path / "s"
    spread = evaluate(capsys, model, *options, "--workers", "2", "--study", str(study))
    assert spread == evaluate(capsys, model, *options)
    assert {json.loads(line)["index"] for line in lines(study)} == {0, 1, 2}


def test_the_first_side_stands_beside_the_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the means by hand; each is held against the first one, not against the base."""
    for name, factor in (("one", 1.3), ("two", 0.8)):
        curve = {"format": "lrope-curve", "version": 1, "layer_factors": [factor] * 6}
        (tmp_path / f"{name}.json").write_text(json.dumps(curve))
    curves = [word for name in ("one", "two") for word in ("--curve", str(tmp_path / f"{name}.json"))]
    assert main(["eval", str(model), *TASK, *curves, "--uniform", "1.1", "--contexts", "3"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^curve one over curve two: accuracy [+-]\d+\.\d points, log-probability [+-]", said, re.MULTILINE
    )
    assert "curve one over uniform 1.1: accuracy " in said

    sides = {"one": (1.3,) * 6, "two": (0.8,) * 6}
    task = task_config(identifiers="number", keys=12, probes=4)
    found = measure(ModelConfig(str(model), n_threads=1), task, sides, contexts=3)
    means = {
        name: sum(probe.log_probability for score in scores for probe in score.probes) / 12
        for name, scores in found.scores.items()
    }
    gain = found.beside["two"].log_probability_gain.mean
    assert gain == pytest.approx(means["one"] - means["two"], abs=1e-12) and abs(gain) > 1e-3
    assert list(found.beside) == ["two"]

    assert main(["eval", str(model), *TASK, *curves[:2], *curves[:2]]) == 1
    assert "curve one is given already" in capsys.readouterr().err


def test_a_search_and_a_measurement_do_not_share_a_directory(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched, measured = str(tmp_path / "searched"), str(tmp_path / "measured")
    search = ["search", str(model), *TASK, "--max-evaluations", "4", "--set", "ga.population=4",
              "--set", "search_contexts=1",
              "--set", "validation_contexts=1", "--set", "test_contexts=1", "--max-kl", "100",
              "--output", str(tmp_path / "best.json"), "--study"]  # fmt: skip
    assert main([*search, searched]) == 0
    capsys.readouterr()
    evaluate(capsys, model, "--uniform", "1.1", "--contexts", "1", "--study", measured)
    assert main(["eval", str(model), *TASK, "--study", searched]) == 1
    assert capsys.readouterr().err == f"lrope-gguf: --study {searched}: holds a search; choose another directory\n"
    assert main([*search, measured]) == 1
    assert "the study was begun with other settings" in capsys.readouterr().err
    assert main(["report", measured]) == 1
    assert "eval" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["eval", str(model), *TASK, "--study", str(tmp_path / "file")]) == 1
    assert "is a file; give a directory" in capsys.readouterr().err


def test_other_contexts_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(tmp_path / "s")
    evaluate(capsys, model, "--uniform", "1.1", "--contexts", "1", "--study", study)
    assert main(["eval", str(model), *TASK, "--seed", "2", "--uniform", "1.1", "--study", study]) == 1
    assert "task.seed was 0, is 2" in capsys.readouterr().err


def test_written_answers_want_one_worker(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), *TASK, "--generate", "--workers", "2"]) == 1
    assert capsys.readouterr().err == "lrope-gguf: --generate: one worker writes all answers; leave out --workers\n"


def test_written_answers_go_with_what_was_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--factors", FACTORS, "--contexts", "2"]
    study = ["--study", str(tmp_path / "s")]
    evaluate(capsys, model, *options, *study)
    kept = lines(tmp_path / "s")
    assert evaluate(capsys, model, *options, "--generate", *study) == evaluate(capsys, model, *options, "--generate")
    assert lines(tmp_path / "s") == kept


def test_a_killed_measurement_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "s"
    options = ["--factors", FACTORS, "--contexts", "60", "--workers", "2"]
    command = [sys.executable, "-m", "lrope_gguf", "eval", str(model), *TASK, *options, "--study", str(study)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60.0
        while not (study / "evaluations.jsonl").exists() or len(lines(study)) < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert len(lines(study)) < 120
    resumed = evaluate(capsys, model, *options, "--study", str(study))
    assert len(lines(study)) == 120 and resumed == evaluate(capsys, model, *options)


def test_a_picture_of_all_sides(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "p.svg"
    options = ["--factors", FACTORS, "--uniform", "1.1", "--uniform", "0.9", "--contexts", "2", "--plot", str(picture)]
    evaluate(capsys, model, *options)
    text = picture.read_text()
    assert all(f">{name}<" in text for name in ("base", "given", "uniform 1.1", "uniform 0.9"))
    assert "model.gguf: 8 questions on 2 contexts" in text
    evaluate(capsys, model, *options)
    assert picture.read_text() == text
    for name, why in (("p.pdf", "ends in .png or .svg"), ("no/p.svg", "its directory does not exist")):
        assert main(["eval", str(model), *TASK, "--plot", str(tmp_path / name)]) == 1
        assert why in capsys.readouterr().err
    (tmp_path / "curve.svg").write_text("{}")
    curve = str(tmp_path / "curve.svg")
    assert main(["eval", str(model), *TASK, "--curve", curve, "--plot", curve]) == 1
    assert "would overwrite the file given as --curve" in capsys.readouterr().err
