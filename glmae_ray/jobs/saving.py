"""Save: a snapshot at a step, written while training goes on."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any, NamedTuple

from glmae_ray import checkpoint
from glmae_ray.config_train import TrainConfig
from glmae_ray.engine import Engine
from glmae_ray.errors import UserError
from glmae_ray.jobs.machine import PACKAGES
from glmae_ray.jobs.random_state import name_of, random_state
from glmae_ray.jobs.store_changes import ENVIRONMENT, StoreFacts
from glmae_ray.paths import Place, read_file
from glmae_ray.ranks import Ranks
from glmae_ray.tracking import flush
from glmae_ray.watch import Event, Tell


class Saved(NamedTuple):
    """What a save cost, in seconds.

    Attributes:
        held_s: For which training stood still.
        written_s: That the last write took, beside it or not; None before the first has ended.
    """

    held_s: float
    written_s: float | None

    @property
    def took_s(self) -> float | None:
        """About how long it is until the next one will be written."""
        return None if self.written_s is None else self.held_s + self.written_s


class Saver:
    """Writes a worker's part of checkpoints; one at a time, in a thread."""

    def __init__(
        self, run: Place, *, cfg: TrainConfig, ranks: Ranks, sitting: int, tell: Tell
    ) -> None:
        """Begin to save.

        Args:
            run: The run folder.
            cfg: The run, on as many workers as there are.
            ranks: This worker among the others.
            sitting: Number of the present one; part of every folder's name.
            tell: Takes what a person should read.
        """
        self._run, self._cfg, self._ranks, self._sitting = run, cfg, ranks, sitting
        self._tell = tell
        environment = read_file(run / ENVIRONMENT) if ranks.rank == 0 else None  # rank 0 tells
        self._store = (
            {k: json.loads(environment)[k] for k in StoreFacts._fields} if environment else {}
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._written_s: float | None = None
        self._failed: Place | None = None  # what this rank could not write

    def save(self, engine: Engine, *, state: dict[str, Any], wait: bool = False) -> Saved:
        """Take a snapshot and have it written. Collective.

        Waits for the one before. That one cannot be written is told, and training goes on: the
        checkpoints before it are as they were.

        Args:
            engine: What is saved.
            state: JSON facts, among them `step`.
            wait: Until every rank's part is written.
        """
        began = time.perf_counter()
        self.settle()
        files = {**engine.snapshot(), name_of(self._ranks.rank): random_state()}
        if self._ranks.rank == 0:
            files[checkpoint.STATE] = json.dumps(self._facts() | state, indent=1).encode()
        step = int(state["step"])
        folder = checkpoint.folder_of(self._run, step=step, sitting=self._sitting)
        self._writing = self._thread.submit(self._write, folder, files, step)
        if wait or not self._cfg.save.background:
            self.settle()
        return Saved(time.perf_counter() - began, self._written_s)

    def wait(self) -> None:
        """Until this rank's last snapshot is written, or could not be."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Wait, and leave what has to stay. Collective."""
        self.settle()
        if self._ranks.rank == 0:
            self._tidy()
        self._thread.shutdown()

    def settle(self) -> None:
        """Wait until no rank writes; what only some could write is removed. Collective."""
        self.wait()
        failed = [place for place in self._ranks.each(self._failed) if place is not None]
        self._failed = None
        if failed and self._ranks.rank == 0:
            self._tidy(failed[0])

    def _facts(self) -> dict[str, Any]:
        cfg = self._cfg
        return {
            "parts": self._ranks.size,
            "sitting": self._sitting,
            "zero_stage": cfg.engine.zero_stage,
            "precision": cfg.engine.precision,
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "store": self._store,
            "config": cfg.model_dump(mode="json"),
        }

    def _write(self, folder: Place, files: dict[str, bytes], step: int) -> None:
        began = time.perf_counter()
        try:
            flush(self._run)  # a checkpoint does not come before the records of its steps
            checkpoint.write_part(folder, files, rank=self._ranks.rank)
        except (OSError, UserError) as error:
            self._failed = folder
            checkpoint.remove_part(folder, files)
            line = (
                f"step {step}: no checkpoint, {error}; training goes on, and the checkpoints "
                f"before this one are as they were"
            )
            self._tell(Event("checkpoint_failed", line, {"step": step, "reason": str(error)}))
        else:
            self._written_s = time.perf_counter() - began
        if self._ranks.rank == 0:
            self._tidy()

    def _tidy(self, failed: Place | None = None) -> None:
        """Remove what need not stay; the newest complete one is never among it.

        Args:
            failed: A folder that will not be complete.
        """
        try:
            if failed is not None:
                checkpoint.remove(failed)
            found = checkpoint.complete(self._run)
            for old in checkpoint.surplus(found, keep=self._cfg.save.keep):
                checkpoint.remove(old.place)
        except (OSError, UserError) as error:
            line = f"old checkpoints stay, {error}; the next save tries again"
            self._tell(Event("checkpoint_stays", line, {"reason": str(error)}))
