"""`eval --study` and `--workers`: answers that are kept, several sides, several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_search import ModelConfig, measure, task_config

pytestmark = pytest.mark.native

TASK = ["--set", "kv.identifiers=number", "--keys", "12", "--set", "kv.probes=4", "--threads", "1"]
Evaluate = Callable[..., dict[str, Any]]
FACTORS = "1,1,1.3,0.7,1,1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readable(tmp_path_factory.mktemp("eval") / "model.gguf")


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], model: Path) -> Evaluate:
    """What `eval` with these options prints, without its speed."""

    def evaluate(*options: str) -> dict[str, Any]:
        assert main(["eval", str(model), *TASK, "--json", *options]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        del document["tokens_per_second"]
        return document

    return evaluate


def lines(study: Path) -> list[bytes]:
    return (study / "evaluations.jsonl").read_bytes().splitlines()


def test_a_study_goes_on_with_more_sides_and_contexts(tmp_path: Path, evaluate: Evaluate) -> None:
    study = tmp_path / "s"
    kept = ["--study", str(study)]
    given = ["--factors", FACTORS]
    first = evaluate(*given, "--contexts", "2", *kept)
    begun = lines(study)
    assert len(begun) == 4
    assert evaluate(*given, "--contexts", "2", *kept) == first
    assert lines(study) == begun
    more = ["--uniform", "1.1", "--uniform", "0.9", "--contexts", "3"]
    both = evaluate(*given, *more, *kept)
    assert lines(study)[:4] == begun and len(lines(study)) == 4 * 3
    assert both == evaluate(*given, *more)  # what was kept is what is measured
    assert sorted(both["beside"]) == ["uniform 0.9", "uniform 1.1"]
    # contexts of one seed and split are the same, however many are asked for
    assert evaluate(*given, "--contexts", "2") == first


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
    assert re.search(r"^curve one over curve two: accuracy [+-]\d+\.\d points, log-probability [+-]", said, re.M)
    assert "curve one over uniform 1.1: accuracy " in said

    sides = {"one": (1.3,) * 6, "two": (0.8,) * 6}
    task = task_config(identifiers="number", keys=12, probes=4)
    found = measure(ModelConfig(str(model), n_threads=1), task, sides, contexts=3)
    means = [sum(score.log_probability for score in found.scores[name]) / 3 for name in sides]
    gain = found.beside["two"].log_probability_gain.mean
    assert gain == pytest.approx(means[0] - means[1], abs=1e-12) and abs(gain) > 1e-3
    assert list(found.beside) == ["two"]

    assert main(["eval", str(model), *TASK, *curves[:2], *curves[:2]]) == 1
    assert "curve one is given already" in capsys.readouterr().err


def test_a_search_and_a_measurement_do_not_share_a_directory(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluate: Evaluate
) -> None:
    searched, measured = str(tmp_path / "searched"), str(tmp_path / "measured")
    sets = ("ga.population=4", "search_contexts=1", "validation_contexts=1", "test_contexts=1")
    search = ["search", str(model), *TASK, "--max-evaluations", "4", *(f"--set={one}" for one in sets),
              "--max-kl", "100", "--output", str(tmp_path / "best.json"), "--study"]  # fmt: skip
    assert main([*search, searched]) == 0
    capsys.readouterr()
    evaluate("--uniform", "1.1", "--contexts", "1", "--study", measured)
    assert main(["eval", str(model), *TASK, "--study", searched]) == 1
    assert capsys.readouterr().err == f"lrope-gguf: --study {searched}: holds a search; choose another directory\n"
    assert main([*search, measured]) == 1
    assert "the study was begun with other settings" in capsys.readouterr().err
    assert main(["report", measured]) == 1
    assert "eval" in capsys.readouterr().err


def test_written_answers_want_one_worker(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), *TASK, "--generate", "--workers", "2"]) == 1
    assert capsys.readouterr().err == "lrope-gguf: --generate: one worker writes all answers; leave out --workers\n"


def test_written_answers_go_with_what_was_kept(tmp_path: Path, evaluate: Evaluate) -> None:
    options = ["--factors", FACTORS, "--contexts", "2"]
    study = ["--study", str(tmp_path / "s")]
    evaluate(*options, *study)
    kept = lines(tmp_path / "s")
    assert evaluate(*options, "--generate", *study) == evaluate(*options, "--generate")
    assert lines(tmp_path / "s") == kept


def test_a_killed_measurement_goes_on(model: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    study = tmp_path / "s"
    options = ["--factors", FACTORS, "--contexts", "60"]
    kept = ["--workers", "2", "--study", str(study)]
    command = [sys.executable, "-m", "lrope_gguf", "eval", str(model), *TASK, *options, *kept]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60.0
        while not (study / "evaluations.jsonl").exists() or len(lines(study)) < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert len(lines(study)) < 120
    resumed = evaluate(*options, *kept)  # neither the kill nor the workers change anything
    assert len(lines(study)) == 120 and resumed == evaluate(*options)


def test_a_picture_of_all_sides(tmp_path: Path, evaluate: Evaluate) -> None:
    picture = tmp_path / "p.svg"
    options = ["--factors", FACTORS, "--uniform", "1.1", "--uniform", "0.9", "--contexts", "2", "--plot", str(picture)]
    evaluate(*options)
    text = picture.read_text()
    assert all(f">{name}<" in text for name in ("base", "given", "uniform 1.1", "uniform 0.9"))
    assert "model.gguf: 8 questions on 2 contexts" in text
    evaluate(*options)
    assert picture.read_text() == text
