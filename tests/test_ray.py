"""Ray: a cluster of two nodes on one machine, a worker killed on the way, a node that lacks the model."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.synthetic import Landscape
from support.worker_evaluators import Workers, see
from test_processes import JOBS, SETTINGS, search

from lrope_gguf.errors import LropeError
from lrope_search.scores import Job
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study
from lrope_search.workers import ray_cluster as ray_executor
from lrope_search.workers.pool import MAX_MOVES
from lrope_search.workers.protocol import LocalExecutor
from lrope_search.workers.ray_cluster import RayExecutor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of two processors each, to which this process is connected."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # the nodes' workers inherit it
        node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def node_and_pid(evaluator: object) -> tuple[str, int]:
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def test_two_nodes_find_what_one_process_finds(tmp_path: Path, cluster: Any) -> None:
    expected = search(tmp_path / "alone", LocalExecutor(Landscape()))
    with RayExecutor(Workers(seconds=0.002), 4) as executor:
        assert executor.n_layer == 12 and executor.n_workers == 4
        assert executor.ask(see)[0] == 1  # 4 processors for 4 workers
        assert search(tmp_path / "four", executor) == expected
    with RayExecutor(Workers()) as executor:
        assert executor.n_workers == 2  # one a node
        assert executor.ask(see)[0] == 2
        nodes = set()
        for _ in range(200):
            nodes.add(executor.ask(node_and_pid)[0])
        assert len(nodes) == 2
        assert search(tmp_path / "two", executor) == expected


def test_a_worker_killed_mid_run_costs_nothing_but_time(tmp_path: Path, cluster: Any) -> None:
    expected = search(tmp_path / "alone", LocalExecutor(Landscape()))
    for death in ("kill", "memory"):
        (tmp_path / death).mkdir()
        with RayExecutor(Workers(str(tmp_path / death), death, ("search", 1), times=2), 2) as executor:
            assert search(tmp_path / f"{death}-study", executor) == expected
        assert len(list((tmp_path / death).iterdir())) == 2


def test_a_node_lost_mid_run_costs_nothing_but_time(tmp_path: Path, cluster: Any) -> None:
    expected = search(tmp_path / "alone", LocalExecutor(Landscape()))
    doomed = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    cluster.wait_for_nodes()

    class Watch(Study):
        def record(self, job: Job, score: object) -> None:
            super().record(job, score)  # type: ignore[arg-type]
            if len(self) == 20:
                cluster.remove_node(doomed, allow_graceful=False)

    with (
        RayExecutor(Workers(seconds=0.01), 6, n_threads=1) as executor,
        Watch(tmp_path / "six", {"search": SETTINGS.identity()}) as study,
    ):
        # the others have room for four: the two that the node took with it are waited for by nobody
        run_search(executor, study, SETTINGS, Progress(study.log, quiet=True))
    assert (tmp_path / "six" / "best.json").read_bytes() == expected


def test_a_cluster_without_room_is_waited_for_aloud(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_executor, "_PATIENCE", 1.0)
    large = cluster.add_node(num_cpus=3, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    with RayExecutor(Workers(seconds=0.5), 1, n_threads=3) as executor:
        for job in JOBS[:3]:
            executor.submit(job)
        results = [executor.next()[0]]
        assert not caplog.messages
        cluster.remove_node(large, allow_graceful=False)

        class Comes(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                nodes.append(cluster.add_node(num_cpus=3, object_store_memory=100 << 20))

        nodes: list[Any] = []
        handler = Comes()
        logging.getLogger(ray_executor.__name__).addHandler(handler)
        try:
            results += [executor.next()[0] for _ in JOBS[1:3]]
        finally:
            logging.getLogger(ray_executor.__name__).removeHandler(handler)
            for node in nodes:
                cluster.remove_node(node)
        assert set(results) == set(JOBS[:3])
        assert len(nodes) == 1 and "no node of the Ray cluster has the 3 processors" in caplog.text


def test_errors_name_what_is_wrong(tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(LropeError, match=r"^node .*: model.gguf: no such file; on a Ray cluster .* on every node$"):
        RayExecutor(Workers(broken="mistake"), 2)
    with pytest.raises(LropeError, match=r"^--workers 99: the Ray cluster has \d+ processors on \d nodes; give fewer$"):
        RayExecutor(Workers(), 99)
    with pytest.raises(LropeError, match=r"^--threads 3: the Ray cluster has room for 2 workers of 2 threads"):
        RayExecutor(Workers(), 2, n_threads=3)
    with (
        RayExecutor(Workers(str(tmp_path), "kill", ("search", 0), 99), 2) as executor,
        pytest.raises(LropeError, match=rf"--workers 2: {MAX_MOVES + 1} workers were lost over .* search 0, .*Actor"),
    ):
        search(tmp_path / "study", executor)


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LropeError, match=r"^executor ray: Ray is not installed; run: pip install 'lrope-gguf\[ray\]'$"):
        RayExecutor(Workers())
