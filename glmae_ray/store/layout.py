"""How a case lies in a store: pyramid, OME-Zarr 0.5 attributes, Zarr v3 array metadata; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from glmae_ray.volume import Shape, Spacing

# Of blosc. Zstandard's level 5 takes four times as long for 1 to 4 % less, bit shuffle more room;
# LZ4 is decoded three times as fast and takes 27 to 40 % more (docs/log.md).
_LEVELS = {"zstd": 2, "lz4": 5}
_SHORTEST_HALVED = 16  # voxels; halving keeps at least 8 on every axis

_SPACE = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]


def pyramid_factors(shape: Shape, spacing: Spacing, levels: int) -> tuple[Shape, ...]:
    """How many level-0 voxels (Z, Y, X) one voxel of each level averages; level 0 is (1, 1, 1).

    Each next level halves the axes whose spacing is within sqrt(2) of the finest one, so that
    voxels become cubes before all axes shrink. Axes of fewer than 16 voxels stay as they are.

    Args:
        shape: Level 0, (Z, Y, X).
        spacing: Level 0, (Z, Y, X) in mm.
        levels: Length of the result.
    """
    factors = [(1, 1, 1)]
    while len(factors) < levels:
        steps = [step * times for step, times in zip(spacing, factors[-1], strict=True)]
        sides = _shrunk(shape, factors[-1])
        finest = min(
            (step for step, side in zip(steps, sides, strict=True) if side >= _SHORTEST_HALVED),
            default=0.0,
        )
        z, y, x = (
            times * 2 if side >= _SHORTEST_HALVED and step <= finest * math.sqrt(2) else times
            for times, side, step in zip(factors[-1], sides, steps, strict=True)
        )
        factors.append((z, y, x))
    return tuple(factors)


def image_attributes(name: str, *, spacing: Spacing, factors: Sequence[Shape]) -> dict[str, Any]:
    """Attributes of an image group whose arrays `0, 1, ...` are (C, Z, Y, X) pyramid levels.

    Args:
        name: What viewers show, the case id.
        spacing: Level 0, (Z, Y, X) in mm.
        factors: Per level, how many level-0 voxels (Z, Y, X) one voxel averages.
    """
    axes = [{"name": "c", "type": "channel"}, *_SPACE]
    datasets = [
        _dataset(str(level), scale=[1.0, *scale], shift=[0.0, *shift])
        for level, (scale, shift) in enumerate(_placed(spacing, factor) for factor in factors)
    ]
    return _ome(multiscales=[{"name": name, "axes": axes, "datasets": datasets, "type": "mean"}])


def labels_attributes(names: Sequence[str]) -> dict[str, Any]:
    """Attributes of the group `labels`, which lists the label maps below it."""
    return _ome(labels=list(names))


def label_attributes(
    name: str, *, spacing: Spacing, label_names: Mapping[str, int]
) -> dict[str, Any]:
    """Attributes of one label map: array `0` is (Z, Y, X) on the grid of image level 0."""
    scale, shift = _placed(spacing, (1, 1, 1))
    level = {"name": name, "axes": _SPACE, "datasets": [_dataset("0", scale=scale, shift=shift)]}
    properties = [
        {"label-value": value, "name": structure} for structure, value in label_names.items()
    ]
    image_label = {"properties": properties, "source": {"image": "../../image"}}
    return _ome(multiscales=[level], **{"image-label": image_label})


def names_in_label_attributes(attributes: Mapping[str, Any]) -> dict[str, int]:
    """Structure name to value: what `label_attributes` was given."""
    properties = attributes["ome"]["image-label"]["properties"]
    return {entry["name"]: entry["label-value"] for entry in properties}


def array_metadata(
    array: NDArray[Any], *, chunk: Shape, fill_value: float, codec: str = "zstd"
) -> dict[str, Any]:
    """The document of a (Z, Y, X) or (C, Z, Y, X) array in Zarr v3: all of it is one shard."""
    sides = array.shape[-3:]
    inner = [min(part, side) for part, side in zip(chunk, sides, strict=True)]
    outer = [-(-side // part) * part for part, side in zip(inner, sides, strict=True)]
    channels = list(array.shape[:-3])
    shuffle = "shuffle" if array.itemsize > 1 else "noshuffle"
    blosc = {"cname": codec, "clevel": _LEVELS[codec], "shuffle": shuffle, "blocksize": 0}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1] * len(channels) + inner,
        "codecs": [
            little,
            {"name": "blosc", "configuration": {**blosc, "typesize": array.itemsize}},
        ],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "fill_value": fill_value,  # blocks of nothing but air go unwritten
        "dimension_names": list("czyx")[-array.ndim :],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": channels + outer}},
        # One file a level: folders of single files would be most of what a case consists of.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
    }


def shard_key(axes: int) -> str:
    """Name of the only shard of an array of so many axes, below the array's own folder."""
    return ".".join("c" + "0" * axes)


def _shrunk(shape: Shape, factor: Shape) -> Shape:
    z, y, x = (-(-side // times) for side, times in zip(shape, factor, strict=True))
    return z, y, x


def _placed(spacing: Spacing, factor: Shape) -> tuple[list[float], list[float]]:
    """Spacing of a level (Z, Y, X) and the centre of its first voxel, both in mm."""
    scale = [step * times for step, times in zip(spacing, factor, strict=True)]
    # The centre of a voxel that averages n lies (n - 1) / 2 steps after that of its first.
    shift = [step * (times - 1) / 2 for step, times in zip(spacing, factor, strict=True)]
    return scale, shift


def _dataset(path: str, *, scale: list[float], shift: list[float]) -> dict[str, Any]:
    transformations = [
        {"type": "scale", "scale": scale},
        {"type": "translation", "translation": shift},
    ]
    return {"path": path, "coordinateTransformations": transformations}


def _ome(**entries: Any) -> dict[str, Any]:
    return {"ome": {"version": "0.5", **entries}}
