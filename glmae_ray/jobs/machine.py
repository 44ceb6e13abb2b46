"""What this machine has: CPUs, memory, GPUs. Without torch, whose import alone takes seconds."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

# Whose versions a run writes down and `glmae doctor` prints.
PACKAGES = (
    *("glmae-ray", "torch", "ray", "deepspeed", "zarr", "tensorstore", "pyarrow", "numpy"),
    "monai",
)

# Ray's own share of what memory is free, kept for objects; the rest is for tasks.
_OBJECT_STORE_SHARE = 0.3
_CPU_LIMITS = (  # of a container: microseconds of CPU in a period, and the period; cgroup v2 and v1
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_QUERY = "--query-gpu=index,uuid,name,memory.total"
_NVIDIA_SMI = ("nvidia-smi", _QUERY, "--format=csv,noheader,nounits")
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Gpu:
    """Name and bytes of memory."""

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """CPUs as Ray counts them when it starts here, bytes of memory, and the GPUs to be seen."""

    cpus: int
    memory: int
    gpus: tuple[Gpu, ...]

    def node(self) -> dict[str, Any]:
        """This machine as `ray.nodes()` would have it."""
        store = self.memory * _OBJECT_STORE_SHARE
        resources = {"CPU": float(self.cpus), "memory": self.memory - store}
        resources |= {"object_store_memory": store, "GPU": float(len(self.gpus))}
        return {"Alive": True, "Labels": {}, "Resources": resources}


def this_machine() -> Machine:
    """Look at the machine that runs this."""
    # Two CPUs at least, as jobs/ray_session.py starts Ray.
    return Machine(cpus=max(2, cpus_here()), memory=_memory(), gpus=_gpus())


def cpus_here() -> int:
    """CPUs of the machine that this process may use, by its affinity and the quota of a container.

    A quota that is no whole number of CPUs is rounded up.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *_cpu_quotas()]))


def _cpu_quotas() -> Iterator[int]:
    for names in _CPU_LIMITS:
        files = [Path(name) for name in names]
        if all(place.exists() for place in files):
            words = [word for place in files for word in place.read_text(encoding="ascii").split()]
            if all(word.isdecimal() for word in words):  # else `max`, or -1: no limit
                quota, period = (int(word) for word in words)
                yield math.ceil(quota / period)


def _memory() -> int:
    """Bytes: of the machine, or of the container where it may use less."""
    files = [place for place in map(Path, _MEMORY_LIMITS) if place.exists()]
    limits = [place.read_text(encoding="ascii").strip() for place in files]
    whole = psutil.virtual_memory().total
    return min([whole, *(int(limit) for limit in limits if limit.isdecimal())])


def _gpus() -> tuple[Gpu, ...]:
    """Those that the driver names and CUDA_VISIBLE_DEVICES leaves."""
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return ()
    try:
        answer = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=_PATIENCE_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver that does not answer drives nothing
    there = _listed(answer)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(there) if chosen is None else _visible(chosen, list(there))
    return tuple(there[name] for name in names)


class _Name(NamedTuple):
    """What CUDA_VISIBLE_DEVICES may call a GPU."""

    number: int
    uuid: str


def _listed(answer: str) -> dict[_Name, Gpu]:
    """The GPUs of nvidia-smi's table, in its order: that of the PCI bus."""
    found = {}
    for line in answer.splitlines():
        rest, _, mebibytes = line.rpartition(",")
        number, uuid, name = (part.strip() for part in rest.split(",", 2))
        if mebibytes.strip().isdecimal():
            found[_Name(int(number), uuid)] = Gpu(name, int(mebibytes) * 2**20)
    return found


def _visible(chosen: str, there: list[_Name]) -> list[_Name]:
    """Those that CUDA would show, in the order of the variable.

    It reads to the first entry that is negative, unknown or could mean two; a GPU that is named
    twice hides all.
    """
    found: list[_Name] = []
    for entry in chosen.split(","):
        fits = [name for name in there if _means(entry.strip(), name)]
        if len(fits) != 1:
            break
        if fits[0] in found:
            return []
        found += fits
    return found


def _means(entry: str, name: _Name) -> bool:
    """Whether an entry is this GPU's index or the beginning of its UUID."""
    if entry.startswith("GPU-"):
        return name.uuid.startswith(entry)
    # CUDA reads a number as far as there are digits, and leaves what follows them.
    digits = re.match(r"\d+", entry)
    return digits is not None and int(digits[0]) == name.number
