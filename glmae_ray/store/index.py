"""VolumeIndex: the Parquet table of cases, and the quarantine table; the only door to pyarrow.

`schema` holds the columns of its tables and `where` evaluates expressions on them; both belong to
the door and are imported here only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from glmae_ray.errors import UserError
from glmae_ray.paths import Place, publish, read_file, to_place
from glmae_ray.store.schema import FILES_SCHEMA, QUARANTINE_SCHEMA, SCHEMA
from glmae_ray.store.where import matching

INGEST_VERSION = 2  # of what ingest computes; goes up when a row would come out different
FINGERPRINT_COLUMNS = ("case_id", "voxel_hash", "split")

_INDEX, _QUARANTINE, _FILES = "index.parquet", "quarantine.parquet", "files.parquet"
_MAPS = ("structures", "options", "acquisition")
_LINES_AT_ONCE = 65536  # some 10 MB of text


@dataclass(frozen=True, eq=False)
class VolumeIndex:
    """The cases of a store, sorted by case id; what a plan needs without opening the store.

    Attributes:
        rows: Table with the columns of `SCHEMA`, or with some of them.
    """

    rows: pa.Table

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the rows alone; with protocol 5, their buffers go out of band."""
        return VolumeIndex, (self.rows,)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> VolumeIndex:
        """Build an index of rows given as dicts (JSON values; maps as dicts)."""
        ordered = sorted(records, key=lambda record: record["case_id"])
        return cls(pa.Table.from_pylist([_with_pairs(row) for row in ordered], schema=SCHEMA))

    @classmethod
    def read(
        cls,
        store_path: str | Place,
        *,
        columns: Iterable[str] | None = None,
        missing_ok: bool = False,
    ) -> VolumeIndex:
        """Read the index of a store.

        Args:
            store_path: The store.
            columns: Names out of `SCHEMA`; None: all. From a local store nothing else is read;
                an object store sends the whole table.
            missing_ok: An index that is not there yet has no cases.

        Raises:
            UserError: There is no index yet, or no store.
        """
        rows = _read_table(to_place(store_path) / _INDEX, SCHEMA, columns=columns)
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
        return VolumeIndex(rows.combine_chunks())

    def where(self, expression: str, *, field: str) -> VolumeIndex:
        """The cases for which an expression holds.

        Args:
            expression: See `glmae_ray/expressions.py`.
            field: Whose value it is, for the line about a mistake.

        Raises:
            UserError: The expression is wrong.
        """
        return self.keep(self.matches(expression, field=field))

    def matches(self, expression: str, *, field: str) -> NDArray[np.bool_]:
        """Whether an expression holds, for each case, bool (N,); the arguments are `where`'s.

        Raises:
            UserError: The expression is wrong.
        """
        try:
            return matching(self.rows, expression)
        except ValueError as error:
            raise UserError(f"{field}: {expression!r} is wrong: {error}") from None

    def keep(self, mask: NDArray[np.bool_]) -> VolumeIndex:
        """The cases where a mask bool (N,) is true; a copy, so that the others can be freed."""
        return VolumeIndex(self.rows.filter(pa.array(mask)).combine_chunks())

    def at(self, position: int) -> dict[str, Any]:
        """The case of a row as a dict of the columns there are, in some 30 microseconds.

        Raises:
            IndexError: There is no such row.
        """
        row = {name: values[position].as_py() for name, values in self._arrays.items()}
        return _with_dicts(row)

    def row(self, case_id: str) -> dict[str, Any]:
        """One case as a dict.

        Raises:
            KeyError: No such case.
        """
        return self.at(self._positions[case_id])

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

    def affines(self) -> NDArray[np.float64]:
        """Canonical index (z, y, x, 1) to RAS+ mm, (N, 4, 4)."""
        return self._numbers("affine", np.float64).reshape(-1, 4, 4)

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
        # Large strings: all lines together may exceed 2 GB.
        columns = [self.rows[name].cast(pa.large_string()) for name in FINGERPRINT_COLUMNS]
        lines = pc.binary_join_element_wise(*columns, pa.scalar("\t", pa.large_string()))
        lines = lines.take(pc.sort_indices(lines))
        digest = hashlib.sha256()
        for begin in range(0, len(lines), _LINES_AT_ONCE):
            text = "\n".join(lines.slice(begin, _LINES_AT_ONCE).to_pylist())
            digest.update(f"\n{text}".encode() if begin else text.encode())
        return digest.hexdigest()

    @cached_property
    def _arrays(self) -> dict[str, pa.Array]:
        """Each column as one array; looking up a row of a table takes longer."""
        return {name: _in_one_piece(self.rows[name]) for name in self.rows.column_names}

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


def write_rows(place: Place, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write any rows of numbers, words and booleans as a Parquet file, in one step."""
    _write_table(pa.Table.from_pylist([dict(row) for row in rows]), place)


def _read_rows(store_path: str | Place, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    table = _read_table(to_place(store_path) / name, schema)
    return [] if table is None else table.to_pylist()


def _write_rows(
    rows: Iterable[Mapping[str, Any]], store_path: str | Place, name: str, schema: pa.Schema
) -> None:
    """Write rows sorted by the first column, so that their order tells nothing of the run."""
    ordered = sorted((dict(row) for row in rows), key=lambda row: row[schema.names[0]])
    _write_table(pa.Table.from_pylist(ordered, schema=schema), to_place(store_path) / name)


def _read_table(
    place: Place, schema: pa.Schema, *, columns: Iterable[str] | None = None
) -> pa.Table | None:
    names = schema.names if columns is None else sorted(set(columns), key=schema.names.index)
    with _open(place) as source:
        return source and pa.table([_read_column(source, schema, name) for name in names], names)


def _read_column(source: pa.NativeFile, schema: pa.Schema, name: str) -> pa.Array:
    """One column, so that what decoding it takes is free again before the next."""
    column = _in_one_piece(pq.read_table(source, schema=schema, columns=[name])[name])
    pa.default_memory_pool().release_unused()
    return column


def _in_one_piece(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _open(place: Place) -> AbstractContextManager[pa.NativeFile | None]:
    """A file to read from, None where there is none; of a local one, only what is asked for."""
    if not isinstance(place, Path):
        raw = read_file(place)
        return nullcontext() if raw is None else pa.BufferReader(raw)
    try:
        return pa.OSFile(str(place))
    except (FileNotFoundError, NotADirectoryError):
        return nullcontext()


def _write_table(table: pa.Table, place: Place) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    publish(place, sink.getvalue().to_pybytes())


def _with_pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Maps as pyarrow takes them, in an order that does not depend on who made the row."""
    return {**row, **{name: sorted(row[name].items()) for name in _MAPS}}


def _with_dicts(row: dict[str, Any]) -> dict[str, Any]:
    """Maps as dicts, those that are there."""
    return {**row, **{name: dict(row[name]) for name in _MAPS if name in row}}
