"""The task's options: which go together, what they make, and `eval` on every task."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import click
import pytest
from support.gguf_fixtures import write_model
from support.rope_models import GEMMA3, N_LAYER
from support.task_files import words, write
from support.tiny_models import write_readable
from test_task_data import own_line, qa_line

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search import ModelConfig, SearchConfig, TaskConfig, optimizer_config, task_config
from lrope_search.commands.options import Gathered, RunConfig, config_options, options_of, task_options
from lrope_search.evaluation.make import task_for
from lrope_search.tasks import JsonlTask, KeyValueTask, MultiDocumentTask, TokenLimit, make_task, task_identity

native = pytest.mark.native
SETTING = re.compile(r"[a-z]+\.[a-z_]+=")


def configs(*options: str) -> tuple[ModelConfig, TaskConfig]:
    """The settings that a command makes of these options; ``kv.probes=3`` stands for ``--set kv.probes=3``."""
    words = [word for text in options for word in (sets(text) if SETTING.match(text) else [text])]

    @click.command()
    @options_of(RunConfig, ModelConfig)
    @task_options
    @config_options
    def command(**values: Any) -> tuple[ModelConfig, TaskConfig]:
        gathered = Gathered(values, (RunConfig, ModelConfig), "eval")
        return gathered.make(ModelConfig, "m.gguf"), gathered.task(gathered.make(RunConfig).seed)

    made: tuple[ModelConfig, TaskConfig] = command.main(words, standalone_mode=False)
    return made


def parse(*options: str) -> TaskConfig:
    return configs(*options)[1]


def studied(*options: str) -> dict[str, Any]:
    """What a study's configuration holds of these options."""
    model, task = configs(*options)
    return task_identity(task) | {"chat_template": model.chat_template}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """A file of each task."""
    records = [{"ordered_kv_records": [[f"k{n}-{i}", f"v{n}-{i}"] for i in range(12)]} for n in range(10)]
    lines = {"kv": records, "mdqa": [qa_line(n) for n in range(120)], "jsonl": [own_line(n) for n in range(10)]}
    return {name: str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in lines.items()}


def test_every_option_reaches_its_task(data: dict[str, str]) -> None:
    context = make_task(parse("--keys", "9", "kv.probes=3", "--seed", "5", "kv.identifiers=number")).context("test", 0)
    assert context == KeyValueTask(9, probes=3, seed=5, identifiers="number").context("test", 0)
    assert make_task(parse()).context("test", 0) == KeyValueTask(40, probes=27).context("test", 0)
    qa = parse("--task", "mdqa", "--data", data["mdqa"], "mdqa.documents=6", "mdqa.probes=4", "--seed", "5")
    assert make_task(qa).context("test", 0) == MultiDocumentTask(data["mdqa"], 6, probes=4, seed=5).context("test", 0)
    template = r"jsonl.prompt_template={context}\n\n{question}\n"
    own = parse("--task", "jsonl", "--data", data["jsonl"], "--seed", "5", template)
    expected = JsonlTask(data["jsonl"], seed=5, template="{context}\n\n{question}\n").context("test", 0)
    assert make_task(own).context("test", 0) == expected
    assert make_task(task_config(keys=9, probes=3)).context("test", 0).prefix.count("-") == 4 * 18


def test_contexts_are_sized_when_a_model_is_there(data: dict[str, str]) -> None:
    class Counting:
        def tokenize_prompt(self, prompt: str, answer: str = "") -> list[str]:
            return ["bos"] * words(prompt + answer)

    options = ("--context-tokens", "90")
    kv = parse(*options, "kv.probes=3", 'kv.answer_prefix= "')
    assert len(make_task(kv).context("test", 0).prefix) < 400  # as small as can be
    limit = TokenLimit(89, words)  # less the answer's beginning
    fitted = task_for(Counting(), kv)  # type: ignore[arg-type]
    assert fitted.context("test", 0) == KeyValueTask(probes=3, limit=limit).context("test", 0)
    qa = parse("--task", "mdqa", "--data", data["mdqa"], *options, "mdqa.probes=3", 'mdqa.answer_prefix= "')
    fitted = task_for(Counting(), qa)  # type: ignore[arg-type]
    assert fitted.context("test", 0) == MultiDocumentTask(data["mdqa"], probes=3, limit=limit).context("test", 0)
    same = task_for(Counting(), parse("--keys", "12"))  # type: ignore[arg-type]
    assert same.context("test", 0) == make_task(parse("--keys", "12")).context("test", 0)
    many = parse("--context-tokens", "900", "kv.probes=60")
    assert len(make_task(many).context("test", 0).probes) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task mdqa --keys 20", "--keys: --task mdqa does not use it; it is for --task kv, words, numbers or multi"),
        ("--task jsonl --context-tokens 9", "--context-tokens: --task jsonl does not use it"),
        ("--task mdqa", "--task mdqa: needs an nq-open file; give --data FILE"),
        ("--task jsonl", "--task jsonl: needs your file of questions; give --data FILE"),
        ("--task jsonl --data none.jsonl", "none.jsonl: cannot read .*No such file"),
        ("--task kv --task kv", "--task kv: given twice; give each task once$"),
        ("--task kv --task jsonl --data x.jsonl", "--data x.jsonl: which of the 2 tasks"),
        ("--keys mdqa=3", "--keys mdqa=3: no --task mdqa is given, only kv; add it or leave this out$"),
        ("--task kv --task jsonl --data mdqa=x", "--data mdqa=x: no --task mdqa is given, only kv and jsonl"),
        ("--task kv --task jsonl --data jsonl=x --keys jsonl=3", "--keys: --task jsonl does not use it"),
        ("--set kv.weight=2", "--set kv.weight=2: there is no other task to weigh kv against; leave it out$"),
        ("--task kv --task jsonl --data jsonl=x --set kv.weight=0", "--set kv.weight=0: too small; give more than 0"),
        ("--task kv --task jsonl --data jsonl=x --set mdqa.weight=1", "--set mdqa.weight=1: no --task mdqa is given"),
        ("--task vt --set vt.lines=4", "vt.lines 4: too few for a chain of 5 lines; ask for at least 5"),
        ("--task vt --set vt.lines=9 --set vt.probes=2", "vt.lines 9: too few for 2 chains of 5 lines; ask for at"),
        ("--task cwe --set cwe.words=60", "cwe.words 60: too few for a list with 10 common words; ask for at least 61"),
        ("--task cwe --set cwe.words=999999", "cwe.words 999999: there are only enough words for 257460; ask for f"),
        ("--task fwe --set fwe.words=73", "fwe.words 73: too few for a text in which 3 words .*; ask for at least 74"),
        ("--task multikey --keys 3 --set multikey.probes=4", "--keys 3: too few for 4 probes"),
        ("--task multikey --data kv.jsonl", "--data: --task multikey does not use it"),
    ],
)
def test_bad_input_is_named_before_any_model(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "odd.gguf")  # a llama of no use, which nobody could load
    for command in ("search", "eval"):
        assert main([command, str(path), *options.split()]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert re.match(f"lrope-gguf: {message}", said) and "odd.gguf" not in said


def test_all_that_decides_the_prompts_is_in_a_studys_configuration(data: dict[str, str]) -> None:
    plain = studied()
    assert plain == studied("kv.probes=27", "kv.identifiers=uuid")  # however it was said
    assert plain == {
        "name": "kv", "keys": None, "data": None, "identifiers": "uuid", "probes": 27,
        "positions": "jittered", "context_tokens": None,
        "seed": 0, "answer_prefix": "", "chat_template": True,
    }  # fmt: skip
    json.dumps(plain)
    changes: dict[str, list[tuple[str, ...]]] = {
        "kv": [("--keys", "9"), ("kv.probes=4",), ("kv.identifiers=number",), ("--context-tokens", "900"),
               ("--data", data["kv"]), ("--seed", "1"), ("kv.answer_prefix=x",), ("--set", "chat_template=false")],
        "mdqa": [("mdqa.documents=9",), ("mdqa.probes=4",), ("--context-tokens", "900"), ("--data", data["kv"])],
        "jsonl": [("jsonl.prompt_template={context}{question}",), ("--data", data["kv"]), ("--seed", "1")],
    }  # fmt: skip
    for name, options in changes.items():
        common = ("--task", name) if name == "kv" else ("--task", name, "--data", data[name])
        last = [(*common, *more) if "--data" not in more else (*common[:2], *more) for more in options]
        made = [studied(*common), *(studied(*words) for words in last)]
        assert len({json.dumps(c, sort_keys=True) for c in made}) == len(made)


def sets(*settings: str) -> list[str]:
    """The options that give these settings."""
    return [word for setting in settings for word in ("--set", setting)]


def evaluate(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["eval", str(path), "--threads", "1", "--contexts", "2", "--json", *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@native
def test_eval_on_every_task(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, str]) -> None:
    path = write_readable(tmp_path / "model.gguf", context_length=4096)
    asked = sets("mdqa.documents=5", "mdqa.probes=3", "mdqa.positions=even")
    qa = evaluate(path, capsys, "--task", "mdqa", "--data", data["mdqa"], *asked, "--generate")
    assert qa["probes"] == 6
    assert [row["depth"] for row in qa["by_depth"]] == [0.0, 0.5, 1.0]
    assert qa["task"]["documents"] == 5 and qa["task"]["data"].startswith("mdqa.jsonl sha256:")
    assert qa["generated"]["probes"] == 6
    own = evaluate(path, capsys, "--task", "jsonl", "--data", data["jsonl"], "--generate", "--uniform", "1.1")
    assert own["probes"] == 2
    assert own["factors"] == {"base": [1.0] * 6, "uniform 1.1": [1.1] * 6}
    assert own["base"] != own["uniform 1.1"]


@native
def test_uniform_moves_the_layers_that_a_search_would_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with sliding windows those without one, as a search's own uniform factors do; not all."""
    path = write_readable(tmp_path / "model.gguf", GEMMA3)
    windowed = [i for i in range(N_LAYER) if (i + 1) % 6]  # src/models/gemma3.cpp: every sixth layer is dense
    options = ["--keys", "20", *sets("kv.probes=2"), "--threads", "1"]
    assert main(["eval", str(path), *options, "--contexts", "1", "--json", "--uniform", "1.3"]) == 0
    out, err = capsys.readouterr()
    moved = json.loads(out)["factors"]["uniform 1.3"]
    assert moved == [1.0 if i in windowed else 1.3 for i in range(N_LAYER)]
    assert f"uniform: {N_LAYER - len(windowed)} of {N_LAYER} layers move" in err

    how = ["--max-evaluations", "2", *sets("search_contexts=1", "validation_contexts=1", "test_contexts=1",
           "uniform_factors=1.3", "parametrization=layers"), "--output", str(tmp_path / "best.json")]  # fmt: skip
    assert main(["search", str(path), *options, *how]) == 0
    lines = (tmp_path / "best.study" / "candidates.jsonl").read_text().splitlines()
    asked = {record["origin"]: record["factors"] for record in map(json.loads, lines)}
    assert asked["uniform"] == moved


def test_settings_travel_as_json_and_by_pickle(data: dict[str, str]) -> None:
    made = [
        ModelConfig("m.gguf", n_threads=3, chat_template=False),
        task_config(keys=9, seed=4),
        task_config("jsonl", data=data["jsonl"], prompt_template="{context}{question}"),
        SearchConfig(algorithm=optimizer_config("ga", lag=3), start=(((0.0, 1.0), (1.0, 1.2)),), max_hours=2.5),
    ]
    for value in made:
        assert pickle.loads(pickle.dumps(value)) == value
        stored = json.loads(json.dumps(value.to_json()))
        back = task_config(**stored) if isinstance(value, TaskConfig) else type(value).from_json(stored)
        assert back.to_json() == value.to_json()
    with pytest.raises(LropeError, match=r"depth: no setting of ModelConfig"):
        ModelConfig.from_json({"path": "m.gguf", "depth": 3})
