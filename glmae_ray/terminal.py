"""A run on the terminal: its records and events as they are written, a bar or plain lines."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from glmae_ray.errors import UserError
from glmae_ray.journal import EVENTS, METRICS, LineFiles, Record, by_time
from glmae_ray.paths import Place

_PLAIN_LINE_S = 10.0
_DISK_S, _STORE_S = 1.0, 5.0  # between two looks at a run
_SHARE = 0.1  # of the time that looking may take: long runs have long files


def follow(run: Place, steps: int, stop: threading.Event) -> None:
    """Show what is new in a run until it is told to stop, and then once more.

    Args:
        run: The run folder, whose store or disk may fail for a while.
        steps: That the run will have.
        stop: Tells it.
    """
    show = _Bar(steps) if sys.stderr.isatty() else _Lines(steps)
    look, failed = _Look(run), False
    while True:
        last_look, began = stop.is_set(), time.monotonic()
        try:
            events, record = look.news()
            failed = False
        except (OSError, UserError) as error:
            events, record = [], None
            if not failed:
                print(f"progress: {error}; looking again", file=sys.stderr, flush=True)
            failed = True
        for event in events:
            if event["event"] != "stand_in":  # thousands of which there may be
                print(event["line"], file=sys.stderr, flush=True)
        if record is not None:
            show.update(record)
        if last_look:
            show.close()
            return
        least = _DISK_S if isinstance(run, Path) else _STORE_S
        stop.wait(max(least, (time.monotonic() - began) / _SHARE))


class _Look:
    """What is new in a run since the last look."""

    def __init__(self, run: Place) -> None:
        """Look from now on; what an earlier sitting told was told then."""
        self._events, self._metrics = LineFiles(run, EVENTS), LineFiles(run, METRICS)
        self._told: dict[str, int] | None = None
        self._seen = 0

    def news(self) -> tuple[list[Record], Record | None]:
        """New events, and the newest record of training if it is new.

        Raises:
            UserError: The object store refuses.
            OSError: It fails.
        """
        files = self._events.read()
        told = self._told if self._told is not None else _lengths(files)
        events = by_time([records[told.get(name, 0) :] for name, records in files.items()])
        self._told = _lengths(files)
        lists = self._metrics.read().values()
        records = [r for found in lists for r in found if "loss" in r]
        is_new = len(records) > self._seen
        self._seen = max(self._seen, len(records))
        return events, records[-1] if is_new else None


def _lengths(files: dict[str, list[Record]]) -> dict[str, int]:
    return {name: len(records) for name, records in files.items()}


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
