"""One source item into one case of the store, and its row of the index; without Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    with _blamed_on_source(pending.item), local_files(pending.item.locations) as local:
        origin = _origin(pending, source_hash(pending.item, local), choices)
        is_new = not _is_same(pending.known, origin, choices)
        read = _read(pending.item, local, choices) if is_new else None
    if read is not None:
        return Taken(_write(*read, pending, origin, store), is_new=True)
    known = pending.known or {}
    record = {**known, **origin, "options": known["options"]}
    store.write_record(pending.item.case_id, record)
    return Taken(record, is_new=False)


@contextmanager
def _blamed_on_source(item: SourceItem) -> Iterator[None]:
    """Turn whatever reading raises into a `ReadError`: the worst file must not end the run."""
    try:
        yield
    except ReadError:
        raise
    except OSError as error:
        where, reason = error.filename or item.source, error.strerror or error
        raise ReadError("unreadable", f"{where}: {reason}; restore it") from error
    except Exception as error:
        message = f"{item.source}: {error!r}; repair or remove it"
        raise ReadError("unreadable", message) from error


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


def source_hash(item: SourceItem, local: Mapping[str, Path]) -> str:
    """SHA-256 over what each file of an item is for, and the files' own hashes."""
    images = [*item.channels] if item.label is None else [*item.channels, item.label]
    parts = [(image.reader, len(image.locations), image.volume) for image in images]
    whole = hashlib.sha256(repr((parts, item.label is None)).encode())
    for place in item.locations:
        with local[place].open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def _fits(kept: Mapping[str, str], wanted: Mapping[str, str], choices: Choices) -> bool:
    """Whether a case shaped by the options `kept` is what the choices would make of it again."""
    volume, fill = kept.get("volume"), kept.get("non_finite")
    others = {name: text for name, text in kept.items() if name not in ("volume", "non_finite")}
    # Where a file held one volume, or nothing to fill, these two choices changed nothing.
    same_volume = volume is None or volume == str(choices.volume)
    return others == wanted and same_volume and (fill is None or choices.fill)


def _is_same(known: Mapping[str, Any] | None, origin: Mapping[str, Any], choices: Choices) -> bool:
    """Whether a stored case has the content that taking it in again would give."""
    if known is None:
        return False
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
) -> tuple[Image, NDArray[Any] | None, dict[str, str]]:
    """Image and label map (Z, Y, X) as the choices shape them, and the choices that mattered."""

    def here(image: SourceImage, volume: int | None) -> ImageFiles:
        return ImageFiles(image.reader, tuple(local[p] for p in image.locations), volume)

    image = read_image(
        [here(c, choices.volume if c.volume is None else c.volume) for c in item.channels],
        case_id=item.case_id,
        modality=item.modality,
        limits=choices.limits,
        fill=choices.fill,
    )
    if item.channels[0].volume is not None and image.volumes != len(item.channels):
        message = f"{item.source}: {image.volumes} volumes, {len(item.channels)} in dataset.json"
        raise ReadError("not_3d", f"{message}; correct one of them")
    label = None
    if item.label is not None:
        label = read_label(here(item.label, None), like=image.volume, limits=choices.limits)
    volume = image.volume
    if choices.spacing_mm is not None:
        volume, label = resampled(volume, label, spacing=choices.spacing_mm)
    if choices.crop:
        volume, label = cropped(volume, label)
    return image._replace(volume=volume), label, _shaped_by(image, item, choices)


def _write(
    image: Image,
    label: NDArray[Any] | None,
    shaped_by: Mapping[str, str],
    pending: Pending,
    origin: Mapping[str, Any],
    store: VolumeStore,
) -> dict[str, Any]:
    pyramid = make_pyramid(image.volume, store.levels)
    names = pending.item.label_names
    record = {
        **origin,
        "options": {**origin["options"], **shaped_by},
        **_geometry(image),
        **_contents(image, pyramid[-1], store.levels),
        "structures": {} if label is None else _structures(label, names),
    }
    labels = {} if label is None else {NNUNET_LABELS: label}
    store.write(image.volume, labels=labels, label_names=names, record=record, pyramid=pyramid)
    return record


def _shaped_by(image: Image, item: SourceItem, choices: Choices) -> dict[str, str]:
    """The choices that had an effect on this image only."""
    is_chosen = image.volumes > 1 and item.channels[0].volume is None
    options = {"volume": str(choices.volume)} if is_chosen else {}
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
