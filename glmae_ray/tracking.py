"""What a run leaves for people: metrics.jsonl, TensorBoard, pictures, summary, progress."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glmae_ray.paths import publish
from glmae_ray.pictures import draw_panels

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
_PLAIN_LINE_S = 10.0
# Parts of a run that follow one another.
_SECONDS = ("first_batch_s", "interval_s", "aside_s")

Record = dict[str, Any]


class RunLog:
    """Writes one record a logged step; opened by rank 0 only."""

    def __init__(self, run: Path, *, step: int, tensorboard: bool) -> None:
        """Continue after `step`; records beyond it belong to work that was lost and go.

        Args:
            run: The run folder.
            step: Steps that the resumed checkpoint had done.
            tensorboard: Also write event files to RUN/tensorboard.
        """
        self._run = run
        kept = [json.dumps(r) for r in read_metrics(run) if r["step"] <= step and step > 0]
        publish(run / METRICS, "".join(line + "\n" for line in kept))
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append a record; nested names become `group/name` in TensorBoard."""
        with (self._run / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in _flat(record):
                self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()

    def picture(self, name: str, panels: dict[str, np.ndarray], *, step: int) -> None:
        """Write RUN/pictures/NAME_STEP.png: panels side by side, axial above coronal slices.

        Args:
            name: The kind of view.
            panels: Title -> (Z, Y, X) volume in [0, 1], NaN where masked.
            step: Steps done.
        """
        path = self._run / "pictures" / f"{name}_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        figure = draw_panels(panels)
        figure.savefig(path, dpi=100)
        if self._writer is not None:
            self._writer.add_figure(f"pictures/{name}", figure, step)


class Told(Protocol):
    """What a person should read; see `glmae_ray/watch.py`."""

    @property
    def kind(self) -> str: ...
    @property
    def line(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...


def write_event(run: Path, event: Told, *, rank: int) -> None:
    """Append an event to RUN/events.jsonl; workers may write at the same time."""
    record = {"event": event.kind, "rank": rank, "line": event.line, **event.facts}
    with (run / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_events(run: Path) -> list[Record]:
    """All events of a run, in order; a last line that is not yet complete is left out."""
    return _read_lines(run / EVENTS)


def read_metrics(run: Path) -> list[Record]:
    """All records of a run; a last line that a kill cut short is left out."""
    return _read_lines(run / METRICS)


def _read_lines(path: Path) -> list[Record]:
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def summarise(run: Path) -> Record:
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
    publish(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


@contextmanager
def progress(run: Path, *, steps: int) -> Iterator[None]:
    """Show the records of a run as they are written: a bar on a terminal, else plain lines."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(run: Path, steps: int, stop: threading.Event) -> None:
    show = _Bar(steps) if sys.stderr.isatty() else _Lines(steps)
    seen, told = 0, len(read_events(run))
    while True:
        last_look = stop.is_set()
        for event in read_events(run)[told:]:
            told += 1
            if event["event"] != "stand_in":  # thousands of which there may be
                print(event["line"], file=sys.stderr, flush=True)
        records = [r for r in read_metrics(run) if "loss" in r]
        if len(records) > seen:
            seen = len(records)
            show.update(records[-1])
        if last_look:
            show.close()
            return
        stop.wait(1.0)


class _Bar:
    """A tqdm bar with steps, loss, samples/s and the time left."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def update(self, record: Record) -> None:
        self._bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {record['samples_per_s']:.1f} samples/s", refresh=False
        )
        if self._bar.n == 0:
            self._bar.initial = record["step"]  # steps of an earlier sitting took no time here
        self._bar.update(record["step"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """The same as plain lines, at most one every ten seconds."""

    def __init__(self, steps: int) -> None:
        self._steps, self._printed = steps, 0.0

    def update(self, record: Record) -> None:
        now, step = time.monotonic(), record["step"]
        if now - self._printed < _PLAIN_LINE_S and step < self._steps:
            return
        self._printed = now
        rate = record["interval_steps"] / record["interval_s"]
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - step) / rate))
        print(
            f"step {step}/{self._steps}  loss {record['loss']:.3f}  "
            f"{record['samples_per_s']:.1f} samples/s  {left} left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Nothing to clear."""


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, value
