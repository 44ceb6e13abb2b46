"""Run the workers of a run under Ray Train, and say in a line why they failed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
from ray.train.torch import TorchTrainer

from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import Allotment
from glmae_ray.jobs.cluster_view import fresh_view, take_over
from glmae_ray.jobs.growing import SaveBeforeResize
from glmae_ray.jobs.patience import Patience
from glmae_ray.jobs.profiles import PROFILES, Profile
from glmae_ray.jobs.rendezvous import torch_config
from glmae_ray.jobs.sittings import last_start
from glmae_ray.jobs.stopping import fit_or_stop
from glmae_ray.jobs.text import last_line
from glmae_ray.paths import to_place
from glmae_ray.pipeline import PlannedDataConfig, PlannedShards
from glmae_ray.reading import Maker

_MISSED = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_NAME = "ray"  # of Ray Train's folder in the run folder; nothing in it is needed to continue


Worker = Callable[[dict[str, Any]], tuple[str, ...]]


class TrainingError(Exception):
    """The workers of a run failed, and it was not to be tried again."""


def train(cfg: TrainConfig, allotment: Allotment, *, worker: Worker, maker: Maker) -> None:
    """Train until the steps are done; workers that fail start again from the newest checkpoint.

    Args:
        cfg: The run.
        allotment: What its workers are given.
        worker: Ray Train's `train_loop_per_worker`; returns the lines of a `CommonError`.
        maker: That of the samples.

    Raises:
        StoppedError: A signal came, the workers saved their state and ended.
        UserError: What stands in the way is for the user to put right.
        TrainingError: They failed more often than the profile allows.
    """
    start = functools.partial(last_start, to_place(cfg.run))
    shards = PlannedShards(maker, cfg, start)
    profile = PROFILES[cfg.resources.profile]
    trainer = TorchTrainer(
        worker,
        train_loop_config=cfg.model_dump(mode="json"),
        torch_config=torch_config(),
        scaling_config=_scaling(cfg, allotment, profile),
        run_config=ray.train.RunConfig(
            name=_NAME,
            failure_config=_failures(cfg, profile),
            callbacks=[
                SaveBeforeResize(cfg.run),
                Patience(cfg.run, needs=_needs(cfg, allotment), wait_s=profile.wait_s),
            ],
            **storage(cfg.run),
        ),
        datasets={"train": lambda: shards},
        dataset_config=PlannedDataConfig(),
    )

    def fit() -> None:
        if lines := trainer.fit().return_value:
            raise UserError(*lines)

    try:
        take_over(cfg.run, run_id=trainer.train_run_context.run_id)
        with fresh_view():
            fit_or_stop(fit, run=cfg.run)
    except ray.train.TrainingFailedError as error:
        raise TrainingError(_reason(error)) from error


def _scaling(cfg: TrainConfig, allotment: Allotment, profile: Profile) -> ray.train.ScalingConfig:
    options: dict[str, Any] = {}
    if not isinstance(cfg.resources.workers, int):
        every_s = cfg.resources.resize_s or profile.elastic_resize_monitor_interval_s
        options["elastic_resize_monitor_interval_s"] = every_s
    return ray.train.ScalingConfig(
        num_workers=cfg.resources.workers,
        use_gpu=allotment.gpu,
        resources_per_worker={"CPU": allotment.cpus, "GPU": 1 if allotment.gpu else 0},
        # The GPUs of a node reach each other faster than those of two; its CPUs share its memory.
        placement_strategy="PACK" if allotment.gpu else "SPREAD",
        **options,
    )


def _needs(cfg: TrainConfig, allotment: Allotment) -> str:
    """What has to be there before a run starts, for people."""
    each = f"{allotment.cpus:g} CPU" + (" and 1 GPU" if allotment.gpu else "")
    return f"{cfg.resources.least} workers with {each} each"


def _failures(cfg: TrainConfig, profile: Profile) -> ray.train.FailureConfig:
    stated = cfg.resources.max_failures
    return ray.train.FailureConfig(
        max_failures=profile.max_failures if stated is None else stated,
        controller_failure_limit=profile.controller_failure_limit,
        max_preemption_failures=profile.max_preemption_failures,
        relax_collectives_on_preemption=profile.relax_collectives_on_preemption,
        preemption_grace_s=profile.preemption_grace_s,
    )


def storage(run: str) -> dict[str, Any]:
    """The run folder as Ray's own runs take it: Ray sees that every node reaches it."""
    place = to_place(run)
    if isinstance(place, Path):
        return {"storage_path": str(place)}
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(place.fs))
    return {"storage_path": place.path, "storage_filesystem": filesystem}


def _reason(error: ray.train.TrainingFailedError) -> str:
    """The rank that failed, and what it said last; not those that only missed it."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return last_line(getattr(error, "controller_failure", error))
    said = {rank: last_line(failure) for rank, failure in failures.items()}
    # Of ranks that wait for one that is gone gloo and NCCL say so, in a line of theirs.
    rank = min(said, key=lambda rank: (any(word in said[rank] for word in _MISSED), rank))
    return f"rank {rank}: {said[rank]}"
