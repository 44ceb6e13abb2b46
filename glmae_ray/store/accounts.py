"""Accounts: one row a file of the source, with what became of it; and what that saves next time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from glmae_ray.errors import UserError
from glmae_ray.store.dicom_headers import SliceHeader
from glmae_ray.store.items import Found, SourceItem, printable
from glmae_ray.store.sources import Header, Sources

CASE, QUARANTINED, PENDING, NOT_AN_IMAGE = "case", "quarantined", "pending", "not_an_image"


def file_rows(
    sources: Sources,
    items: Iterable[SourceItem],
    cases: Collection[str],
    rejected: Collection[str],
    *,
    secret: str,
) -> Iterator[dict[str, Any]]:
    """Rows of the table of files.

    Args:
        sources: What was found.
        items: Its items, under the ids that they are stored with.
        cases: Ids of the cases in the store.
        rejected: Sources (`SourceItem.source`) that are in quarantine.
        secret: Name of the salt with which people were hashed.
    """
    item_of = {place: item for item in items for place in item.locations}
    for place, found in sources.files.items():
        item = item_of.get(place)
        case_id = None
        if item is not None and item.source not in rejected and item.case_id in cases:
            outcome, case_id = CASE, item.case_id
        elif printable(place) in rejected or (item is not None and item.source in rejected):
            outcome = QUARANTINED
        else:
            outcome = NOT_AN_IMAGE if item is None else PENDING
        yield {
            "location": printable(place),
            "size": found.size,
            "stamp": found.stamp,
            "outcome": outcome,
            "case_id": case_id,
            "dicom": _as_text(sources, place, secret),
        }


def known_headers(rows: Iterable[Mapping[str, Any]], *, secret: str) -> dict[Found, Header]:
    """What files that were looked into are, for those that have not changed since.

    Raises:
        UserError: People in the store were hashed with another salt: they would get other names.
    """
    known: dict[Found, Header] = {}
    for row in rows:
        if row["dicom"] is None:
            continue
        facts = json.loads(row["dicom"])
        if facts is not None and facts[0] != secret:
            raise UserError(
                "store: its people have ids made with another secret; set GLMAE_SUBJECT_SALT to "
                "the one that the store was made with, or ingest into a new store"
            )
        found = Found(row["location"], row["size"], row["stamp"])
        known[found] = None if facts is None else SliceHeader(*facts[1:])
    return known


def _as_text(sources: Sources, place: str, secret: str) -> str | None:
    """JSON of a header; null for "no DICOM"; None where nobody looked, or should look again."""
    header = sources.headers.get(place, ...)
    if header is ... or isinstance(header, Exception):
        return None
    return json.dumps(None if header is None else [secret, *header])
