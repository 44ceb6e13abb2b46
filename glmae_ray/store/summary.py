"""What a store holds, in figures: from its index without opening a case, and from its files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.paths import Place, plain_errors
from glmae_ray.store.index import VolumeIndex, read_quarantine
from glmae_ray.store.zarr_store import FORMAT, VolumeStore

Facts = dict[str, Any]  # JSON values

_DOCUMENT = "zarr.json"


def describe(store: VolumeStore, index: VolumeIndex) -> Facts:
    """What the tables of a store say.

    Returns:
        store: Where it is.
        format, chunk, levels: Of the store; chunk is (Z, Y, X) in voxels.
        fingerprint: SHA-256 over ids, voxels and splits.
        cases, subjects: How many.
        splits: Name to `cases` and `subjects`.
        modalities: Word to the figures of `_modality`.
        structures: Name to `cases` that have it and `median_voxels` in those.
        readers: Name to cases.
        options: Choices that are not the same in every case: name to a list of `value` (null
            where the choice was not made) and `cases`, the most frequent value first.
        quarantine: Reason to `sources` and the message of one of them, `example`.
    """
    modalities = sorted(set(index.column("modality")))
    return {
        "store": str(store.path),
        "format": FORMAT,
        "chunk": list(store.chunk),
        "levels": store.levels,
        "codec": store.codec,
        "fingerprint": index.fingerprint(),
        "cases": len(index),
        "subjects": len(set(index.column("subject"))),
        "splits": _splits(index),
        "modalities": {word: _modality(index.select(modality=word)) for word in modalities},
        "structures": {
            name: {"cases": len(voxels), "median_voxels": float(np.median(voxels))}
            for name, voxels in index.entries("structures").items()
        },
        "readers": _counts(index.column("reader")),
        "options": _differing_options(index),
        "quarantine": _quarantine(store),
    }


def measure(store: VolumeStore, index: VolumeIndex) -> Facts:
    """Sizes of a store's files, and whether its cases are those of its index.

    Returns:
        raw: Bytes of level 0 of all indexed cases as plain arrays.
        parts: `level_0`, `level_1`, ..., `labels`, `documents` (group documents and tables) and
            `sum`, each with its `bytes` (lengths of files) and their `ratio` to `raw`.
        not_indexed: Published cases that the index misses: an ingest runs or was killed.
        missing: Cases of the index that are not published.
    """
    sizes: Counter[str] = Counter({f"level_{level}": 0 for level in range(store.levels)})
    sizes.update({"labels": 0, "documents": 0})
    published = set()
    for name, size in _files(store.path):
        parts = name.split("/")
        sizes[_part(parts)] += size
        if len(parts) == 3 and parts[::2] == ["cases", _DOCUMENT]:
            published.add(parts[1])
    sizes["sum"] = sum(sizes.values())
    raw, known = _raw_bytes(index), set(index.case_ids())
    return {
        "raw": raw,
        "parts": {
            part: {"bytes": size, "ratio": size / raw if raw else None}
            for part, size in sizes.items()
        },
        "not_indexed": len(published - known),
        "missing": len(known - published),
    }


def _splits(index: VolumeIndex) -> Facts:
    subjects: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    splits = index.column("split")
    for split, subject in zip(splits, index.column("subject"), strict=True):
        subjects[split].add(subject)
    cases = Counter(splits)
    return {
        split: {"cases": cases[split], "subjects": len(people)}
        for split, people in subjects.items()
    }


def _modality(index: VolumeIndex) -> Facts:
    """Figures of the cases of one modality.

    Returns:
        cases: How many.
        channels, dtypes: Number of channels (as text) and type to cases.
        shape, spacing: `median`, `minimum` and `maximum`, each (Z, Y, X) in voxels or mm.
        intensity: Of channel 0 inside the foreground box: `p0_5`, `p50`, `p99_5` as medians over
            the cases, `minimum` and `maximum` of all.
    """
    intensity = {
        name: float(np.median(index.first_channel(name))) for name in ("p0_5", "p50", "p99_5")
    }
    return {
        "cases": len(index),
        "channels": {str(n): cases for n, cases in _counts(index.column("channels")).items()},
        "dtypes": _counts(index.column("dtype")),
        "shape": _spread(index.shapes()),
        "spacing": _spread(index.spacings()),
        "intensity": {
            **intensity,
            "minimum": float(index.first_channel("minimum").min()),
            "maximum": float(index.first_channel("maximum").max()),
        },
    }


def _spread(sides: NDArray[Any]) -> Facts:
    return {
        "median": np.median(sides, axis=0).tolist(),
        "minimum": sides.min(axis=0).tolist(),
        "maximum": sides.max(axis=0).tolist(),
    }


def _counts(values: NDArray[Any]) -> dict[Any, int]:
    return dict(Counter(values.tolist()).most_common())


def _differing_options(index: VolumeIndex) -> Facts:
    differing = {}
    for name, values in index.entries("options").items():
        counts = [{"value": value, "cases": cases} for value, cases in _counts(values).items()]
        if len(values) < len(index):
            counts.append({"value": None, "cases": len(index) - len(values)})
        if len(counts) > 1:
            differing[name] = sorted(counts, key=lambda entry: -entry["cases"])
    return differing


def _quarantine(store: VolumeStore) -> Facts:
    rows = read_quarantine(store.path)
    example = {row["reason"]: row["message"] for row in reversed(rows)}
    sources = Counter(row["reason"] for row in rows)
    return {
        reason: {"sources": count, "example": example[reason]}
        for reason, count in sources.most_common()
    }


def _raw_bytes(index: VolumeIndex) -> int:
    kinds, codes = np.unique(index.column("dtype").astype(str), return_inverse=True)
    widths = np.array([np.dtype(kind).itemsize for kind in kinds], np.int64)
    voxels = index.shapes().prod(axis=1) * index.column("channels").astype(np.int64)
    return int((voxels * widths[codes]).sum())


def _part(parts: list[str]) -> str:
    """What a file, named by its folders below the store, belongs to."""
    if len(parts) < 4 or parts[0] != "cases" or parts[-1] == _DOCUMENT:
        return "documents"
    return f"level_{parts[3]}" if parts[2] == "image" else "labels"


def _files(store: Place) -> Iterator[tuple[str, int]]:
    """Every file: its path below the store with `/`, and its length in bytes."""
    if isinstance(store, Path):
        yield from ((name[len(str(store)) + 1 :], size) for name, size in _local_files(store))
        return
    root = store.path.rstrip("/") + "/"
    with plain_errors(store):
        found = store.fs.find(store.path, detail=True)
    yield from ((name.removeprefix(root), about["size"]) for name, about in found.items())


def _local_files(folder: Path) -> Iterator[tuple[str, int]]:
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except FileNotFoundError:  # an ingest that runs replaces cases and tables
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
                continue
            try:
                yield entry.path, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
