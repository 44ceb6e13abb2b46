"""Records as lines of JSON in files that grow.

A file on a disk is appended to. An object store cannot append: its file is published whole, again
and again, by the one process that writes it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glmae_ray.outbox import Outbox, Tell
from glmae_ray.paths import Place, read_file, stamps

Record = dict[str, Any]

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SUFFIX = ".jsonl"


class FileLines:
    """A file on a disk; what it does not take, as when the disk is full, waits for the next."""

    def __init__(self, path: Path, tell: Tell) -> None:
        """Append to `path`; `tell` takes `late_write` and `written_again`."""
        self._path, self._tell = path, tell
        self._waits = bytearray(b"" if _ends_whole(path) else b"\n")
        self._fails = False
        self._lock = threading.RLock()  # what is told may be appended here

    def append(self, record: Record) -> None:
        """Write a record, and before it those that wait."""
        with self._lock:
            self._waits += encoded([record])
            try:
                with self._path.open("ab", buffering=0) as file:
                    while self._waits:
                        # A disk that becomes full takes a part; the rest goes on from there.
                        del self._waits[: file.write(self._waits)]
            except OSError as error:
                if not self._fails:
                    self._fails = True
                    line = f"{self._path}: {error.strerror}; it stays in memory until it can be"
                    self._tell("late_write", f"{line} written")
                return
            if self._fails:
                self._fails = False
                self._tell("written_again", f"{self._path}: written again")


class ObjectLines:
    """An object that holds all records so far."""

    def __init__(self, place: Place, outbox: Outbox, *, kept: Iterable[Record] | None) -> None:
        """Begin an object, in place of one that is there.

        Args:
            place: Where; no other process may write it.
            outbox: Publishes it.
            kept: Its first records; None: it is not published before the first is appended.
        """
        self._place, self._outbox = place, outbox
        self._data = bytearray(encoded(kept or []))
        if kept is not None:
            self._put()

    def append(self, record: Record) -> None:
        """Add a record, which the store has a few seconds later."""
        self._data += encoded([record])
        self._put()

    def _put(self) -> None:
        self._outbox.put(self._place, lambda: bytes(self._data))


class LineFiles:
    """Files of lines that are read again only where they have changed."""

    def __init__(self, folder: Place, name: str) -> None:
        """Read a file of a folder, and those of the folder beside it (see `folder_of`)."""
        self._folder, self._name = folder, name
        self._known: dict[str, tuple[str, list[Record]]] = {}

    def read(self) -> dict[str, list[Record]]:
        """All records, by file.

        Raises:
            UserError: The object store refuses.
            OSError: It fails.
        """
        stem = folder_of(self._name)
        for name, stamp in stamps(self._folder, stem).items():
            is_one = name.startswith(f"{stem}/") and name.endswith(SUFFIX)
            if not (is_one or name == self._name):
                continue
            if name not in self._known or self._known[name][0] != stamp:
                self._known[name] = (stamp, read_lines(self._folder / name))
        return {name: records for name, (_, records) in sorted(self._known.items())}


def folder_of(name: str) -> str:
    """Where each writer has an object of its own, in place of a file to which all append."""
    return name.removesuffix(SUFFIX)


def by_time(writers: Iterable[list[Record]]) -> list[Record]:
    """Records of several writers as one list; those of one keep their order, whatever its clock."""
    timed = []
    for records in writers:
        latest = 0.0
        for record in records:
            latest = max(latest, record.get("time", 0.0))
            timed.append((latest, record))
    return [record for _, record in sorted(timed, key=lambda pair: pair[0])]


def read_lines(place: Place) -> list[Record]:
    """Records of a file, none if there is none.

    A line that a kill or a full disk cut short is left out.

    Raises:
        UserError: The object store refuses.
        OSError: It fails.
    """
    *lines, _unfinished = (read_file(place) or b"").split(b"\n")
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _ends_whole(path: Path) -> bool:
    """Whether what comes next begins a line: a kill may have cut the last one short."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except OSError:  # there is none, or an empty one
        return True


def encoded(records: Iterable[Record]) -> bytes:
    """Records as lines."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)
