"""Studies: what is on disk after a kill, a full disk, a second process; what a study is bound to, what may change."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search import SearchConfig, task_config
from lrope_search.scores import GUARD, ContextScore, DivergenceScore, Job, ProbeScore, Tuned
from lrope_search.study import store as study_module
from lrope_search.study.store import Study

CONFIG = {"seed": 1, "task": {"name": "kv", "keys": 20}, "search": {"bounds": (0.5, 4.0)}}


def result(index: int = 0, log_probability: float = -0.1) -> tuple[Job, ContextScore]:
    probes = (ProbeScore(0.0, log_probability, True), ProbeScore(1.0, -2.0, False))
    return Job((1.0, 1.1 + index / 7.0), "search", index), ContextScore("search", index, probes, 100, 0.25)


def filled(directory: Path, n: int = 3) -> Path:
    with Study(directory, CONFIG) as study:
        for i in range(n):
            study.record(*result(i))
    return directory / "evaluations.jsonl"


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    st.lists(st.tuples(st.floats(0, 1), st.floats(), st.booleans()), min_size=1, max_size=4),
)
def test_floats_come_back_exactly(factors: list[float], probes: list[tuple[float, float, bool]]) -> None:
    rows = (tuple(factors), (), tuple(reversed(factors)))
    heads = [tuple(factors), Tuned(factors, rows), Tuned(factors, None, rows), Tuned(factors, rows, rows[::-1])]
    job = Job(heads[len(probes) % 4], "test", 3)
    score = ContextScore("test", 3, tuple(ProbeScore(*p) for p in probes), 7, 0.1)
    line = study_module.json_line(study_module._record(job, score))
    assert line.count(b"\n") == 1
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert repr(study_module._parse(line)) == repr((job, score)) and study_module._parse(line)[0] == job


@pytest.mark.parametrize("long", [0.0, 0.015413350625310624, math.inf])
def test_a_divergence_is_written_as_it_always_was(long: float) -> None:
    """As two probes with minus the KL divergence: a study of an earlier version goes on, byte for byte."""
    job, score = Job((1.0, 1.25), GUARD, 0), DivergenceScore(0.010119496138908321, long, 6144, 18.5)
    correct = str(math.isfinite(long)).lower()
    minus = '"-inf"' if math.isinf(long) else repr(-long)
    line = (
        '{"factors":[1.0,1.25],"split":"guard","index":0,"n_tokens":6144,"seconds":18.5,'
        f'"probes":[[0.0,-0.010119496138908321,true],[1.0,{minus},{correct}]]}}\n'
    )
    assert study_module.json_line(study_module._record(job, score)) == line.encode()
    assert study_module._parse(line.encode()) == (job, score)


@pytest.mark.parametrize("cut", [1, 2, 40, 100])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Study(tmp_path, CONFIG) as study:
        assert len(study) == 2
        study.record(*result(2))
    assert path.read_bytes() == whole
    assert "torn last line" in (tmp_path / "log.txt").read_text()
    path.write_bytes(whole + bytes(50) + b"\n")  # zeros, as a file system leaves them
    Study(tmp_path, CONFIG).close()
    assert path.read_bytes() == whole


NONSENSE = [
    result_line.replace(old, new)
    for result_line in [study_module.json_line(study_module._record(*result(1)))]
    for old, new in [(b"[[0.0,", b"[[7.0,"), (b'"factors":[1.0', b'"factors":[-1.0'), (b'"index":1', b'"index":-1'),
                     (b'"seconds":0.25', b'"seconds":1e999')]
] + [b'{"factors":[1.0],"split":"search","index":0,"n_tokens":1,"seconds":0.1,"probes":[]}']  # fmt: skip


@pytest.mark.parametrize(
    "damage", [*NONSENSE, b"{}", b"nonsense", b"\xff\xfe", b"[1]", b'{"factors": null}', b"[" * 100_000]
)
def test_what_no_model_could_have_said_is_damage(tmp_path: Path, damage: bytes) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines()
    assert damage.strip() not in lines
    path.write_bytes(b"\n".join([lines[0], damage.strip(), lines[2]]) + b"\n")
    before = path.read_bytes()
    with pytest.raises(LropeError, match=r"evaluations.jsonl: line 2 is damaged; delete that line"):
        Study(tmp_path, CONFIG)
    assert path.read_bytes() == before
    path.write_bytes(b"\n".join([lines[0], lines[2]]) + b"\n")  # what the message advises
    with Study(tmp_path, CONFIG) as study:
        assert len(study) == 2


@given(st.data())
def test_any_damage_is_a_torn_end_or_a_line_in_a_message(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = filled(directory)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        before = path.read_bytes()
        try:
            with Study(directory, CONFIG) as study:
                for i in range(3):
                    if study.lookup(result(i)[0]) is None:
                        study.record(*result(i))
        except LropeError as error:
            assert "is damaged; delete that line" in str(error) and path.read_bytes() == before
        else:
            with Study(directory, CONFIG) as study:
                assert all(study.lookup(result(i)[0]) is not None for i in range(3))


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LropeError, match=r"config.json: is not JSON"):
        Study(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LropeError, match=r"config.json: is missing"):
        Study(tmp_path, CONFIG)


def test_two_processes_do_not_share_a_study(tmp_path: Path) -> None:
    code = (
        "import sys; from lrope_search.study.store import Study\n"
        f"with Study({str(tmp_path)!r}, {CONFIG!r}):\n    print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(LropeError, match=rf"another search is using this study \(process {other.pid}\)"):
            Study(tmp_path, CONFIG)
        other.stdin.close()
        assert other.wait(10) == 0
    Study(tmp_path, CONFIG).close()


def test_a_full_disk_loses_nothing_that_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    write_all = study_module.write_all

    def full(file, data) -> None:
        write_all(file, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Study(tmp_path, CONFIG) as study:
        monkeypatch.setattr(study_module, "write_all", full)
        with pytest.raises(LropeError, match=r"evaluations.jsonl: cannot be written \(No space left"):
            study.record(*result(3))
        assert study.lookup(result(3)[0]) is None
        assert path.read_bytes() == whole
        monkeypatch.undo()
        study.record(*result(3))
    with Study(tmp_path, CONFIG) as study:
        assert len(study) == 4


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "study"):
        with pytest.raises(LropeError, match="choose another directory"):
            Study(path, CONFIG)


def test_what_is_kept_stays(tmp_path: Path) -> None:
    assert Study.kept(tmp_path, "guard") is None
    with Study(tmp_path, CONFIG) as study:
        study.keep("guard", {"long": [1, 2]})
        study.keep("guard", {"long": [3]})
    assert Study.kept(tmp_path, "guard") == {"long": [1, 2]}
    (tmp_path / "guard.json").write_text('{"long": [1, ')
    with pytest.raises(LropeError, match=r"guard.json: is not JSON .*; choose another study directory"):
        Study.kept(tmp_path, "guard")


ONE, TWO = "sha256:0123456789abcdef", "sha256:fedcba9876543210"
CHANGES = [
    # began with, is now, what is said; None: it goes on
    ({"data": f"a.jsonl {ONE}"}, {"data": f"b c.jsonl {ONE}"}, None),
    ({"parts": {"kv": {"data": f"a {ONE}"}}}, {"parts": {"kv": {"data": f"b {ONE}"}}}, None),
    ({"text": f"a {ONE}"}, {"text": f" {ONE}"}, None),
    ({"data": f"a.jsonl {ONE}"}, {"data": f"a.jsonl {TWO}"}, f'data was "a.jsonl {ONE}", is "a.jsonl {TWO}"'),
    ({"data": f"a.jsonl {ONE}"}, {"data": None}, f'data was "a.jsonl {ONE}", is null'),
    ({"data": "a.jsonl"}, {"data": "b.jsonl"}, 'data was "a.jsonl", is "b.jsonl"'),
    ({"data": f"a {ONE}x"}, {"data": f"b {ONE}x"}, "data was"),
    ({"versions": {"llama-cpp-python": "0.3.1"}}, {"versions": {"llama-cpp-python": "0.3.2"}}, None),
    ({"versions": {"a": "1"}, "seed": 1}, {"versions": {"a": "2"}, "seed": 2}, "other settings: seed was 1, is 2; "),
    ({"seed": 1}, {"seed": 1.0}, "seed was 1, is 1.0"),
    (CONFIG, {"seed": 2, "task": {"name": "kv", "keys": 21, "data": "x"}, "search": {"bounds": [0.5, 4.0]}},
     'other settings: seed was 1, is 2, task.data was absent, is "x", task.keys was 20, is 21; use the same'),
    ({"versions": {"a": "1"}}, {}, "versions was"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "now", "message"), CHANGES)
def test_what_changes_a_study(tmp_path: Path, before: dict[str, Any], now: dict[str, Any], message: str | None) -> None:
    Study(tmp_path, before).close()
    stored = (tmp_path / "config.json").read_bytes()
    if message is None:
        with Study(tmp_path, now) as study:
            changed = {"llama-cpp-python": ("0.3.1", "0.3.2")} if "versions" in now else {}
            assert study.changed_versions == changed
    else:
        with pytest.raises(LropeError) as refused:
            Study(tmp_path, now)
        assert message in str(refused.value) and "\n" not in str(refused.value)
        Study(tmp_path, before).close()  # and the lock is free
    assert (tmp_path / "config.json").read_bytes() == stored


def records() -> str:
    pairs = [[f"key {i} {j}", f"value {i} {j}"] for i in range(12) for j in range(6)]
    rows = [{"ordered_kv_records": pairs[6 * i : 6 * i + 6]} for i in range(12)]
    return "".join(json.dumps(row) + "\n" for row in rows)


SETTINGS = ("kv.probes=2", "ga.population=4", "search_contexts=1", "validation_contexts=1", "test_contexts=2")
OPTIONS = [*(f"--set={setting}" for setting in SETTINGS), "--max-evaluations", "6", "--threads", "1", "--max-kl", "100",
           "--study", "s"]  # fmt: skip


@pytest.mark.native
def test_a_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_readable(tmp_path / "m.gguf")
    (tmp_path / "a.jsonl").write_text(records())
    command = ["search", "m.gguf", *OPTIONS, "--output", "best.json", "--data"]
    assert main([*command, "a.jsonl"]) == 0
    kept = tmp_path / "s" / "evaluations.jsonl"
    evaluations, best = kept.read_bytes(), json.loads((tmp_path / "best.json").read_text())
    assert "other versions" not in capsys.readouterr().err

    (tmp_path / "a.jsonl").rename("b.jsonl")
    monkeypatch.setattr("lrope_search.session.binding_version", lambda: "99.0")
    assert main([*command, "b.jsonl"]) == 0
    assert json.loads((tmp_path / "best.json").read_text())["layer_factors"] == best["layer_factors"]
    err = capsys.readouterr().err
    assert "s: begun with other versions (llama-cpp-python was " in err and ", is 99.0); one result was measured" in err
    assert kept.read_bytes() == evaluations

    # had the other version measured something else
    first, rest = evaluations.split(b"\n", 1)
    line = json.loads(first)
    line["probes"][0][1] -= 0.25
    kept.write_bytes(json.dumps(line).encode() + b"\n" + rest)
    assert main([*command, "b.jsonl"]) == 1
    err = capsys.readouterr().err
    assert "a result that was measured again differs by 0.25 nats; install the old versions (pip install " in err
    assert "llama-cpp-python==" in err and err.rstrip().endswith("or choose another --study")


# as studies that are kept since version 0.1.0 have them
SEARCH_BEFORE = {
    "algorithm": "ga", "bounds": [0.5, 4.0], "confidence": 0.95, "degree": 3, "finalists": 3, "lag": 2, "max_kl": 0.1,
    "middle_weight": 0.0, "parametrization": "layers", "parents": None, "population": None, "racing_first": 1,
    "racing_fraction": 0.3, "search_contexts": 8, "seed": 3, "test_contexts": 16,
    "uniform_factors": [0.95, 1.05, 1.1, 1.25], "validation_contexts": 8, "width": 0.05,
}  # fmt: skip
TASKS_BEFORE: list[dict[str, Any]] = [
    {"context_tokens": None, "data": None, "identifiers": "word", "keys": 240, "name": "kv", "positions": "jittered",
     "probes": 40},
    {"context_tokens": None, "data": f"nq.jsonl.gz {ONE}", "documents": 5, "name": "mdqa", "positions": "jittered",
     "probes": None},
    {"context_tokens": 1100, "keys": None, "name": "multikey", "positions": "jittered", "probes": None},
    {"context_tokens": None, "lines": 40, "name": "vt", "positions": "jittered", "probes": 1},
    {"context_tokens": None, "name": "cwe", "words": 70},
    {"data": f"own.jsonl {ONE}", "name": "jsonl", "prompt_template": r"{context}\n\nQuestion: {question}\nAnswer:"},
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["ga", "cma-es", "de", "random", "papers-ga"])
def test_a_study_from_before_goes_on_with_the_settings_that_it_was_begun_with(algorithm: str) -> None:
    lag = 2 if algorithm in ("ga", "random") else 8
    before = SEARCH_BEFORE | {"algorithm": algorithm, "lag": lag}
    settings = SearchConfig.from_json(before)
    assert json.loads(json.dumps(settings.identity())) == before
    unsaid = replace(settings, racing_first=None, racing_fraction=None)  # options that nobody need repeat
    assert unsaid.settled(40, kept={"search": before}).identity() == settings.identity()


@pytest.mark.parametrize("before", TASKS_BEFORE, ids=lambda task: task["name"])
def test_a_tasks_settings_are_kept_as_before(before: dict[str, Any]) -> None:
    before = before | {"seed": 3, "answer_prefix": ""}
    assert json.loads(json.dumps(task_config(**before).to_json())) == before


def test_a_setting_of_a_study_that_there_is_no_more_is_named() -> None:
    with pytest.raises(LropeError, match=r"^kv.depths: no such setting; task kv has"):
        task_config("kv", depths=11)
