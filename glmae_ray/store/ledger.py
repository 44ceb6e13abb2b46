"""Ledger: what an ingest has, still needs and has rejected; survives a kill at any moment."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glmae_ray.config import UserError
from glmae_ray.store.index import (
    VolumeIndex,
    assign_split,
    read_quarantine,
    write_quarantine,
)
from glmae_ray.store.intake import Pending, Taken, options_of, source_hash, stamp_of
from glmae_ray.store.scan import ReadError
from glmae_ray.store.sources import SourceItem, other_id, printable
from glmae_ray.store.zarr_store import VolumeStore

Row = Mapping[str, Any]


class Ledger:
    """The tables of a store while items are taken in.

    Whatever the order in which cases finish, the same items leave the same tables: of cases with
    equal voxels the one stays that is not among the items, else the first of the items.

    Attributes:
        pending: Items to take in.
    """

    def __init__(
        self, store: VolumeStore, items: Sequence[SourceItem], *, splits: Sequence[float]
    ) -> None:
        """Read the tables, adopt what a killed ingest left, and find out what is to be done.

        Args:
            store: Where the cases go.
            items: All items of the source, in path order.
            splits: Shares of train, val and test for subjects that the store does not know.
        """
        self._store = store
        stored = _stored_rows(store)
        items = _with_settled_ids(items, stored)
        self._rank = {item.case_id: number for number, item in enumerate(items)}
        self._sources = {item.source for item in items}
        self._rows: dict[str, Row] = {}
        self._first: dict[str, str] = {}  # voxel hash to the case that keeps it
        self._rejected = _still_rejected(store, self._sources)
        todo = [item for item in items if not _is_current(stored.get(item.case_id), item)]
        # A row that may have to change leaves the table first: after a kill in the middle, the
        # case itself says what it became.
        redo = {item.case_id for item in todo}
        self._new: set[str] = set()
        self._old = self._rank.keys() - redo
        for case_id in stored.keys() - redo:
            self._keep(case_id, stored[case_id])
        split_of = _splits(list(self._rows.values()), todo, splits)
        self.pending = [
            Pending(item, split_of[item.subject], stored.get(item.case_id)) for item in todo
        ]

    def add(self, pending: Pending, outcome: Taken | ReadError) -> None:
        """Book what became of an item."""
        case_id = pending.item.case_id
        if isinstance(outcome, Taken):
            (self._new if outcome.is_new else self._old).add(case_id)
            self._keep(case_id, outcome.record)
            return
        self._reject(pending.item.source, outcome.reason, outcome.message)
        if case_id in self._store:
            # What was read from this source before stays: a share that is offline loses nothing.
            self._keep(case_id, self._store.record(case_id))
        else:
            self._store.remove(case_id)

    def save(self) -> None:
        """Write both tables."""
        VolumeIndex.from_records(self._rows.values()).write(self._store.path)
        write_quarantine(self._store.path, self._rejected.values())

    @property
    def ingested(self) -> int:
        """Items that became a case in this run."""
        return len(self._new & self._rows.keys())

    @property
    def already_stored(self) -> int:
        """Items whose case was there before this run."""
        return len(self._old & self._rows.keys())

    @property
    def quarantined(self) -> list[Mapping[str, str]]:
        """Rows of the quarantine table that are about the items."""
        return [row for source, row in sorted(self._rejected.items()) if source in self._sources]

    def __len__(self) -> int:
        """Cases in the store."""
        return len(self._rows)

    def _keep(self, case_id: str, row: Row) -> None:
        rival = self._first.get(row["voxel_hash"], case_id)
        # -1: a case from elsewhere was there before any of the items.
        winner, loser = sorted((rival, case_id), key=lambda name: (self._rank.get(name, -1), name))
        self._first[row["voxel_hash"]] = winner
        self._rows[case_id] = row
        if winner != loser:
            source = self._rows.pop(loser)["source"]
            self._store.remove(loser)
            message = f"{source}: the same voxels as case {winner}; remove one of the two"
            self._reject(source, "duplicate", message)

    def _reject(self, source: str, reason: str, message: str) -> None:
        self._rejected[source] = {
            "source": source,
            "reason": reason,
            "message": printable(message),
        }


def _stored_rows(store: VolumeStore) -> dict[str, Row]:
    """Rows of the published cases: from the index, else (a killed job) from the case itself."""
    try:
        known = {row["case_id"]: row for row in VolumeIndex.read(store.path).records()}
    except UserError:
        known = {}
    return {case_id: known.get(case_id) or store.record(case_id) for case_id in store.cases()}


def _with_settled_ids(items: Sequence[SourceItem], stored: Mapping[str, Row]) -> list[SourceItem]:
    """A source keeps the id that it is stored under; an id that another source has is not taken."""
    id_of = {row["source"]: case_id for case_id, row in stored.items()}
    sources = {item.source for item in items}
    settled = []
    for item in items:
        case_id = id_of.get(item.source, item.case_id)
        row = stored.get(case_id)
        if row is not None and row["source"] != item.source:
            # The same content under another path is the same source, moved.
            moved = row["source"] not in sources and row["source_hash"] == _hash_or_none(item)
            case_id = case_id if moved else other_id(case_id, place=item.source)
        settled.append(replace(item, case_id=case_id))
    return settled


def _hash_or_none(item: SourceItem) -> str | None:
    try:
        return source_hash(item)
    except OSError:
        return None  # reading it will say why


def _is_current(row: Row | None, item: SourceItem) -> bool:
    """Whether a stored case is this item's, as far as can be told without opening files."""
    if row is None:
        return False
    return row["source_stamp"] == stamp_of(item) and row["options"] == options_of(item)


def _still_rejected(store: VolumeStore, retried: Collection[str]) -> dict[str, Mapping[str, str]]:
    """Quarantine rows by source, without the sources tried again and those gone since."""
    rows = {row["source"]: row for row in read_quarantine(store.path)}
    return {
        source: row
        for source, row in rows.items()
        if source not in retried and Path(source).exists()
    }


def _splits(
    kept: Sequence[Row], todo: Sequence[SourceItem], splits: Sequence[float]
) -> dict[str, str]:
    """Split of each subject: the one it has, else the one its source states, else by hash."""
    split_of = {item.subject: assign_split(item.subject, splits) for item in todo}
    split_of |= {item.subject: item.split for item in reversed(todo) if item.split}
    return split_of | {row["subject"]: row["split"] for row in kept}
