"""The folder of a run: new or to be continued, and what is written before it starts."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from glmae_ray import checkpoint
from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.machine import PACKAGES
from glmae_ray.jobs.store_changes import (
    ENVIRONMENT,
    StoreFacts,
    accept_change,
    refusal,
    store_change,
)
from glmae_ray.paths import UNFINISHED, Place, names_in, publish, read_file

# What may differ when a run is continued: none of it changes an update, nor a sample but where a
# case cannot be read. Folders may move; the store is known by its fingerprint.
_FREE = {
    *("store", "run", "resources", "ray", "save", "log", "pipeline", "accept_store_change"),
    *("engine.micro_batch", "optim.rewind_after", "probe"),
}
CASES = "cases.json"  # of finetuning: who is trained on, who is held out, what outputs mean
CONFIG = "config.json"
_BEFORE_CONFIG = (ENVIRONMENT, "init.json", CASES)
_FIRST_FILES = {*_BEFORE_CONFIG, *(name + UNFINISHED for name in (*_BEFORE_CONFIG, CONFIG))}


def check_run(cfg: TrainConfig, folder: Place, facts: StoreFacts) -> bool:
    """See that the folder is new or of the same run; whether that run is complete.

    Raises:
        UserError: It is of another run, or holds something else.
    """
    config = read_file(folder / CONFIG)
    if config is None:
        # A kill may come before config.json, which is the last.
        if (isinstance(folder, Path) and folder.is_file()) or names_in(folder) - _FIRST_FILES:
            raise UserError(f"run: {folder} is not a run folder and not empty; name another")
        return False
    lines = refusals(json.loads(config), cfg.model_dump(mode="json"), folder)
    change = store_change(cfg, folder, facts)
    if change and not cfg.accept_store_change:
        lines.append(refusal(change))
    if lines:
        raise UserError(*lines)
    summary = read_file(folder / "summary.json")
    return summary is not None and json.loads(summary)["steps"] >= cfg.steps


def changed_fields(
    before: Any, now: Any, *, free: Collection[str] = _FREE
) -> list[tuple[str, Any, Any]]:
    """What may not change when a run is continued and did: dotted field, its value before, now.

    Args:
        before: The fields that it was started with.
        now: Those that it is given now.
        free: Sections and dotted fields that may differ.
    """
    return [
        (name, old, new)
        for name, old, new in _differences(before, now)
        if name.split(".")[0] not in free and name not in free
    ]


def refusals(before: Any, now: Any, folder: Place, *, free: Collection[str] = _FREE) -> list[str]:
    """A line for each of `changed_fields`, about the folder of the run."""
    return [
        f"{name}: {new!r}, but {folder} was started with {old!r}; name another run"
        for name, old, new in changed_fields(before, now, free=free)
    ]


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(name, old, new)]
    return [
        difference
        for key in sorted(old.keys() | new.keys())
        for difference in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    ]


def write_facts(cfg: TrainConfig, folder: Place, store: StoreFacts) -> None:
    """environment.json and, last, config.json: what runs, on what."""
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
    publish(folder / CONFIG, text + "\n")


def _git_commit() -> str | None:
    """Commit of the checkout that runs; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
