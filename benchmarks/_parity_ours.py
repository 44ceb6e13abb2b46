"""Ours with views in memory, as a process: `python -m benchmarks._parity_ours CONFIG.yaml`."""

from __future__ import annotations

import sys

from benchmarks._training import Job, fit
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load
from glmae_ray.jobs.ray_session import ray_session


def main() -> None:
    """Train to the end of the run; its metrics are what is measured."""
    cfg = load(PretrainConfig, sys.argv[1:])
    window = cfg.log.every_steps
    steps = {"window": window, "warm_up": 0, "windows": cfg.steps // window}
    with ray_session(cfg.ray):
        fit(Job(cfg.model_dump(mode="json"), "memory", **steps))


if __name__ == "__main__":
    main()
