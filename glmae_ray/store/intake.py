"""One source item into one case of the store, and its row of the index; without Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from glmae_ray.store.fetching import local_files
from glmae_ray.store.index import INGEST_VERSION
from glmae_ray.store.items import NNUNET_LABELS, SourceImage, SourceItem
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.pyramid import make_pyramid
from glmae_ray.store.readers import Image, read_image, read_label
from glmae_ray.store.reshaping import cropped, resampled
from glmae_ray.store.scan import LIMITS, ImageFiles, Limits, ReadError
from glmae_ray.store.statistics import foreground_box, intensities, label_counts
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Spacing


@dataclass(frozen=True)
class Choices:
    """What the user decides about how cases are taken in.

    Attributes:
        limits: What is too small or too large.
        volume: Which one to take where a file holds several; None: such a file is refused.
        fill: Give voxels that are NaN or infinite a finite value; else such a file is refused.
        spacing_mm: Resample to this spacing (Z, Y, X); None keeps the acquired one.
        crop: Keep the foreground box only.
    """

    limits: Limits = LIMITS
    volume: int | None = None
    fill: bool = False
    spacing_mm: Spacing | None = None
    crop: bool = False


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


def take_in(pending: Pending, *, store: VolumeStore, choices: Choices) -> Taken:
    """Read, check and write one case, unless the store has the same content.

    What goes wrong while reading is the source's fault and a `ReadError`; what goes wrong while
    writing (a full disk) would hit every case, and comes through as it is.

    Raises:
        ReadError: The source cannot become a case.
    """
    item, known = pending.item, pending.known
    try:
        with local_files(item.locations) as local:
            origin = _origin(pending, source_hash(local.values()), choices)
            if known is not None and _is_same(known, origin, choices):
                record = {**known, **origin, "options": known["options"]}
                store.write_record(item.case_id, record)
                return Taken(record, is_new=False)
            image, label = _read(item, local, choices)
    except ReadError:
        raise
    except Exception as error:  # an archive's worst file must not end the run
        message = f"{item.source}: {error!r}; repair or remove it"
        raise ReadError("unreadable", message) from error
    return Taken(_write(image, label, pending, origin, store), is_new=True)


def is_current(row: Mapping[str, Any] | None, item: SourceItem, choices: Choices) -> bool:
    """Whether a stored case is this item's, as far as can be told without opening files."""
    if row is None or row["ingest_version"] != INGEST_VERSION:
        return False
    annotated = None if item.annotated is None else list(item.annotated)
    stated = {"source_stamp": item.stamp, "annotated": annotated, "subject": item.subject}
    same = all(row[name] == value for name, value in stated.items())
    return same and _fits(row["options"], options_of(item, choices), choices)


def options_of(item: SourceItem, choices: Choices) -> dict[str, str]:
    """The choices that shape an item's case besides the voxels, as the index keeps them."""
    options = {"label_names": json.dumps(dict(item.label_names), sort_keys=True)}
    if item.modality is not None:
        options["modality"] = item.modality.upper()
    if choices.spacing_mm is not None:
        options["spacing_mm"] = json.dumps(list(choices.spacing_mm))
    if choices.crop:
        options["crop"] = "foreground"
    return options


def source_hash(paths: Sequence[Path] | Any) -> str:
    """SHA-256 over the hashes of files, in the order that is given."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def _fits(kept: Mapping[str, str], wanted: Mapping[str, str], choices: Choices) -> bool:
    """Whether a case shaped by the options `kept` is what the choices would make of it again."""
    volume, fill = kept.get("volume"), kept.get("non_finite")
    others = {name: text for name, text in kept.items() if name not in ("volume", "non_finite")}
    # Where a file held one volume, or nothing to fill, these two choices changed nothing.
    same_volume = volume is None or volume == str(choices.volume)
    return others == wanted and same_volume and (fill is None or choices.fill)


def _is_same(known: Mapping[str, Any], origin: Mapping[str, Any], choices: Choices) -> bool:
    same = all(known[key] == origin[key] for key in ("source_hash", "ingest_version"))
    return same and _fits(known["options"], origin["options"], choices)


def _origin(pending: Pending, digest: str, choices: Choices) -> dict[str, Any]:
    """The columns of the index that are known before a voxel is decoded."""
    item = pending.item
    return {
        "case_id": item.case_id,
        "subject": item.subject,
        "split": pending.split,
        "annotated": None if item.annotated is None else list(item.annotated),
        "source": item.source,
        "source_hash": digest,
        "source_stamp": item.stamp,
        "ingest_version": INGEST_VERSION,
        "options": options_of(item, choices),
    }


def _read(
    item: SourceItem, local: Mapping[str, Path], choices: Choices
) -> tuple[Image, NDArray[Any] | None]:
    """The image and its label map (Z, Y, X), in the shape that the choices give them."""

    def here(image: SourceImage) -> ImageFiles:
        volume = choices.volume if image.volume is None else image.volume
        return ImageFiles(image.reader, tuple(local[p] for p in image.locations), volume)

    image = read_image(
        [here(channel) for channel in item.channels],
        case_id=item.case_id,
        modality=item.modality,
        limits=choices.limits,
        fill=choices.fill,
    )
    label = None
    if item.label is not None:
        label = read_label(here(item.label), like=image.volume, limits=choices.limits)
    volume = image.volume
    if choices.spacing_mm is not None:
        volume, label = resampled(volume, label, spacing=choices.spacing_mm)
    if choices.crop:
        volume, label = cropped(volume, label)
    return image._replace(volume=volume), label


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
        "options": {**origin["options"], **_shaped_by(image, pending.item)},
        **_geometry(image),
        **_contents(image, pyramid[-1], store.levels),
        "structures": {} if label is None else _structures(label, names),
    }
    labels = {} if label is None else {NNUNET_LABELS: label}
    store.write(image.volume, labels=labels, label_names=names, record=record, pyramid=pyramid)
    return record


def _shaped_by(image: Image, item: SourceItem) -> dict[str, str]:
    """The choices that had an effect on this image only."""
    chosen = image.number if item.channels[0].volume is None else None
    options = {} if chosen is None else {"volume": str(chosen)}
    return options | ({"non_finite": "fill"} if image.filled else {})


def _geometry(image: Image) -> dict[str, Any]:
    volume = image.volume
    return {
        "modality": volume.modality,
        "channels": len(volume.array),
        "shape": list(volume.shape),
        "spacing": list(volume.spacing),
        "affine": volume.affine.ravel().tolist(),
        "source_affine": image.source_affine.ravel().tolist(),
        "source_shape": list(image.source_shape),
        "dtype": volume.array.dtype.name,
        "reader": image.reader,
        "acquisition": dict(image.acquisition),
        "filled": image.filled,
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
    return {names.get(value, str(value)): n for value, n in label_counts(label).items()}
