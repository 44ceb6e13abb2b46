"""Manifests: a CSV or Parquet table that names the cases of an archive, a row each.

    case_id,image,label,subject,split,modality,structures,label_names
    p1_pre,ct/p1_pre.nii.gz,seg/p1_pre.nii.gz,p1,train,CT,Liver|Spleen,Liver=1|Spleen=2|Kidney=3

`case_id` and `image` have to be there. Locations are relative to the manifest, absolute, or URLs;
`image` is a file, a folder that holds one DICOM series, or one such per channel. Several values
in a cell are separated by `|` (or are a list, in Parquet). `structures` says which structures
were annotated in the case, where not all of `label_names` were.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmae_ray.errors import UserError
from glmae_ray.paths import is_url, to_place
from glmae_ray.store.index import read_rows
from glmae_ray.store.items import SourceImage, SourceItem
from glmae_ray.store.readers import suffix_of

SUFFIXES = (".csv", ".parquet")
_NEEDED = ("case_id", "image")
_COLUMNS = (*_NEEDED, "label", "subject", "split", "modality", "structures", "label_names")
_SPLITS = ("train", "val", "test")
_SEPARATORS = ",;\t"
_TOLD = 20  # mistakes named one by one

Row = Mapping[str, Any]


def manifest_items(location: str) -> list[SourceItem]:
    """The cases that a manifest names, in its order.

    An image without a suffix that is known has reader "": a folder or a file to be looked at.

    Raises:
        UserError: It cannot be read, or rows are wrong: a line each.
    """
    rows = _rows(location)
    lines: list[str] = []
    if not rows:
        raise UserError(f"source: {location} has no rows")
    if missing := [name for name in _NEEDED if name not in rows[0]]:
        has = ", ".join(str(name) for name in rows[0])
        raise UserError(f"source: {location} has no column {' and '.join(missing)}; it has {has}")
    if unused := [str(name) for name in rows[0] if name not in _COLUMNS]:
        print(f"source: {location}: columns that are not used: {', '.join(unused)}")
    items: list[SourceItem] = []
    seen: dict[str, dict[str, int]] = {name: {} for name in _NEEDED}
    for number, row in enumerate(rows, start=1):
        wrong = list(_mistakes(row, seen))
        lines += [f"source: {location}, row {number}: {line}" for line in wrong]
        for name in _NEEDED:
            seen[name].setdefault("".join(_several(row, name)[:1]), number)
        if not wrong:
            items.append(_item(row, folder=location.rpartition("/")[0]))
    if lines:
        more = [f"source: {len(lines) - _TOLD} more mistakes"] if len(lines) > _TOLD else []
        raise UserError(*lines[:_TOLD], *more)
    return items


def _rows(location: str) -> list[dict[str, Any]]:
    try:
        raw = to_place(location).read_bytes()
        if location.lower().endswith(".parquet"):
            return read_rows(raw)
        text = raw.decode("utf-8-sig")
        header = text.partition("\n")[0]
        separator = max(_SEPARATORS, key=header.count)
        table = io.StringIO(text, newline="")
        return list(csv.DictReader(table, delimiter=separator, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"source: {location} is no table that can be read ({reason})") from None


def _mistakes(row: Row, seen: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines = [f"{name} is empty" for name in _NEEDED if not _several(row, name)]
    for name in _NEEDED:
        first = "".join(_several(row, name)[:1])
        if first in seen[name]:
            lines.append(f"{name} {first!r} is that of row {seen[name][first]} too")
    split = _text(row, "split")
    if split and split not in _SPLITS:
        lines.append(f"split {split!r} is none of {', '.join(_SPLITS)}")
    if None in row:
        lines.append(f"{len(row[None])} more cells than the header has columns")  # type: ignore[index]
    return lines + list(_label_mistakes(row))


def _label_mistakes(row: Row) -> Iterator[str]:
    parts = [pair.partition("=") for pair in _several(row, "label_names")]
    wrong = ["".join(part) for part in parts if not part[2].strip().isdecimal()]
    yield from (f"label_names {pair!r} is not NAME=NUMBER" for pair in wrong)
    names, values = [part[0].strip() for part in parts], [part[2].strip() for part in parts]
    if len(set(names)) < len(names) or len(set(values)) < len(values):
        yield "label_names has a name or a number twice"
    unknown = [name for name in _several(row, "structures") if names and name not in names]
    yield from (f"structures {name!r} is not in label_names" for name in unknown)


def _item(row: Row, *, folder: str) -> SourceItem:
    case_id, label = _text(row, "case_id"), _text(row, "label")
    pairs = [pair.partition("=") for pair in _several(row, "label_names")]
    names = {name.strip(): int(value) for name, _, value in pairs}
    stated = _several(row, "structures")
    known = tuple(name for name, value in names.items() if value) or None
    return SourceItem(
        case_id=case_id,
        channels=tuple(_image(place, folder) for place in _several(row, "image")),
        label=_image(label, folder) if label else None,
        subject=_text(row, "subject") or case_id,
        split=_text(row, "split") or None,
        modality=_text(row, "modality") or None,
        label_names=names,
        annotated=(tuple(stated) or known) if label else None,
    )


def _image(name: str, folder: str) -> SourceImage:
    location = name if is_url(name) or name.startswith("/") else posixpath.join(folder, name)
    if not is_url(location):
        location = posixpath.normpath(location)
    return SourceImage(suffix_of(location) or "", (location.rstrip("/"),))


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None else str(value).strip()


def _several(row: Row, name: str) -> list[str]:
    value = row.get(name)
    parts: Sequence[Any] = value if isinstance(value, list) else _text(row, name).split("|")
    return [str(part).strip() for part in parts if str(part).strip()]
