"""The settings of the workers: how many there are, and where."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Settings, setting


@dataclass(frozen=True)
class WorkersConfig(Settings):
    """How many workers there are, and where; the result of a search does not depend on it."""

    n_workers: int | None = setting(
        None, "worker processes, each with a model of its own", key="workers", metavar="N", least=1,
        unset="the number that is fastest; 1 with GPUs; on a Ray cluster one per GPU, else one per node", option=True,
    )  # fmt: skip
    gpus: tuple[str, ...] = setting(
        (), "GPUs for the local workers, one each in turn; none: all in CUDA_VISIBLE_DEVICES"
    )
    executor: str = setting(
        "local", "where workers run: as processes on this machine, or on a Ray cluster", choices=("local", "ray")
    )
    ray_address: str | None = setting(
        None, "address of the Ray cluster", unset="what the environment names, or a new one"
    )
