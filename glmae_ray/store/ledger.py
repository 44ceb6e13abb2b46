"""Ledger: what an ingest has, still needs and has rejected; survives a kill at any moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from glmae_ray.errors import UserError
from glmae_ray.paths import is_url, to_place
from glmae_ray.store.accounts import file_rows
from glmae_ray.store.fetching import local_files
from glmae_ray.store.index import (
    VolumeIndex,
    assign_split,
    read_files,
    read_quarantine,
    write_files,
    write_quarantine,
)
from glmae_ray.store.intake import Choices, Pending, Taken, is_current, options_of, source_hash
from glmae_ray.store.items import SourceItem, other_id, printable
from glmae_ray.store.scan import ReadError
from glmae_ray.store.sources import Sources
from glmae_ray.store.zarr_store import VolumeStore

Row = Mapping[str, Any]

_TOLD = 20  # conflicts named one by one


class Ledger:
    """The tables of a store while items are taken in.

    Whatever the order in which cases finish, the same items leave the same tables: of cases with
    equal voxels the one stays that is not among the items, else the first of the items.

    Attributes:
        pending: Items to take in.
    """

    def __init__(
        self,
        store: VolumeStore,
        sources: Sources,
        *,
        splits: Sequence[float],
        choices: Choices,
    ) -> None:
        """Read the tables, adopt what a killed ingest left, and find out what is to be done.

        Args:
            store: Where the cases go.
            sources: All items of the source, in path order, and what else it holds.
            splits: Shares of train, val and test for subjects that the store does not know.
            choices: How cases are taken in.
        """
        self._store, self._files = store, sources
        stored, adopted = _stored_rows(store)
        self._items = items = _with_settled_ids(sources.items, stored)
        self._rank = {case_id: len(items) for case_id in adopted}
        self._rank |= {item.case_id: number for number, item in enumerate(items)}
        self._attempts = {item.source: _attempt(item, choices) for item in items}
        self._rows: dict[str, Row] = {}
        self._first: dict[str, str] = {}  # voxel hash to the case that keeps it
        todo = [i for i in items if not is_current(stored.get(i.case_id), i, choices)]
        # A row that may have to change leaves the table first: after a kill in the middle, the
        # case itself says what it became.
        redo = {item.case_id for item in todo}
        self._new: set[str] = set()
        self._old = {item.case_id for item in items} - redo
        self._rejected: dict[str, Row] = {}
        for case_id in stored.keys() - redo:
            self._keep(case_id, stored[case_id])
        settled = self._still_rejected()
        todo = [item for item in todo if item.source not in settled or item.case_id in stored]
        for source, error in sources.rejected.items():
            self._reject(printable(source), error.reason, error.message)
        split_of = _splits(list(stored.values()), items, splits)
        self.pending = [
            Pending(item, split_of[item.subject], stored.get(item.case_id)) for item in todo
        ]

    def add(self, pending: Pending, outcome: Taken | ReadError) -> None:
        """Book what became of an item."""
        case_id, source = pending.item.case_id, pending.item.source
        if isinstance(outcome, Taken):
            (self._new if outcome.is_new else self._old).add(case_id)
            self._rejected.pop(source, None)
            self._keep(case_id, outcome.record)
            return
        self._reject(source, outcome.reason, outcome.message)
        if case_id in self._store:
            # What was read from this source before stays: a share that is offline loses nothing.
            self._keep(case_id, self._store.record(case_id))
        else:
            self._store.remove(case_id)

    def save(self) -> None:
        """Write the tables of cases and of quarantine."""
        VolumeIndex.from_records(self._rows.values()).write(self._store.path)
        write_quarantine(self._store.path, map(self._told, self._rejected.values()))

    def save_files(self, *, secret: str) -> None:
        """Write what became of every file so far, and what looking into it has shown.

        Args:
            secret: Name of the salt with which people were hashed.
        """
        kept = {row["location"]: row for row in read_files(self._store.path)}
        rows = file_rows(self._files, self._items, self._rows, self._rejected, secret=secret)
        write_files(self._store.path, (kept | {row["location"]: row for row in rows}).values())

    @property
    def ingested(self) -> int:
        """Items that became a case in this run."""
        return len(self._new & self._rows.keys())

    @property
    def already_stored(self) -> int:
        """Items whose case was there before this run."""
        return len(self._old & self._rows.keys())

    @property
    def quarantined(self) -> list[Row]:
        """Rows of the quarantine table that are about this source."""
        about = self._attempts.keys() | {printable(place) for place in self._files.rejected}
        rows = [row for source, row in sorted(self._rejected.items()) if source in about]
        return list(map(self._told, rows))

    def __len__(self) -> int:
        """Cases in the store."""
        return len(self._rows)

    def _keep(self, case_id: str, row: Row) -> None:
        rival = self._first.get(row["voxel_hash"], case_id)
        # -1: a case from elsewhere was there before any of the items. One that a killed job left
        # there, which nobody has seen yet, comes after them.
        winner, loser = sorted((rival, case_id), key=lambda name: (self._rank.get(name, -1), name))
        self._first[row["voxel_hash"]] = winner
        self._rows[case_id] = row
        if winner != loser:
            source = self._rows.pop(loser)["source"]
            self._store.remove(loser)
            self._reject(source, "duplicate", "", voxel_hash=row["voxel_hash"])

    def _reject(self, source: str, reason: str, message: str, voxel_hash: str = "") -> None:
        self._rejected[source] = {
            "source": source,
            "reason": reason,
            "message": printable(message),
            "stamp": self._attempts.get(source, ""),
            "voxel_hash": voxel_hash,
        }

    def _told(self, row: Row) -> Row:
        """A row of the quarantine table with its message: which twin stays is known in the end."""
        if row["reason"] != "duplicate" or row["voxel_hash"] not in self._first:
            return row
        winner = self._first[row["voxel_hash"]]
        message = f"{row['source']}: the same voxels as case {winner}; remove one of the two"
        return {**row, "message": message}

    def _still_rejected(self) -> set[str]:
        """Keep quarantine rows that still hold; return the items that need no other try."""
        settled = set()
        seen = _with_folders(self._files.files)
        for row in read_quarantine(self._store.path):
            source = row["source"]
            if source in self._rejected:
                continue
            if source in self._attempts:
                if not self._is_settled(row):
                    continue
                settled.add(source)
            elif source in seen or not _is_there(source):
                continue
            self._rejected[source] = row
        return settled

    def _is_settled(self, row: Row) -> bool:
        """Whether trying the same files in the same way again would end the same."""
        if row["reason"] == "unreadable":  # perhaps a share was offline
            return False
        is_won = row["reason"] != "duplicate" or row["voxel_hash"] in self._first
        return is_won and row["stamp"] == self._attempts[row["source"]]


def _attempt(item: SourceItem, choices: Choices) -> str:
    """What an item's rejection depends on: its files, its row in a manifest, the choices."""
    facts = [item.stamp, json.dumps(options_of(item, choices)), repr(choices), item.case_id]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _with_folders(places: Iterable[str]) -> set[str]:
    """Locations, and all folders that hold them."""
    seen: set[str] = set()
    for place in places:
        while place and place not in seen:
            seen.add(place)
            place = place.rpartition("/")[0]
    return seen


def _is_there(source: str) -> bool:
    return is_url(source) or to_place(source).exists()


def _stored_rows(store: VolumeStore) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Rows of the published cases, and those whose row a killed job left in the case only."""
    index = VolumeIndex.read(store.path, missing_ok=True)
    known = {row["case_id"]: row for row in index.records()}
    cases = store.cases()
    rows = {case_id: known.get(case_id) or store.record(case_id) for case_id in cases}
    return rows, set(cases) - known.keys()


def _with_settled_ids(items: Sequence[SourceItem], stored: Mapping[str, Row]) -> list[SourceItem]:
    """A source keeps the id that it is stored under; an id that another source has is not taken."""
    id_of = {row["source"]: case_id for case_id, row in stored.items()}
    sources = {item.source for item in items}
    return [_settled(item, id_of, sources, stored) for item in items]


def _settled(
    item: SourceItem,
    id_of: Mapping[str, str],
    sources: Collection[str],
    stored: Mapping[str, Row],
) -> SourceItem:
    case_id = id_of.get(item.source, item.case_id)
    row = stored.get(case_id)
    if row is not None and row["source"] not in map(printable, item.locations):
        # The same content under another path is the same source, moved.
        moved = row["source"] not in sources and row["source_hash"] == _hash_or_none(item)
        case_id = case_id if moved else other_id(case_id, place=item.source)
    return replace(item, case_id=case_id)


def _hash_or_none(item: SourceItem) -> str | None:
    try:
        with local_files(item.locations) as local:
            return source_hash(item, local)
    except (OSError, ReadError):
        return None  # reading it will say why


def _splits(
    stored: Sequence[Row], items: Sequence[SourceItem], splits: Sequence[float]
) -> dict[str, str]:
    """Split of each subject: the one it has, else the one its source states, else by hash.

    Raises:
        UserError: A source states a split that the subject cannot have: it has another.
    """
    split_of = {item.subject: assign_split(item.subject, splits) for item in items}
    split_of |= {item.subject: item.split for item in reversed(items) if item.split}
    split_of |= {row["subject"]: row["split"] for row in stored}
    lines = [
        f"source: {item.source} says {item.split}, but its subject {item.subject} is in "
        f"{split_of[item.subject]}; a person stays in one split: a manifest can tell people apart"
        for item in items
        if item.split not in (None, split_of[item.subject])
    ]
    if lines:
        more = [f"source: {len(lines) - _TOLD} more such"] if len(lines) > _TOLD else []
        raise UserError(*lines[:_TOLD], *more)
    return split_of
