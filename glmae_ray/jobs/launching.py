"""What every training verb does around its workers: limits of Ray, resources, a polite stop."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from glmae_ray import checkpoint
from glmae_ray.config_base import Config
from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import StoppedError
from glmae_ray.jobs.allotment import Allotment, allot
from glmae_ray.jobs.profiles import PROFILES, apply
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.run_folder import write_facts
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.paths import to_place
from glmae_ray.tracking import Record, progress, summarise

Section = TypeVar("Section", bound=Config)


def with_whole_paths(cfg: Section, *names: str) -> Section:
    """The same with fields that are paths made whole: Ray's workers run in another directory."""
    given = {name: location for name in names if (location := getattr(cfg, name)) is not None}
    return cfg.model_copy(update={name: str(to_place(at)) for name, at in given.items()})


def launch(
    cfg: TrainConfig,
    store: StoreFacts,
    *,
    begin: Callable[[], None],
    fit: Callable[[Allotment], None],
) -> Record:
    """Train, or go on, to the end of the run; prints and returns its summary.

    Args:
        cfg: The run.
        store: What is written down of its store.
        begin: Writes what belongs into the folder of the run before its config.
        fit: Runs the workers to the end.

    Raises:
        StoppedError: A signal came, the workers saved their state and ended.
        UserError: The cluster does not fit; nothing was written.
    """
    folder = to_place(cfg.run)
    apply_profile(cfg)
    with ray_session(cfg.ray):
        allotment = allot_here(cfg)
        begin()
        write_facts(cfg, folder, store)
        with progress(folder, steps=cfg.steps):
            _fit_or_stop(cfg, lambda: fit(allotment))
    summary = summarise(folder)
    print(
        f"{summary['steps']} steps, {summary['samples']} samples in {summary['wall_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} samples/s, {summary['data_wait_share']:.0%} of the time "
        f"waiting for data, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB)"
    )
    if summary["skipped_steps"]:
        print(f"skipped steps: {summary['skipped_steps']}; see events.jsonl")
    return summary


def apply_profile(cfg: TrainConfig) -> None:
    """Set what Ray reads when it is imported."""
    joins = cfg.ray.address or os.environ.get("RAY_ADDRESS")
    profile = PROFILES[cfg.resources.profile]
    apply(profile, starts_ray=not joins, hang_s=cfg.resources.hang_s)


def allot_here(cfg: TrainConfig) -> Allotment:
    """See that the cluster that runs has what the run needs; says what that is."""
    import ray

    allotment = allot(cfg, [node for node in ray.nodes() if node["Alive"]])
    for line in (allotment.budget.line(), *allotment.warnings):
        print(line)
    return allotment


def _fit_or_stop(cfg: TrainConfig, fit: Callable[[], None]) -> None:
    """Train; where a signal stops it, say where it stands."""
    try:
        fit()
    except StoppedError as stopped:
        step = checkpoint.latest_step(to_place(cfg.run))
        if step < cfg.steps:
            print(f"{stopped}: saved at step {step} of {cfg.steps}")
            raise
