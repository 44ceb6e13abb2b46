"""Items: what of a source becomes one case, and the names that are safe for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

NNUNET_LABELS = "structures"  # name of the label map that a case has

_LONGEST_ID = 120  # characters; file systems take 255 bytes, and ids get a suffix here and there


class Found(NamedTuple):
    """One file of a source."""

    location: str  # absolute path or URL
    size: int  # bytes
    stamp: str  # another one after every change


class SourceImage(NamedTuple):
    """The files of one 3-D image, wherever they are."""

    reader: str  # key of READERS
    locations: tuple[str, ...]  # the file; a header and its data; the slices of a series
    volume: int | None = None  # which one to take, from 0, where a file holds several


@dataclass(frozen=True)
class SourceItem:
    """What becomes one case.

    Attributes:
        case_id: Unique in its source, safe as a folder name.
        channels: The image of each channel.
        label: Label map on the grid of the images.
        subject: The person; cases of one person share a split.
        split: train, val or test where the source says so.
        modality: The source's word, None where it has none.
        label_names: Structure name to value in the label map.
        annotated: Structures that someone looked for in this case; None where nobody says.
        size: Bytes of all files.
        stamp: Another one when a file of the item is moved, resized, written to, added or removed.
    """

    case_id: str
    channels: tuple[SourceImage, ...]
    label: SourceImage | None = None
    subject: str = ""
    split: str | None = None
    modality: str | None = None
    label_names: Mapping[str, int] = field(default_factory=dict)
    annotated: tuple[str, ...] | None = None
    size: int = 0
    stamp: str = ""

    @property
    def source(self) -> str:
        """Location of the first file as text that tables and screens take, whatever its bytes."""
        return printable(self.channels[0].locations[0])

    @property
    def locations(self) -> list[str]:
        """All files, each once: images in channel order, then the label map."""
        images = [*self.channels] if self.label is None else [*self.channels, self.label]
        return list(dict.fromkeys(place for image in images for place in image.locations))


def printable(text: str) -> str:
    """Text with the bytes of a file name that are no UTF-8 written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def other_id(case_id: str, *, place: str) -> str:
    """An id for a case whose own id is taken, from where its file is."""
    return f"{case_id}-{hashlib.sha256(printable(place).encode()).hexdigest()[:8]}"


def with_unique_ids(items: Sequence[SourceItem], *, root: str) -> list[SourceItem]:
    """Ids safe as folder names; of several equal ones all but the first get a hash of the path.

    An id that is safe as it stands comes before one that has to be changed.

    Args:
        items: In path order.
        root: What every location starts with; ids stay when the whole source moves.
    """
    # Some file systems see no difference between A and a.
    exact = {item.case_id.casefold() for item in items if safe_name(item.case_id) == item.case_id}
    taken: set[str] = set()
    unique = []
    for item in items:
        case_id = safe_name(item.case_id)
        is_lost = case_id != item.case_id and case_id.casefold() in exact
        if is_lost or case_id.casefold() in taken:
            place = item.channels[0].locations[0].removeprefix(root).lstrip("/")
            case_id = other_id(case_id, place=place)
        taken.add(case_id.casefold())
        unique.append(replace(item, case_id=case_id))
    return unique


def with_file_facts(items: Iterable[SourceItem], files: Mapping[str, Found]) -> list[SourceItem]:
    """Items that know the size and the state of their files."""

    def known(item: SourceItem) -> SourceItem:
        found = [files.get(place, Found(place, 0, "")) for place in item.locations]
        text = printable("\n".join(map(repr, [item.channels, item.label, *found])))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return replace(item, size=sum(file.size for file in found), stamp=digest)

    return [known(item) for item in items]


def safe_name(name: str) -> str:
    """A name that no file system and no Zarr store reads as anything but a name."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    safe = re.sub(r"^(\.|__)[._]*", "_", safe) or "_"
    if len(safe) > _LONGEST_ID:
        safe = other_id(safe[:_LONGEST_ID], place=name)
    return safe + "_" if safe.casefold() == "zarr.json" else safe
