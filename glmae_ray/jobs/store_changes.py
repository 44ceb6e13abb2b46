"""The store of a run that is continued: the one it began with, or a change that is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import UserError
from glmae_ray.paths import Place, read_file
from glmae_ray.tracking import flush, write_event
from glmae_ray.watch import Event

ENVIRONMENT = "environment.json"  # in the run folder
_DIGITS = 12  # of a digest in a line; the whole ones are in the files
_NAMES = {"store_fingerprint": "fingerprint", "selection": "selection of cases"}


class StoreFacts(NamedTuple):
    """What a run must find again when it is continued: its samples follow from it.

    Attributes:
        store_fingerprint: Of ids, voxels and splits of all cases.
        selection: Of the cases that `sampling` chooses, their foreground boxes and weights.
    """

    store_fingerprint: str
    selection: str


def store_change(cfg: TrainConfig, folder: Place, now: StoreFacts) -> str | None:
    """In which digest the store differs from the one that the run was last given; None: in none.

    Returns:
        A line with both digests of the first that differs: the second follows from the first.
    """
    was = _read(folder)
    for name, what in _NAMES.items():
        old, new = was.get(name, ""), getattr(now, name)
        if old != new:
            return (
                f"store: {cfg.store} has changed since {folder} was started: its {what} was "
                f"{old[:_DIGITS]} and is {new[:_DIGITS]}"
            )
    return None


def accept_change(
    cfg: TrainConfig, folder: Place, now: StoreFacts, *, step: Callable[[], int]
) -> list[dict[str, Any]]:
    """Tell a change of the store that the user accepts, and write it as an event.

    One that is not accepted is refused by `check_run`, which comes first.

    Args:
        cfg: The run.
        folder: Its folder; what it holds of the store is not touched.
        now: The store as it is.
        step: Tells the steps that the newest checkpoint has done.

    Returns:
        All changes of the run's store, for `environment.json`.
    """
    was = _read(folder)
    known: list[dict[str, Any]] = was.get("store_changes", [])
    line = store_change(cfg, folder, now) if was else None
    if line is None:
        if cfg.accept_store_change:
            print(f"accept_store_change: has no effect, {cfg.store} is the store that {folder} has")
        return known
    digests = {name: {"was": was.get(name), "is": getattr(now, name)} for name in _NAMES}
    change: dict[str, Any] = {"step": step(), **digests}
    if digests["selection"]["was"] != now.selection:
        line += "; the samples from here on are those of the new store"
    else:
        line += "; the cases that are sampled and their order are the same"
    print(line)
    write_event(folder, Event("store_changed", line, change), rank=0)
    flush(folder)
    return [*known, change]


def refusal(line: str) -> str:
    """What a user can do about a change."""
    return f"{line}; name another run, or accept_store_change=true"


def _read(folder: Place) -> dict[str, Any]:
    """environment.json of a run that has begun: config.json is written after it."""
    if read_file(folder / "config.json") is None:
        return {}
    facts = read_file(folder / ENVIRONMENT)
    if facts is None:
        raise UserError(f"run: {folder} has no {ENVIRONMENT}, which tells its store; name another")
    return json.loads(facts)
