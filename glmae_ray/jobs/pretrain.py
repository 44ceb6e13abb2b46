"""`glmae pretrain`: check what was asked, run the workers under Ray Train, sum up."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmae_ray import checkpoint
from glmae_ray.config import PretrainConfig
from glmae_ray.errors import StoppedError, UserError
from glmae_ray.jobs.allotment import Allotment, allot
from glmae_ray.jobs.machine import PACKAGES
from glmae_ray.jobs.profiles import PROFILES, apply
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.store_changes import (
    ENVIRONMENT,
    StoreFacts,
    accept_change,
    refusal,
    store_change,
)
from glmae_ray.paths import UNFINISHED, Place, names_in, publish, read_file, to_place
from glmae_ray.store.index import FINGERPRINT_COLUMNS, VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.tracking import progress, summarise

if TYPE_CHECKING:
    from glmae_ray.models.load_report import LoadReport

# What may differ when a run is continued: none of it changes an update, nor a sample but where a
# case cannot be read. Folders may move; the store is known by its fingerprint.
_FREE = {
    *("store", "run", "resources", "ray", "save", "log", "pipeline", "accept_store_change"),
    *("engine.micro_batch", "optim.rewind_after"),
}
_FIRST_FILES = {
    *(ENVIRONMENT, f"{ENVIRONMENT}{UNFINISHED}", f"config.json{UNFINISHED}"),
    *("init.json", f"init.json{UNFINISHED}"),
}


def run(cfg: PretrainConfig) -> None:
    """Pre-train, or continue; prints the summary and where the run is.

    Raises:
        UserError: Store, run folder or cluster do not fit the config; nothing was written.
    """
    # Ray's workers run in another directory.
    places = {
        name: str(to_place(location))
        for name in ("store", "run", "init")
        if (location := getattr(cfg, name)) is not None
    }
    cfg = cfg.model_copy(update=places)
    folder = to_place(cfg.run)
    facts = check_store(cfg)
    if check_run(cfg, folder, facts):
        print(f"{folder}: has done its {cfg.steps} steps already")
    else:
        loaded = _check_init(cfg, folder)
        _apply_profile(cfg)
        with ray_session(cfg.ray):
            allotment = _allot(cfg)
            _write_facts(cfg, folder, facts, loaded)
            with progress(folder, steps=cfg.steps):
                _train(cfg, allotment)
        _print_summary(summarise(folder))
    print(f"run: {folder}")


def _apply_profile(cfg: PretrainConfig) -> None:
    """Set what Ray reads when it is imported."""
    joins = cfg.ray.address or os.environ.get("RAY_ADDRESS")
    profile = PROFILES[cfg.resources.profile]
    apply(profile, starts_ray=not joins, hang_s=cfg.resources.hang_s)


def _allot(cfg: PretrainConfig) -> Allotment:
    """See that the cluster that runs has what the run needs; says what that is."""
    import ray

    allotment = allot(cfg, [node for node in ray.nodes() if node["Alive"]])
    for line in (allotment.budget.line(), *allotment.warnings):
        print(line)
    return allotment


def _train(cfg: PretrainConfig, allotment: Allotment) -> None:
    from glmae_ray.jobs.training import train  # brings torch with it

    try:
        train(cfg, allotment)
    except StoppedError as stopped:
        step = checkpoint.latest_step(to_place(cfg.run))
        if step < cfg.steps:
            print(f"{stopped}: saved at step {step} of {cfg.steps}")
            raise


def _check_init(cfg: PretrainConfig, folder: Place) -> LoadReport | None:
    """See that the encoder to start from fits; None where none is named."""
    if cfg.init is None:
        return None
    from glmae_ray.jobs.starting import check_init  # brings torch with it

    return check_init(cfg, folder)


def check_store(cfg: PretrainConfig, *, tell: Callable[[str], None] = print) -> StoreFacts:
    """See that the store can feed the run; tell what is odd about it.

    Raises:
        UserError: It cannot.
    """
    VolumeStore.open(cfg.store)
    boxes = {"box_start", "box_stop"}
    needed = {*FINGERPRINT_COLUMNS, "channels", *boxes, *columns_to_select(cfg.sampling)}
    index = VolumeIndex.read(cfg.store, columns=needed)
    selection, val = select_cases(index, cfg.sampling), index.select(split="val")
    chosen = selection.index
    channels = sorted({*chosen.column("channels").tolist(), *val.column("channels").tolist()})
    if channels != [cfg.model.channels]:
        raise UserError(
            f"model.channels: {cfg.model.channels}, but the store's cases have {channels}"
        )
    if len(val) == 0 and cfg.loss.reconstructed:
        tell(f"{cfg.store}: no case of the split val, so no held-out reconstruction is measured")
    if both := len(chosen.select(split="val")):
        tell(f"sampling.where: {both} chosen cases are of the split val, which is held out")
    return StoreFacts(index.fingerprint(), selection.digest())


def check_run(cfg: PretrainConfig, folder: Place, facts: StoreFacts) -> bool:
    """See that the folder is new or of the same run; whether that run is complete.

    Raises:
        UserError: It is of another run, or holds something else.
    """
    config = read_file(folder / "config.json")
    if config is None:
        # A kill may come before config.json, which is the last.
        if (isinstance(folder, Path) and folder.is_file()) or names_in(folder) - _FIRST_FILES:
            raise UserError(f"run: {folder} is not a run folder and not empty; name another")
        return False
    before = json.loads(config)
    now = cfg.model_dump(mode="json")
    lines = [
        f"{name}: {new!r}, but {folder} was started with {old!r}; name another run"
        for name, old, new in _differences(before, now)
        if name.split(".")[0] not in _FREE and name not in _FREE
    ]
    change = store_change(cfg, folder, facts)
    if change and not cfg.accept_store_change:
        lines.append(refusal(change))
    if lines:
        raise UserError(*lines)
    summary = read_file(folder / "summary.json")
    return summary is not None and json.loads(summary)["steps"] >= cfg.steps


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(name, old, new)]
    return [
        difference
        for key in sorted(old.keys() | new.keys())
        for difference in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    ]


def _write_facts(
    cfg: PretrainConfig, folder: Place, store: StoreFacts, loaded: LoadReport | None
) -> None:
    """config.json, environment.json and, if it has one, init.json: what runs, on what."""
    if loaded is not None:
        from glmae_ray.jobs.starting import keep_report

        keep_report(loaded, folder)
    changes = accept_change(cfg, folder, store, step=lambda: checkpoint.latest_step(folder))
    facts = {
        **store._asdict(),
        **({"store_changes": changes} if changes else {}),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }
    publish(folder / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")
    text = json.dumps(cfg.model_dump(mode="json"), indent=2)
    publish(folder / "config.json", text + "\n")


def _git_commit() -> str | None:
    """Commit of the checkout that runs; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _print_summary(summary: dict[str, Any]) -> None:
    print(
        f"{summary['steps']} steps, {summary['samples']} samples in {summary['wall_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} samples/s, {summary['data_wait_share']:.0%} of the time "
        f"waiting for data, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB)"
    )
    if summary["skipped_steps"]:
        print(f"skipped steps: {summary['skipped_steps']}; see events.jsonl")
    held_out = summary.get("val_reconstruction")
    if held_out:
        print(
            f"held-out reconstruction: loss {held_out['first']:.4f} -> {held_out['last']:.4f} "
            f"(predicting the mean: {held_out['trivial']:.4f}), r2 {held_out['r2']:.4f}"
        )
