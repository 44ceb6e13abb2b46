"""VolumeStore: cases as OME-Zarr groups with a pyramid and labels; the only door to Zarr.

Arrays are written by `shards` and read by `chunks`, the documents of groups are JSON. A case is
published by the document of its group, written last: a case folder without it is what a killed
job left, nobody sees it, and the next write replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from glmae_ray.config_data import CacheLimits
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
from glmae_ray.store.items import NNUNET_LABELS
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.pyramid import make_pyramid
from glmae_ray.store.ranges import LocalRanges, Ranges
from glmae_ray.store.shards import encode_shard
from glmae_ray.volume import Shape, Volume

if TYPE_CHECKING:
    from glmae_ray.blocks import Blocks
    from glmae_ray.store.chunks import Opening

FORMAT = 2  # of the store; goes up when an older reader would go wrong

Box = Sequence[Sequence[int]]  # ((z0, y0, x0), (z1, y1, x1)), end exclusive
Request = tuple[str, int, Box | None]  # case id, level, box in voxels of that level
LabelRequest = tuple[str, str, Box | None]  # case id, name of the map, box in level-0 voxels

_DOCUMENT = "zarr.json"
_BEFORE_DOCUMENT = {"cases", _DOCUMENT + UNFINISHED}  # all that a killed `create` leaves
_OPEN_ARRAYS = 1024  # kept per process, 64 KiB for 512^3 voxels; an archive may hold far more
_IMAGE_KEY, _LABEL_KEY = layout.shard_key(4), layout.shard_key(3)


class VolumeStore:
    """A folder of cases, here or on S3. Cheap to pickle: each process opens its own handles.

    Attributes:
        path: The STORE folder; as a string, what the caller named.
    """

    def __init__(
        self,
        path: str | Place,
        *,
        chunk: Shape,
        levels: int,
        codec: str = "zstd",
        threads: int = 1,
        cache: CacheLimits | None = None,
    ) -> None:
        """Name a store without touching it; `create` and `open` are what callers want.

        Args:
            path: The STORE folder, a path or `s3://BUCKET/FOLDER`.
            chunk: Sides (Z, Y, X) of the compressed blocks inside a shard.
            levels: Pyramid levels of every case.
            codec: `zstd`, or `lz4`: read faster, and larger.
            threads: How many decode at a time in each call that reads.
            cache: Where chunks from an object store are kept on this machine; None: nowhere.
        """
        self.path = _store_place(path)
        self.chunk, self.levels, self.codec = chunk, levels, codec
        self.threads, self.cache = threads, cache
        self._opened = lru_cache(maxsize=_OPEN_ARRAYS)(self._open_array)
        self._files = lru_cache(maxsize=1)(self._open_files)

    @classmethod
    def create(
        cls,
        path: str | Place,
        *,
        chunk: Shape = (32, 32, 32),
        levels: int = 3,
        codec: str = "zstd",
    ) -> VolumeStore:
        """Make an empty store; `chunk`, `levels` and `codec` are kept in it for later writers.

        Raises:
            UserError: Something is there already, or the object store refuses.
        """
        if cls.exists(path):
            raise UserError(f"store: {path} is there already")
        store = cls(path, chunk=chunk, levels=levels, codec=codec)
        about = {"format": FORMAT, "chunk": list(chunk), "levels": levels, "codec": codec}
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
    def open(
        cls, path: str | Place, *, threads: int = 1, cache: CacheLimits | None = None
    ) -> VolumeStore:
        """Open a store that exists; `threads` and `cache` as in `__init__`.

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
        codec = about.get("codec", "zstd")  # stores from before there was a choice
        kept = {"chunk": (z, y, x), "levels": about["levels"], "codec": codec}
        return cls(path, **kept, threads=threads, cache=cache)

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
        """Like `read` for each request, in order, with all reads under way at once."""
        return [box.array() for box in self.read_blocks(requests)]

    def read_blocks(self, requests: Sequence[Request]) -> list[Blocks]:
        """Like `read_many`, as blocks: each chunk is decoded once, whatever boxes share it.

        Raises:
            KeyError: A case or level is not in the store.
            ValueError: A box is empty or reaches outside its level.
            UserError: The object store refuses.
            OSError: Disk or object store fail, or the file is damaged.
        """
        arrays = [(f"{case}/image/{level}", _IMAGE_KEY, box) for case, level, box in requests]
        return self._read(arrays)

    def read_label(self, case_id: str, name: str) -> NDArray[Any]:
        """Label map (Z, Y, X) on the grid of level 0; a KeyError where the case has none."""
        return self.read_labels([(case_id, name, None)])[0]

    def read_labels(self, requests: Sequence[LabelRequest]) -> list[NDArray[Any]]:
        """Boxes of label maps, each (Z, Y, X) of integers, in order; see `read_label_blocks`."""
        return [blocks.array()[0] for blocks in self.read_label_blocks(requests)]

    def read_label_blocks(self, requests: Sequence[LabelRequest]) -> list[Blocks]:
        """Boxes of label maps as blocks of one channel: each chunk is decoded once.

        Raises:
            KeyError: A case has no such map.
            ValueError: A box is empty or reaches outside the map.
            UserError: The object store refuses.
            OSError: Disk or object store fail, or the file is damaged.
        """
        arrays = [(f"{case}/labels/{name}/0", _LABEL_KEY, box) for case, name, box in requests]
        return self._read(arrays)

    def label_names(self, case_id: str, name: str = NNUNET_LABELS) -> dict[str, int]:
        """Structure name to value, as the metadata of a label map says.

        Raises:
            KeyError: The case has no such map.
            UserError: The object store refuses, or the metadata is no JSON object.
            OSError: The object store fails.
        """
        attributes = _read_group(self._cases / case_id / "labels" / name)
        if attributes is None:
            raise KeyError(f"{self.path} has no {case_id}/labels/{name}")
        return layout.names_in_label_attributes(attributes)

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
        names = ("chunk", "levels", "codec", "threads", "cache")
        settings = {name: getattr(self, name) for name in names}
        return partial(VolumeStore, **settings), (str(self.path),)

    @property
    def _cases(self) -> Place:
        return self.path / "cases"

    def _open_files(self) -> Ranges:
        if isinstance(self._cases, Path):
            return LocalRanges(self._cases)
        from glmae_ray.store.remote import RemoteRanges

        files = RemoteRanges(self._cases)
        if self.cache is None:
            return files
        from glmae_ray.store.cached import CachedRanges

        return CachedRanges(files, self.cache, store=str(self.path))

    def _open_array(self, name: str, key: str) -> Opening:
        from glmae_ray.store.chunks import Opening

        return Opening(self._files(), name, key)

    def _read(self, arrays: Sequence[tuple[str, str, Box | None]]) -> list[Blocks]:
        from glmae_ray.store.chunks import read_boxes  # with a compiler, which writing never needs

        openings = [self._opened(name, key) for name, key, _ in arrays]  # all at once
        try:
            shards = [opening.result() for opening in openings]
        except KeyError as error:
            self._opened.cache_clear()  # the case may be published later
            raise KeyError(f"{self.path} has no {error.args[0]}") from None
        boxes = [(shard, shard.box(box)) for shard, (_, _, box) in zip(shards, arrays, strict=True)]
        return read_boxes(self._files(), boxes, threads=self.threads)

    def _write_arrays(self, arrays: Mapping[str, tuple[NDArray[Any], float]]) -> None:
        """Write arrays, by name and each with its fill value."""
        for name, (array, fill_value) in arrays.items():
            metadata = layout.array_metadata(
                array, chunk=self.chunk, fill_value=fill_value, codec=self.codec
            )
            folder = self._cases / name
            if (shard := encode_shard(array, metadata)) is not None:
                publish(folder / layout.shard_key(array.ndim), shard)
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
