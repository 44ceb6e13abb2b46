"""From a source that the user names to items, one per case: files, folders, nnU-Net data sets."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from glmae_ray.config import UserError
from glmae_ray.store.readers import READERS, suffix_of

NNUNET_LABELS = "structures"  # name of the label map that an nnU-Net data set has


@dataclass(frozen=True)
class SourceItem:
    """What becomes one case.

    Attributes:
        case_id: Unique in its source, safe as a folder name.
        images: One file a channel.
        label: Label map on the grid of the images.
        subject: The person; cases of one person share a split.
        split: train, val or test where the source says so.
        modality: The data set's word, None where it has none.
        label_names: Structure name to value in the label map.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None = None
    subject: str = ""
    split: str | None = None
    modality: str | None = None
    label_names: Mapping[str, int] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Path of the first image as text that tables and screens take, whatever its bytes."""
        return printable(str(self.images[0]))

    @property
    def files(self) -> list[Path]:
        """Images in channel order, then the label map."""
        return [*self.images] if self.label is None else [*self.images, self.label]


class Sources(NamedTuple):
    """What a source holds."""

    items: list[SourceItem]  # in path order
    ignored: int  # files that belong to no item


def discover(source: str) -> Sources:
    """Find the cases of a file, or of a folder and everything below it.

    A folder with an nnU-Net v2 `dataset.json` is taken as that says; any other file with a
    suffix of `READERS` is a case of its own.

    Raises:
        UserError: The source is missing, cannot be read, or holds no image.
    """
    root = Path(source).absolute()
    if not root.exists():
        raise UserError(f"source: {source} does not exist")
    found = list(_walk(root)) if root.is_dir() else [_loose(root)]
    items = [item for item in found if item is not None]
    if not items:
        known = ", ".join(READERS)
        raise UserError(f"source: {source} holds no image ({known}, or an nnU-Net v2 data set)")
    items = _with_unique_ids(items, root)
    return Sources(items, ignored=len(found) - len(items))


def printable(text: str) -> str:
    """Text with the bytes of a file name that are no UTF-8 written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def other_id(case_id: str, *, place: str) -> str:
    """An id for a case whose own id is taken, from where its file is."""
    return f"{case_id}-{hashlib.sha256(printable(place).encode()).hexdigest()[:8]}"


def _walk(folder: Path) -> Iterator[SourceItem | None]:
    """Items of a folder and all below it in path order; None for a file that is no part of one."""
    about = _nnunet_description(folder)
    if about is not None:
        yield from _nnunet_items(folder, about)
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"source: {folder} cannot be read ({error.strerror})") from None
    for entry in entries:
        # Links to folders are not followed: they may lead back up.
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name)
        else:
            yield _loose(folder / entry.name)


def _loose(path: Path) -> SourceItem | None:
    suffix = suffix_of(path)
    if suffix is None:
        return None
    name = printable(path.name[: -len(suffix)])
    return SourceItem(name, (path,), subject=name)


def _nnunet_description(folder: Path) -> dict[str, Any] | None:
    """The `dataset.json` of an nnU-Net v2 data set, None where the folder is something else."""
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"channel_names": dict, "labels": dict, "file_ending": str}
    is_v2 = isinstance(about, dict) and all(
        isinstance(about.get(key), kind) for key, kind in wanted.items()
    )
    return about if is_v2 and (folder / "imagesTr").is_dir() else None


def _nnunet_items(folder: Path, about: dict[str, Any]) -> Iterator[SourceItem | None]:
    used: set[Path] = set()
    for part, split in (("Tr", None), ("Ts", "test")):
        for item in _nnunet_part(folder, about, part=part):
            used.update(item.files)
            yield replace(item, split=split)
    files = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    yield from (None for path in files if path not in used)


def _nnunet_part(folder: Path, about: dict[str, Any], *, part: str) -> Iterator[SourceItem]:
    ending, channels = about["file_ending"], about["channel_names"]
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    names = (path.name for path in (folder / f"images{part}").glob(f"*{ending}"))
    cases = {match[1] for name in names if (match := pattern.fullmatch(name))}
    # Regions are lists of values that other entries name.
    label_names = {name: value for name, value in about["labels"].items() if type(value) is int}
    for case in sorted(cases):
        # A channel that is missing is named here all the same: reading it says so.
        images = (
            folder / f"images{part}" / f"{case}_{n:04d}{ending}" for n in range(len(channels))
        )
        label = folder / f"labels{part}" / f"{case}{ending}"
        yield SourceItem(
            case_id=case,
            images=tuple(images),
            label=label if label.exists() else None,
            subject=printable(case),
            modality=channels.get("0"),
            label_names=label_names,
        )


def _with_unique_ids(items: Iterable[SourceItem], root: Path) -> list[SourceItem]:
    """Ids safe as folder names; of several equal ones all but the first get a hash of the path."""
    taken: set[str] = set()
    unique = []
    for item in items:
        case_id = _safe(item.case_id)
        if case_id.casefold() in taken:
            case_id = other_id(case_id, place=os.path.relpath(item.images[0], root))
        # Some file systems see no difference between A and a.
        taken.add(case_id.casefold())
        unique.append(replace(item, case_id=case_id))
    return unique


def _safe(name: str) -> str:
    """A name that no file system and no Zarr store reads as anything but a name."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    safe = re.sub(r"^(\.|__)[._]*", "_", safe) or "_"
    return safe + "_" if safe.casefold() == "zarr.json" else safe
