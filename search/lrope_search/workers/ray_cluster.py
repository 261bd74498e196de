"""Workers on a Ray cluster, an actor with a model each."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from lrope_gguf.errors import LropeError

from .pool import Failed, Lost, Ready, Reply, Work, WorkerPool, failure, perform
from .protocol import EvaluatorFactory

_PATIENCE = 60.0  # seconds without an answer after which to look whether anybody is left to give one

_logger = logging.getLogger(__name__)


class RayExecutor(WorkerPool):
    """Evaluates in actors of a Ray cluster, spread over its nodes.

    An actor that dies, with or without its node, is replaced, and its job goes to another one. If no node is left that
    could hold one, a warning says so, and the search goes on as soon as there is one again. Raises `LropeError`: Ray is
    not installed or not to be reached, the cluster is too small, or no evaluator could be made.

    Args:
        factory: Makes the evaluator in each actor; what it names by path must exist on every node.
        n_workers: Number of actors; None: one for each GPU, or for each node of a cluster without GPUs.
        address: Of the cluster, as `ray.init` takes it; None: one that the environment names, or a new one here.
        n_threads: CPU threads of each actor; None: the cluster's processors divided between them.
    """

    def __init__(
        self,
        factory: EvaluatorFactory,
        n_workers: int | None = None,
        *,
        address: str | None = None,
        n_threads: int | None = None,
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise LropeError("executor ray: Ray is not installed; run: pip install 'lrope-gguf[ray]'") from None
        self._ray: Any = ray
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray, address)
        self._factory = factory
        self._actors: dict[int, Any] = {}
        self._homeless = False
        self._pending: dict[Any, int] = {}  # the worker that will answer, by Ray's reference
        try:
            n_workers, self._options = self._plan(n_workers, n_threads)
        except BaseException:
            self.close()
            raise
        super().__init__(n_workers)

    def close(self) -> None:
        """Kill the actors, and leave the cluster if the connection is ours."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._pending.clear()
        if self._is_ours and self._ray.is_initialized():
            self._ray.shutdown()
        self._is_ours = False

    def _plan(self, n_workers: int | None, n_threads: int | None) -> tuple[int, dict[str, Any]]:
        """Return the number of actors and what each may use."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
        n_workers = n_workers or gpus or len(nodes)
        cpus = [int(node.get("CPU", 0.0)) for node in nodes]
        fitting = (n for n in range(max(cpus, default=0), 0, -1) if sum(cpu // n for cpu in cpus) >= n_workers)
        most = next(fitting, None)
        if most is None:
            raise LropeError(
                f"--workers {n_workers}: the Ray cluster has {sum(cpus)} processors on {len(nodes)} nodes; give fewer"
            )
        threads = n_threads or most
        if threads > most:
            raise LropeError(
                f"--threads {threads}: the Ray cluster has room for {n_workers} workers of {most} threads; give fewer"
            )
        options: dict[str, Any] = {"num_cpus": threads, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        if gpus:
            options["num_gpus"] = 1.0 if n_workers <= gpus else 1.0 / -(-n_workers // gpus)
        return n_workers, options

    def _start(self, worker: int) -> None:
        actor = self._ray.remote(_Worker).options(**self._options).remote(self._factory, self._options["num_cpus"])
        self._actors[worker] = actor
        self._pending[actor.introduce.remote()] = worker

    def _send(self, worker: int, work: Work) -> None:
        self._pending[self._actors[worker].perform.remote(work)] = worker

    def _wait(self) -> Iterable[tuple[int, Reply]]:
        while not (ready := self._ray.wait(list(self._pending), num_returns=1, timeout=_PATIENCE)[0]):
            self._warn_if_homeless()
        return [(self._pending.pop(reference), self._receive(reference)) for reference in ready]

    def _warn_if_homeless(self) -> None:
        """Say so, once in a row, if no node of the cluster is large enough for a worker."""
        wanted = {"CPU": self._options["num_cpus"], "GPU": self._options.get("num_gpus", 0.0)}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        homeless = not any(all(node.get(kind, 0.0) >= n for kind, n in wanted.items()) for node in nodes)
        if homeless and not self._homeless:
            _logger.warning(
                "no node of the Ray cluster has the %d processors of a worker any more: waiting for one (ray start), "
                "Ctrl-C stops; what was recorded is kept",
                wanted["CPU"],
            )
        self._homeless = homeless

    def _receive(self, reference: Any) -> Reply:
        try:
            reply: Reply = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return failure(error)
        except self._ray.exceptions.RayError as error:
            return Lost(f"with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return reply

    def _discard(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))


class _Worker:
    """The actor."""

    def __init__(self, factory: EvaluatorFactory, n_threads: int) -> None:
        self._stack = ExitStack()
        self._first: Reply
        try:
            self._evaluator = self._stack.enter_context(factory(n_threads))
            self._first = Ready(self._evaluator.n_layer)
        except MemoryError:
            self._first = Lost("out of memory")
        except Exception as error:
            self._first = _on_this_node(failure(error))

    def introduce(self) -> Reply:
        return self._first

    def perform(self, work: Work) -> Reply:
        reply = perform(work, self._evaluator)
        return _on_this_node(reply) if isinstance(reply, Failed) else reply


def _on_this_node(failed: Failed) -> Failed:
    if not failed.is_mistake:
        return failed
    advice = "; on a Ray cluster the model and all data must exist at the same path on every node"
    return Failed(f"node {platform.node()}: {failed.text}{advice}", is_mistake=True)


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"ray_address {address}" if address else "executor ray"
        raise LropeError(
            f"{where}: cannot connect to a Ray cluster ({reason}); start one with: ray start --head"
        ) from None
