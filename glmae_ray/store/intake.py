"""One source item into one case of the store, and its row of the index; without Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.index import INGEST_VERSION
from glmae_ray.store.readers import Image, read_image, read_label, suffix_of
from glmae_ray.store.scan import ImageFiles, ReadError
from glmae_ray.store.sources import NNUNET_LABELS, SourceItem, printable
from glmae_ray.store.statistics import foreground_box, intensities
from glmae_ray.store.zarr_store import VolumeStore, make_pyramid, pyramid_factors


@dataclass(frozen=True)
class Pending:
    """An item that the store may not have yet.

    Attributes:
        item: What to take in.
        split: Of the item's subject: train, val or test.
        known: Row of the case as it is stored, None where there is none.
    """

    item: SourceItem
    split: str
    known: Mapping[str, Any] | None = None


class Taken(NamedTuple):
    """A case that is in the store."""

    record: dict[str, Any]  # its row of the index
    is_new: bool  # False: the same content was there


def take_in(pending: Pending, *, store: VolumeStore) -> Taken:
    """Read, check and write one case, unless the store has the same content.

    What goes wrong while reading is the source's fault and a `ReadError`; what goes wrong while
    writing (a full disk) would hit every case, and comes through as it is.

    Raises:
        ReadError: The source cannot become a case.
    """
    item, known = pending.item, pending.known
    try:
        origin = _origin(pending)
        if known is not None and all(known[key] == origin[key] for key in _SAME_CONTENT):
            record = {**known, **origin}
            store.write_record(item.case_id, record)
            return Taken(record, is_new=False)
        channels = [ImageFiles(suffix_of(path) or "", (path,)) for path in item.images]
        image = read_image(channels, case_id=item.case_id, modality=item.modality)
        label = None
        if item.label is not None:
            files = ImageFiles(suffix_of(item.label) or "", (item.label,))
            label = read_label(files, like=image.volume)
    except ReadError:
        raise
    except Exception as error:  # an archive's worst file must not end the run
        message = f"{item.source}: {error!r}; repair or remove it"
        raise ReadError("unreadable", message) from error
    return Taken(_write(image, label, pending, origin, store), is_new=True)


def options_of(item: SourceItem) -> dict[str, str]:
    """The choices that shape an item's case besides the voxels, as the index keeps them."""
    labels = json.dumps(dict(item.label_names), sort_keys=True)
    return {"modality": item.modality or "CT", "label_names": labels}


def stamp_of(item: SourceItem) -> str:
    """Changes when a file of the item is moved, resized, written to, added or removed."""
    lines = [str(INGEST_VERSION)]
    for path in item.files:
        status = path.stat() if path.exists() else None
        facts = (status.st_size, status.st_mtime_ns) if status else ()
        lines.append(f"{path}\t{facts}")
    return hashlib.sha256(printable("\n".join(lines)).encode()).hexdigest()


def source_hash(item: SourceItem) -> str:
    """SHA-256 over the hashes of the item's files: images in channel order, then the label map."""
    whole = hashlib.sha256()
    for path in item.files:
        with path.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


_SAME_CONTENT = ("source_hash", "options", "ingest_version")


def _origin(pending: Pending) -> dict[str, Any]:
    """The columns of the index that are known before a voxel is decoded."""
    item = pending.item
    return {
        "case_id": item.case_id,
        "subject": item.subject,
        "split": pending.split,
        "modality": item.modality or "CT",
        "source": item.source,
        "source_hash": source_hash(item),
        "source_stamp": stamp_of(item),
        "ingest_version": INGEST_VERSION,
        "options": options_of(item),
    }


def _write(
    image: Image,
    label: NDArray[Any] | None,
    pending: Pending,
    origin: Mapping[str, Any],
    store: VolumeStore,
) -> dict[str, Any]:
    pyramid = make_pyramid(image.volume, store.levels)
    names = pending.item.label_names
    record = {
        **origin,
        **_geometry(image),
        **_contents(image, pyramid[-1], store.levels),
        "structures": {} if label is None else _structures(label, names),
    }
    labels = {} if label is None else {NNUNET_LABELS: label}
    store.write(image.volume, labels=labels, label_names=names, record=record, pyramid=pyramid)
    return record


def _geometry(image: Image) -> dict[str, Any]:
    volume = image.volume
    return {
        "channels": len(volume.array),
        "shape": list(volume.shape),
        "spacing": list(volume.spacing),
        "affine": volume.affine.ravel().tolist(),
        "source_affine": image.source_affine.ravel().tolist(),
        "source_shape": list(image.source_shape),
        "dtype": volume.array.dtype.name,
        "reader": image.reader,
    }


def _contents(image: Image, coarsest: NDArray[Any], levels: int) -> dict[str, Any]:
    volume = image.volume
    factors = pyramid_factors(volume.shape, volume.spacing, levels)
    box = foreground_box(coarsest, factor=factors[-1], shape=volume.shape, modality=volume.modality)
    voxels = hashlib.sha256(repr(volume.array.shape).encode())
    voxels.update(volume.array.data)
    return {
        **intensities(volume.array, box),
        "box_start": list(box[0]),
        "box_stop": list(box[1]),
        "factors": [list(factor) for factor in factors],
        "voxel_hash": voxels.hexdigest(),
    }


def _structures(label: NDArray[Any], label_names: Mapping[str, int]) -> dict[str, int]:
    """Voxels of each structure that is there; a value without a name goes by its number."""
    names = {value: name for name, value in label_names.items()}
    low, high = int(label.min()), int(label.max())
    counts = np.zeros(high - low + 1, np.int64)
    for plane in label:  # bincount widens what it is given to int64
        counts += np.bincount(plane.reshape(-1).astype(np.int64) - low, minlength=len(counts))
    values = np.flatnonzero(counts).tolist()
    return {names.get(n + low, str(n + low)): int(counts[n]) for n in values if n + low != 0}
