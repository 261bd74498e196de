"""What a study is bound to: the content of its data, not its name; other versions go on where they measure the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search import SearchConfig, task_config
from lrope_search.study.store import Study

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
    ({"versions": {"a": "1"}}, {}, "versions was"),
]


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
        assert message in str(refused.value)
    assert (tmp_path / "config.json").read_bytes() == stored


def records() -> str:
    pairs = [[f"key {i} {j}", f"value {i} {j}"] for i in range(12) for j in range(6)]
    rows = [{"ordered_kv_records": pairs[6 * i : 6 * i + 6]} for i in range(12)]
    return "".join(json.dumps(row) + "\n" for row in rows)


OPTIONS = ["--set", "kv.probes=2", "--max-evaluations", "6", "--set", "ga.population=4",
           "--set", "search_contexts=1", "--threads", "1",
           "--set", "validation_contexts=1", "--set", "test_contexts=2", "--max-kl", "100", "--study", "s"]  # fmt: skip


@pytest.mark.native
def test_a_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_readable(tmp_path / "m.gguf")
    (tmp_path / "a.jsonl").write_text(records())
    command = ["search", "m.gguf", *OPTIONS, "--output", "best.json", "--data"]
    assert main([*command, "a.jsonl"]) == 0
    evaluations = (tmp_path / "s" / "evaluations.jsonl").read_bytes()
    best = json.loads((tmp_path / "best.json").read_text())
    capsys.readouterr()

    (tmp_path / "a.jsonl").rename("b.jsonl")
    assert main([*command, "b.jsonl"]) == 0
    assert (tmp_path / "s" / "evaluations.jsonl").read_bytes() == evaluations
    assert json.loads((tmp_path / "best.json").read_text())["layer_factors"] == best["layer_factors"]
    capsys.readouterr()

    monkeypatch.setattr("lrope_search.session.binding_version", lambda: "99.0")
    assert main([*command, "b.jsonl"]) == 0
    err = capsys.readouterr().err
    assert "s: begun with other versions (llama-cpp-python was " in err and ", is 99.0); one result was measured" in err
    assert (tmp_path / "s" / "evaluations.jsonl").read_bytes() == evaluations

    # had the other version measured something else
    first, rest = evaluations.split(b"\n", 1)
    line = json.loads(first)
    line["probes"][0][1] -= 0.25
    (tmp_path / "s" / "evaluations.jsonl").write_bytes(json.dumps(line).encode() + b"\n" + rest)
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
