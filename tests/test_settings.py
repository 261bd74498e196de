"""Settings: where they come from, what is refused, and that a task or an optimizer brings its own."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_search import ModelConfig, SearchConfig, TaskConfig, WorkersConfig, launch, task_config
from lrope_search.commands import evaluate, search
from lrope_search.commands.config_file import key_lines
from lrope_search.commands.options import known_settings
from lrope_search.optimizers.settings import OPTIMIZERS
from lrope_search.settings import Settings, setting
from lrope_search.tasks import IDENTIFIERS, KeyValueTask, task_identity
from lrope_search.tasks.settings import TASKS, Count

Made = tuple[ModelConfig, Any, SearchConfig, WorkersConfig | None]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what `search` makes of options, without a search; of a mistake its one line."""
    monkeypatch.chdir(tmp_path)
    path = write_readable(tmp_path / "m.gguf")

    def make(*options: str) -> Made | str:
        found: list[Made] = []

        def estimate(model: ModelConfig, task: Any, settings: SearchConfig, directory: Path, *, workers: Any) -> None:
            found.append((model, task, settings, workers))

        monkeypatch.setattr(launch, "estimate", estimate)
        status = main(["search", str(path), "--dry-run", *options])
        out, err = capsys.readouterr()
        if status == 0:
            return found[0]
        assert status == 1 and out == "" and "Traceback" not in err
        (line,) = err.splitlines()
        return line.removeprefix("lrope-gguf: ")

    return make


@pytest.mark.parametrize("command", [search.command, evaluate.command])
def test_help_shows_at_most_twenty_options(command: click.Command) -> None:
    with click.Context(command, help_option_names=["-h", "--help"]) as context:
        shown = [option for option in command.get_params(context) if option.get_help_record(context)]
        assert len([option for option in shown if isinstance(option, click.Option)]) <= 20


def test_what_print_config_writes_are_the_defaults(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--print-config"]) == 0
    text = capsys.readouterr().out
    Path("all.toml").write_text(text)
    assert made("--config", "all.toml") == made()
    # each setting is there with a comment before it, set or not
    table, before, names = "", "", []
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        elif match := re.fullmatch(r"(?:# )?([a-z_]+) = .*", line):
            names.append(table + match[1])
            assert before.startswith("# ")
        before = line
    assert names == list(known_settings())
    tomllib.loads(re.sub(r"^# ([a-z_]+) = .*$", r"\1 = 1", text, flags=re.MULTILINE))  # and could be given


def test_settings_of_all_sources_combine(made: Any) -> None:
    Path("c.toml").write_text(
        'task = ["kv", "multikey"]\nmax_evaluations = 50\nmax_kl = 1\n'
        "bounds = [0.5, 2]\nthreads = 1\n"
        'algorithm = "cma-es"\n[kv]\nkeys = 30\nprobes = 3\nweight = 2\n'
        "[multikey]\nkeys = 9\n[cma-es]\npopulation = 7\n"
        "[ga]\nlag = 3\n[vt]\nlines = 12\n"
    )
    model, task, settings, workers = made(
        "--config", "c.toml", "--max-evaluations", "60", "--keys", "kv=31", "--set", "kv.identifiers=word",
        "--seed", "4", "--set", "gpus=0,1", "--set", "cma-es.width=0.3", "--workers", "2",
    )  # fmt: skip
    assert (model.n_threads, workers.n_workers, workers.gpus) == (1, 2, ("0", "1"))
    kv, multikey = task.tasks
    assert kv == task_config("kv", keys=31, probes=3, identifiers="word", seed=4)
    assert multikey == task_config("multikey", keys=9, seed=4) and task.weights == {"kv": 2.0, "multikey": 1.0}
    assert (settings.max_evaluations, settings.max_kl, settings.bounds, settings.seed) == (60, 1.0, (0.5, 2.0), 4)
    assert settings.optimizer.to_json() == {"width": 0.3, "population": 7}


def test_what_a_file_and_an_option_say_may_not_go_together(made: Any) -> None:
    Path("c.toml").write_text("[kv]\n\nkeys = 30\n")
    said = made("--config", "c.toml", "--context-tokens", "900")
    assert said == ("c.toml:3: kv.keys = 30, --context-tokens 900: both give a context's size; leave out one of them")


BAD_FILES = [
    ("max_evaluation = 3", "c.toml:1: max_evaluation: no such setting; did you mean max_evaluations?"),
    ("\n# a\n[kv]\nkey = 3", "c.toml:4: kv.key: no such setting; did you mean kv.keys?"),
    ("keys = 3", "c.toml:1: keys: no such setting; did you mean kv.keys?"),
    ("[kvv]\nkeys = 3", "c.toml:2: kvv.keys: no such setting; did you mean kv.keys?"),
    ("kv = {keys = 3, zebra = 1}", "c.toml:1: kv.zebra: no such setting; lrope-gguf search --print-config has all"),
    ('a = """\nkeys = 1\n"""\n', "c.toml:1: a: no such setting"),
    ('max_evaluations = "many"', 'c.toml:1: max_evaluations = "many": give a whole number'),
    ("max_evaluations = 3.0", "c.toml:1: max_evaluations = 3.0: give a whole number"),
    ("max_evaluations = true", "c.toml:1: max_evaluations = true: give a whole number"),
    ("\nbounds = 2", "c.toml:2: bounds = 2: give a list of numbers"),
    ("bounds = [0.5, 'x']", "c.toml:1: bounds: give a list of numbers"),
    ("chat_template = 'yes'", 'c.toml:1: chat_template = "yes": give true or false'),
    ("max_kl = nan", "c.toml:1: max_kl = nan: not finite"),
    ("[kv]\nidentifiers = 'words'", 'c.toml:2: kv.identifiers = "words": unknown; choose from uuid'),
    ("max_kl = 1\n\nmax_kl = 2", "c.toml:3: max_kl is given twice, first in line 1; leave out one of them"),
    ("[kv]\nkeys = 3\n[kv]\nprobes = 1", "c.toml:3: table [kv] is given twice, first in line 1"),
    ("max_kl = ", "c.toml:1: is not valid TOML ("),
    ("a = [1,\n2\nb = 3", "c.toml:3: is not valid TOML ("),
    (
        "task = ['kv', 'kw']",
        "c.toml:1: task kw: unknown; choose from kv, words, numbers, mdqa, jsonl, multikey, vt, cwe, fwe (did",
    ),
    ("rope_scaling = 'none'\nrope_scale = 2", 'c.toml:2: rope_scale = 2, c.toml:1: rope_scaling = "none": has no'),
    ("algorithm = 'gaa'", "c.toml:1: algorithm gaa: unknown; choose from ga, cma-es, de, random, papers-ga (did"),
    ("\xff", "c.toml:1: is not UTF-8 text"),
]


BAD_OPTIONS = [
    ("--config none.toml", "--config none.toml: cannot be read (No such file or directory); give a TOML file"),
    ("--set probes", "--set probes: give NAME=VALUE"),
    ("--set probes=3", "--set probes=3: no such setting; did you mean kv.probes?"),
    ("--set kv.prob=3", "--set kv.prob=3: no such setting; did you mean kv.probes?"),
    ("--set kv.probes=three", "--set kv.probes=three: give a whole number"),
    ("--set kv.probes=0", "--set kv.probes=0: too small; give at least 1"),
    ("--set verbose=1", "--set verbose=1: give true or false"),
    ("--set kv.probes=1 --set kv.probes=2", "--set kv.probes=1, --set kv.probes=2: both set kv.probes; leave out one"),
    ("--keys 3 --set kv.keys=4", "--set kv.keys=4, --keys 3: both set kv.keys; leave out one of them"),
    ("--keys 3 --context-tokens 99", "--keys 3, --context-tokens 99: both give a context's size; leave out one"),
    ("--keys x", "--keys x: give a whole number"),
    ("--set max_hours=nan", "--set max_hours=nan: not finite"),
    ("--set de.population=9", "--set de.population=9: algorithm ga does not use it; leave it out, or set algorithm"),
    ("--set vt.lines=9", "--set vt.lines=9: no --task vt is given, only kv; add it or leave this out"),
    ("--probes 3", "--probes: is now --set kv.probes=N"),
    ("--task mdqa --probes 3", "--probes: is now --set mdqa.probes=N"),
    ("--no-chat-template", "--no-chat-template: is now --set chat_template=false"),
]


@pytest.mark.parametrize(("given", "message"), [*BAD_FILES, *BAD_OPTIONS])
def test_a_bad_file_or_option_is_one_line(given: str, message: str, made: Any) -> None:
    Path("c.toml").write_bytes(given.encode("latin-1"))
    said = made(*(given.split() if given.startswith("--") else ("--config", "c.toml")))
    assert isinstance(said, str) and said.startswith(message)


OLD = [
    "--context-tokens", "--documents", "--lines", "--words", "--identifiers", "--probes", "--depths", "--positions",
    "--prompt-template", "--answer-prefix", "--weight", "--search-contexts", "--validation-contexts",
    "--test-contexts", "--finalists", "--racing-fraction", "--guard-text", "--algorithm", "--parametrization",
    "--lag", "--bounds", "--degree", "--population", "--width", "--middle-weight", "--gpus", "--executor",
    "--ray-address", "--batch-size", "--no-chat-template", "--verbose", "--rope-scaling", "--rope-scale",
    "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx", "--yarn-ext-factor", "--yarn-attn-factor",
    "--yarn-beta-slow", "--yarn-beta-fast", "--cache-type-k", "--cache-type-v",
]  # fmt: skip


@pytest.mark.parametrize("option", OLD)
def test_each_old_option_is_still_there_or_says_where_it_went(option: str, made: Any) -> None:
    with click.Context(search.command) as context:
        if any(option in param.opts for param in search.command.get_params(context)):
            return
    said = made(option, "1")
    assert isinstance(said, str) and said.startswith(f"{option}: is ")
    (name,) = re.findall(r"--set (\S+)=", said)
    assert name in known_settings() or name == "TASK.weight"


def test_eval_reads_the_same_file_and_refuses_what_is_for_a_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_readable(tmp_path / "m.gguf")
    Path("c.toml").write_text("max_evaluations = 3\n[kv]\nkeys = 3\nprobes = 4\n[de]\npopulation = 9\n")
    assert main(["eval", str(path), "--config", "c.toml"]) == 1
    assert capsys.readouterr().err == "lrope-gguf: --keys 3: too few for 4 probes; ask for at least 4 keys\n"
    for text in ("max_evaluations=3", "ga.lag=3", "start=a.json"):
        assert main(["eval", str(path), "--set", text]) == 1
        assert capsys.readouterr().err == f"lrope-gguf: --set {text}: eval does not use it; leave it out\n"
    assert main(["demo", "--batch-size", "64"]) == 1
    assert capsys.readouterr().err == "lrope-gguf: --batch-size: demo does not use it any more; leave it out\n"


KEYS = st.text("ab_", min_size=1, max_size=3)
VALUES = st.one_of(
    st.integers(), st.booleans(), st.text("ab\"'#=[]{}\\\n ", max_size=8), st.lists(st.text('ab]"#', max_size=4))
)


def toml_of(value: Any, multiline: bool) -> str:
    if isinstance(value, list):
        return f"[{', '.join(toml_of(item, multiline) for item in value)}{chr(10) if multiline else ''}]"
    if isinstance(value, str):
        body = json.dumps(value)[1:-1]
        return f'"""\n{body}"""' if multiline else f'"{body}"'
    return str(value).lower()


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(KEYS, VALUES, max_size=3), st.booleans())
def test_each_key_is_found_in_its_line(top: dict[str, Any], table: dict[str, Any], multiline: bool) -> None:
    """An independent count: lines are those in which this test wrote the keys."""
    text, expected = "", {}
    for prefix, values in (("", top), ("t.t.", table)):
        if prefix:
            expected["t.t."] = text.count("\n") + 1
            text += "[t.t] # a [comment]\n"
        for key, value in values.items():
            expected[f"{prefix}{key}"] = text.count("\n") + 1
            text += f"{key} = {toml_of(value, multiline)} # = ]\n\n"
    tomllib.loads(text)
    assert dict(key_lines(text)) == expected


@given(st.text("ab=[]{}\"'#\n\\. ", max_size=40))
def test_no_text_hangs_or_breaks_the_scan(text: str) -> None:
    assert all(1 <= line <= text.count("\n") + 1 for _, line in key_lines(text))


# A task of one class and one entry


@dataclass(frozen=True, kw_only=True)
class EchoConfig(TaskConfig):
    """A key-value task of few pairs, of another name."""

    section = "echo"
    summary = "say it again"

    loudness: int = setting(3, "how many pairs", metavar="N", least=2)

    def make(self, count: Count | None = None) -> KeyValueTask:
        """Return the task."""
        task = KeyValueTask(self.loudness, probes=1, seed=self.seed, identifiers="number")
        task.name = self.section
        return task


@pytest.fixture
def echo() -> Iterator[None]:
    TASKS.add("echo", EchoConfig)
    yield
    TASKS.remove("echo")


@pytest.mark.usefixtures("echo")
def test_a_task_of_ones_own_is_one_class_and_one_entry(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, task, _, _ = made("--task", "echo", "--set", "echo.loudness=5", "--seed", "2")
    assert task == EchoConfig(loudness=5, seed=2) == task_config("echo", loudness=5, seed=2)
    Path("c.toml").write_text('task = ["echo", "kv"]\n[echo]\nloudness = 4\n')
    _, mix, _, _ = made("--config", "c.toml")
    assert [part.name for part in mix.tasks] == ["kv", "echo"] and mix.tasks[1].loudness == 4
    assert task_identity(task) == {"name": "echo", "loudness": 5, "seed": 2, "answer_prefix": "", "data": None}
    said = made("--task", "echo", "--set", "echo.loudness=1")
    assert said == "--set echo.loudness=1: too small; give at least 2"
    assert main(["search", "--print-config"]) == 0
    assert "# how many pairs\nloudness = 3\n" in capsys.readouterr().out


def test_settings_say_what_they_are() -> None:
    """Whoever adds one says of it what the file of --print-config and the messages need."""
    for one in known_settings().values():
        assert one.text and not one.text.endswith(".")
        assert one.default is not None or one.unset, one.dotted
    with pytest.raises(LropeError, match=r"^--workers 0: too small; give at least 1$"):
        WorkersConfig(n_workers=0)
    with pytest.raises(LropeError, match=r"^executor far: unknown; choose from local, ray$"):
        WorkersConfig(executor="far")


def test_what_numbers_are_is_what_their_setting_says() -> None:
    ((key, value),) = IDENTIFIERS["number"].pairs(np.random.default_rng(0), 1)
    said = known_settings()["kv.identifiers"].text
    assert f"number: keys of {len(key)} digits and values of {len(value)}" in said


@dataclass(frozen=True)
class Odd(Settings):
    """A setting of each kind."""

    whole: int = setting(1, "a", least=0)
    number: float | None = setting(None, "b", above=0.0, unset="c")
    flag: bool = setting(True, "d")
    words: tuple[str, ...] = setting((), "e")
    numbers: tuple[float, ...] = setting((1.0,), "f")


KINDS = {
    "whole": st.integers(0, 10**6),
    "number": st.none() | st.floats(1e-9, 1e9),
    "flag": st.booleans(),
    "words": st.lists(st.text("ab", min_size=1)).map(tuple),
    "numbers": st.lists(st.floats(-1e9, 1e9)).map(tuple),
}


@given(st.fixed_dictionaries({}, optional=KINDS))
def test_a_setting_is_the_same_however_it_is_said(values: dict[str, Any]) -> None:
    odd = Odd(**values)
    assert Odd.from_json(json.loads(json.dumps(odd.to_json()))) == odd
    said = {}
    for name, value in values.items():
        text = ",".join(map(repr if name == "numbers" else str, value)) if isinstance(value, tuple) else str(value)
        text = "" if value is None else text.lower() if isinstance(value, bool) else text
        said[name] = Odd.named(name).parsed(text)
    assert Odd(**said) == odd


def test_optimizers_say_what_they_are() -> None:
    assert [kind.section for kind in OPTIMIZERS.classes()] == list(OPTIMIZERS)
    assert [kind.section for kind in TASKS.classes()] == list(TASKS)
    assert all(kind.summary for kind in (*OPTIMIZERS.classes(), *TASKS.classes()))
