"""Data sets that describe themselves: nnU-Net v2, nnU-Net v1 and Medical Segmentation Decathlon."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from glmae_ray.paths import to_place
from glmae_ray.store.items import SourceImage, SourceItem, printable
from glmae_ray.store.readers import suffix_of

_NAME = "dataset.json"
_ANNOTATIONS = "cases.json"  # {case: {"structures": [names that were looked for]}}


def dataset_items(root: str, files: Mapping[str, Any]) -> list[SourceItem] | None:
    """Cases of the data set in a folder; None where the folder is something else.

    A file `cases.json` beside `dataset.json` may say for each case which structures were
    annotated; without it, all that the data set names were.

    Args:
        root: The folder that holds a `dataset.json`.
        files: Everything there is, by location.
    """
    about = _json(f"{root}/{_NAME}")
    if _is_nnunet_v2(about):
        items = list(_v2_items(root, about, files))
    elif _is_decathlon(about):
        items = list(_decathlon_items(root, about, files))
    else:
        return None
    annotated = _json(f"{root}/{_ANNOTATIONS}") if f"{root}/{_ANNOTATIONS}" in files else {}
    return [_with_annotated(item, annotated) for item in items] or None


def _json(location: str) -> dict[str, Any]:
    try:
        content = json.loads(to_place(location).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_nnunet_v2(about: Mapping[str, Any]) -> bool:
    wanted = {"channel_names": dict, "labels": dict, "file_ending": str}
    return all(isinstance(about.get(key), kind) for key, kind in wanted.items())


def _v2_items(
    root: str, about: Mapping[str, Any], files: Mapping[str, Any]
) -> Iterator[SourceItem]:
    ending, channels = about["file_ending"], about["channel_names"]
    # Regions are lists of values that other entries name.
    label_names = {name: value for name, value in about["labels"].items() if type(value) is int}
    for part, split in (("Tr", None), ("Ts", "test")):
        pattern = re.compile(rf"{re.escape(root)}/images{part}/(.+)_\d{{4}}{re.escape(ending)}")
        cases = dict.fromkeys(match[1] for place in files if (match := pattern.fullmatch(place)))
        for case in cases:
            # A channel that is missing is named all the same: reading it says so.
            images = [f"{root}/images{part}/{case}_{n:04d}{ending}" for n in range(len(channels))]
            label = f"{root}/labels{part}/{case}{ending}"
            yield SourceItem(
                case_id=printable(case),
                channels=tuple(_image(place) for place in images),
                label=_image(label) if label in files else None,
                subject=printable(case),
                split=split,
                modality=channels.get("0"),
                label_names=label_names,
            )


def _is_decathlon(about: Mapping[str, Any]) -> bool:
    return isinstance(about.get("modality"), dict) and isinstance(about.get("training"), list)


def _decathlon_items(
    root: str, about: Mapping[str, Any], files: Mapping[str, Any]
) -> Iterator[SourceItem]:
    names = about.get("labels", {}).items()
    label_names = {name: int(value) for value, name in names if str(value).isdecimal()}
    for part, split in (("training", None), ("test", "test")):
        for entry in about.get(part, []):
            pair = entry if isinstance(entry, dict) else {"image": entry}
            image = _below(root, pair.get("image"))
            if image is None:
                continue
            label = _below(root, pair.get("label"))
            name = posixpath.basename(image)
            case = printable(name.removesuffix(suffix_of(name) or ""))
            yield SourceItem(
                case_id=case,
                channels=_decathlon_channels(image, len(about["modality"]), files),
                label=None if label is None else _image(label),
                subject=case,
                split=split,
                modality=about["modality"].get("0"),
                label_names=label_names,
            )


def _decathlon_channels(
    image: str, count: int, files: Mapping[str, Any]
) -> tuple[SourceImage, ...]:
    """One file that holds all channels (Decathlon), or one each beside its name (nnU-Net v1)."""
    ending = suffix_of(image) or ""
    stem = image.removesuffix(ending)
    if image not in files and f"{stem}_0000{ending}" in files:
        return tuple(_image(f"{stem}_{n:04d}{ending}") for n in range(count))
    if count == 1:
        return (_image(image),)
    return tuple(_image(image)._replace(volume=n) for n in range(count))


def _below(root: str, name: Any) -> str | None:
    """The location of a file that a data set names; None where it is no name inside of it."""
    if not isinstance(name, str):
        return None
    inside = posixpath.normpath(name)
    return None if inside.startswith(("/", "..")) else f"{root}/{inside}"


def _with_annotated(item: SourceItem, cases: Mapping[str, Any]) -> SourceItem:
    if item.label is None:
        return item
    known = [name for name, value in item.label_names.items() if value != 0]
    entry = cases.get(item.case_id)
    stated = entry.get("structures") if isinstance(entry, dict) else None
    if isinstance(stated, list):
        known = [name for name in known if name in stated]
    return replace(item, annotated=tuple(known))


def _image(location: str) -> SourceImage:
    return SourceImage(suffix_of(location) or "", (location,))
