"""research/short_tasks.py on an archive of our own: what is asked, what counts as right, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_tasks

MODEL = Path(__file__).parents[2] / "models" / "lrope-kv.gguf"
CHOICES = {"input": "Is it so?", "target_scores": {"yes": 1, "no": 0, "perhaps": 0.5}}
TASKS: dict[str, Any] = {
    "plain": {"examples": [CHOICES, {"input": "Written?", "target": "no choice"}] * 3},
    "own": {
        "examples": [CHOICES], "task_prefix": "Say: ", "example_input_prefix": "", "example_output_prefix": " So: ",
        "append_choices_to_input": False,
    },
}  # fmt: skip


def archive(path: Path, tasks: dict[str, Any] = TASKS) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, task in tasks.items():
            data = json.dumps(task).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_questions_are_put_as_big_bench_puts_them(tmp_path: Path) -> None:
    found = short_tasks.read_task(archive(tmp_path / "b.tar.gz"), ["own", "plain"], 2, 0)
    assert [*found] == ["own", "plain"] and [len(questions) for questions in found.values()] == [1, 2]
    assert found["own"][0].prompt == "Say: Is it so? So:"
    listed = "\n  choice: yes\n  choice: no\n  choice: perhaps"
    assert found["plain"][0].prompt == f"\nQ: Is it so?{listed}\nA:"
    assert found["plain"][0].choices == {"yes": 1.0, "no": 0.0, "perhaps": 0.5}


def test_the_likeliest_choice_is_graded() -> None:
    """By the whole probability of a choice, of which the evaluator gives the mean over its tokens."""

    class Evaluator:
        def evaluate(self, factors: Any, split: str, index: int) -> Any:
            probes = [
                short_tasks.ProbeScore(0.0, value, 0.0) for value in ((-0.5, -1.2, -3.0), (-2.0, -1.2, -3.0))[index]
            ]
            return short_tasks.ContextScore(split, index, tuple(probes), 0, 0.0)

        def encoding(self, split: str, index: int) -> Any:
            class Encoding:
                owner = np.array([0, 0, 0, 1, 2])  # three tokens, one and one

            return Encoding()

    question = short_tasks.Question("?", {"a": 1.0, "b": 0.0, "c": 0.5})
    evaluator: Any = Evaluator()
    scores = short_tasks.answered(evaluator, [question, question], (1.0,))
    assert [score.accuracy for score in scores] == [0.0, 0.0]  # -1.5 and -6 against -1.2
    likely = np.exp([-1.5, -1.2, -3.0])
    assert scores[0].log_probability == pytest.approx(float(np.log(likely[0] / likely.sum())))


def run(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["short_tasks.py", *map(str, words)])
    short_tasks.main()


@pytest.mark.native
def test_a_table_has_each_task_and_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = archive(tmp_path / "b.tar.gz", {"kv": {"examples": [CHOICES | {"input": str(i)} for i in range(8)]}})
    curve = tmp_path / "far.json"
    curve.write_text(json.dumps({"format": "lrope-curve", "version": 1, "layer_factors": [3.0, 3.0, 3.0, 3.0]}))
    run(monkeypatch, MODEL, "--curve", curve, "--data", data, "--tasks", "kv", "--questions", 7, "--threads", 1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["kv", "7", "far"], ["all", "7", "far"]]
    assert rows[0][3:] == rows[1][3:] and "[" in rows[0][6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.tar.gz"], "--data none.tar.gz: cannot be read"),
        (["--data", "b.tar.gz", "--tasks", "plain", "other"], "--tasks other: b.tar.gz has no such multiple choice"),
        (["--data", "w.tar.gz", "--tasks", "written"], "--tasks written: w.tar.gz has no such multiple choice"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    archive(Path("b.tar.gz"))
    archive(Path("w.tar.gz"), {"written": {"examples": [{"input": "a", "target": "b"}]}})
    curve = Path("far.json")
    curve.write_text(json.dumps({"format": "lrope-curve", "version": 1, "layer_factors": [3.0, 3.0, 3.0, 3.0]}))
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, MODEL, "--curve", curve, *words)
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
