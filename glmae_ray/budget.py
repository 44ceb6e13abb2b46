"""What a run's views cost: CPUs, object store and memory, from sizes, batches and prefetching."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glmae_ray.config_train import TrainConfig
from glmae_ray.paths import is_url

# Bytes of decoded chunks per byte of views: 730 chunks of 64 KiB for CT of 512x512x256 are 1.6,
# views from level 0 need more. Our decision, on the safe side.
_CHUNKS_PER_VIEW = 8
_PROCESS = 500 * 2**20  # of a task's process with its libraries
_QUEUED = 2  # finished batches per maker that Ray Data holds before it pauses


@dataclass(frozen=True)
class Budget:
    """What the making of views needs while a run goes on; bytes, and CPUs.

    Attributes:
        sample: Bytes of one sample's views.
        batch: Bytes of a micro-batch.
        makers: Tasks that make views at a time.
        maker_cpus: CPUs that all of them take.
        trainer_cpus: CPUs that the training workers take.
        maker_memory: Memory of all makers, beside the object store.
        object_store: Batches that are made, queued, fetched ahead and in use.
    """

    sample: int
    batch: int
    makers: int
    maker_cpus: float
    trainer_cpus: float
    maker_memory: int
    object_store: int

    def line(self) -> str:
        """All of it in one line."""
        return (
            f"views: {self.sample / 1e6:.1f} MB a sample, {self.batch / 1e6:.1f} MB a micro-batch; "
            f"{self.makers} makers on {self.maker_cpus:g} CPUs with up to "
            f"{self.maker_memory / 1e9:.1f} GB, {self.trainer_cpus:g} CPUs for training; "
            f"{self.object_store / 1e9:.2f} GB of object store"
        )


def cpus_per_maker(cfg: TrainConfig) -> float:
    """CPUs of a task that makes views: 1, and a half where it waits for an object store."""
    return cfg.pipeline.cpus_per_maker or (0.5 if is_url(cfg.store) else 1.0)


def budget(cfg: TrainConfig, *, cpus: float, cpus_per_worker: float) -> Budget:
    """What a run needs on so many CPUs.

    Args:
        cfg: The run.
        cpus: That can make views or train.
        cpus_per_worker: Of each training worker.
    """
    workers, each, sample = cfg.workers, cpus_per_maker(cfg), cfg.sample_bytes
    batch = sample * cfg.micro_batch
    makers = max(0, math.floor((cpus - workers * cpus_per_worker) / each + 1e-9))
    makers = min(makers, cfg.pipeline.makers or makers)
    waiting = _QUEUED * makers + workers * (1 + cfg.pipeline.prefetch_batches)
    return Budget(
        sample=sample,
        batch=batch,
        makers=makers,
        maker_cpus=makers * each,
        trainer_cpus=workers * cpus_per_worker,
        maker_memory=makers * (_PROCESS + batch + _CHUNKS_PER_VIEW * sample),
        object_store=waiting * batch,
    )
