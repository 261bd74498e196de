"""The whole path on a tiny model: search, kill, resume, write, serve, ask."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import llama_direct
from support.commands import lrope_gguf as run
from support.llama_direct import GGML_TYPE_F16, Context
from support.tiny_models import write_readable

from lrope_gguf.curve import Curve, CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import read_factors, write_factors
from lrope_search import ModelConfig, task_config
from lrope_search.commands.search import at_the_bounds
from lrope_search.demo.server import LlamaServer
from lrope_search.evaluation.divergence import GuardTexts
from lrope_search.evaluation.make import EvaluatorSpec

pytestmark = pytest.mark.native

FACTORS = [1.0, 1.3, 0.8, 2.5, 1.07, 3.1]
PROMPT = 'Key: "4711" has the value "123" and Key: "815" has another value, so what is it? '
SEARCH = ["--method", "genetic", "--set", "kv.identifiers=number", "--keys", "12", "--set", "kv.probes=4",
          "--max-evaluations", "20", "--set", "ga.population=8",
          "--set", "search_contexts=2", "--set", "racing_fraction=0.5", "--set", "validation_contexts=3",
          "--set", "test_contexts=6",
          "--threads", "1", "--max-kl", "100"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readable(tmp_path_factory.mktemp("path") / "tiny.gguf")


def greedy(path: Path, n_predict: int) -> list[int]:
    """The greedy continuation of PROMPT in the binding, on a cache like the server's."""
    lib = llama_direct.library()
    with Context(path, type_kv=GGML_TYPE_F16, flash=True) as context:
        vocab = lib.llama_model_get_vocab(context.model)
        buffer = (lib.llama_token * 512)()
        n = lib.llama_tokenize(vocab, PROMPT.encode(), len(PROMPT), buffer, 512, True, True)
        tokens, chosen = list(buffer[:n]), []
        for _ in range(n_predict):
            chosen.append(int(np.argmax(context.decode(tokens)[-1])))
            tokens = chosen[-1:]
    return chosen


def test_the_server_logs_the_factors_and_answers_as_the_binding_does(model: Path, tmp_path: Path) -> None:
    written = tmp_path / "written.gguf"
    write_factors(model, FACTORS, output=written)
    answers = {}
    for path in (model, written):
        with LlamaServer(path, 512, n_threads=1, options=["--flash-attn", "on"]) as server:
            answers[path] = [server.complete(PROMPT, 16) for _ in range(2)]
            found = "RoPE factors from 0.8 to 3.1, 5 of 6 layers differ from 1" in server.log
        assert found == (path == written)
        assert answers[path][0] == answers[path][1]
        with Context(path) as context:
            lib, piece = context.lib, (llama_direct.ctypes.c_char * 64)()
            vocab = lib.llama_model_get_vocab(context.model)
            text = b"".join(
                bytes(piece[: lib.llama_token_to_piece(vocab, token, piece, 64, 0, False)])
                for token in greedy(path, 16)
            )
        assert answers[path][0] == text.decode("utf-8", "replace")
    assert answers[model] != answers[written]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LropeError, match=r"bad\.gguf: llama-server does not start: "), LlamaServer(bad, 512):
        pass


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[Any], path: Path, wanted: int) -> None:
    """Until ``path`` has them or the process has ended."""
    while process.poll() is None and lines(path) < wanted:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(model: Path) -> tuple[Path, str]:
    """The curve of a search that ran without interruption, with its study beside it, and what was said."""
    output = model.with_name("straight.json")
    done = run("search", model, *SEARCH, "--workers", "1", "--output", output)
    assert done.returncode == 0, done.stderr
    assert "unseen contexts" in done.stdout or "no curve beat" in done.stdout
    return output, done.stdout


def test_a_killed_search_resumes_to_the_same_curve(model: Path, straight: tuple[Path, str], tmp_path: Path) -> None:

    killed = tmp_path / "killed.json"
    evaluations = tmp_path / "killed.study" / "evaluations.jsonl"
    command = [sys.executable, "-m", "lrope_gguf", "search", str(model), *SEARCH, "--output", str(killed)]
    for wanted in (4, 25):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_lines(process, evaluations, wanted)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, "the search ended before it was killed"
    assert not killed.exists()
    resumed = run("search", model, *SEARCH, "--output", killed)
    assert resumed.returncode == 0, resumed.stderr
    assert killed.read_bytes() == straight[0].read_bytes()
    assert resumed.stdout.replace(str(killed), str(straight[0])) == straight[1]

    report = run("report", tmp_path / "killed.study")
    assert (
        report.returncode == 0 and json.loads(killed.read_text())["provenance"]["results"]["verdict"] in report.stdout
    )
    with_curve = run("write", model, "--curve", killed, "--output", tmp_path / "out.gguf")
    assert with_curve.returncode == 0 and len(read_factors(tmp_path / "out.gguf") or ()) == 6


def test_a_dry_run_leaves_nothing(model: Path, tmp_path: Path) -> None:
    done = run("search", model, *SEARCH, "--output", tmp_path / "a.json", "--dry-run")
    assert done.returncode == 0 and "about 80 evaluations of " in done.stderr
    assert f"results go to {tmp_path / 'a.study'}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_other_settings_on_a_study_are_refused_with_the_difference(
    model: Path, straight: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(straight[0].with_suffix(".study"), tmp_path / "a.study")
    second = run("search", model, *SEARCH, "--output", tmp_path / "a.json", "--seed", "9")
    assert second.returncode == 1
    assert "seed" in second.stderr and "0" in second.stderr and "9" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes()[:-64] + bytes(64))
    study = ["--study", tmp_path / "a.study", "--output", tmp_path / "a.json"]
    third = run("search", other, *SEARCH, *study, "--set", "batch_size=256")
    assert third.returncode == 1 and len(third.stderr.splitlines()) == 1
    assert "model.fingerprint was " in third.stderr and "computing.batch_size was 512, is 256" in third.stderr


def test_a_search_begins_with_the_curves_it_is_given(model: Path, tmp_path: Path) -> None:
    points = ((0.0, 1.1), (0.2, 0.9), (0.7, 1.4), (1.0, 4.0))
    known = tmp_path / "known.json"
    CurveFile(control_points=points).save(known)
    few = ["--max-evaluations", "6", "--output", tmp_path / "a.json", "--start", known]
    assert run("search", model, *SEARCH, *few).returncode == 0
    config = json.loads((tmp_path / "a.study" / "config.json").read_text())
    assert config["search"]["start"] == [[list(point) for point in points]]
    candidates = [json.loads(line) for line in (tmp_path / "a.study" / "candidates.jsonl").read_text().splitlines()]
    assert [c["origin"] for c in candidates] == ["identity", *["uniform"] * 4, "seed"]
    assert candidates[5]["control_points"] == config["search"]["start"][0]
    other = run("search", model, *SEARCH, *few[:4])  # it is part of what a study is bound to
    assert other.returncode == 1 and "search.start" in other.stderr

    bezier = ["--set", "parametrization=bezier"]
    for wrong, said in (
        ([*bezier, "--set", "degree=2"], "give --set degree=3"),
        (["--set", "bounds=0.5,3"], "outside the bounds 0.5,3"),
    ):
        refused = run("search", model, *SEARCH, *few, *wrong)
        assert refused.returncode == 1 and said in refused.stderr and len(refused.stderr.splitlines()) == 1
    factors = (1.0, 1.1, 1.0, 0.9, 1.2, 1.3)
    for numbers, more, said in (
        (factors, bezier, f"--start {known}: has factors of layers but no curve"),
        (factors, ["--set", "bounds=0.5,1.2"], f"--start {known}: outside the bounds 0.5,1.2 (a factor of 1.3)"),
        (factors[:2], [], "--start: 2 factors, but"),
    ):
        CurveFile(layer_factors=numbers).save(known)
        refused = run("search", model, *SEARCH, *few, *more)
        assert refused.returncode == 1 and said in refused.stderr and len(refused.stderr.splitlines()) == 1
    CurveFile(layer_factors=factors).save(known)
    small = tmp_path / "small.json"  # of a degree that a curve of degree 3 has not: its factors are taken
    CurveFile(control_points=((0.0, 1.0), (1.0, 2.0))).save(small)
    begun = ["--max-evaluations", "7", "--output", tmp_path / "b.json", "--start", known, "--start", small]
    assert run("search", model, *SEARCH, *begun).returncode == 0
    candidates = [json.loads(line) for line in (tmp_path / "b.study" / "candidates.jsonl").read_text().splitlines()]
    assert candidates[5]["factors"] == list(factors) and candidates[5]["origin"] == "seed"
    assert candidates[6]["factors"] == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]


def test_a_control_point_at_the_bounds_is_pointed_out() -> None:
    inside = Curve(((0.0, 1.0), (0.5, 1.2), (1.0, 3.9)))
    assert at_the_bounds(inside) is None
    outside = Curve(((0.0, 0.8), (0.5, 1.5), (1.0, 1.1)), bounds=(0.8, 1.5))
    assert (
        at_the_bounds(outside)
        == "control points lie at the bounds (0.8 and 1.5); wider bounds may find more: --set bounds=LOW,HIGH"
    )


def test_a_verdict_without_a_gain_has_a_status_of_its_own_if_asked(model: Path, tmp_path: Path) -> None:
    arguments = ["search", model, *SEARCH, "--max-evaluations", "1", "--output", tmp_path / "none.json"]
    assert run(*arguments).returncode == 0
    required = run(*arguments, "--require-gain")
    assert required.returncode == 3 and "not recommended" in required.stdout


def test_the_number_of_workers_does_not_matter(model: Path, straight: tuple[Path, str], tmp_path: Path) -> None:
    outputs = [straight[0], tmp_path / "3.json"]
    result = run("search", model, *SEARCH, "--workers", "3", "--output", outputs[1])
    assert result.returncode == 0, result.stderr
    assert len({output.read_bytes() for output in outputs}) == 1
    scores: dict[str, set[str]] = {}
    for output in outputs:
        for line in (output.with_suffix(".study") / "evaluations.jsonl").read_text().splitlines():
            record = json.loads(line)
            job = json.dumps([record["factors"], record["split"], record["index"]])
            scores.setdefault(job, set()).add(json.dumps(record["probes"]))
    assert all(len(probes) == 1 for probes in scores.values())


@pytest.mark.slow
def test_ray_finds_the_same(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    outputs = [tmp_path / f"{name}.json" for name in ("local", "ray")]
    for output, options in zip(outputs, ([], ["--set", "executor=ray", "--workers", "2"]), strict=True):
        result = run("search", model, *SEARCH, *options, "--output", output)
        assert result.returncode == 0, result.stderr
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_the_number_of_threads_does_not_matter(model: Path) -> None:
    """Which is why workers may share the threads that one would have: scores are equal bit by bit."""
    how, task = ModelConfig(str(model)), task_config(identifiers="number", keys=12, probes=4)
    text = tuple(range(10, 74))
    texts = GuardTexts((text[:16], text[16:32]), text)
    scores = []
    for n_threads in (1, 2):
        with EvaluatorSpec(how, task, guard_texts=texts)(n_threads) as evaluator:
            of_text = evaluator.divergence(tuple(FACTORS))
            of_tasks = [evaluator.evaluate(tuple(FACTORS), *job).probes for job in (("search", 0), ("test", 1))]
            scores.append((of_tasks, of_text.short, of_text.long))
    assert scores[0] == scores[1]


STOPS = [
    ("1", signal.SIGINT, []),
    ("2", signal.SIGINT, []),
    ("2", signal.SIGTERM, ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]),
]


def test_a_search_that_is_stopped_ends_cleanly(model: Path, tmp_path: Path) -> None:
    """Also when Ctrl-C reaches the workers, as in a terminal, and comes twice; a shell's background job ignores it."""
    output = tmp_path / "stopped.json"
    evaluations = tmp_path / "stopped.study" / "evaluations.jsonl"
    more = [*SEARCH, "--max-evaluations", "400", "--output", str(output)]
    for workers, stop, start in STOPS:
        command = [*start, sys.executable, "-m", "lrope_gguf", "search", str(model), *more, "--workers", workers]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            wait_for_lines(process, evaluations, lines(evaluations) + 12)
            if stop == signal.SIGTERM:
                process.terminate()
            else:
                os.killpg(process.pid, stop)
                time.sleep(0.01)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, stop)
            assert process.stderr is not None
            said = process.stderr.read().splitlines()
            assert process.wait(20) == 128 + stop, said
        assert "Traceback" not in "\n".join(said)
        assert said[-1] == "lrope-gguf: interrupted" and any(line.startswith("stopped after ") for line in said)
        assert evaluations.read_bytes().endswith(b"\n") and not output.exists()
        deadline = time.monotonic() + 10.0
        with pytest.raises(ProcessLookupError):  # no worker is left
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
