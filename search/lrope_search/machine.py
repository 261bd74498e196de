"""Facts about this machine: processors, GPUs, free memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path


def physical_cores() -> int:
    """Return the number of physical cores that this process may run on (logical ones where unknown)."""
    try:
        cpus = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(siblings.format(cpu)).read_text(encoding="ascii") for cpu in cpus})
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` knows; none: no NVIDIA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        listed = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30.0
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(listed.stdout.split()) if listed.returncode == 0 else ()


def free_memory() -> int | None:
    """Return the bytes that processes here may still take, by Linux and the control group; None if it does not say."""
    free = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max": ValueError, no limit
        used = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        free.append(limit - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0)))
    return min(free, default=None)
