"""Data sets that describe themselves: nnU-Net v2, nnU-Net v1 and Medical Segmentation Decathlon."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from glmae_ray.paths import to_place
from glmae_ray.store.items import SourceImage, SourceItem, printable
from glmae_ray.store.readers import suffix_of
from glmae_ray.store.scan import ReadError

_NAME = "dataset.json"
_ANNOTATIONS = "cases.json"  # {case: {"structures": [names that were looked for]}}


class _Nnunet(BaseModel):
    """What `dataset.json` of nnU-Net v2 says."""

    channel_names: dict[str, str]
    labels: dict[str, int | list[int]] = {}  # regions are lists of values that other entries name
    file_ending: str


class _Pair(BaseModel):
    image: str
    label: str | None = None


class _Decathlon(BaseModel):
    """What `dataset.json` of Decathlon and nnU-Net v1 says."""

    modality: dict[str, str]
    labels: dict[str, str] = {}
    training: list[_Pair | str]
    test: list[_Pair | str] = []


def dataset_items(root: str, files: Collection[str]) -> list[SourceItem] | None:
    """Cases of the data set in a folder; None where the folder is something else.

    A file `cases.json` beside `dataset.json` may say for each case which structures were
    annotated; without it, all that the data set names were.

    Args:
        root: The folder that holds a `dataset.json`.
        files: Locations of all files below it.

    Raises:
        ReadError: unreadable: a data set that says wrong things, or names no case.
    """
    about = _json(f"{root}/{_NAME}")
    try:
        if {"channel_names", "file_ending"} <= about.keys():
            items = list(_nnunet_items(root, _Nnunet.model_validate(about), files))
        elif {"modality", "training"} <= about.keys():
            items = list(_decathlon_items(root, _Decathlon.model_validate(about), files))
        else:
            return None
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        message = f"{root}/{_NAME}: {wrong} is not what nnU-Net or Decathlon write; correct it"
        raise ReadError("unreadable", message) from None
    if not items:
        message = f"{root}/{_NAME}: names no case that is there; correct it, or remove it"
        raise ReadError("unreadable", message)
    annotated = _json(f"{root}/{_ANNOTATIONS}") if f"{root}/{_ANNOTATIONS}" in files else {}
    return [_with_annotated(item, annotated) for item in items]


def _json(location: str) -> dict[str, Any]:
    try:
        content = json.loads(to_place(location).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _nnunet_items(root: str, about: _Nnunet, files: Collection[str]) -> Iterator[SourceItem]:
    ending, channels = about.file_ending, about.channel_names
    label_names = {name: value for name, value in about.labels.items() if isinstance(value, int)}
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


def _decathlon_items(root: str, about: _Decathlon, files: Collection[str]) -> Iterator[SourceItem]:
    label_names = {name: int(value) for value, name in about.labels.items() if value.isdecimal()}
    seen: set[str] = set()
    for entries, split in ((about.training, None), (about.test, "test")):
        for entry in entries:
            pair = _Pair(image=entry) if isinstance(entry, str) else entry
            image = _below(root, pair.image)
            if image is None or image in seen:
                continue
            seen.add(image)
            label = None if pair.label is None else _below(root, pair.label)
            name = posixpath.basename(image)
            case = printable(name.removesuffix(suffix_of(name) or ""))
            yield SourceItem(
                case_id=case,
                channels=_decathlon_channels(image, len(about.modality), files),
                label=None if label is None else _image(label),
                subject=case,
                split=split,
                modality=about.modality.get("0"),
                label_names=label_names,
            )


def _decathlon_channels(image: str, count: int, files: Collection[str]) -> tuple[SourceImage, ...]:
    """One file that holds all channels (Decathlon), or one each beside its name (nnU-Net v1)."""
    ending = suffix_of(image) or ""
    stem = image.removesuffix(ending)
    if image not in files and f"{stem}_0000{ending}" in files:
        return tuple(_image(f"{stem}_{n:04d}{ending}") for n in range(count))
    if count == 1:
        return (_image(image),)
    return tuple(_image(image)._replace(volume=n) for n in range(count))


def _below(root: str, name: str) -> str | None:
    """The location of a file that a data set names; None where it is no name inside of it."""
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
