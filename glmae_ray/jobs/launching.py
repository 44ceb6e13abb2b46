"""What every training verb does around its workers: limits of Ray, resources, a polite stop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from glmae_ray import checkpoint
from glmae_ray.config_base import Config
from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import StoppedError, UserError
from glmae_ray.jobs.allotment import Allotment, Node, allot
from glmae_ray.jobs.profiles import PROFILES, apply
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.run_folder import write_facts
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.paths import to_place
from glmae_ray.tracking import Record, progress, summarise

Section = TypeVar("Section", bound=Config)

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in which Ray tells a job's driver what it was given


def with_whole_paths(cfg: Section, *names: str) -> Section:
    """The same with fields that are paths made whole: Ray's workers run in another directory.

    Raises:
        UserError: Store or run folder would lie in a copy that Ray removes.
    """
    given = {name: location for name in names if (location := getattr(cfg, name)) is not None}
    places = {name: to_place(location) for name, location in given.items()}
    if _runs_in_a_copy():
        lines = [
            f"{name}: {given[name]} would lie in the copy of --working-dir in which this Ray job "
            "runs, and be lost with it; give a whole path that all nodes see, or s3://BUCKET/FOLDER"
            for name in ("store", "run")
            if isinstance(place := places.get(name), Path) and place.is_relative_to(Path.cwd())
        ]
        if lines:
            raise UserError(*lines)
    return cfg.model_copy(update={name: str(place) for name, place in places.items()})


def _runs_in_a_copy() -> bool:
    """Whether this process is the driver of `ray job submit --working-dir`."""
    job = json.loads(os.environ.get(_RAY_JOB, "{}"))
    return "working_dir" in job.get("runtime_env", {})


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
        UserError: The cluster does not fit, and nothing was written; or not all of it sees the
            folders.
    """
    folder = to_place(cfg.run)
    apply_profile(cfg)
    with ray_session(cfg.ray):
        nodes = nodes_alive()
        allotment = allot_here(cfg, nodes)
        begin()
        write_facts(cfg, folder, store)
        _check_shared(cfg, nodes)
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


def nodes_alive() -> list[Node]:
    """Those of the cluster that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def allot_here(cfg: TrainConfig, nodes: Sequence[Node]) -> Allotment:
    """See that the cluster that runs has what the run needs; says what that is."""
    allotment = allot(cfg, nodes)
    for line in (allotment.budget.line(), *allotment.warnings):
        print(line)
    return allotment


def _check_shared(cfg: TrainConfig, nodes: list[Node]) -> None:
    """See that all nodes see the store and the run folder, which has its first files now."""
    from glmae_ray.jobs.shared_folders import check_shared  # brings Ray with it

    check_shared({"store": to_place(cfg.store), "run": to_place(cfg.run)}, nodes)


def _fit_or_stop(cfg: TrainConfig, fit: Callable[[], None]) -> None:
    """Train; where a signal stops it, say where it stands."""
    try:
        fit()
    except StoppedError as stopped:
        step = checkpoint.latest_step(to_place(cfg.run))
        if step < cfg.steps:
            print(f"{stopped}: saved at step {step} of {cfg.steps}")
            raise
