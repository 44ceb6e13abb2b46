"""What one process writes of a run, so that neither a full disk nor a store that is gone ends it.

On a disk all is written at once, in an object store in the background, a few seconds late. What
cannot be written is told, and waits in memory.
"""

from __future__ import annotations

import atexit
import hashlib
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmae_ray.journal import (
    EVENTS,
    SUFFIX,
    FileLines,
    ObjectLines,
    Record,
    encoded,
    folder_of,
)
from glmae_ray.outbox import Outbox
from glmae_ray.paths import Place, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BOARD_S = 60.0  # between two publications of a file of TensorBoard, which is for the eye


class Scribe:
    """Writes one run for a process; for use by several threads.

    Attributes:
        outbox: What goes to an object store; None on a disk.
        rank: That its events are of.
    """

    def __init__(self, run: Place) -> None:
        """Write nothing yet."""
        self._run, self.rank = run, 0
        self.outbox: Outbox | None = None
        self._events: FileLines | ObjectLines
        if isinstance(run, Path):
            self._events = FileLines(run / EVENTS, self.tell)
            return
        self.outbox = Outbox(self.tell)
        # Of this process alone: what two published would be the one's or the other's.
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}{SUFFIX}"
        self._events = ObjectLines(run / folder_of(EVENTS) / name, self.outbox, kept=None)

    def tell(self, kind: str, line: str) -> None:
        """Tell what befalls writing itself, here and as an event."""
        print(line, file=sys.stderr, flush=True)
        self.write_event({"event": kind, "rank": self.rank, "line": line})

    def write_event(self, record: Record) -> None:
        """Append an event, with the time."""
        self._events.append({"time": round(time.time(), 3), **record})

    def rewrite(self, name: str, kept: list[Record]) -> FileLines | ObjectLines:
        """Begin a file of lines with what it has to keep.

        Raises:
            OSError: The disk fails.
        """
        place = self._run / name
        if self.outbox is not None:
            return ObjectLines(place, self.outbox, kept=kept)
        publish(place, encoded(kept))
        return FileLines(Path(str(place)), self.tell)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file once."""
        place = self._run / name
        if self.outbox is not None:
            self.outbox.put(place, lambda: data, every_s=0.0)
            return
        try:
            publish(place, data)
        except OSError as error:
            self.tell("late_write", f"{place}: {error.strerror}; it is left out")

    def flush(self, *, timeout_s: float) -> bool:
        """Wait for an object store; whether it has all that was written."""
        return self.outbox is None or self.outbox.flush(timeout_s=timeout_s)


_scribes: dict[str, Scribe] = {}  # of this process, by run
_scribes_lock = threading.Lock()


def scribe_of(run: Place) -> Scribe:
    """The one scribe that this process has for a run."""
    with _scribes_lock:
        if str(run) not in _scribes:
            _scribes[str(run)] = Scribe(run)
        return _scribes[str(run)]


class Board:
    """TensorBoard's event files, which grow on a disk, and go from there to an object store."""

    def __init__(self, run: Place, *, step: int) -> None:
        """Write to RUN/tensorboard; what earlier sittings did beyond `step` is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._place, self._scribe, self._is_broken = run / "tensorboard", scribe_of(run), False
        self._here = None if self._scribe.outbox is None else _room_for(run)
        self._writer = SummaryWriter(str(self._here or self._place), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Write the numbers of a record; nested names become `group/name`."""

        def scalars() -> None:
            for name, value in _flat(record):
                self._writer.add_scalar(name, value, record["step"])

        self._try(scalars)
        self.publish()

    def picture(self, name: str, figure: Figure, *, step: int) -> None:
        """Write a figure; it is published with the next record."""
        self._try(lambda: self._writer.add_figure(name, figure, step))

    def publish(self) -> None:
        """Have what was written in its files, and these in the object store."""
        self._try(self._writer.flush)
        if self._here is not None and self._scribe.outbox is not None:
            for path in self._here.iterdir():
                place = self._place / path.name
                self._scribe.outbox.put(place, path.read_bytes, every_s=_BOARD_S)

    def close(self) -> None:
        """Write no more."""
        self.publish()
        self._try(self._writer.close)

    def _try(self, write: Callable[[], Any]) -> None:
        """Use the writer, which fails for good once it has failed."""
        if self._is_broken:
            return
        try:
            write()
        except OSError as error:
            self._is_broken = True
            line = f"{self._place}: {error.strerror}; nothing more comes until the next start"
            self._scribe.tell("late_write", line)


def _room_for(run: Place) -> Path:
    """A new folder on this machine; those go that killed processes left of the run."""
    prefix = f"glmae-tensorboard-{hashlib.sha256(str(run).encode()).hexdigest()[:16]}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, value
