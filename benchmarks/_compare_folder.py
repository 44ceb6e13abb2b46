"""The folder of a comparison: one command at a time, and always the same comparison."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._compare_config import CompareConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.run_folder import changed_fields
from glmae_ray.paths import UNFINISHED, names_in, publish, read_file

CONFIG, LOCK = "config.json", "lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Have the folder to oneself; a part that outlived an earlier command is waited for.

    Yields:
        The file that is locked. It stays so while any process has it open, so that a part to
        which it was given holds the folder even when the command was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(file, 1000, 0).decode(errors="replace")
            print(f"waiting: {folder} is in use by {who}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def tell_who(file: int, who: str) -> None:
    """Say in the locked file who works now."""
    os.ftruncate(file, 0)
    os.pwrite(file, who.encode(), 0)


def claim(cfg: CompareConfig, *, fingerprint: str) -> None:
    """See that the folder is new or of this comparison, and write down what it is.

    Arms, fractions and seeds may be added, and left out: parts that are there stay what they are.

    Raises:
        UserError: It is of another comparison, a line each field; or holds something else.
    """
    before = read_file(cfg.folder / CONFIG)
    if before is None:
        if names_in(cfg.folder) - {LOCK, CONFIG + UNFINISHED}:
            line = f"out: {cfg.folder} is not the folder of a comparison and not empty"
            raise UserError(f"{line}; name another")
        old: dict[str, Any] = {"arms": {}}
    else:
        old = json.loads(before)
    now = _settings(cfg, fingerprint)
    if before is not None and (lines := _refusals(cfg.folder, old, now)):
        raise UserError(*lines)
    now["arms"] = old["arms"] | now["arms"]
    publish(cfg.folder / CONFIG, json.dumps(now, indent=1) + "\n")


def _settings(cfg: CompareConfig, fingerprint: str) -> dict[str, Any]:
    """What may not change, as it stands with all defaults."""
    cell = cfg.cells[0]
    varied = {"init", "label_fraction", "seed"}
    return {
        "store_fingerprint": fingerprint,
        "pretrain_each_seed": cfg.pretrain_each_seed,
        "arms": {
            arm: None
            if changes is None
            else cfg.pretraining(arm, cell.seed).model_dump(
                mode="json", exclude={"seed"} if cfg.pretrain_each_seed else None
            )
            for arm, changes in cfg.arms.items()
        },
        "finetune": cfg.finetuning(cell).model_dump(mode="json", exclude=varied),
        "evaluate": cfg.evaluation(cell).model_dump(mode="json", exclude={"workers"}),
    }


def _refusals(folder: Path, old: dict[str, Any], now: dict[str, Any]) -> list[str]:
    sections = [(name, old[name], now[name]) for name in ("finetune", "evaluate")]
    sections += [
        (f"arms.{arm}", old["arms"][arm], changes)
        for arm, changes in now["arms"].items()
        if arm in old["arms"]
    ]
    changes = [
        (f"{section}.{name}".rstrip("."), before, after)
        for section, was, is_ in sections
        for name, before, after in changed_fields(was, is_)
    ]
    alone = ("store_fingerprint", "pretrain_each_seed")
    changes += [(name, old[name], now[name]) for name in alone if old[name] != now[name]]
    return [
        f"{name}: {after!r}, but {folder} was started with {before!r}; name another out"
        for name, before, after in changes
    ]
