"""VolumeStore: cases as OME-Zarr groups with a pyramid and labels; the only door to Zarr.

Arrays go through tensorstore (zarr-python reads the chunks of a shard one after another), the
documents of groups are JSON. A case is published by the document of its group, written last: a
case folder without it is what a killed job left, nobody sees it, and the next write replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import tensorstore as ts
from numpy.typing import NDArray

from glmae_ray.errors import UserError
from glmae_ray.paths import (
    UNFINISHED,
    Place,
    folders_with,
    is_url,
    names_in,
    publish,
    read_file,
    remove_folder,
    to_place,
)
from glmae_ray.store import layout
from glmae_ray.store.arrays import array_errors, kvstore, make_context
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.pyramid import make_pyramid
from glmae_ray.store.shards import encode_shard
from glmae_ray.volume import Shape, Volume

FORMAT = 2  # of the store; goes up when an older reader would go wrong

Box = Sequence[Sequence[int]]  # ((z0, y0, x0), (z1, y1, x1)), end exclusive
Request = tuple[str, int, Box | None]  # case id, level, box in voxels of that level

_DOCUMENT = "zarr.json"
_BEFORE_DOCUMENT = {"cases", _DOCUMENT + UNFINISHED}  # all that a killed `create` leaves
_OPEN_ARRAYS = 4096  # handles kept per process; an archive may hold far more cases than that


class VolumeStore:
    """A folder of cases, here or on S3. Cheap to pickle: each process opens its own handles.

    Attributes:
        path: The STORE folder; as a string, what the caller named.
    """

    def __init__(
        self, path: str | Place, *, chunk: Shape, levels: int, threads: int | None = None
    ) -> None:
        """Name a store without touching it; `create` and `open` are what callers want.

        Args:
            path: The STORE folder, a path or `s3://BUCKET/FOLDER`.
            chunk: Sides (Z, Y, X) of the compressed blocks inside a shard.
            levels: Pyramid levels of every case.
            threads: Cap on threads that read and decode; None leaves it to tensorstore.
        """
        self.path = _store_place(path)
        self.chunk, self.levels, self.threads = chunk, levels, threads
        self._opened = lru_cache(maxsize=_OPEN_ARRAYS)(self._open_array)

    @classmethod
    def create(
        cls, path: str | Place, *, chunk: Shape = (32, 32, 32), levels: int = 3
    ) -> VolumeStore:
        """Make an empty store; `chunk` and `levels` are kept in it for later writers.

        Raises:
            UserError: Something is there already, or the object store refuses.
        """
        if cls.exists(path):
            raise UserError(f"store: {path} is there already")
        store = cls(path, chunk=chunk, levels=levels)
        about = {"format": FORMAT, "chunk": list(chunk), "levels": levels}
        _write_group(store._cases, {})
        _write_group(store.path, {"glmae": about})
        return store

    @classmethod
    def exists(cls, path: str | Place) -> bool:
        """Whether `open` would succeed; False where `create` would.

        Raises:
            UserError: Neither: something else is there, a store of another format version, or
                an object store that refuses.
            OSError: The object store fails.
        """
        place = _store_place(path)
        if _read_group(place) is not None:
            cls.open(path)
            return True
        if _is_file(place) or names_in(place) - _BEFORE_DOCUMENT:
            raise UserError(f"store: {path} is there and not a store that glmae made")
        return False

    @classmethod
    def open(cls, path: str | Place, *, threads: int | None = None) -> VolumeStore:
        """Open a store that exists.

        Raises:
            UserError: Nothing is there, it is no store of ours, one of another format version, or
                the object store refuses.
            OSError: The object store fails.
        """
        place = _store_place(path)
        attributes = _read_group(place)
        if attributes is None and not _is_file(place) and not names_in(place):
            raise UserError(f"store: {path} does not exist; `glmae ingest` makes one")
        try:
            about = (attributes or {})["glmae"]
            found = about["format"]
        except (KeyError, TypeError):
            raise UserError(f"store: {path} is not a store that glmae made") from None
        if found != FORMAT:
            raise UserError(f"store: {path} has format {found}, this version reads {FORMAT}")
        z, y, x = about["chunk"]
        return cls(path, chunk=(z, y, x), levels=about["levels"], threads=threads)

    def write(
        self,
        volume: Volume,
        *,
        labels: Mapping[str, NDArray[Any]],
        label_names: Mapping[str, int],
        record: Mapping[str, Any],
        pyramid: Sequence[NDArray[Any]] | None = None,
    ) -> None:
        """Write a case, in place of one with the same id, and publish it.

        Args:
            volume: Level 0.
            labels: Name of a label map to its values (Z, Y, X) on the grid of level 0.
            label_names: Structure name to value, the same for every map.
            record: The case's row of the index, JSON values; the index can be rebuilt from it.
            pyramid: What `make_pyramid` gave for this volume, where the caller has it already.

        Raises:
            UserError: The object store refuses.
            OSError: Disk or object store fail; the case is not in the store.
        """
        case, folder = volume.case_id, self._cases / volume.case_id
        self.remove(case)
        levels = pyramid or make_pyramid(volume, self.levels)
        air = volume.array.min().item()
        arrays = {f"{case}/image/{level}": (array, air) for level, array in enumerate(levels)}
        arrays |= {f"{case}/labels/{name}/0": (array, 0) for name, array in labels.items()}
        self._write_arrays(arrays)
        factors = pyramid_factors(volume.shape, volume.spacing, self.levels)
        about = layout.image_attributes(case, spacing=volume.spacing, factors=factors)
        _write_group(folder / "image", about)
        for name in labels:
            about = layout.label_attributes(name, spacing=volume.spacing, label_names=label_names)
            _write_group(folder / "labels" / name, about)
        _write_group(folder / "labels", layout.labels_attributes(list(labels)))
        _write_group(folder, {"glmae": dict(record)})

    def remove(self, case_id: str) -> None:
        """Take a case out of the store; a case that is not there is fine."""
        # Unpublished first: a kill while the folder goes must not leave half a case in sight.
        if remove_folder(self._cases / case_id, first=_DOCUMENT):
            self._opened.cache_clear()

    def read(self, case_id: str, *, level: int = 0, box: Box | None = None) -> NDArray[Any]:
        """Voxels (C, Z, Y, X) of a box, in voxels of `level`; the whole level without one."""
        return self.read_many([(case_id, level, box)])[0]

    def read_many(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        """Like `read` for each request, in order, with all reads under way at once.

        Raises:
            KeyError: A case or level is not in the store.
            ValueError: A box reaches outside its level.
            UserError: The object store refuses.
            OSError: Disk or object store fail.
        """
        names = [f"{case}/image/{level}" for case, level, _ in requests]
        for name in names:
            self._opened(name)  # all opening at once
        with array_errors(self.path):
            reads = [
                self._array(name)[_slices(box)].read()
                for name, (_, _, box) in zip(names, requests, strict=True)
            ]
            return [read.result() for read in reads]

    def read_label(self, case_id: str, name: str) -> NDArray[Any]:
        """Label map (Z, Y, X) on the grid of level 0; a KeyError where the case has none."""
        with array_errors(self.path):
            return self._array(f"{case_id}/labels/{name}/0").read().result()

    def cases(self) -> list[str]:
        """Ids of the published cases, sorted."""
        return folders_with(self._cases, _DOCUMENT)

    def __contains__(self, case_id: str) -> bool:
        """Whether a case is published; an OSError where the object store does not say."""
        return read_file(self._cases / case_id / _DOCUMENT) is not None

    def record(self, case_id: str) -> dict[str, Any]:
        """The index row that was written with a published case."""
        attributes = _read_group(self._cases / case_id)
        if attributes is None:
            raise KeyError(f"{self.path} has no {case_id}")
        return attributes["glmae"]

    def write_record(self, case_id: str, record: Mapping[str, Any]) -> None:
        """Replace the index row that a published case carries; its voxels stay."""
        self.record(case_id)  # a case that is not there must not be published by this
        _write_group(self._cases / case_id, {"glmae": dict(record)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name and the settings, not the open handles, not the credentials."""
        kind = partial(VolumeStore, chunk=self.chunk, levels=self.levels, threads=self.threads)
        return kind, (str(self.path),)

    @property
    def _cases(self) -> Place:
        return self.path / "cases"

    @cached_property
    def _context(self) -> ts.Context:
        return make_context(self.path, threads=self.threads)

    def _open_array(self, name: str) -> ts.Future:
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(self._cases / name),
            "recheck_cached_metadata": False,  # a case never changes in place, so once is enough
        }
        return ts.open(spec, open=True, read=True, context=self._context)

    def _array(self, name: str) -> ts.TensorStore:
        try:
            with array_errors(self.path):
                return self._opened(name).result()
        except FileNotFoundError:
            self._opened.cache_clear()  # the case may be published later
            raise KeyError(f"{self.path} has no {name}") from None
        except (OSError, UserError):
            self._opened.cache_clear()  # the next call tries again
            raise

    def _write_arrays(self, arrays: Mapping[str, tuple[NDArray[Any], float]]) -> None:
        """Write arrays, by name and each with its fill value."""
        for name, (array, fill_value) in arrays.items():
            metadata = layout.array_metadata(array, chunk=self.chunk, fill_value=fill_value)
            folder = self._cases / name
            if (shard := encode_shard(array, metadata)) is not None:
                publish(folder / layout.shard_key(array), shard)
            publish(folder / _DOCUMENT, json.dumps(metadata))


def _store_place(path: str | Place) -> Place:
    if is_url(path) and not str(path).startswith("s3://"):
        raise UserError(f"store: {path} is neither a path nor s3://BUCKET/FOLDER")
    return to_place(path)


def _is_file(place: Place) -> bool:
    return isinstance(place, Path) and place.is_file()


def _read_group(folder: Place) -> dict[str, Any] | None:
    """Attributes of a Zarr group, None where there is none."""
    try:
        raw = read_file(folder / _DOCUMENT)
    except UserError as error:
        raise UserError(*(f"store: {line}" for line in error.lines)) from None
    try:
        return None if raw is None else json.loads(raw).get("attributes", {})
    except (ValueError, AttributeError):
        raise UserError(f"store: {folder / _DOCUMENT} is no JSON object; restore it") from None


def _write_group(folder: Place, attributes: Mapping[str, Any]) -> None:
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    publish(folder / _DOCUMENT, json.dumps(document))


def _slices(box: Box | None) -> tuple[Any, ...]:
    if box is None:
        return (...,)
    start, stop = box
    sides = (slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
    return (slice(None), *sides)
