"""`glmae inspect`: what a store holds, as text or JSON; and one case, with a picture. No Ray."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_store import InspectConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.inspect_text import case_lines, disk_lines, store_lines
from glmae_ray.jobs.text import times
from glmae_ray.paths import publish, to_place
from glmae_ray.pictures import draw_planes, plane_boxes, three_planes
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.items import NNUNET_LABELS
from glmae_ray.store.summary import Facts, describe, measure
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHANNELS_DRAWN = 4
_SOFT_TISSUE_HU = (-160.0, 240.0)  # the usual abdominal window: level 40, width 400


def run(cfg: InspectConfig, *, as_json: bool = False) -> None:
    """Print what is in the store, or draw a case and print its facts.

    Raises:
        UserError: There is no store, no index, or no such case; or the picture cannot be written.
    """
    store = VolumeStore.open(cfg.store)
    index = VolumeIndex.read(cfg.store)
    if cfg.case is not None:
        facts = inspect_case(store, index, case_id=cfg.case, out=cfg.out)
        print(json.dumps(facts) if as_json else case_lines(facts))
    elif as_json:
        print(json.dumps({**describe(store, index), "disk": measure(store, index)}))
    else:
        # Looking at every file of a large store takes longer than all the rest.
        print(store_lines(describe(store, index)), flush=True)
        print(disk_lines(measure(store, index)))


def inspect_case(
    store: VolumeStore, index: VolumeIndex, *, case_id: str, out: str | None = None
) -> Facts:
    """Draw three planes of a case into `out`, by default CASE.png in the current folder.

    Returns:
        The case's row of the index (the columns of `SCHEMA`) as JSON values, `store` and
        `picture`: where the two are.

    Raises:
        UserError: The index has no such case, or the picture cannot be written.
    """
    try:
        row = index.row(case_id)
    except KeyError:
        raise UserError(_unknown(case_id, index)) from None
    if case_id not in store:
        raise UserError(f"case: {case_id} is in the index and its folder is gone; ingest it again")
    place = to_place(out or f"{case_id}.png")
    picture = io.BytesIO()
    figure = _draw(store, row)
    figure.savefig(picture, format="png", dpi=100)
    try:
        publish(place, picture.getvalue())
    except OSError as error:
        raise UserError(f"out: {place} cannot be written ({error.strerror or error})") from None
    return {**row, "store": str(store.path), "picture": str(place)}


def _unknown(case_id: str, index: VolumeIndex) -> str:
    near = difflib.get_close_matches(case_id, index.case_ids(), n=3, cutoff=0.0)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"case: {case_id} is not among the {len(index)} cases of the index{hint}"


def _draw(store: VolumeStore, row: Mapping[str, Any]) -> Figure:
    case_id, shape = row["case_id"], tuple(row["shape"])
    structures = _label_values(row)
    # The middle of a structure is not known before the whole map is.
    label = store.read_label(case_id, NNUNET_LABELS) if structures else None
    at = _box_centre(row)
    if label is not None:
        largest = max(structures, key=lambda name: row["structures"][name])
        at = centre_of(label == structures[largest])
    boxes = plane_boxes(at, shape)
    images = store.read_many([(case_id, 0, box) for box in boxes])
    labels = None if label is None else [label[_slices(box)] for box in boxes]
    sides, steps = times(shape), times(row["spacing"])
    return draw_planes(
        three_planes(images, labels, spacing=tuple(row["spacing"])),
        title=f"{case_id}   {row['modality']}   {sides} voxels of {steps} mm (Z x Y x X)",
        windows=_windows(row)[:_CHANNELS_DRAWN],
        structures=structures,
    )


def _label_values(row: Mapping[str, Any]) -> dict[str, int]:
    """Structures that the case has, with their values in its label map."""
    if not row["structures"]:
        return {}
    values = json.loads(row["options"]["label_names"])
    # A value that nobody named goes by its number.
    return {name: int(values.get(name, name)) for name in row["structures"]}


def _windows(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    if row["modality"] == "CT":
        return [_SOFT_TISSUE_HU] * row["channels"]
    return list(zip(row["p0_5"], row["p99_5"], strict=True))


def _box_centre(row: Mapping[str, Any]) -> Shape:
    ends = zip(row["box_start"], row["box_stop"], strict=True)
    z, y, x = ((start + stop) // 2 for start, stop in ends)
    return z, y, x


def centre_of(mask: NDArray[np.bool_]) -> Shape:
    """A voxel (Z, Y, X) of a structure from its middle, also where the structure is bent."""
    z = _middle(mask.sum(axis=(1, 2)))
    y = _middle(mask[z].sum(axis=1))
    return z, y, _middle(mask[z, y])


def _middle(counts: NDArray[Any]) -> int:
    """The position that halves the counts; itself one with a count."""
    total = np.cumsum(counts)
    return int(np.searchsorted(total, total[-1] / 2))


def _slices(box: tuple[Shape, Shape]) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in zip(*box, strict=True))
