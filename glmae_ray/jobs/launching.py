"""What every training verb does around its workers: limits of Ray, resources, a polite stop."""

from __future__ import annotations

import os
from collections.abc import Callable

from glmae_ray import checkpoint
from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import StoppedError
from glmae_ray.jobs.allotment import Allotment, allot
from glmae_ray.jobs.profiles import PROFILES, apply
from glmae_ray.paths import to_place


def apply_profile(cfg: TrainConfig) -> None:
    """Set what Ray reads when it is imported."""
    joins = cfg.ray.address or os.environ.get("RAY_ADDRESS")
    profile = PROFILES[cfg.resources.profile]
    apply(profile, starts_ray=not joins, hang_s=cfg.resources.hang_s)


def allot_or_refuse(cfg: TrainConfig) -> Allotment:
    """See that the cluster that runs has what the run needs; says what that is."""
    import ray

    allotment = allot(cfg, [node for node in ray.nodes() if node["Alive"]])
    for line in (allotment.budget.line(), *allotment.warnings):
        print(line)
    return allotment


def train_or_stop(cfg: TrainConfig, fit: Callable[[], None]) -> None:
    """Train; where a signal stops it, say where it stands.

    Args:
        cfg: The run.
        fit: Runs the workers to the end.

    Raises:
        StoppedError: A signal came, the workers saved their state and ended.
    """
    try:
        fit()
    except StoppedError as stopped:
        step = checkpoint.latest_step(to_place(cfg.run))
        if step < cfg.steps:
            print(f"{stopped}: saved at step {step} of {cfg.steps}")
            raise
