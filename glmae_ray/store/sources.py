"""From a source that the user names to items, one per case, with nothing left unaccounted for."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from glmae_ray.errors import UserError
from glmae_ray.paths import to_place
from glmae_ray.store.datasets import dataset_items
from glmae_ray.store.dicom_headers import SliceHeader
from glmae_ray.store.items import (
    Found,
    SourceImage,
    SourceItem,
    printable,
    with_file_facts,
    with_unique_ids,
)
from glmae_ray.store.listing import list_files
from glmae_ray.store.manifest import SUFFIXES, manifest_items
from glmae_ray.store.readers import DETACHED, READERS, suffix_of
from glmae_ray.store.scan import ReadError

DICOM = ".dcm"

# What a file is: a slice, not DICOM at all (None), or DICOM that no case can be made of.
Header = SliceHeader | ReadError | None
ReadHeaders = Callable[[Sequence[str]], Iterable[Header]]


@dataclass
class Sources:
    """What a source holds: every file is in an item, rejected, or something else than an image.

    Attributes:
        items: In path order.
        files: Every file, by location.
        headers: What the files that were looked into turned out to be, by location.
        rejected: Locations that nothing can be made of, and why.
        others: Files that are no images, and why it was thought so.
    """

    items: list[SourceItem] = field(default_factory=list)
    files: dict[str, Found] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    rejected: dict[str, ReadError] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def discover(
    source: str, *, read_headers: ReadHeaders, known: Mapping[Found, Header] | None = None
) -> Sources:
    """Find the cases of a file, a folder and everything below it, a glob, or a manifest.

    A folder with the `dataset.json` of nnU-Net or Decathlon is taken as that says. Elsewhere
    every file with a suffix of `READERS` is a case, and DICOM files, whatever they are called
    and wherever they lie, make one case a series.

    Args:
        source: Path, URL, glob, or a manifest (.csv, .parquet).
        read_headers: Looks into files that may be DICOM.
        known: What is known of files that have not changed since.

    Raises:
        UserError: The source is missing, cannot be read, or holds no image.
    """
    found = _Finder(read_headers, known or {})
    if source.lower().endswith(SUFFIXES):
        root = str(to_place(source))
        found.take_manifest(root)
    else:
        root = found.take_all(source)
    sources = found.sources
    if not sources.items and not sources.rejected:
        kinds = ", ".join(READERS)
        raise UserError(f"source: {source} holds no image ({kinds}, or a data set of them)")
    items = with_unique_ids(with_file_facts(sources.items, sources.files), root=root)
    return replace(sources, items=items)


class _Finder:
    """Sources while they are being found."""

    def __init__(self, read_headers: ReadHeaders, known: Mapping[Found, Header]) -> None:
        self.sources = Sources()
        self._read_headers, self._known = read_headers, known

    def take_all(self, source: str) -> str:
        """Take every file that a folder, a glob or a file name stands for; return their root."""
        root, files, unreadable = list_files(source)
        for folder, reason in unreadable:
            message = f"{folder}: {reason}; give the right to read it"
            self.sources.rejected[folder] = ReadError("unreadable", message)
        self.sources.files = {found.location: found for found in files}
        loose = self._without_datasets([found.location for found in files])
        series = self._take_loose(loose)
        self.sources.items += self._series_items(series)
        self.sources.items.sort(key=lambda item: item.channels[0].locations[0].split("/"))
        return root

    def take_manifest(self, location: str) -> None:
        """Take what a manifest names."""
        self.sources.others[location] = "the manifest"
        for item in manifest_items(location):
            try:
                channels = tuple(self._settled(image) for image in item.channels)
            except ReadError as error:
                self.sources.rejected[item.source] = error
                continue
            self.sources.items.append(replace(item, channels=channels))
            if item.label is not None:
                self._list(item.label.locations[0])

    def _without_datasets(self, locations: Sequence[str]) -> list[str]:
        """Take the items of self-describing data sets; return the files outside of them."""
        roots = [place.rpartition("/")[0] for place in locations if place.endswith("/dataset.json")]
        inside: set[str] = set()
        for root in roots:
            if f"{root}/dataset.json" in inside:
                continue
            below = _below(locations, root)
            items = dataset_items(root, dict.fromkeys(below))
            if items is None:
                continue
            self.sources.items += items
            used = {place for item in items for place in item.locations}
            unused = (place for place in below if place not in used)
            self.sources.others |= dict.fromkeys(unused, "no case of the data set names it")
            inside.update(below)
        return [place for place in locations if place not in inside]

    def _take_loose(self, locations: Sequence[str]) -> dict[str, list[str]]:
        """Take single-file images; return the slices of each DICOM series."""
        singles = [place for place in locations if suffix_of(place) not in (None, DICOM)]
        parts: dict[str, list[str]] = {place: self._data_files(place) for place in singles}
        data = {part for several in parts.values() for part in several}
        for place, several in parts.items():
            suffix = suffix_of(place)
            if suffix is not None and place not in data:
                name = printable(place.rpartition("/")[2][: -len(suffix)])
                image = SourceImage(suffix, (place, *several))
                self.sources.items.append(SourceItem(name, (image,), subject=name))
        unclear = [place for place in locations if place not in parts and place not in data]
        series: dict[str, list[str]] = defaultdict(list)
        for place, header in zip(unclear, self._headers(unclear), strict=True):
            if header is None:
                self.sources.others[place] = "no suffix and no content of an image"
            elif isinstance(header, ReadError):
                self.sources.rejected[place] = header
            else:
                series[header.series].append(place)
        return series

    def _series_items(self, series: Mapping[str, list[str]]) -> Iterable[SourceItem]:
        for key, places in self._without_copies(series):
            header = self.sources.headers[places[0]]
            assert isinstance(header, SliceHeader)
            yield SourceItem(
                case_id=f"dicom-{key[:16]}",
                channels=(SourceImage(DICOM, tuple(places)),),
                subject=header.subject,
                modality=header.modality,
                is_named_by_content=True,
            )

    def _without_copies(self, series: Mapping[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
        """Each series with its files; one that lies in several folders as copies, once a folder."""
        for key, places in series.items():
            folders: dict[str, list[str]] = defaultdict(list)
            for place in places:
                folders[place.rpartition("/")[0]].append(place)
            held = [{self._instance(place) for place in inside} for inside in folders.values()]
            is_copied = sum(map(len, held)) > len(set().union(*held))
            for inside in folders.values() if is_copied else [places]:
                yield key, inside

    def _instance(self, place: str) -> str:
        header = self.sources.headers[place]
        assert isinstance(header, SliceHeader)
        return header.instance

    def _headers(self, locations: Sequence[str]) -> list[Header]:
        """What each file is; those that have not changed since are not opened again."""
        found = self.sources.files
        headers = {p: self._known[found[p]] for p in locations if found[p] in self._known}
        unread = [place for place in locations if place not in headers]
        headers |= dict(zip(unread, self._read_headers(unread), strict=True))
        self.sources.headers |= headers
        return [headers[place] for place in locations]

    def _data_files(self, place: str) -> list[str]:
        """Files that hold the voxels of a detached header."""
        names = DETACHED.get(suffix_of(place) or "")
        if names is None:
            return []
        folder = place.rpartition("/")[0]
        try:
            return [f"{folder}/{name}" for name in names(to_place(place))]
        except (ReadError, OSError):
            return []  # reading the image will say the same

    def _settled(self, image: SourceImage) -> SourceImage:
        """An image of a manifest with all its files; a folder becomes the series in it."""
        (place,) = image.locations
        if image.reader and image.reader != DICOM:
            several = self._data_files(place)
            for part in (place, *several):
                self._list(part)
            return SourceImage(image.reader, (place, *several))
        try:
            files = list_files(place).files
        except UserError as error:
            raise ReadError(
                "unreadable", f"{place}: {error.lines[0]}; correct the manifest"
            ) from None
        self.sources.files |= {found.location: found for found in files}
        places = [found.location for found in files]
        headers = dict(zip(places, self._headers(places), strict=True))
        slices = [p for p, header in headers.items() if isinstance(header, SliceHeader)]
        kinds = {header.series for header in headers.values() if isinstance(header, SliceHeader)}
        if len(kinds) != 1:
            message = f"{place}: {len(kinds)} DICOM series; name a folder that holds one"
            raise ReadError("unreadable" if not kinds else "not_3d", message)
        self.sources.others |= {p: "no slice of the series" for p in places if p not in slices}
        return SourceImage(DICOM, tuple(slices))

    def _list(self, location: str) -> None:
        """Put a file that a manifest names among the files; one that is not there is no file."""
        try:
            self.sources.files |= {found.location: found for found in list_files(location).files}
        except UserError:
            return  # reading it will say so


def _below(locations: Sequence[str], root: str) -> list[str]:
    """Locations inside a folder, out of a list in path order."""
    parts = root.split("/")
    start = bisect.bisect_left(locations, parts, key=lambda place: place.split("/"))
    stop = start
    while stop < len(locations) and locations[stop].startswith(f"{root}/"):
        stop += 1
    return list(locations[start:stop])
