"""From a source that the user names to items, one per case, with nothing left unaccounted for."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from glmae_ray.errors import UserError
from glmae_ray.paths import plain_errors, to_place
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
from glmae_ray.store.listing import list_files, stat_files
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
        ambiguous: Subjects by the name of files that lie in several folders.
        others: Files that are no images, and why it was thought so.
    """

    items: list[SourceItem] = field(default_factory=list)
    files: dict[str, Found] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    rejected: dict[str, ReadError] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    ambiguous: list[str] = field(default_factory=list)


def discover(
    source: str,
    *,
    read_headers: ReadHeaders,
    known: Mapping[Found, Header] | None = None,
    by_folder: bool = False,
) -> Sources:
    """Find the cases of a file, a folder and everything below it, a glob, or a manifest.

    A folder with the `dataset.json` of nnU-Net or Decathlon is taken as that says. Elsewhere
    every file with a suffix of `READERS` is a case, and DICOM files, whatever they are called
    and wherever they lie, make one case a series.

    Args:
        source: Path, URL, glob, or a manifest (.csv, .parquet).
        read_headers: Looks into files that may be DICOM.
        known: What is known of files that have not changed since.
        by_folder: Single files of a folder are of one person; else those of the same name are.

    Raises:
        UserError: The source is missing, cannot be read, or holds no image.
    """
    found = _Finder(read_headers, known or {}, by_folder=by_folder)
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

    def __init__(
        self, read_headers: ReadHeaders, known: Mapping[Found, Header], *, by_folder: bool
    ) -> None:
        self.sources = Sources()
        self._read_headers, self._known, self._by_folder = read_headers, known, by_folder
        self._root = ""
        self._folders: dict[str, set[str]] = defaultdict(set)  # by name of a single file

    def take_all(self, source: str) -> str:
        """Take every file that a folder, a glob or a file name stands for; return their root."""
        root, files, unreadable = list_files(source)
        self._root = root
        for place, reason in unreadable:
            message = f"{place}: {reason}; mend it, or name what it leads to"
            self.sources.rejected[place] = ReadError("unreadable", message)
        self.sources.files = {found.location: found for found in files}
        loose = self._without_datasets([found.location for found in files])
        series = self._take_loose(loose)
        if not self._by_folder:
            names = (name for name, folders in self._folders.items() if len(folders) > 1)
            self.sources.ambiguous = sorted(names)
        self.sources.items += self._series_items(series)
        self.sources.items.sort(key=lambda item: item.channels[0].locations[0].split("/"))
        return root

    def take_manifest(self, location: str) -> None:
        """Take what a manifest names."""
        items = manifest_items(location)
        self.sources.others[location] = "the manifest"
        images = [image for item in items for image in item.channels]
        folders = {i.locations[0]: self._folder(i.locations[0]) for i in images if _is_open(i)}
        self._headers([place for places in folders.values() for place in places])
        parts = {i.locations[0]: self._with_data(i) for i in images if not _is_open(i)}
        labels = [item.label.locations[0] for item in items if item.label is not None]
        named = [place for image in parts.values() for place in image.locations]
        self.sources.files |= stat_files(list(dict.fromkeys([location, *named, *labels])))
        for item in items:
            try:
                channels = tuple(
                    parts.get(i.locations[0]) or self._series(i.locations[0], folders)
                    for i in item.channels
                )
            except ReadError as error:
                self.sources.rejected[item.source] = error
            else:
                self.sources.items.append(replace(item, channels=channels))

    def _without_datasets(self, locations: Sequence[str]) -> list[str]:
        """Take the items of self-describing data sets; return the files outside of them."""
        roots = [place.rpartition("/")[0] for place in locations if place.endswith("/dataset.json")]
        inside: set[str] = set()
        for root in roots:
            if f"{root}/dataset.json" in inside:
                continue
            below = dict.fromkeys(_below(locations, root))
            try:
                items = dataset_items(root, below.keys())
            except ReadError as error:
                self.sources.rejected[f"{root}/dataset.json"] = error
                items = []
            if items is not None:
                self.sources.items += items
                self._account_for(below, {place for item in items for place in item.locations})
                inside.update(below)
        return [place for place in locations if place not in inside]

    def _account_for(self, places: Iterable[str], used: Collection[str]) -> None:
        """Files of a data set that are in none of its cases: images are not just left out."""
        for place in places:
            if place in used or place in self.sources.rejected:
                continue
            if suffix_of(place) is None:
                self.sources.others[place] = "no image of the data set"
            else:
                message = f"{place}: no case of its data set; name it in dataset.json, or move it"
                self.sources.rejected[place] = ReadError("unlisted", message)

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
                folder = printable(place.rpartition("/")[0])
                self._folders[name].add(folder)
                person = folder.removeprefix(printable(self._root)).strip("/")
                is_folder = self._by_folder and person
                subject = person if is_folder else name
                self.sources.items.append(SourceItem(name, (image,), subject=subject))
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
        """Files that hold the voxels of a detached header; none that is an image itself."""
        names = DETACHED.get(suffix_of(place) or "")
        if names is None:
            return []
        folder, at = place.rpartition("/")[0], to_place(place)
        try:
            with plain_errors(at):
                found = names(at)
        except (ReadError, UserError, OSError):
            return []  # reading the image will say the same
        return [f"{folder}/{name}" for name in found if suffix_of(name) is None]

    def _with_data(self, image: SourceImage) -> SourceImage:
        (place,) = image.locations
        return SourceImage(image.reader, (place, *self._data_files(place)))

    def _folder(self, place: str) -> list[str]:
        """Files of a folder, or the one file, that a manifest names as DICOM."""
        try:
            files = list_files(place, may_be_glob=False).files
        except UserError:
            return []
        self.sources.files |= {found.location: found for found in files}
        return [found.location for found in files]

    def _series(self, folder: str, found: Mapping[str, Sequence[str]]) -> SourceImage:
        """The one series that a folder of a manifest has to hold."""
        headers = {place: self.sources.headers[place] for place in found[folder]}
        slices = [p for p, header in headers.items() if isinstance(header, SliceHeader)]
        broken = {p: header for p, header in headers.items() if isinstance(header, ReadError)}
        self.sources.rejected |= broken
        kinds = {h.series for h in headers.values() if isinstance(h, SliceHeader)}
        if len(kinds) != 1:
            message = f"{folder}: {len(kinds)} DICOM series; name a folder that holds one"
            error = ReadError("unreadable" if not kinds else "not_3d", message)
            self.sources.rejected |= dict.fromkeys(slices, error)
            raise error
        others = (place for place, header in headers.items() if header is None)
        self.sources.others |= dict.fromkeys(others, "no slice of the series")
        return SourceImage(DICOM, tuple(slices))


def _is_open(image: SourceImage) -> bool:
    """Whether a manifest's image has to be looked at: a folder, or a file of an unknown kind."""
    return image.reader in ("", DICOM)


def _below(locations: Sequence[str], root: str) -> list[str]:
    """Locations inside a folder, out of a list in path order."""
    parts = root.split("/")
    start = bisect.bisect_left(locations, parts, key=lambda place: place.split("/"))
    stop = start
    while stop < len(locations) and locations[stop].startswith(f"{root}/"):
        stop += 1
    return list(locations[start:stop])
