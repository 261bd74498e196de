"""The stage of a search that follows derivatives: kept step by step, and what it proposes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.synthetic import Landscape
from support.tiny_models import write_readable

from lrope_gguf.errors import LropeError
from lrope_search import ModelConfig, SearchConfig, TaskMix, climbing, launch, search, task_config
from lrope_search.report.reading import read_study
from lrope_search.report.text import summary_lines
from lrope_search.study.ascend import NAME, Climber, Trail, ascend
from lrope_search.study.conclude import SearchOutcome
from lrope_search.study.plan import make_optimizer, planned_evaluations
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study
from lrope_search.workers.protocol import LocalExecutor

STEPS = 7
SETTINGS = SearchConfig(
    method="both", seed=3, max_evaluations=40, search_contexts=3, racing_fraction=0.5, validation_contexts=4,
    test_contexts=12, gradient_steps=STEPS,
)  # fmt: skip
EMBEDDED = Path(__file__).parent.parent / "models" / "lrope-kv.gguf"


class Hill:
    """Climbs a quadratic whose top is the landscape's, with momentum, from where ``restore`` says.

    After each ``STEPS`` steps it begins anew, a little higher each time.
    """

    def __init__(self, fail: Mapping[int, BaseException | float] | None = None) -> None:
        self.top, self.at, self.speed = Landscape().target, np.zeros(12), np.zeros(12)
        self.number, self.fail, self.at_bound = 0, fail or {}, (3, 5)
        self.done = False

    @property
    def factors(self) -> tuple[float, ...]:
        return tuple(np.round(np.exp(self.at), 4).tolist())

    def step(self) -> Any:
        start = self.number // STEPS
        if self.number == start * STEPS:
            self.at, self.speed = np.full(12, 0.05 * start), np.zeros(12)
        self.number += 1
        wrong = self.fail.get(self.number, 0.0)
        if isinstance(wrong, BaseException):
            raise wrong
        kl = float(self.at @ self.at) + wrong
        gain = -float((self.at - self.top) @ (self.at - self.top))
        self.speed = 0.5 * self.speed + 0.4 * (self.top - self.at)
        self.at = self.at + self.speed
        state = {"at": self.at.tolist(), "speed": self.speed.tolist(), "number": self.number, "start": start}
        found = {"number": self.number, "gains": {"kv": gain}, "divergence": kl, "n_tokens": 300, "seconds": 0.5}
        return SimpleNamespace(to_json=lambda: found | {"state": state})

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at, self.speed, self.number = np.array(state["at"]), np.array(state["speed"]), state["number"]


def opened(hill: Hill | LropeError) -> AbstractContextManager[Climber]:
    @contextmanager
    def opening() -> Iterator[Climber]:
        if isinstance(hill, LropeError):
            raise hill
        yield hill

    return opening()


def run(
    directory: Path, hill: Hill | LropeError | None = None, settings: SearchConfig = SETTINGS
) -> tuple[SearchOutcome, list[str]]:
    """A search with its stage, and what it said."""
    lines: list[str] = []
    land, progress = Landscape(), Progress(lines.append, quiet=True)
    with Study(directory, {"task": "synthetic", "search": settings.identity()}) as study:
        trail = ascend(study, settings.n_steps, lambda: opened(hill or Hill()), progress)
        optimizer = make_optimizer(settings, land.n_layer, None, trail.proposals(settings.bounds))
        outcome = run_search(
            LocalExecutor(land), study, settings, progress, algorithm=optimizer, ascent=trail.summary()
        )
    return outcome, lines


def origins(directory: Path) -> list[str]:
    return [json.loads(line)["origin"] for line in (directory / "candidates.jsonl").read_text().splitlines()]


def test_killed_at_every_step_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    for number in range(1, STEPS + 1):
        with pytest.raises(KeyboardInterrupt):
            run(killed, Hill({number: KeyboardInterrupt()}))
        assert len(Trail.of(killed).steps) == number - 1
        with (killed / NAME).open("ab") as file:
            file.write(b'{"number":')  # torn
    run(killed)
    for name in ("best.json", "candidates.jsonl", NAME):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    _, lines = run(killed, LropeError("opened, though all steps are made"))
    assert (killed / "best.json").read_bytes() == (whole / "best.json").read_bytes()
    assert not [line for line in lines if "step" in line]


def test_several_starts_propose_what_each_found(tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="gradient", gradient_starts=3)
    _, lines = run(tmp_path / "whole", settings=settings)
    for number in (STEPS + 1, 2 * STEPS, 3 * STEPS):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", Hill({number: KeyboardInterrupt()}), settings)
    run(tmp_path / "killed", settings=settings)
    for name in ("best.json", "candidates.jsonl", NAME):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = Trail.of(tmp_path / "whole").steps
    assert [step["number"] for step in steps] == [*range(1, 3 * STEPS + 1)]
    ends = [tuple(step["factors"]) for step in steps[STEPS - 1 :: STEPS]]
    proposals = Trail.of(tmp_path / "whole").proposals(SETTINGS.bounds)
    assert len(set(ends)) == 3 and [proposals[i] for i in (0, 5, 10)] == ends
    assert origins(tmp_path / "whole").count("gradient") == len(proposals) == 15
    assert any(line.startswith(f"{3 * STEPS}/{3 * STEPS} steps") for line in lines)
    planned = (planned_evaluations(replace(settings, gradient_starts=n))["search"] for n in (1, 3))
    assert next(planned) < next(planned)


@pytest.mark.parametrize("name", ["gradient_starts", "gradient_visits"])
def test_a_search_of_one_start_and_visit_is_what_it_was(name: str) -> None:
    assert name not in SETTINGS.identity()
    assert replace(SETTINGS, **{name: 2}).identity()[name] == 2
    assert name not in replace(SETTINGS, method="genetic", **{name: 2}).identity()


def test_what_it_proposes_is_tried_and_refined(tmp_path: Path) -> None:
    outcome, lines = run(tmp_path / "both")
    alone, _ = run(tmp_path / "alone", settings=replace(SETTINGS, method="gradient"))
    first = ["identity", *["uniform"] * 4, *["gradient"] * 5]
    assert origins(tmp_path / "alone") == first == origins(tmp_path / "both")[:10]
    assert set(origins(tmp_path / "both")[10:]) <= {"crossover", "mutation", "random"}
    assert [score[0] for candidate, score in outcome.candidates if candidate.origin == "gradient"] == [3] * 5
    assert alone.winner is not None and alone.winner.origin == "gradient" and alone.verdict.recommended
    assert outcome.candidates[0][1] >= alone.candidates[0][1]
    best = json.loads((tmp_path / "both" / "best.json").read_text())["provenance"]
    assert best["config"]["search"]["method"] == "both" and best["gradient"] == {"steps": STEPS, "tokens": 300 * STEPS}
    assert any(line.startswith(f"{STEPS}/{STEPS} steps") and "2,100 tokens" in line for line in lines)
    assert any("layers 3, 5 to the bounds" in line for line in lines)
    assert planned_evaluations(replace(SETTINGS, method="gradient"))["search"] < planned_evaluations(SETTINGS)["search"]
    said = read_study(tmp_path / "both")
    assert said.ascent == outcome.summary.ascent and said.costs[0].phase == "gradients, 7 steps"
    assert any(line.startswith("gradients   7 steps, log-probability of kv from ") for line in summary_lines(said))


def test_proposals_are_steps_their_mean_and_half_the_way(tmp_path: Path) -> None:
    run(tmp_path)
    path = [np.array(step["factors"]) for step in Trail.of(tmp_path).steps]
    wanted = [path[6], np.exp((np.log(path[5]) + np.log(path[6])) / 2), path[4], np.sqrt(path[6]), path[1]]
    found = Trail.of(tmp_path).proposals((0.5, 1.05))
    assert np.array(found) == pytest.approx(np.clip(wanted, 0.5, 1.05), abs=1e-4)


def test_refining_ends_where_nothing_improves() -> None:
    """Of a top that is proposed, three times the lag of tries is enough."""
    optimizer, top = make_optimizer(replace(SETTINGS, max_evaluations=999), 4, None, [(1.2, 1.1, 1.0, 0.9)]), None
    for n in range(999):
        candidate = optimizer.ask()
        if candidate is None:
            break
        value = -sum(abs(math.log(s / t)) for s, t in zip(candidate.factors, (1.2, 1.1, 1.0, 0.9), strict=True))
        top = max(top or (value, 0), (value, -n))
        optimizer.tell(candidate, (1, value))
    assert optimizer.should_stop() and top == (0.0, -5) and n == 6 + 24


WRONG: dict[str, tuple[Hill | LropeError, int, str]] = {
    "cannot open": (LropeError("gradients need torch"), 0, "without gradients: gradients need torch"),
    "fails": (Hill({3: LropeError("a derivative is NaN")}), 2, "without further gradients: after 2 steps: a deriv"),
    "NaN": (Hill({1: math.nan}), 0, "without gradients: step 1 found something else than numbers"),
    "memory": (Hill({2: MemoryError()}), 1, "without further gradients: after 1 steps: memory ran out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_a_line_and_the_search_goes_on(name: str, tmp_path: Path) -> None:
    hill, n_steps, said = WRONG[name]
    _, lines = run(tmp_path / "a", hill)
    assert len([line for line in lines if line.startswith(said)]) == 1
    assert len(Trail.of(tmp_path / "a").steps) == n_steps and ("gradient" in origins(tmp_path / "a")) == (n_steps > 0)
    best = (tmp_path / "a" / "best.json").read_bytes()
    _, lines = run(tmp_path / "a")  # it stays so
    assert any(line.endswith(f"; to try them again, delete {tmp_path}/a/{NAME}") for line in lines)
    assert (tmp_path / "a" / "best.json").read_bytes() == best
    if not n_steps:  # then it is the search that there was before
        run(tmp_path / "b", LropeError("none"), replace(SETTINGS, method="genetic"))
        tried = [(tmp_path / place / "candidates.jsonl").read_bytes() for place in "ab"]
        assert tried[0] == tried[1]


def test_a_hill_without_a_slope_proposes_nothing(tmp_path: Path) -> None:
    hill = Hill()
    hill.top = np.zeros(12)
    _, lines = run(tmp_path, hill)
    assert "gradients moved no factor; the search goes on without them" in lines
    assert "gradient" not in origins(tmp_path)


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    (tmp_path / NAME).write_text("".join([*lines[:2], *lines[3:]]))
    with pytest.raises(LropeError, match=r"ascent.jsonl: step 3 is damaged; delete the file"):
        Trail.of(tmp_path)
    (tmp_path / NAME).write_text("".join([lines[0], "{\n", lines[1]]))
    with pytest.raises(LropeError, match=r"ascent.jsonl: line 2 is damaged; choose another"):
        Trail.of(tmp_path)


BOTH, OLD = {"search": {"method": "both"}}, {"search": {"seed": 3}}
CHOICES: list[tuple[dict[str, Any], Any, bool, str, bool]] = [
    # settings, what is kept, whether torch is there, the method, whether a line says why
    ({}, None, True, "both", False),
    ({}, None, False, "genetic", True),
    ({}, OLD, True, "genetic", False),
    ({}, BOTH, False, "both", False),
    ({"method": "gradient"}, None, False, "genetic", True),
    ({"method": "gradient"}, OLD, True, "gradient", False),  # which the study then refuses
    ({"method": "genetic"}, None, True, "genetic", False),
    ({"parametrization": "bezier"}, None, True, "genetic", True),
    ({"max_kl": 0.0}, None, True, "genetic", True),
    ({"algorithm": "random"}, None, True, "genetic", False),
    ({"algorithm": "random", "method": "both"}, None, True, "both", False),
]


@pytest.mark.parametrize(("given", "kept", "there", "method", "told"), CHOICES)
def test_which_method_a_search_has(
    given: dict[str, Any], kept: Any, there: bool, method: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        monkeypatch.setattr(climbing, "check_installed", lambda: None)
    settings, why = launch._with_method(SearchConfig(**given), kept)
    assert (settings.method, bool(why)) == (method, told)
    assert ("method" in settings.identity()) == (method != "genetic") == ("gradient_steps" in settings.identity())
    assert SearchConfig.from_json(settings.to_json()) == settings
    assert SearchConfig.from_json(OLD["search"]).method == "genetic"


def test_steps_see_contexts_that_compare_no_candidates(tmp_path: Path) -> None:
    rows = [{"context": f"text {i}", "question": f"q{i}", "answer": "a", "depth": 0.5} for i in range(24)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = task_config("jsonl", data=str(tmp_path / "d.jsonl"))
    size = own.make().size("search")
    assert size is not None
    mix = TaskMix(((own, 1.0), (task_config("kv", keys=6), 1.0)))
    session = SimpleNamespace(mix=mix, ask=lambda asked: asked.args)
    kv, limited = climbing._contexts(cast(Any, session), SearchConfig(search_contexts=5))
    assert [cast(Any, kv(step)) for step in (1, 2, 40)] == [("search", 2 * i) for i in (3, 4, 42)]
    asked = [cast(Any, limited(step)) for step in range(1, size + 1)]
    assert asked == [("search", 2 * ((2 + i) % size) + 1) for i in range(size)]


ASK = ["--keys", "120", "--set", "kv.identifiers=word", "--set", "kv.probes=60", "--threads", "1", "--max-kl", "100",
       "--set", "search_contexts=2", "--set", "validation_contexts=2", "--set", "test_contexts=6", "--method",
       "gradient", "--set", "gradient_steps=8"]  # fmt: skip


@pytest.mark.native
@pytest.mark.gradient
@pytest.mark.parametrize("visits", [1, 2])
def test_a_search_by_gradients_gains_and_resumes_after_a_kill(tmp_path: Path, visits: int) -> None:
    pytest.importorskip("torch")
    more = ["--set", f"gradient_visits={visits}"]
    command = [sys.executable, "-m", "lrope_gguf", "search", str(EMBEDDED), *ASK, *more, "--output"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, str(tmp_path / "a.json")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "about 8 steps of gradients, " in done.stderr and "8/8 steps, " in done.stderr
    assert "\ngain " in done.stdout
    steps = tmp_path / "b.study" / NAME
    with subprocess.Popen([*command, str(tmp_path / "b.json")], stderr=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 120.0
        while not steps.exists() or steps.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert len(Trail.of(steps.parent).steps) < 8
    assert ("halved" in Trail.of(steps.parent).steps[0]["state"]) == (visits > 1)
    done = subprocess.run([*command, str(tmp_path / "b.json")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


TINY = SearchConfig(max_evaluations=12, search_contexts=2, validation_contexts=2, test_contexts=4, gradient_steps=2)


@pytest.mark.native
@pytest.mark.gradient
def test_without_torch_it_is_the_search_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    model, lines = ModelConfig(str(write_readable(tmp_path / "m.gguf")), n_threads=1), list[str]()
    for method in (None, "genetic"):
        settings, task = replace(TINY, method=method), task_config("kv", keys=6, probes=3)
        search(model, task, settings, tmp_path / f"{method}", progress=lines.append)
    for name in ("best.json", "config.json", "candidates.jsonl"):
        assert (tmp_path / "None" / name).read_bytes() == (tmp_path / "genetic" / name).read_bytes()
    assert [line for line in lines if "gradient" in line] == [
        "without gradients: gradients need torch 2.5: pip install 'lrope-gguf[gradient]'"
    ]


@pytest.mark.native
@pytest.mark.gradient
def test_before_the_first_step_tasks_and_the_replay_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    path = write_readable(tmp_path / "m.gguf")
    tasks = [(task_config("kv", keys=6, probes=3), 1.0), (task_config("multikey", keys=6, probes=3), 2.0)]
    lines: list[str] = []
    settings = replace(TINY, method="gradient")
    search(ModelConfig(str(path), n_threads=1), tasks, settings, tmp_path / "s", progress=lines.append)
    rows = [line.split() for line in lines if line.split()[0] in ("kv", "multikey")]
    assert [row[1 + i] for i, row in enumerate(rows)] == ["+1.00", "+1.00"] and rows[0][2] == rows[1][1]
    assert set(Trail.of(tmp_path / "s").steps[0]["gains"]) == {"kv", "multikey"}
    monkeypatch.setattr("lrope_search.gradient.objective.SPREAD_WITHIN", 0.0)
    search(ModelConfig(str(path), n_threads=1), tasks, settings, tmp_path / "t", progress=lines.append)
    assert len([line for line in lines if line.startswith("without gradients: the replay of the model's graph")]) == 1
    assert Trail.of(tmp_path / "t").steps == () and "gradient" not in origins(tmp_path / "t")
