"""More than one task at once: what the options make, whose turn it is, and each task's own gain beside the mean."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.study_fixtures import make_study
from support.synthetic import Landscape
from support.task_files import write
from support.tiny_models import write_readable
from support.virtual_workers import VirtualExecutor
from test_task_data import own_line, qa_line
from test_task_options import evaluate, parse, sets

from lrope_gguf.errors import LropeError
from lrope_search import ModelConfig, SearchConfig, TaskMix, measure, search, task_config
from lrope_search.report.page import page_text
from lrope_search.report.pictures import draw_pictures
from lrope_search.report.reading import read_study
from lrope_search.results.comparison import compare
from lrope_search.results.objective import Objective, task_scales
from lrope_search.results.table import depth_table
from lrope_search.scores import ContextScore, ProbeScore
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study
from lrope_search.tasks import KeyValueTask, MixedTask, make_task, make_tasks, task_identity

native = pytest.mark.native
WEIGHTS = {"kv": 3.0, "mdqa": 1.0}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """A file of each task that needs one."""
    lines = {"mdqa": [qa_line(n) for n in range(120)], "jsonl": [own_line(n) for n in range(40)]}
    return {name: str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in lines.items()}


def mix(*options: str) -> TaskMix:
    made: Any = parse(*options)
    assert isinstance(made, TaskMix)
    return made


def test_options_go_to_the_tasks_that_take_them(data: dict[str, str]) -> None:
    both = ("--task", "kv", "--task", "mdqa", "--data", f"mdqa={data['mdqa']}")
    made = mix(*both, "--keys", "9", "mdqa.documents=6", "kv.probes=3", "mdqa.probes=4", "kv.weight=3",
               'kv.answer_prefix= "', "--seed", "5")  # fmt: skip
    kv = task_config("kv", keys=9, probes=3, answer_prefix=' "', seed=5)
    mdqa = task_config("mdqa", data=data["mdqa"], documents=6, probes=4, seed=5)
    assert made.parts == ((kv, 3.0), (mdqa, 1.0))
    assert made.weights == WEIGHTS
    turned = mix("--task", "mdqa", "--task", "kv", *both[4:], "--keys", "9", "mdqa.documents=6", "mdqa.probes=4",
                 "kv.probes=3", "kv.weight=3", 'kv.answer_prefix= "', "--seed", "5")  # fmt: skip
    assert turned == made and pickle.loads(pickle.dumps(made)) == made
    assert TaskMix.of([(mdqa, 1), (kv, 3)]) == made == TaskMix.of(made)
    last = mix("--task", "kv", "--task", "multikey", "--keys", "kv=2", "--keys", "7", "--keys", "5")
    assert [task.to_json()["keys"] for task in last.tasks] == [2, 5]


def test_one_task_is_what_it_was(data: dict[str, str]) -> None:
    assert parse("--keys", "9", "--keys", "12") == parse("--keys", "kv=12") == task_config("kv", keys=12)
    assert parse() == task_config() and parse("--data", "a=b.jsonl").file == "a=b.jsonl"
    alone = task_config("kv", keys=12)
    assert TaskMix.of(alone).weights == {} and TaskMix.of([(alone, 2.0)]).weights == {}
    assert task_identity(TaskMix.of(alone)) == task_identity(alone)
    assert isinstance(make_tasks(alone), KeyValueTask)


def test_bad_mixes_from_python() -> None:
    kv = task_config("kv")
    for parts, message in (
        ([], "none given"),
        ([(kv, 1.0), (kv, 2.0)], "--task kv: given twice"),
        ([(kv, True)], "give a positive number"),
        ([(kv, "2")], "give a positive number"),
    ):
        with pytest.raises(LropeError, match=message):
            TaskMix.of(parts)  # type: ignore[arg-type]


def test_tasks_take_turns(data: dict[str, str]) -> None:
    configs = (task_config("kv", keys=6, probes=2), task_config("jsonl", data=data["jsonl"]))
    kv, own = map(make_task, configs)
    both = make_tasks([(config, 1.0) for config in configs])
    assert isinstance(both, MixedTask) and both.name == "kv+jsonl"
    for index in range(6):
        part, name = ((kv, "kv"), (own, "jsonl"))[index % 2]
        expected = part.context("test", index // 2)
        assert both.context("test", index) == dataclasses.replace(expected, index=index, task=name)
    n = own.size("test")
    assert n is not None and both.size("test") == 2 * n + 1  # kv, which never ends, has the turn after the last one
    both.context("test", 2 * n)
    with pytest.raises(LropeError, match="contexts asked for"):
        both.context("test", 2 * n + 1)
    assert MixedTask([kv, kv]).size("test") is None


def test_a_studys_configuration_holds_each_task(data: dict[str, str]) -> None:
    made = mix("--task", "kv", "--task", "jsonl", "--data", f"jsonl={data['jsonl']}", "jsonl.weight=2")
    identity = task_identity(made, ('"', ""))
    assert identity["name"] == "kv+jsonl" and list(identity) == ["name", "parts"]
    for config, lead, weight in zip(made.tasks, ('"', ""), (1.0, 2.0), strict=True):
        expected = task_identity(config) | {"answer_lead": lead, "weight": weight}
        assert identity["parts"][config.name] == expected
    json.dumps(identity)


def test_fewer_contexts_than_tasks_are_refused(data: dict[str, str], tmp_path: Path) -> None:
    path = write_readable(tmp_path / "model.gguf")
    made = mix("--task", "kv", "--task", "jsonl", "--data", f"jsonl={data['jsonl']}")
    with pytest.raises(LropeError, match="search_contexts 1: too few for kv and jsonl, each of which needs one"):
        search(ModelConfig(str(path)), made, SearchConfig(search_contexts=1), tmp_path / "study")
    with pytest.raises(LropeError, match="--contexts 1: too few for kv and jsonl"):
        measure(ModelConfig(str(path)), made, {}, contexts=1)
    with pytest.raises(LropeError, match=r"^test_contexts 99: the data has only \d+"):
        search(ModelConfig(str(path)), made, SearchConfig(test_contexts=99), tmp_path / "study")


def scores(differences: dict[str, list[float]], base: float = 0.0) -> list[ContextScore]:
    """Contexts by turns, each with one probe."""
    names = list(differences)
    rows = [(names[i % len(names)], i // len(names)) for i in range(sum(map(len, differences.values())))]
    return [
        ContextScore("test", i, (ProbeScore(0.5, base + differences[t][n], differences[t][n] > 0.0),), 1, 0.0, t)
        for i, (t, n) in enumerate(rows)
    ]


def test_fitness_is_the_weighted_mean_of_the_tasks_means() -> None:
    gains = {"kv": [0.4, 0.2], "mdqa": [-0.1]}
    base = scores({task: [0.0] * len(values) for task, values in gains.items()}, -1.0)
    objective = Objective(base, weights=WEIGHTS)
    assert objective.fitness(scores(gains, -1.0)) == pytest.approx((3.0 * 0.3 - 0.1) / 4.0)
    assert Objective(base).fitness(scores(gains, -1.0)) == pytest.approx((0.3 - 0.1) / 2.0)
    alone = [score for score in scores(gains, -1.0) if score.task == "kv"]
    assert objective.fitness(alone) == pytest.approx(0.3)  # over the tasks that are there
    gains["mdqa"] = [-math.inf]
    assert objective.fitness(scores(gains, -1.0)) == -math.inf


def test_tasks_are_scaled_by_their_own_spread_so_that_the_default_needs_no_weight() -> None:
    """Half a nat is little where questions lie 2 nats apart and much where they lie 0.1 apart."""
    base = scores({"kv": [-2.0, 0.0, 2.0], "multikey": [-0.1, 0.0, 0.1]}, -3.0)
    scales = task_scales(base)
    assert scales == pytest.approx({"kv": 2.0, "multikey": 0.1})
    moved = scores({"kv": [-2.2, -0.2, 1.8], "multikey": [-0.05, 0.05, 0.15]}, -3.0)  # -0.2 and +0.05 nats
    assert Objective(base).fitness(moved) == pytest.approx(-0.075)
    assert Objective(base, scales=scales).fitness(moved) == pytest.approx((-0.1 + 0.5) / 2.0)
    assert compare(base, moved).n_effective == 6.0  # accuracy is weighed equally
    assert task_scales(scores({"vt": [0.0]}, -0.5)) == {"vt": 0.5}
    assert task_scales(scores({"vt": [0.0, 0.0]}, -0.5)) == {"vt": 1e-3}


def test_an_older_study_of_several_tasks_goes_on_with_nats(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_evaluations=6, search_contexts=2, validation_contexts=2)
    make_study(tmp_path, settings, evaluator=Two(), config=CONFIG)
    path = tmp_path / "objective.json"
    kept = json.loads(path.read_text())["scales"]
    assert kept.keys() == WEIGHTS.keys() and read_study(tmp_path).unit == "standard deviations"
    best = (tmp_path / "best.json").read_bytes()
    make_study(tmp_path, settings, evaluator=Two(), config=CONFIG)
    assert json.loads(path.read_text())["scales"] == kept and (tmp_path / "best.json").read_bytes() == best
    path.unlink()  # as before there were scales
    make_study(tmp_path, settings, evaluator=Two(), config=CONFIG)
    assert json.loads(path.read_text()) == {"scales": {}} and read_study(tmp_path).unit == "nats"
    path.unlink()
    (tmp_path / "candidates.jsonl").unlink()  # nothing was told yet: it begins anew
    make_study(tmp_path, settings, evaluator=Two(), config=CONFIG)
    assert json.loads(path.read_text())["scales"] == kept


@pytest.mark.parametrize(("sizes", "weights"), [((8, 8), (1.0, 1.0)), ((6, 5), (3.0, 1.0)), ((12, 6), (1.0, 2.0))])
def test_weighted_intervals_cover_the_truth_as_often_as_they_say(
    sizes: tuple[int, int], weights: tuple[float, float]
) -> None:
    """Of tasks that differ in their spread; 95 % of 400 would be 380, with a standard deviation of 4.4."""
    rng, names = np.random.default_rng(1), ("kv", "mdqa")
    truth = (weights[0] * 0.5 - weights[1] * 0.2) / sum(weights)
    covered = 0
    for trial in range(400):
        values = {
            n: rng.normal(m, s, k).tolist() for n, m, s, k in zip(names, (0.5, -0.2), (0.3, 1.0), sizes, strict=True)
        }
        rows = [(n, v) for n in names for v in values[n]]
        base, other = (
            [ContextScore("test", i, (ProbeScore(0.5, v * on, False),), 1, 0.0, n) for i, (n, v) in enumerate(rows)]
            for on in (0.0, 1.0)
        )
        weighted = dict(zip(names, weights, strict=True))
        gain = compare(base, other, seed=trial, resamples=1000, weights=weighted).log_probability_gain
        expected = sum(w * np.mean(values[n]) for n, w in weighted.items()) / sum(weights)
        assert gain.mean == pytest.approx(expected)
        covered += gain.low <= truth <= gain.high
    assert covered >= 366, covered


def test_a_mixs_interval_is_welchs() -> None:
    normal = stats.norm.ppf((np.arange(8) + 0.5) / 8)
    values = {"kv": (0.2 + 0.1 * normal).tolist(), "mdqa": (0.4 * normal).tolist()}
    base, other = scores({task: [0.0] * 8 for task in values}), scores(values)
    gain = compare(base, other, resamples=100_000).log_probability_gain
    t = stats.ttest_ind(values["kv"], -np.array(values["mdqa"]), equal_var=False).confidence_interval()
    assert (gain.low, gain.high) == pytest.approx((t.low / 2.0, t.high / 2.0), rel=0.06)


def test_how_many_contexts_a_weighted_mean_stands_for() -> None:
    base = scores({"kv": [0.0] * 4, "mdqa": [0.0] * 4})
    other = scores({"kv": [1.0] * 4, "mdqa": [1.0] * 4})
    assert compare(base, other).n_effective == pytest.approx(8.0) and compare(base, other).significant
    one_sided = compare(base, other, weights={"kv": 100.0})
    assert one_sided.n_effective == pytest.approx(4.08, abs=0.01) and not one_sided.significant
    with pytest.raises(ValueError, match="another"):
        compare(base, [dataclasses.replace(score, task="kv") for score in other])


def test_the_table_has_a_row_for_each_task() -> None:
    rng = np.random.default_rng(0)
    right = {"kv": [0.5] * 8, "mdqa": [-0.5] * 8}
    noise = {task: (values + rng.normal(0.0, 0.01, 8)).tolist() for task, values in right.items()}
    base = scores({"kv": [-1.0] * 8, "mdqa": [1.0] * 8})
    table = depth_table({"base": base, "curve": scores(noise)}, weights=WEIGHTS)
    assert [table.totals[side].accuracy for side in ("base", "curve")] == pytest.approx([0.25, 0.75])
    assert table.comparisons["curve"].accuracy_gain.mean == pytest.approx(0.5)
    alone = {name: part.comparisons["curve"] for name, part in table.tasks.items()}
    assert [alone[name].accuracy_gain.mean for name in WEIGHTS] == [1.0, -1.0]
    assert alone["kv"].accuracy_gain == compare(base[::2], scores(noise)[::2]).accuracy_gain
    lines = str(table).splitlines()[-5:]
    assert [" ".join(line.split()[:5]) for line in lines[1::2]] == ["kv 3 8 base 0.0", "mdqa 1 8 base 100.0"]
    assert "+100.0 [+54.1, +100.0]" in lines[2] and "-100.0 [-100.0, -54.1]" in lines[4]
    assert table.json()["tasks"]["mdqa"]["weight"] == 1.0


class Two(Landscape):
    """Two tasks by turns, whose best factors differ."""

    def __init__(self) -> None:
        super().__init__(peak=1.12)
        self.other = Landscape(seed=0, peak=1.05)

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        land = (super(), self.other)[index % 2]
        return dataclasses.replace(land.evaluate(factors, split, index), task=("kv", "mdqa")[index % 2])


SETTINGS = SearchConfig(
    parametrization="bezier", seed=3, max_evaluations=40, search_contexts=4, racing_fraction=0.5, validation_contexts=4,
    test_contexts=16,
)  # fmt: skip
CONFIG = {"task": {"name": "kv+mdqa", "parts": {name: {"name": name, "weight": w} for name, w in WEIGHTS.items()}}}


def test_a_search_over_two_tasks_reports_both(tmp_path: Path) -> None:
    outcome = make_study(tmp_path, SETTINGS, evaluator=Two(), config=CONFIG)
    assert outcome.verdict.recommended and outcome.winner is not None
    table = outcome.summary.table
    assert table is not None and table.weights == WEIGHTS
    gains = {name: part.comparisons["curve"] for name, part in table.tasks.items()}
    weighted = sum(WEIGHTS[name] * gain.accuracy_gain.mean for name, gain in gains.items()) / 4.0
    assert table.comparisons["curve"].accuracy_gain.mean == pytest.approx(weighted)
    stored = json.loads((tmp_path / "best.json").read_text())["provenance"]["results"]["test"]
    assert stored["tasks"] == {name: {"weight": WEIGHTS[name], **gain.to_json()} for name, gain in gains.items()}
    assert "(kv " in outcome.verdict.text and ", mdqa " in outcome.verdict.text

    # the fitness is the weighted one, whatever the weights of the same evaluations
    again = read_study(tmp_path)
    assert again.table == table and again.trials == outcome.summary.trials
    (tmp_path / "candidates.jsonl").unlink()
    told = {trial.factors: trial.fitness for trial in read_study(tmp_path).trials}
    assert told == pytest.approx({trial.factors: trial.fitness for trial in again.trials})
    assert min(trial.contexts for trial in again.trials) == 2  # nobody is dropped before both tasks had a say

    page = page_text(again, draw_pictures(again))
    for name, gain in gains.items():
        assert f"<dt>Gain in {name}</dt><dd>{100 * gain.accuracy_gain.mean:+.1f} points" in page
        assert f"<summary>{name}, weight {WEIGHTS[name]:g}</summary>" in page


def test_every_rung_of_a_race_has_every_task() -> None:
    settings = SearchConfig(search_contexts=8, racing_fraction=0.5)
    assert [settings.racing(n).stops() for n in (1, 2, 3)] == [(1, 2, 4, 8), (2, 4, 8), (3, 6, 8)]
    assert SearchConfig(search_contexts=4).racing(2).stops() == (4,)


def test_workers_and_kills_change_nothing(tmp_path: Path) -> None:
    config = CONFIG | {"search": SETTINGS.identity()}

    def run(directory: Path, executor: VirtualExecutor) -> bytes:
        with Study(directory, config) as study:
            run_search(executor, study, SETTINGS, Progress(study.log, quiet=True))
        return (directory / "best.json").read_bytes()

    def anyhow() -> VirtualExecutor:
        return VirtualExecutor(Two(), 3, lambda job: random.random())

    whole = run(tmp_path / "whole", VirtualExecutor(Two(), 1, lambda job: 1.0))
    assert run(tmp_path / "other", anyhow()) == whole
    path = tmp_path / "other" / "evaluations.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])  # as a kill leaves it
    assert run(tmp_path / "other", anyhow()) == whole


@native
def test_eval_on_two_tasks(tmp_path: Path, data: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_readable(tmp_path / "model.gguf", context_length=4096)
    tasks = ["--task", "jsonl", "--task", "kv", "--data", f"jsonl={data['jsonl']}", "--keys", "6",
             *sets("kv.probes=2", 'kv.answer_prefix= "', "kv.weight=3")]  # fmt: skip
    alone = {}
    for name, options in (("kv", ["--keys", "6", *sets("kv.probes=2", 'kv.answer_prefix= "')]),
                          ("jsonl", ["--task", "jsonl", "--data", data["jsonl"]])):  # fmt: skip
        alone[name] = evaluate(path, capsys, *options, "--contexts", "3", "--uniform", "1.2")
    both = evaluate(path, capsys, *tasks, "--contexts", "6", "--uniform", "1.2", "--generate")
    for name, document in alone.items():  # each with its own prompt and lead, as if there were no other
        assert both["tasks"][name]["uniform 1.2"] == pytest.approx(document["uniform 1.2"], rel=1e-4)
        assert both["task"]["parts"][name].items() >= {"answer_lead": document["task"]["answer_lead"]}.items()
    of = {name: document["base"]["log_probability"] for name, document in alone.items()}
    assert both["base"]["log_probability"] == pytest.approx((3.0 * of["kv"] + of["jsonl"]) / 4.0, rel=1e-4)
    assert both["task"]["name"] == "kv+jsonl" and both["generated"]["tasks"].keys() == {"kv", "jsonl"}
