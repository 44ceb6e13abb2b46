"""What a run leaves for people: metrics.jsonl, TensorBoard, pictures, events, summary, progress.

An object store has it a few seconds late; `flush` waits for it.
"""

from __future__ import annotations

import io
import json
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from glmae_ray.beside import beside
from glmae_ray.journal import EVENTS, METRICS, LineFiles, Record, by_time, read_lines
from glmae_ray.paths import Place, publish
from glmae_ray.pictures import draw_panels
from glmae_ray.scribe import Board, scribe_of
from glmae_ray.terminal import follow

__all__ = [
    *("EVENTS", "METRICS", "Record", "RunLog", "flush", "progress", "read_events"),
    *("read_metrics", "summarise", "write_event"),
]

FLUSH_S = 10.0  # that a checkpoint may wait for records; a store that answers takes less than one
CLOSE_S = 60.0  # that the end of a run may wait
# Parts of a run that follow one another.
_SECONDS = ("first_batch_s", "interval_s", "aside_s")


class RunLog:
    """Writes one record a logged step; opened by rank 0 only."""

    def __init__(self, run: Place, *, step: int, tensorboard: bool) -> None:
        """Continue after `step`; records beyond it belong to work that was lost and go.

        Args:
            run: The run folder.
            step: Steps that the resumed checkpoint had done.
            tensorboard: Also write event files to RUN/tensorboard.

        Raises:
            UserError: The object store refuses to tell what was there.
            OSError: The disk or the object store fails.
        """
        self._scribe = scribe_of(run)
        kept = [r for r in read_metrics(run) if r["step"] <= step and step > 0]
        self._metrics = self._scribe.rewrite(METRICS, kept)
        self._board = Board(run, step=step) if tensorboard else None

    def write(self, record: Record) -> None:
        """Append a record; nested names become `group/name` in TensorBoard."""
        self._metrics.append(record)
        if self._board is not None:
            self._board.write(record)

    def picture(self, name: str, panels: dict[str, np.ndarray], *, step: int) -> None:
        """Write RUN/pictures/NAME_STEP.png: panels side by side, axial above coronal slices.

        Args:
            name: The kind of view.
            panels: Title -> (Z, Y, X) volume in [0, 1], NaN where masked.
            step: Steps done.
        """
        figure, png = draw_panels(panels), io.BytesIO()
        figure.savefig(png, dpi=100, format="png")
        self._scribe.write_file(f"pictures/{name}_{step:07d}.png", png.getvalue())
        if self._board is not None:
            self._board.picture(f"pictures/{name}", figure, step=step)

    def flush(self, *, timeout_s: float = FLUSH_S) -> bool:
        """Have all that was written in the store, as before a checkpoint counts; whether it is."""
        return self._scribe.flush(timeout_s=timeout_s)

    def close(self, *, timeout_s: float = CLOSE_S) -> bool:
        """End; whether all that was written is in the store."""
        if self._board is not None:
            self._board.close()
        return self._scribe.flush(timeout_s=timeout_s)


def flush(run: Place, *, timeout_s: float = FLUSH_S) -> bool:
    """Wait until an object store has what this process wrote of a run; whether it has.

    Every process calls it before it ends, and before what it wrote has to be found by others.
    """
    return scribe_of(run).flush(timeout_s=timeout_s)


class Told(Protocol):
    """What a person should read; see `glmae_ray/watch.py`."""

    @property
    def kind(self) -> str: ...
    @property
    def line(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...


def write_event(run: Place, event: Told, *, rank: int) -> None:
    """Append an event to the run's; workers may write at the same time."""
    scribe = scribe_of(run)
    scribe.rank = rank
    scribe.write_event({"event": event.kind, "rank": rank, "line": event.line, **event.facts})


def read_events(run: Place) -> list[Record]:
    """All events of a run, of all who wrote them, by time.

    Raises:
        UserError: The object store refuses.
        OSError: It fails.
    """
    return by_time(LineFiles(run, EVENTS).read().values())


def read_metrics(run: Place) -> list[Record]:
    """All records of a run.

    Raises:
        UserError: The object store refuses.
        OSError: It fails.
    """
    return read_lines(run / METRICS)


def summarise(run: Place) -> Record:
    """Write RUN/summary.json from the records of all sittings of the run, and return it."""
    records = read_metrics(run)
    trained = [r for r in records if "loss" in r]
    train_s = sum(r["interval_s"] for r in trained)
    summary = {
        "steps": records[-1]["step"],
        "samples": records[-1]["samples"],
        "wall_s": sum(r.get(name, 0.0) for r in records for name in _SECONDS),
        "samples_per_s": sum(r["interval_samples"] for r in trained) / train_s,
        "data_wait_share": sum(r["data_wait_s"] for r in trained) / train_s,
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in trained),
        "skipped_steps": sum(r.get("skipped_steps", 0) for r in trained),
        "loss": {"first": trained[0]["loss"], "last": trained[-1]["loss"]},
    }
    held_out = [r["val_reconstruction"] for r in records if "val_reconstruction" in r]
    if held_out:
        summary["val_reconstruction"] = {
            "first": held_out[0]["loss"],
            "last": held_out[-1]["loss"],
            "best": min(figures["loss"] for figures in held_out),
            "trivial": held_out[-1]["trivial"],
            "r2": held_out[-1]["r2"],
        }
    if vals := [(r["val"]["mean"], r["step"]) for r in records if "val" in r]:
        best, best_step = max(vals, key=lambda pair: (pair[0], -pair[1]))
        summary["val"] = {"last": vals[-1][0], "best": best, "best_step": best_step}
    publish(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def progress(run: Place, *, steps: int) -> AbstractContextManager[None]:
    """Show the records of a run as they are written: a bar on a terminal, else plain lines."""
    return beside(lambda stop: follow(run, steps, stop), name="progress")
