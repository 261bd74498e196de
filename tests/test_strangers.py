"""What strangers bring: templates, tokenizers, encodings, numbers and streams of every kind. A table a kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from support.gguf_fixtures import write_model
from support.tiny_models import write_readable

from lrope_gguf import read_factors, remove_factors, write_factors
from lrope_gguf.cli import main
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.sample_answer import Sample
from lrope_search.tasks import KeyValueTask
from lrope_search.tasks.records import read_records

native = pytest.mark.native

ASK = ["--keys", "4", "--set", "kv.probes=2", "--threads", "1"]

TEMPLATES = {
    "Go": "{{ range .Messages }}{{ .Content }}{{ end }}",
    "Go with a pipe": "{{ if .System }}{{ .System | trim }}{{ end }}",
    "unclosed block": "{% for m in messages %}{{ m.content }}", "unclosed variable": "{{ messages",
    "unknown tag": "{% nonsense %}{{ messages[0].content }}",
    "unknown filter": "{{ messages[0].content | nonsense }}",
    "unknown test": "{% if messages is nonsense %}{% endif %}", "undefined attribute": "{{ nothing.there.at_all }}",
    "division by zero": "{{ 1 // 0 }}", "not UTF-8": "{{ messages[0].content }}~~~~",
}  # fmt: skip


@native
@pytest.mark.parametrize(("name", "command"), list(zip(TEMPLATES, ["eval", "search"] * 5, strict=True)))
def test_a_chat_template_that_fails_is_one_line(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_readable(tmp_path / "model.gguf", chat_template=TEMPLATES[name])
    path.write_bytes(path.read_bytes().replace(b"~~~~", b"\xff\xfe\xff\xfe"))
    output = [] if command == "eval" else ["--output", str(tmp_path / "best.json")]
    assert main([command, str(path), *ASK, *output]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert f"{path}: its chat template fails (" in err and "--set chat_template=false" in err
    assert main(["eval", str(path), *ASK, "--contexts", "1", "--set", "chat_template=false"]) == 0


@native
def test_an_end_token_behind_the_prompt_is_taken_off(tmp_path: Path) -> None:
    plain, ended = write_readable(tmp_path / "a.gguf"), write_readable(tmp_path / "b.gguf", add_eos=True)
    task = KeyValueTask(4, probes=2)
    found = []
    for path in (plain, ended):
        with Model(path, n_threads=1) as model:
            found.append((model.tokenize_prompt("Key: 1", " 2"), TeacherForcedEvaluator(model, task).evaluate(
                (1.0,) * model.n_layer, "test", 0).probes))  # fmt: skip
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


ADVICE = {
    "opens <think>": (
        Sample("<|assistant|>\n<think>\n", "42", "Okay, so", chat=True),
        "--set TASK.answer_prefix='</think>'",
    ),
    "closes it": (Sample("<think>\n\n</think>\n\n", "42", "Okay, so", chat=True), "Try --set chat_template=false"),
    "no template": (Sample("the value of 7:", "42", "", chat=False), "Try --set TASK.answer_prefix=TEXT"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_where_the_base_model_answers_nothing_it_is_said_what_to_look_at(name: str) -> None:
    sample, advice = ADVICE[name]
    text = sample.advice(60)
    assert text.startswith("the base model answers none of 60 questions right") and advice in text
    assert text.isprintable() and "'42'" in text
    assert (name == "closes it") == ("</think>\\n" in text)


@native
@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}<think>\n"])
def test_commands_say_it(template: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_readable(tmp_path / "model.gguf", chat_template=template)  # of random weights: it answers nothing
    wanted = "--set TASK.answer_prefix='</think>'" if template else "Try --set TASK.answer_prefix=TEXT"
    assert main(["eval", str(path), *ASK, "--contexts", "1"]) == 0
    err = capsys.readouterr().err
    assert "the base model answers none of 2 questions right" in err and wanted in err
    options = ["--dry-run", "--set", "search_contexts=1", "--output", str(tmp_path / "best.json")]
    assert main(["search", str(path), *ASK, *options]) == 0
    err = capsys.readouterr().err
    assert "the base model answers none of 2 questions right" in err and wanted in err


def test_data_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8-sig")
    assert read_records(data, "record", lambda _, value: value["a"]) == [1, 2]


VALUES = [
    ("--max-kl", "inf"), ("--max-kl", "nan"), ("--max-kl", "-1"), ("--max-kl", "1e999"), ("--set", "ga.width=inf"),
    ("--set", "ga.width=nan"), ("--set", "bounds=0.5,inf"), ("--set", "bounds=nan,2"), ("--set", "bounds=0.0001,4"),
    ("--set", "racing_fraction=nan"), ("--set", "middle_weight=inf"), ("--set", "max_hours=nan"),
    ("--set", "max_hours=inf"), ("--method", "gradients"), ("--set", "max_hours=0"), ("--set", "bounds=0.5,2000"),
    ("--set", "bounds=2,4"), ("--set", "finalists=0"),
    ("--start", "none.json"), ("--set", "guard_text=none.txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_values_that_cannot_be_are_refused_before_anything_is_written(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_readable(tmp_path / "model.gguf")
    before = sorted(tmp_path.iterdir())
    assert main(["search", str(path), *ASK, "--output", str(tmp_path / "best.json"), f"{name}={value}"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and (name in err or value.rpartition("=")[2] in err)
    assert sorted(tmp_path.iterdir()) == before


FACTORS = (1.0, 1.25, 0.75, 1.5)


def test_a_header_of_every_kind_is_written_and_restored(tmp_path: Path) -> None:
    """Sixty thousand keys, one of them of 65 kB, and no alignment."""

    def add(writer: GGUFWriter) -> None:
        writer.add_string("k" * 65_535, "v")
        for i in range(60_000):
            writer.add_uint32(f"general.extra.{i}", i)

    path = write_model(tmp_path / "m.gguf", alignment=1, add=add)
    before = path.read_bytes()
    write_factors(path, FACTORS)
    assert read_factors(path) == FACTORS
    remove_factors(path)
    assert path.read_bytes() == before
