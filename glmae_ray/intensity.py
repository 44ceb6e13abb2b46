"""Intensity: which stored values become 0 and 1 for a network, for training and inference alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_finetune import CropsConfig
from glmae_ray.resizing import Code

# Of the index: what `window_of` needs of a row.
COLUMNS = {"modality", "minimum", "maximum", "p0_5", "p99_5", "mean", "std"}


class Window(NamedTuple):
    """What the intensities of a case become.

    Attributes:
        ends: float64 (C, 2), the stored values that become 0 and 1.
        clips: Whether what lies outside becomes 0 or 1 too.
    """

    ends: NDArray[np.float64]
    clips: bool

    @property
    def codes(self) -> list[Code]:
        """The same for `resize`, one a channel."""
        return [
            Code(
                low if self.clips else -np.inf,
                high if self.clips else np.inf,
                1 / (high - low),
                -low / (high - low),
            )
            for low, high in self.ends.tolist()
        ]

    def apply(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """Stored intensities (C, Z, Y, X) as the network sees them; a copy."""
        out = np.empty(array.shape, np.float32)
        for code, channel, values in zip(self.codes, array, out, strict=True):
            np.multiply(channel, code.scale, out=values, casting="unsafe")
            values += code.shift
            if self.clips:
                np.clip(values, 0, 1, out=values)
        return out

    def air(self, minimum: Sequence[float]) -> NDArray[np.float32]:
        """What pads a case, float32 (C,): its lowest intensity as the network sees it.

        Args:
            minimum: The row's lowest stored intensity of each channel.
        """
        return self.apply(np.reshape(minimum, (-1, 1, 1, 1)))[:, 0, 0, 0]


def window_of(row: Mapping[str, Any], crops: CropsConfig) -> Window:
    """The window of a case.

    Of CT in HU `crops.window`, of others percentiles 0.5 and 99.5, unless `crops.intensity` says
    how. `window` and `percentiles` cut off what lies outside, `zscore` does not: its 0 is the mean
    of the case's foreground box, its 1 a standard deviation above.

    Args:
        row: Of the index, with at least `COLUMNS`.
        crops: The run's section.
    """
    kind = crops.intensity or ("window" if row["modality"] == "CT" else "percentiles")
    if kind == "window":
        return Window(np.tile(np.array(crops.window, float), (len(row["minimum"]), 1)), clips=True)
    if kind == "percentiles":
        return Window(percentiles(row), clips=True)
    mean, std = (np.array(row[name], float) for name in ("mean", "std"))
    return Window(np.stack([mean, mean + np.where(std > 0, std, 1)], axis=1), clips=False)


def percentiles(row: Mapping[str, Any]) -> NDArray[np.float64]:
    """Percentiles 0.5 and 99.5 of a case, (C, 2), apart even where all voxels are alike."""
    low, high = (np.array(row[name], float) for name in ("p0_5", "p99_5"))
    window = np.stack([low, high], axis=1)
    # Where nearly all voxels are alike, percentiles meet; where all are, one unit is as good.
    flat = low == high
    window[flat] = np.stack([row["minimum"], row["maximum"]], axis=1)[flat]
    window[:, 1] += window[:, 0] == window[:, 1]
    return window
