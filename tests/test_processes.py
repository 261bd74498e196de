"""Local worker processes: the same results, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.synthetic import Landscape
from support.worker_evaluators import Workers, see

from lrope_gguf.errors import LropeError
from lrope_search import SearchConfig, machine
from lrope_search.machine import free_memory, visible_gpus
from lrope_search.scores import Job
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study
from lrope_search.workers import pool
from lrope_search.workers.pool import MAX_MOVES, WorkerError
from lrope_search.workers.processes import ProcessExecutor
from lrope_search.workers.protocol import Executor, LocalExecutor

SETTINGS = SearchConfig(
    seed=4, max_evaluations=24, search_contexts=2, racing_fraction=0.5, validation_contexts=2, test_contexts=6,
    finalists=2,
)  # fmt: skip
JOBS = [Job((1.0 + i / 100.0,) * 12, "search", i) for i in range(12)]


def search(directory: Path, executor: Executor) -> bytes:
    with Study(directory, {"search": SETTINGS.identity()}) as study:
        run_search(executor, study, SETTINGS, Progress(study.log, quiet=True))
    return (directory / "best.json").read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return search(tmp_path_factory.mktemp("alone"), LocalExecutor(Landscape()))


def test_two_and_four_workers_find_what_one_finds(tmp_path: Path, expected: bytes) -> None:
    for n in (2, 4):
        with ProcessExecutor(Workers(seconds=0.001), n) as executor:
            assert executor.n_layer == 12 and executor.n_workers == n
            assert search(tmp_path / str(n), executor) == expected


@pytest.mark.parametrize(("death", "n", "times"), [("kill", 2, MAX_MOVES), ("memory", 2, 1), ("exit", 1, 1)])
def test_a_lost_worker_costs_nothing_but_time(tmp_path: Path, expected: bytes, death: str, n: int, times: int) -> None:
    """As often as is allowed; and a single worker takes the job again itself."""
    (tmp_path / "deaths").mkdir()
    with ProcessExecutor(Workers(str(tmp_path / "deaths"), death, ("search", 1), times), n) as executor:
        assert search(tmp_path / "study", executor) == expected
    assert len(list((tmp_path / "deaths").iterdir())) == times


def test_a_worker_killed_from_outside_is_replaced(tmp_path: Path, expected: bytes) -> None:
    with ProcessExecutor(Workers(seconds=0.005), 2) as executor:
        before = executor.pids()
        for job in JOBS:
            executor.submit(job)
        results = [executor.next()]
        os.kill(before[1], signal.SIGKILL)
        results += [executor.next() for _ in JOBS[1:]]
        assert {job for job, _ in results} == set(JOBS) and len(results) == len(JOBS)
        assert executor.pids()[0] == before[0] and executor.pids()[1] != before[1]
        assert search(tmp_path, executor) == expected


def test_a_job_that_kills_every_worker_ends_in_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_MOVES", 1)
    with (
        ProcessExecutor(Workers(str(tmp_path), "kill", ("search", 0), 99), 2) as executor,
        pytest.raises(LropeError) as caught,
    ):
        search(tmp_path / "study", executor)
    message = str(caught.value)
    assert "--workers 2: 2 workers were lost over the evaluation of search 0" in message
    assert "killed by signal 9" in message and "fewer workers" in message and "\n" not in message
    assert not any(alive(pid) for pid in executor.pids())


def test_mistakes_and_faults_in_a_worker_are_told_apart(tmp_path: Path) -> None:
    with ProcessExecutor(Workers(str(tmp_path), "mistake", ("search", 3)), 1) as executor:
        executor.submit(JOBS[3])
        with pytest.raises(LropeError, match=r"^data.jsonl: context 3 is missing; give another file$"):
            executor.next()
    (tmp_path / "death0").unlink()
    with ProcessExecutor(Workers(str(tmp_path), "fault", ("search", 3)), 1) as executor:
        executor.submit(JOBS[3])
        with pytest.raises(WorkerError, match=r"(?s)worker_evaluators\.py.*ZeroDivisionError: a fault"):
            executor.next()
    assert not any(alive(pid) for pid in executor.pids())


def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_MOVES", 1)
    with pytest.raises(LropeError, match=r"^model.gguf: no such file$"):
        ProcessExecutor(Workers(broken="mistake"), 2)
    with pytest.raises(LropeError, match=r"workers were lost while they started, the last one killed by signal 9"):
        ProcessExecutor(Workers(broken="kill"), 1)


def test_threads_and_gpus_are_handed_out() -> None:
    with ProcessExecutor(Workers(), 1, n_threads=3, gpus=["5", "GPU-7"]) as executor:
        n_threads, gpu, pid = executor.ask(see)
        assert (n_threads, gpu) == (3, "5") and [pid] == executor.pids() and pid != os.getpid()
    with ProcessExecutor(Workers(), 3, gpus=["5", "GPU-7"]) as executor:
        seen: dict[int, str | None] = {}

        def everybody() -> bool:
            _, gpu, pid = executor.ask(see)
            seen[pid] = gpu
            return len(seen) == 3

        wait_until(everybody)
        assert [seen[pid] for pid in executor.pids()] == ["5", "GPU-7", "5"]


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert visible_gpus() == ("2", "3")
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert visible_gpus() == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert visible_gpus() == ()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_free_memory() -> None:
    free = free_memory()
    assert free is not None and 1 << 20 < free < 1 << 50


HEAD = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
SCRIPT = """
from support.worker_evaluators import Workers
from lrope_search.scores import Job
from lrope_search.workers.processes import ProcessExecutor
print("run", __spec__, __file__ == sys.argv[0])
with ProcessExecutor(Workers(), 2) as executor:
    executor.submit(Job((1.0,) * 12, "search", 0))
    executor.next()
print("done", __spec__, __file__ == sys.argv[0])
"""


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    """Its workers do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("run None True\ndone None True\n", "")


PROGRAM = """
from support.worker_evaluators import Workers
from lrope_search.scores import GUARD, Job
from lrope_search.workers.processes import ProcessExecutor
if __name__ == "__main__":
    executor = ProcessExecutor(Workers(seconds=60.0), 2)
    for i in range(2):
        executor.submit(Job((1.0,) * 12, "search", i))
    print(*executor.pids(), flush=True)
    executor.next()
"""


def test_workers_end_with_the_search_that_was_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(HEAD + PROGRAM)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        process.kill()
    wait_until(lambda: not any(map(alive, pids)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
