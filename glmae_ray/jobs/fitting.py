"""Whether a run's memory fits a machine, and which change would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from glmae_ray.config import PretrainConfig
from glmae_ray.costs import trainable
from glmae_ray.costs_memory import memory
from glmae_ray.jobs.machine import Machine
from glmae_ray.jobs.text import in_bytes

# Of a GPU's memory; libraries, kernels and fragmentation take the rest. Our decision.
_USABLE_GPU = 0.9
# Of a machine's memory: glibc keeps what was freed, up to 1.6 times of what lives (docs/log.md).
_USABLE_CPU = 0.6
_FLOAT = 4  # bytes


def memory_advice(cfg: PretrainConfig, machine: Machine, *, gpu: bool) -> list[str]:
    """Lines on memory that is too small; none where all fits.

    Args:
        cfg: The run.
        machine: Where it would run.
        gpu: Whether a worker has a GPU, or shares the machine's memory with the others.
    """
    if gpu and not machine.gpus:
        return []
    total = min(each.memory for each in machine.gpus) if gpu else machine.memory
    room, need = usable(total, gpu=gpu), needed(cfg, gpu=gpu)
    if need <= room:
        return []
    place = "a GPU here has" if gpu else "this machine has"
    start = (
        f"memory: a micro-batch of {cfg.micro_batch} takes {in_bytes(need)}, {place} "
        f"{in_bytes(total)}, of which tensors may take {in_bytes(room)}"
    )
    ways = [
        f"{change} takes {in_bytes(size)}"
        for checkpointing in (False, True)
        for change, size in _first_that_fits(cfg, room, gpu=gpu, checkpointing=checkpointing)
    ]
    return [f"{start}; {', '.join(ways) or 'take a smaller model.preset or smaller views'}"]


def usable(total: int, *, gpu: bool) -> float:
    """Bytes of a GPU's or a machine's memory that tensors may take."""
    return total * (_USABLE_GPU if gpu else _USABLE_CPU)


def needed(cfg: PretrainConfig, *, gpu: bool) -> int:
    """Bytes at the peak, of a GPU or of all workers on one machine without."""
    sizes = memory(cfg)
    if gpu:
        return sizes.peak
    # A CPU has no page of a buffer before it is touched, and gradients touch their own size.
    touched = min(sizes.buffers, _FLOAT * trainable(cfg))
    return cfg.workers * (sizes.peak - sizes.buffers + touched)


def _first_that_fits(
    cfg: PretrainConfig, room: float, *, gpu: bool, checkpointing: bool
) -> Iterator[tuple[str, int]]:
    """The largest micro-batch that fits, as words of the command line, and its bytes."""
    if checkpointing and cfg.model.activation_checkpointing:
        return
    share = cfg.global_batch // cfg.workers
    extra = "model.activation_checkpointing=true" if checkpointing else ""
    for small in range(cfg.micro_batch, 0, -1):
        if share % small or (small == cfg.micro_batch and not checkpointing):
            continue
        changed = _changed(cfg, small, checkpointing=checkpointing)
        if (size := needed(changed, gpu=gpu)) <= room:
            micro = "" if small == cfg.micro_batch else f"engine.micro_batch={small}"
            yield " ".join(filter(None, (micro, extra))), size
            return


def _changed(cfg: PretrainConfig, micro_batch: int, *, checkpointing: bool) -> PretrainConfig:
    engine = cfg.engine.model_copy(update={"micro_batch": micro_batch})
    update: dict[str, Any] = {"engine": engine}
    if checkpointing:
        update["model"] = cfg.model.model_copy(update={"activation_checkpointing": True})
    return cfg.model_copy(update=update)
