"""Pictures as matplotlib figures: the views of a run side by side, and three planes of a case.

Everything is shown as a radiologist expects it: the patient's right, or the front, on the left.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from glmae_ray.volume import Shape, Spacing

_WIDTH_IN, _HEIGHT_IN = 12.0, 10.0  # the planes of a case fit into this
_LINE_IN = 0.22  # of text
_LETTERS_WIDE = 110  # of a legend as wide as that

Colour = tuple[float, float, float]  # red, green, blue from 0 to 1


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane through a case; rows and columns run as the canonical axes do.

    Attributes:
        name: What is written above it.
        ends: Letters of the patient directions at its top, bottom, left and right as shown.
        pixels: (C, rows, columns).
        labels: (rows, columns), None without a label map.
        spacing: Of rows and of columns, in mm.
        predicted: (rows, columns), a label map to hold against the other, outlined in dashes.
    """

    name: str
    ends: str
    pixels: NDArray[Any]
    labels: NDArray[Any] | None
    spacing: tuple[float, float]
    predicted: NDArray[Any] | None = None

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height and width."""
        (rows, columns), (tall, wide) = self.pixels.shape[1:], self.spacing
        return rows * tall, columns * wide


def plane_boxes(at: Shape, shape: Shape) -> list[tuple[Shape, Shape]]:
    """Boxes (start, stop) of the axial, coronal and sagittal plane through a voxel (Z, Y, X)."""
    boxes = []
    for axis in range(3):
        start, stop = [0, 0, 0], list(shape)
        start[axis], stop[axis] = at[axis], at[axis] + 1
        boxes.append(((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    return boxes


def three_planes(
    images: Sequence[NDArray[Any]],
    labels: Sequence[NDArray[Any]] | None,
    *,
    spacing: Spacing,
    predicted: Sequence[NDArray[Any]] | None = None,
) -> list[Plane]:
    """Planes of what the boxes of `plane_boxes` hold.

    Args:
        images: Per box (C, Z, Y, X), one voxel thick.
        labels: Per box (Z, Y, X), None without a label map.
        spacing: (Z, Y, X) in mm.
        predicted: Per box (Z, Y, X), None without a second label map.
    """
    z, y, x = spacing
    views = (("axial", "APRL", (y, x)), ("coronal", "SIRL", (z, x)), ("sagittal", "SIAP", (z, y)))
    return [
        Plane(
            name,
            ends,
            np.squeeze(images[axis], axis=1 + axis),
            None if labels is None else np.squeeze(labels[axis], axis=axis),
            steps,
            None if predicted is None else np.squeeze(predicted[axis], axis=axis),
        )
        for axis, (name, ends, steps) in enumerate(views)
    ]


def draw_planes(
    planes: Sequence[Plane],
    *,
    title: str,
    windows: Sequence[tuple[float, float]],
    structures: Mapping[str, int],
) -> Figure:
    """Planes side by side in true proportions, a row per channel, structures outlined.

    Args:
        planes: From left to right.
        title: Above everything.
        windows: Per channel that is drawn: the values that become black and white.
        structures: Name to label value; those that a plane shows stand in the legend.
    """
    from matplotlib.figure import Figure

    colours = _colours(structures, planes)
    columns = max(1, _LETTERS_WIDE // (6 + max(map(len, colours), default=0)))
    lines = 3 + len(windows) + math.ceil(len(colours) / columns)
    widths = [plane.size_mm[1] for plane in planes]
    tall = max(plane.size_mm[0] for plane in planes) * len(windows)
    scale = min(_WIDTH_IN / sum(widths), _HEIGHT_IN / tall)
    size = max(scale * sum(widths), _WIDTH_IN / 2), scale * tall + _LINE_IN * lines
    figure = Figure(figsize=size, layout="constrained", facecolor="black")
    figure.suptitle(title, color="white", fontsize=11)
    axes = figure.subplots(len(windows), len(planes), squeeze=False, width_ratios=widths)
    for channel, window in enumerate(windows):
        for axis, plane in zip(axes[channel], planes, strict=True):
            _draw_plane(axis, plane, channel=channel, window=window)
            for name, colour in colours.items():
                _outline(axis, plane, value=structures[name], colour=colour)
    if colours:
        _add_legend(figure, colours, columns=min(columns, len(colours)))
    return figure


def draw_panels(panels: Mapping[str, NDArray[Any]]) -> Figure:
    """Volumes side by side, the middle axial slice above the middle coronal one.

    Args:
        panels: Title -> (Z, Y, X) volume in [0, 1], NaN where masked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(panels), 6.4), layout="constrained")
    axes = figure.subplots(2, len(panels))
    for column, (title, volume) in enumerate(panels.items()):
        z, y, _ = (side // 2 for side in volume.shape)
        axes[0, column].set_title(title)
        for row, plane in enumerate((volume[z], volume[:, y])):
            axes[row, column].set_facecolor("#305080")
            _show(axes[row, column], plane, window=(0.0, 1.0))
    return figure


def _show(
    axis: Axes, plane: NDArray[Any], *, window: tuple[float, float], aspect: float = 1.0
) -> None:
    low, high = window
    # X grows to the patient's right, Y to the front; both are expected on the left.
    axis.imshow(plane[:, ::-1], cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_plane(axis: Axes, plane: Plane, *, channel: int, window: tuple[float, float]) -> None:
    from matplotlib.patheffects import withStroke

    tall, wide = plane.spacing
    _show(axis, plane.pixels[channel], window=window, aspect=tall / wide)
    low, high = window
    what = plane.name if len(plane.pixels) == 1 else f"{plane.name}, channel {channel}"
    axis.spines[:].set_color("#606060")  # where the scan ends, air being black too
    axis.set_title(f"{what}   [{low:g}, {high:g}]", color="white", fontsize=9)
    # Readable on air and on bone.
    edge = [withStroke(linewidth=2, foreground="black")]
    places = ((0.5, 0.99, "top"), (0.5, 0.01, "bottom"), (0.01, 0.5, "left"), (0.99, 0.5, "right"))
    for letter, (x, y, side) in zip(plane.ends, places, strict=True):
        across = side if side in ("left", "right") else "center"
        along = side if side in ("top", "bottom") else "center"
        where: dict[str, Any] = {"transform": axis.transAxes, "ha": across, "va": along}
        axis.text(x, y, letter, color="#ffd166", fontsize=9, path_effects=edge, **where)


def _outline(axis: Axes, plane: Plane, *, value: int, colour: Colour) -> None:
    for labels, style in ((plane.labels, "solid"), (plane.predicted, "dashed")):
        mask = np.zeros(1, bool) if labels is None else labels == value
        if mask.any() and not mask.all():
            lines: dict[str, Any] = {"linewidths": 1.0, "linestyles": style}
            axis.contour(mask[:, ::-1], levels=[0.5], colors=[colour], **lines)


def _add_legend(figure: Figure, colours: Mapping[str, Colour], *, columns: int) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[Line2D([], [], color=colour, label=name) for name, colour in colours.items()],
        loc="outside lower center",
        ncols=columns,
        labelcolor="white",
        frameon=False,
        fontsize=9,
    )


def _colours(structures: Mapping[str, int], planes: Sequence[Plane]) -> dict[str, Colour]:
    """A bright colour for each structure that a plane shows, evenly around the colour wheel."""
    maps = [m for plane in planes for m in (plane.labels, plane.predicted) if m is not None]
    seen = [name for name, value in structures.items() if any((m == value).any() for m in maps)]
    return {name: colorsys.hsv_to_rgb(n / len(seen), 0.75, 1.0) for n, name in enumerate(seen)}
