"""research/transfer.py: what its settings are read as, its tables, and what it refuses."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import options
import pytest
import transfer

from lrope_gguf import LropeError, native
from lrope_search import Measurement, ModelConfig, TaskConfig, task_config
from lrope_search.results.table import depth_table
from lrope_search.scores import ContextScore, ProbeScore

MODEL = str(Path(__file__).parents[2] / "models/lrope-kv.gguf")


def parse(*given: str) -> dict[str, TaskConfig]:
    parser = argparse.ArgumentParser()
    options.add_task_options(parser, several=True)
    tasks: dict[str, TaskConfig] = options.tasks_of(parser.parse_args(["--tasks", *given]))
    return tasks


TASKS = [
    (["kv"], [task_config("kv")]),
    (["kv:keys=7,probes=3", "vt:lines=30"], [task_config("kv", keys=7, probes=3), task_config("vt", lines=30)]),
    # options of the line are for all that take them, and one's own size replaces another's
    (["kv", "multikey:keys=9", "vt", "--context-tokens", "500", "--probes", "4", "--seed", "2"],
     [task_config("kv", context_tokens=500, probes=4, seed=2), task_config("multikey", keys=9, probes=4, seed=2),
      task_config("vt", context_tokens=500, probes=4, seed=2)]),
    (["kv:identifiers=word", "kv:identifiers=number", "cwe", "--identifiers", "uuid", "--answer-prefix", "x"],
     [task_config("kv", identifiers="word", answer_prefix="x"), task_config("kv", identifiers="number",
      answer_prefix="x"), task_config("cwe", answer_prefix="x")]),
    (["mdqa:data=nq.jsonl,documents=5", "fwe:context-tokens=90"],
     [task_config("mdqa", data="nq.jsonl", documents=5), task_config("fwe", context_tokens=90)]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "made"), TASKS)
def test_tasks_are_read(given: list[str], made: list[TaskConfig]) -> None:
    found = parse(*given)
    assert list(found.values()) == made
    assert list(found) == given[: len(made)]


BAD_TASKS = [
    (
        ["nonsense"],
        "--tasks nonsense: no such task; choose from kv, words, numbers, mdqa, jsonl, multikey, vt, cwe, fwe",
    ),
    (["kv:keys"], "--tasks kv:keys: 'keys' is no option with a value; kv has context-tokens, data, identifiers, keys,"),
    (["kv:size=3"], "--tasks kv:size=3: 'size=3' is no option with a value"),
    (["kv:keys=many"], "--tasks kv:keys=many: 'many' is no whole number"),
    (["kv:keys=0"], "--keys 0: too small"),
    (["kv:lines=3"], "lines: --task kv does not use it; it is for --task vt"),
    (["kv:keys=3,context-tokens=9"], "--keys, --context-tokens: both give a context's size"),
    (["mdqa"], "--task mdqa: needs an nq-open file"),
    (["kv", "cwe", "--lines", "5"], "lines: --task kv does not use it"),
]


@pytest.mark.parametrize(("given", "message"), BAD_TASKS)
def test_tasks_that_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(LropeError) as refused:
        parse(*given)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_who_may_see_what_of_a_file_is_for_the_file_to_say() -> None:
    """Another seed would shuffle it otherwise, and the test's contexts would be ones that the search has seen."""
    setting = transfer.Setting
    model = ModelConfig("m.gguf")
    assert setting("a", model, task_config("kv", keys=3)).seeded(5).seed == 5
    assert setting("b", model, task_config("jsonl", data="mine.jsonl", seed=2)).seeded(5).seed == 2


def measurement(rights: dict[str, list[int]], generated: bool = False) -> Measurement:
    """Contexts of four probes, of which so many are right, and a log-probability of -1 + a tenth of that."""
    scores = {
        name: [
            ContextScore("test", i, tuple(ProbeScore(k / 3, right / 10 - 1, k < right) for k in range(4)), 50, 0.5)
            for i, right in enumerate(row)
        ]
        for name, row in rights.items()
    }
    table = depth_table(scores)
    factors = dict.fromkeys(rights, (1.0, 1.0))
    return Measurement({}, factors, scores, table, table if generated else None, None, 50, 0.5)


def test_tables() -> None:
    task, model = task_config("kv"), ModelConfig("m.gguf")
    settings = [transfer.Setting("F16", model, task), transfer.Setting("Q4_0", model, task)]
    rows = [("F16", 0), ("Q4_0", 0)]
    found = {
        "F16": measurement({"base": [1] * 6, "F16, seed 0": [3] * 6, "Q4_0, seed 0": [2] * 6}),
        "Q4_0": measurement({"base": [0] * 6, "F16, seed 0": [1, 1, 1, 1, 1, 3], "Q4_0, seed 0": [3] * 6}),
    }
    accuracy, log_probability, beside = transfer.tables(settings, rows, found)
    ends = re.findall(r"([+-][\d.]+) \[(\S+), (\S+)\]", accuracy + beside)
    assert len(ends) == 7 and all(float(low) < float(mean) < float(high) for mean, low, high in ends)
    accuracy, beside = (re.sub(r" \[\S+, \S+\]", "", text) for text in (accuracy, beside))
    assert accuracy.splitlines()[:7] == [
        "Accuracy, gains in points:",
        "",
        "| searched on | asked F16 | asked Q4_0 |",
        "|---|---|---|",
        "| base | 25.0 % | 0.0 % |",
        "| quantization alone, over F16 | - | -25.0 |",
        "| F16, seed 0 | +50.0 | +33.3 |",
    ]
    assert "| base | -0.9000 | -1.0000 |" in log_probability
    assert "| Q4_0, seed 0 | +0.1000 [0.1000, 0.1000] | +0.3000 [0.3000, 0.3000] |" in log_probability
    assert "| F16, seed 0 | - | -41.7 |" in beside
    assert "| Q4_0, seed 0 | -25.0 | - |" in beside


def test_tables_of_given_curves_and_of_few_contexts() -> None:
    """Nothing was searched, so nothing stands beside; other tasks' contexts do not pair; few tell no interval."""
    model = ModelConfig("m.gguf")
    settings = [transfer.Setting(name, model, task_config(name)) for name in ("kv", "vt")]
    found = {s.name: measurement({"base": [1, 1], "curve c": [2, 3]}, generated=True) for s in settings}
    accuracy, log_probability, written = transfer.tables(settings, [("curve c", None)], found)
    assert accuracy.splitlines()[4:] == ["| base | 25.0 % | 25.0 % |", "| curve c | +37.5 | +37.5 |"]
    assert log_probability.endswith("| curve c | +0.1500 | +0.1500 |")
    assert written == accuracy.replace("Accuracy", "Answers that the model wrote")


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["transfer.py", *options])
        transfer.main()
    assert left.value.code == 1
    return capsys.readouterr().err


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(capsys, "tasks", MODEL, "--tasks", "kv:keys=3", "xyz")
    assert said == "--tasks xyz: no such task; choose from kv, words, numbers, mdqa, jsonl, multikey, vt, cwe, fwe\n"
    said = refusal(capsys, "lengths", MODEL, "--lengths", "20", "30", "20")
    assert said == "20: given twice; give each setting once\n"
    said = refusal(capsys, "lengths", MODEL, "--lengths", "20", "--curves", "none-such")
    assert said.startswith("none-such: no such file") and said.count("\n") == 1
    monkeypatch.setattr(native, "_folder", lambda name: None)
    said = refusal(capsys, "quantizations", MODEL, "--quantizations", "Q8_0")
    assert said.startswith("llama-quantize: ")
    assert said.count("\n") == 1


@pytest.mark.native
def test_quantizations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the file is said, and whether it was made of quantized tensors."""
    quantized = transfer.quantized
    path, said = quantized(MODEL, "Q8_0", tmp_path)
    assert (path.name, said) == ("Q8_0.gguf", "30 q8_0, 9 f32")
    assert quantized(str(path), "COPY", tmp_path)[1] == said
    assert quantized(MODEL, "Q4_K_M", tmp_path)[1] == "25 q5_0, 9 f32, 5 q8_0"  # its rows are too short for K quants
    assert quantized(str(path), "Q4_0", tmp_path)[1] == "29 q4_0, 9 f32, 1 q8_0 (requantized: --allow-requantize)"
    for kind, why in (("Q9", "(invalid ftype 'Q9')"), ("Q1_0", "(no tensor type fallback is defined for type q1_0)")):
        said = refusal(capsys, "quantizations", MODEL, "--quantizations", kind)
        assert said == f"{MODEL}: llama-quantize makes no {kind} of it {why}\n"


@pytest.mark.native
def test_a_search_on_one_length_is_asked_on_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--max-evaluations 3 --search-contexts 1 --validation-contexts 1 --test-contexts 2 --search-seeds 0"
    monkeypatch.setattr(sys, "argv", ["transfer.py", "lengths", MODEL, "--lengths", "9", "60", *few.split(),
                                      "--identifiers", "word", "--probes", "4", "--threads", "1"])  # fmt: skip
    transfer.main()
    out, err = capsys.readouterr()
    assert out.count("| searched on | asked 9 | asked 60 |") == 3 and out.count("| 60, seed 0 |") == 4
    assert "\n60: " in err and " s a context and side; base " in err
