"""Checkpoints of weights that are some bytes."""

from __future__ import annotations

from typing import Any

from glmae_ray import checkpoint
from glmae_ray.jobs.resuming import resume
from glmae_ray.jobs.saving import Saver
from glmae_ray.paths import Place
from tests.conftest import tiny_config
from tests.jobs.fakes import ALONE, Told, Weights


def saver(run: Place, *words: str, told: Told | None = None, sitting: int = 0) -> Saver:
    cfg = tiny_config(f"run={run}", *words)
    return Saver(run, cfg=cfg, ranks=ALONE, sitting=sitting, tell=Told() if told is None else told)


def save(saver: Saver, step: int, *, size: int = 1000, **facts: Any) -> None:
    """Save weights that tell the step, and wait until they are written."""
    weights = Weights(bytes([step]) * size)
    saver.save(weights, state={"step": step, "passed": [], **facts}, wait=True)


def steps(run: Place) -> list[int]:
    return [found.step for found in checkpoint.complete(run)]


def loaded(run: Place, told: Told | None = None) -> tuple[int, bytes]:
    """The step that a run goes on from, and the first byte of the weights."""
    weights = Weights()
    found = resume(weights, run, ranks=ALONE, tell=Told() if told is None else told)
    assert found is not None
    return found.step, weights.content[:1]
