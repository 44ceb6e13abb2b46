"""VolumeIndex: the Parquet table of cases, and the quarantine table; the only door to pyarrow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from glmae_ray.errors import UserError
from glmae_ray.paths import Place, publish, read_file, to_place

INGEST_VERSION = 2  # of what ingest computes; goes up when a row would come out different

_TRIPLE = pa.list_(pa.int32(), 3)
_AFFINE = pa.list_(pa.float64(), 16)
_PER_CHANNEL = pa.list_(pa.float64())

SCHEMA = pa.schema(
    [
        ("case_id", pa.string()),
        ("subject", pa.string()),
        ("split", pa.string()),  # train, val, test
        ("modality", pa.string()),
        ("channels", pa.int32()),
        ("shape", _TRIPLE),  # level 0, (Z, Y, X)
        ("spacing", pa.list_(pa.float64(), 3)),  # level 0, (Z, Y, X) in mm
        ("affine", _AFFINE),  # row by row: canonical index (z, y, x, 1) to RAS+ mm
        ("source_affine", _AFFINE),  # row by row: file index (x, y, z, 1) to RAS+ mm
        ("source_shape", _TRIPLE),  # file axes (X, Y, Z)
        ("dtype", pa.string()),
        ("minimum", _PER_CHANNEL),  # this and the next six: intensities inside the
        ("maximum", _PER_CHANNEL),  # foreground box, in stored units
        ("p0_5", _PER_CHANNEL),
        ("p50", _PER_CHANNEL),
        ("p99_5", _PER_CHANNEL),
        ("mean", _PER_CHANNEL),
        ("std", _PER_CHANNEL),
        ("box_start", _TRIPLE),  # foreground box in level-0 voxels (Z, Y, X)
        ("box_stop", _TRIPLE),  # exclusive
        ("factors", pa.list_(_TRIPLE)),  # per level: level-0 voxels per voxel (Z, Y, X)
        ("structures", pa.map_(pa.string(), pa.int64())),  # labels present: voxels
        ("annotated", pa.list_(pa.string())),  # structures looked for; null: nobody says
        ("filled", pa.int64()),  # voxels that were NaN or infinite and were given a value
        ("acquisition", pa.map_(pa.string(), pa.string())),  # technical facts, from DICOM
        ("source", pa.string()),  # location of the first file
        ("source_hash", pa.string()),  # SHA-256 of the files of images and label map, in order
        ("source_stamp", pa.string()),  # paths, sizes, times: equal means not worth opening
        ("voxel_hash", pa.string()),  # SHA-256 of shape and voxels of level 0
        ("reader", pa.string()),
        ("ingest_version", pa.int32()),
        ("options", pa.map_(pa.string(), pa.string())),  # choices that shaped this case
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("stamp", pa.string()),  # of files and choices: equal means not worth another try
        ("voxel_hash", pa.string()),  # of a duplicate
    ]
)
FILES_SCHEMA = pa.schema(
    [
        ("location", pa.string()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("outcome", pa.string()),  # case, quarantined, not_an_image
        ("case_id", pa.string()),
        ("dicom", pa.string()),  # JSON of the header's facts: not worth opening again
    ]
)

_INDEX, _QUARANTINE, _FILES = "index.parquet", "quarantine.parquet", "files.parquet"
_MAPS = ("structures", "options", "acquisition")


@dataclass(frozen=True, eq=False)
class VolumeIndex:
    """The cases of a store, sorted by case id; what a plan needs without opening the store.

    Attributes:
        rows: Table with the columns of `SCHEMA`.
    """

    rows: pa.Table

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> VolumeIndex:
        """Build an index of rows given as dicts (JSON values; maps as dicts)."""
        ordered = sorted(records, key=lambda record: record["case_id"])
        return cls(pa.Table.from_pylist([_with_pairs(row) for row in ordered], schema=SCHEMA))

    @classmethod
    def read(cls, store_path: str | Place, *, missing_ok: bool = False) -> VolumeIndex:
        """Read the index of a store; with `missing_ok`, one that is not there yet has no cases.

        Raises:
            UserError: There is no index yet, or no store.
        """
        rows = _read_table(to_place(store_path) / _INDEX, SCHEMA)
        if rows is None and missing_ok:
            return cls.from_records([])
        if rows is None:
            raise UserError(f"store: {store_path} has no {_INDEX}; `glmae ingest` makes it")
        return cls(rows)

    def write(self, store_path: str | Place) -> None:
        """Write the index into a store, in one step for whoever reads it."""
        _write_table(self.rows, to_place(store_path) / _INDEX)

    def __len__(self) -> int:
        """Number of cases."""
        return self.rows.num_rows

    def select(self, *, split: str | None = None, modality: str | None = None) -> VolumeIndex:
        """The cases of a split, of a modality, or of both."""
        rows = self.rows
        for name, value in (("split", split), ("modality", modality)):
            if value is not None:
                rows = rows.filter(pc.equal(rows[name], value))
        return VolumeIndex(rows)

    def row(self, case_id: str) -> dict[str, Any]:
        """One case as a dict.

        Raises:
            KeyError: No such case.
        """
        return _with_dicts(self.rows.slice(self._positions[case_id], 1).to_pylist()[0])

    def records(self) -> list[dict[str, Any]]:
        """All cases as dicts, the form that `from_records` takes."""
        return [_with_dicts(row) for row in self.rows.to_pylist()]

    def case_ids(self) -> list[str]:
        """Ids in row order."""
        return self.rows["case_id"].to_pylist()

    def shapes(self) -> NDArray[np.int64]:
        """Level-0 sides in voxels, (N, 3) as (Z, Y, X)."""
        return self._numbers("shape", np.int64).reshape(-1, 3)

    def spacings(self) -> NDArray[np.float64]:
        """Level-0 spacing in mm, (N, 3) as (Z, Y, X)."""
        return self._numbers("spacing", np.float64).reshape(-1, 3)

    def boxes(self) -> NDArray[np.int64]:
        """Foreground boxes in level-0 voxels, (N, 2, 3): start and stop (exclusive), (Z, Y, X)."""
        ends = [self._numbers(name, np.int64).reshape(-1, 3) for name in ("box_start", "box_stop")]
        return np.stack(ends, axis=1)

    def factors(self) -> NDArray[np.int64]:
        """Level-0 voxels per voxel of each pyramid level, (N, levels, 3) as (Z, Y, X).

        Every case of a store has the same number of levels.
        """
        numbers = self._numbers("factors", np.int64)
        return numbers.reshape(len(self), -1, 3) if len(self) else numbers.reshape(0, 0, 3)

    def column(self, name: str) -> NDArray[Any]:
        """A column of one number or word a case, (N,); words as objects."""
        return self.rows[name].to_numpy()

    def first_channel(self, name: str) -> NDArray[np.float64]:
        """A column of intensities (`p50`, ...) in channel 0, (N,)."""
        return pc.list_element(self.rows[name], 0).to_numpy()

    def entries(self, name: str) -> dict[str, NDArray[Any]]:
        """Keys of a column of maps, sorted, each with its values in the cases that have it."""
        maps = self.rows[name].combine_chunks()
        words = maps.keys.dictionary_encode()
        codes = words.indices.to_numpy()
        ordered = maps.items.to_numpy(zero_copy_only=False)[np.argsort(codes, kind="stable")]
        parts = np.split(ordered, np.cumsum(np.bincount(codes)))[:-1]  # behind the last cut: none
        return dict(sorted(zip(words.dictionary.to_pylist(), parts, strict=True)))

    def fingerprint(self) -> str:
        """SHA-256 over what a training run depends on: ids, voxels and splits."""
        names = ("case_id", "voxel_hash", "split")
        columns = [self.rows[name].to_pylist() for name in names]
        lines = sorted("\t".join(row) for row in zip(*columns, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {case_id: number for number, case_id in enumerate(self.case_ids())}

    def _numbers(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        values = self.rows[name].combine_chunks()
        while not pa.types.is_primitive(values.type):
            values = values.flatten()
        return values.to_numpy(zero_copy_only=False).astype(dtype)


def assign_split(subject: str, splits: Sequence[float]) -> str:
    """Where a person goes: train, val or test, from the name alone, so that it never changes.

    Args:
        subject: The person.
        splits: Shares of train, val and test, summing to 1.
    """
    digest = hashlib.sha256(subject.encode(errors="surrogateescape")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    train, val, _ = splits
    if place < train:
        return "train"
    return "val" if place < train + val else "test"


def read_quarantine(store_path: str | Place) -> list[dict[str, Any]]:
    """Rejected sources, as rows of `QUARANTINE_SCHEMA`; none if there is no table."""
    return _read_rows(store_path, _QUARANTINE, QUARANTINE_SCHEMA)


def write_quarantine(store_path: str | Place, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the quarantine table of a store in one step, rows sorted by source."""
    _write_rows(rows, store_path, _QUARANTINE, QUARANTINE_SCHEMA)


def read_files(store_path: str | Place) -> list[dict[str, Any]]:
    """Every file that was ever given to a store, as rows of `FILES_SCHEMA`."""
    return _read_rows(store_path, _FILES, FILES_SCHEMA)


def write_files(store_path: str | Place, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table of files of a store in one step, rows sorted by location."""
    _write_rows(rows, store_path, _FILES, FILES_SCHEMA)


def read_rows(raw: bytes) -> list[dict[str, Any]]:
    """Rows of any Parquet file, given its bytes.

    Raises:
        ValueError: It is no Parquet file.
    """
    return pq.read_table(pa.BufferReader(raw)).to_pylist()


def _read_rows(store_path: str | Place, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    table = _read_table(to_place(store_path) / name, schema)
    return [] if table is None else table.to_pylist()


def _write_rows(
    rows: Iterable[Mapping[str, Any]], store_path: str | Place, name: str, schema: pa.Schema
) -> None:
    """Write rows sorted by the first column, so that their order tells nothing of the run."""
    ordered = sorted((dict(row) for row in rows), key=lambda row: row[schema.names[0]])
    _write_table(pa.Table.from_pylist(ordered, schema=schema), to_place(store_path) / name)


def _read_table(place: Place, schema: pa.Schema) -> pa.Table | None:
    raw = read_file(place)
    return None if raw is None else pq.read_table(pa.BufferReader(raw), schema=schema)


def _write_table(table: pa.Table, place: Place) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    publish(place, sink.getvalue().to_pybytes())


def _with_pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Maps as pyarrow takes them, in an order that does not depend on who made the row."""
    return {**row, **{name: sorted(row[name].items()) for name in _MAPS}}


def _with_dicts(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, **{name: dict(row[name]) for name in _MAPS}}
