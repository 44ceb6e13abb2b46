"""VolumeStore: cases as OME-Zarr groups with a pyramid and labels; the only door to Zarr.

Arrays go through tensorstore (zarr-python reads the chunks of a shard one after another), group
documents through zarr-python. A case is published by the document of its group, written last: a
case folder without it is what a killed job left, nobody sees it, and the next write replaces it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import tensorstore as ts
import zarr
from numpy.typing import NDArray

from glmae_ray.config import UserError
from glmae_ray.store import layout
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.volume import Shape, Volume

FORMAT = 1  # of the store; goes up when an older reader would go wrong

Box = Sequence[Sequence[int]]  # ((z0, y0, x0), (z1, y1, x1)), end exclusive
Request = tuple[str, int, Box | None]  # case id, level, box in voxels of that level

_DOCUMENT = "zarr.json"
_OPEN_ARRAYS = 4096  # handles kept per process; an archive may hold far more cases than that


class VolumeStore:
    """A folder of cases. Cheap to pickle: another process opens its own handles when it reads."""

    def __init__(
        self, path: str | Path, *, chunk: Shape, levels: int, threads: int | None = None
    ) -> None:
        """Name a store without touching it; `create` and `open` are what callers want.

        Args:
            path: The STORE folder.
            chunk: Sides (Z, Y, X) of the compressed blocks inside a shard.
            levels: Pyramid levels of every case.
            threads: Cap on threads that read and decode; None leaves it to tensorstore.
        """
        self.path = Path(path).absolute()
        self.chunk, self.levels, self.threads = chunk, levels, threads
        self._opened = lru_cache(maxsize=_OPEN_ARRAYS)(self._open_array)

    @classmethod
    def create(
        cls, path: str | Path, *, chunk: Shape = (32, 32, 32), levels: int = 3
    ) -> VolumeStore:
        """Make an empty store; `chunk` and `levels` are kept in it for later writers.

        Raises:
            UserError: Something is there already.
        """
        if cls.exists(path):
            raise UserError(f"store: {path} is there already")
        about = {"format": FORMAT, "chunk": list(chunk), "levels": levels}
        zarr.open_group(str(Path(path) / "cases"), mode="a")
        zarr.create_group(str(path), attributes={"glmae": about})
        return cls(path, chunk=chunk, levels=levels)

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether `open` would succeed; False where `create` would.

        Raises:
            UserError: Neither: something else is there, or a store of another format version.
        """
        if (Path(path) / _DOCUMENT).exists():
            cls.open(path)
            return True
        # A folder with `cases` alone is a store whose making was killed.
        if Path(path).exists() and (not Path(path).is_dir() or set(os.listdir(path)) - {"cases"}):
            raise UserError(f"store: {path} is there and not a store that glmae made")
        return False

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None) -> VolumeStore:
        """Open a store that exists.

        Raises:
            UserError: Nothing is there, it is no store of ours, or one of another format version.
        """
        if not Path(path).exists():
            raise UserError(f"store: {path} does not exist; `glmae ingest` makes one")
        try:
            about = dict(zarr.open_group(str(path), mode="r").attrs)["glmae"]
            found = about["format"]
        except (OSError, ValueError, KeyError, TypeError):
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
        """
        case = volume.case_id
        self.remove(case)
        levels = pyramid or make_pyramid(volume, self.levels)
        air = volume.array.min().item()
        for level, array in enumerate(levels):
            self._write_array(f"{case}/image/{level}", array, fill_value=air)
        factors = pyramid_factors(volume.shape, volume.spacing, self.levels)
        about = layout.image_attributes(case, spacing=volume.spacing, factors=factors)
        self._write_group(f"{case}/image", about)
        for name, array in labels.items():
            self._write_array(f"{case}/labels/{name}/0", array, fill_value=0)
            about = layout.label_attributes(name, spacing=volume.spacing, label_names=label_names)
            self._write_group(f"{case}/labels/{name}", about)
        self._write_group(f"{case}/labels", layout.labels_attributes(list(labels)))
        self._write_group(case, {"glmae": dict(record)})

    def remove(self, case_id: str) -> None:
        """Take a case out of the store; a case that is not there is fine."""
        folder = self._cases / case_id
        # Unpublished first: a kill while the folder goes must not leave half a case in sight.
        (folder / _DOCUMENT).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
            self._opened.cache_clear()

    def read(self, case_id: str, *, level: int = 0, box: Box | None = None) -> NDArray[Any]:
        """Voxels (C, Z, Y, X) of a box, in voxels of `level`; the whole level without one."""
        return self.read_many([(case_id, level, box)])[0]

    def read_many(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        """Like `read` for each request, in order, with all reads under way at once.

        Raises:
            KeyError: A case or level is not in the store.
            ValueError: A box reaches outside its level.
        """
        names = [f"{case}/image/{level}" for case, level, _ in requests]
        for name in names:
            self._opened(name)  # all opening at once
        reads = [
            self._array(name)[_slices(box)].read()
            for name, (_, _, box) in zip(names, requests, strict=True)
        ]
        return [read.result() for read in reads]

    def read_label(self, case_id: str, name: str) -> NDArray[Any]:
        """Label map (Z, Y, X) on the grid of level 0; a KeyError where the case has none."""
        return self._array(f"{case_id}/labels/{name}/0").read().result()

    def cases(self) -> list[str]:
        """Ids of the published cases, sorted."""
        if not self._cases.is_dir():
            return []
        folders = (entry.name for entry in os.scandir(self._cases) if entry.is_dir())
        return sorted(name for name in folders if name in self)

    def __contains__(self, case_id: str) -> bool:
        """Whether a case is published."""
        return (self._cases / case_id / _DOCUMENT).exists()

    def record(self, case_id: str) -> dict[str, Any]:
        """The index row that was written with a published case."""
        return dict(zarr.open_group(str(self._cases / case_id), mode="r").attrs["glmae"])

    def write_record(self, case_id: str, record: Mapping[str, Any]) -> None:
        """Replace the index row that a published case carries; its voxels stay."""
        zarr.open_group(str(self._cases / case_id), mode="r+").attrs["glmae"] = dict(record)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name and the settings, not the open handles."""
        kind = partial(VolumeStore, chunk=self.chunk, levels=self.levels, threads=self.threads)
        return kind, (self.path,)

    @property
    def _cases(self) -> Path:
        return self.path / "cases"

    @cached_property
    def _context(self) -> ts.Context:
        if self.threads is None:
            return ts.Context()
        limit = {"limit": self.threads}
        return ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit})

    def _open_array(self, name: str) -> ts.Future:
        # recheck_cached_metadata: a case never changes in place, so once is enough.
        spec = {"driver": "zarr3", "kvstore": self._kvstore(name), "recheck_cached_metadata": False}
        return ts.open(spec, open=True, read=True, context=self._context)

    def _array(self, name: str) -> ts.TensorStore:
        try:
            return self._opened(name).result()
        except ValueError as error:
            self._opened.cache_clear()  # the case may be published later
            if "NOT_FOUND" in str(error):
                raise KeyError(f"{self.path} has no {name}") from None
            raise

    def _write_array(self, name: str, array: NDArray[Any], *, fill_value: float) -> None:
        spec = {
            "driver": "zarr3",
            "kvstore": self._kvstore(name),
            "metadata": layout.array_metadata(array, chunk=self.chunk, fill_value=fill_value),
        }
        handle = ts.open(spec, create=True, context=self._context).result()
        handle.write(array).result()

    def _write_group(self, name: str, attributes: dict[str, Any]) -> None:
        # Opened at the group itself: below a root, zarr-python would write the parents' documents
        # too, and so publish the case before it is whole.
        zarr.create_group(str(self._cases / name), attributes=attributes)

    def _kvstore(self, name: str) -> dict[str, str]:
        return {"driver": "file", "path": f"{self._cases / name}/"}


def make_pyramid(volume: Volume, levels: int) -> list[NDArray[Any]]:
    """All levels of a volume, each (C, Z, Y, X) of its dtype: means, with odd sides rounded up."""
    source = ts.array(volume.array)
    factors = pyramid_factors(volume.shape, volume.spacing, levels)
    coarser = [ts.downsample(source, [1, *factor], "mean").read() for factor in factors[1:]]
    return [volume.array, *(future.result() for future in coarser)]


def _slices(box: Box | None) -> tuple[Any, ...]:
    if box is None:
        return (...,)
    start, stop = box
    sides = (slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
    return (slice(None), *sides)
