"""Load an encoder from a file of ours or of the original GL-MAE, and say what became of all in it.

Names are timm's, with or without a prefix such as `module.backbone.`. What a file leaves open
(axes, heads, grid of positions) is decided by a rule or an argument, and the report says by which.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from glmae_ray.errors import UserError
from glmae_ray.models.encoder_formats import AXES, Axes, turn_kernel, turn_positions, turn_sides
from glmae_ray.models.encoder_names import KERNEL, UNKNOWN, encoder_tensors, load_whole, some
from glmae_ray.models.load_report import LoadReport
from glmae_ray.models.vit3d import Encoder, Grid, sincos_positions
from glmae_ray.models.weight_files import WeightFile, open_weights
from glmae_ray.paths import Place

Part = Literal["student", "teacher"]
Positions = Literal["file", "sincos"]

_NAME = ("pos_embed",)


def load_encoder(
    path: str | Place,
    *,
    channels: int | None = None,
    axes: Axes | None = None,
    part: Part = "student",
    heads: int | None = None,
    grid: Grid | None = None,
    positions: Positions = "file",
) -> tuple[Encoder, LoadReport]:
    """Build an encoder for (C, Z, Y, X) from a file, and report what was and was not loaded.

    Args:
        path: A file or a folder with `encoder.safetensors`, local or on S3. A pickle is opened
            only as far as it holds plain data.
        channels: Of the encoder; None: the file's. Where they differ, each gets the mean kernel
            of the file's C channels times C / channels: an image repeated in all channels gives
            the features that it gives repeated in the channels of the file.
        axes: Order of the axes that the weights in the file are for. None: what the file says,
            else XYZ, the order of MONAI's pipelines.
        part: Which entry to take where the file has both.
        heads: For a file that does not say; one that does is believed. None: width / 64, the
            convention of ViT-B.
        grid: Patches along the file's axes for which its positions were made. None: what the
            file says, else a cube if their number is one.
        positions: `file` keeps the file's, `sincos` replaces them by the formula.

    Raises:
        UserError: Something is missing, has the wrong shape, or is not of this architecture.
    """
    asked = _Asked(channels, axes, part, heads, grid, positions)
    return _load(open_weights(path, part=part), asked)


class _Asked(NamedTuple):
    """The arguments of `load_encoder`."""

    channels: int | None
    axes: Axes | None
    part: Part
    heads: int | None
    grid: Grid | None
    positions: Positions


class _Taken(NamedTuple):
    """What an encoder took from a file beside its positions, and by which rules."""

    loaded: tuple[str, ...]
    skipped: dict[str, str]
    axes: str
    channels: str
    heads: str


def _load(file: WeightFile, asked: _Asked) -> tuple[Encoder, LoadReport]:
    tensors, skipped = encoder_tensors(file, part=asked.part)
    order, axes = _axes(file, asked.axes)
    table = _Table(file, tensors.pop("pos_embed", None), order, asked.grid)
    _turn_and_check_kernel(file, tensors, order)
    tensors[KERNEL], channels = with_channels(tensors[KERNEL], asked.channels)
    number, heads = _heads(file, asked.heads, width=len(tensors[KERNEL]))
    encoder = _build(tensors, heads=number, source=file.source)
    placed = _place(encoder, table, asked.positions)
    taken = _Taken(tuple(tensors), skipped, axes, channels, heads)
    return encoder, _report(table, asked, taken, placed)


def _report(table: _Table, asked: _Asked, taken: _Taken, placed: _Placed) -> LoadReport:
    file = table.file
    heads_are_used = file.facts.get("heads", asked.heads) == asked.heads
    grid_is_used = table.values is not None and asked.positions == "file"
    return LoadReport(
        source=file.source,
        sha256=file.sha256,
        part=asked.part,
        loaded=(*taken.loaded, *placed.loaded),
        skipped=taken.skipped | placed.skipped,
        missing=placed.missing,
        order=table.order,
        axes=taken.axes,
        heads=taken.heads,
        positions=placed.line,
        channels=taken.channels,
        warnings=(
            *placed.warnings,
            *_unknown(taken.skipped),
            *_without_effect("heads", asked.heads, is_used=heads_are_used),
            *_without_effect("grid", asked.grid, is_used=grid_is_used),
        ),
        facts=file.facts,
    )


def with_channels(kernel_ECZYX: Tensor, channels: int | None) -> tuple[Tensor, str]:
    """A patch kernel for another number of channels, and the rule in words.

    Every channel gets the mean over the C that there were, times C / channels, so the embedding of
    an image repeated in all channels does not depend on how many there are.
    """
    had = kernel_ECZYX.shape[1]
    if channels in (None, had):
        return kernel_ECZYX, f"{had}, as in the file"
    mean = kernel_ECZYX.mean(dim=1, keepdim=True)
    line = f"{channels}, each the mean of the file's {had} times {had}/{channels}"
    return (mean * had / channels).repeat(1, channels, 1, 1, 1), line


def cube_side(patches: int) -> int | None:
    """Side of a cube of so many patches, in integers: int(216 ** (1/3)) is 5."""
    side = 1
    while side**3 < patches:
        side += 1
    return side if side**3 == patches else None


def _axes(file: WeightFile, asked: Axes | None) -> tuple[Axes, str]:
    if not file.facts:
        order = asked or "XYZ"
        return order, f"{order}, {'as asked' if asked else 'by default: the file does not say'}"
    orders = [order for order, sentence in AXES.items() if sentence == file.facts.get("axes")]
    if not orders:
        known = " or ".join(repr(sentence) for sentence in AXES.values())
        raise UserError(f"{file.source}: says axes {file.facts.get('axes')!r}, not {known}")
    if asked not in (None, orders[0]):
        raise UserError(f"{file.source}: axes {asked} were asked for, but it says {orders[0]}")
    return orders[0], f"{orders[0]}, as the file says"


def _heads(file: WeightFile, asked: int | None, *, width: int) -> tuple[int, str]:
    """The number of heads, which no tensor shows."""
    if "heads" in file.facts:
        number, line = int(file.facts["heads"]), "as the file says"
    elif asked is not None:
        number, line = asked, "as asked; the file does not say"
    elif width % 64 == 0:
        number, line = width // 64, "width / 64; the file does not say"
    else:
        raise UserError(f"{file.source}: does not say its heads; give heads (width is {width})")
    if number < 1 or width % number:
        raise UserError(f"{file.source}: width {width} is not divisible by {number} heads")
    return number, f"{number}, {line}"


def _turn_and_check_kernel(file: WeightFile, tensors: dict[str, Tensor], order: Axes) -> None:
    """Bring the patch kernel into our axes; see that the file says of its shape what is true."""
    kernel = tensors[KERNEL]
    if kernel.ndim != 5:
        shape = tuple(kernel.shape)
        raise UserError(f"{file.source}: {KERNEL} has the shape {shape}; a 3-D encoder has 5 sides")
    width, channels, *patch = kernel.shape
    numbers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    found = {"width": width, "channels": channels, "patch": patch, "depth": len(numbers)}
    lines = [
        f"{file.source}: says {name} {file.facts[name]}, but its tensors have {value}"
        for name, value in found.items()
        if name in file.facts and file.facts[name] != value
    ]
    if lines:
        raise UserError(*lines)
    if order == "XYZ":
        tensors[KERNEL] = turn_kernel(kernel)


def _build(tensors: dict[str, Tensor], *, heads: int, source: str) -> Encoder:
    """An encoder as deep as the file's last block, with all its weights."""
    width, channels, z, y, x = tensors[KERNEL].shape
    blocks = [name.split(".")[1] for name in tensors if name.startswith("blocks.")]
    depth = 1 + max((int(number) for number in blocks if number.isdecimal()), default=0)
    with torch.device("meta"):  # no weights are drawn that the file's would replace
        encoder = Encoder(channels=channels, patch=(z, y, x), width=width, depth=depth, heads=heads)
    load_whole(encoder, tensors, source=source)
    return encoder


class _Table(NamedTuple):
    """The positions of a file."""

    file: WeightFile
    values: Tensor | None  # (1, 1 + N, E), patches over the file's axes
    order: Axes
    asked: Grid | None


class _Placed(NamedTuple):
    """How an encoder came to its positions."""

    line: str
    loaded: tuple[str, ...] = ()
    skipped: dict[str, str] = {}
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _place(encoder: Encoder, table: _Table, choice: Positions) -> _Placed:
    """Give an encoder the positions of its file, or the formula."""
    width = encoder.cls_token.shape[-1]
    if (table.values is None or choice == "sincos") and width % 6:
        raise UserError(
            f"{table.file.source}: width {width} is not divisible by 6, so there are no sin-cos "
            "positions of three axes; a table of its own is needed"
        )
    if table.values is None:
        if table.file.facts.get("position_grid"):
            raise UserError(f"{table.file.source}: pos_embed is missing; it says it has a table")
        ours = bool(table.file.facts)
        line = "sin-cos, exact on any grid"
        return _Placed(line) if ours else _Placed(f"{line}; none in the file", missing=_NAME)
    if choice == "sincos":
        return _Placed("sin-cos, as asked", skipped={"pos_embed": "replaced by sin-cos, as asked"})
    return _adopt(encoder, table)


def _adopt(encoder: Encoder, table: _Table) -> _Placed:
    """Take the file's table, or the formula where the table is nothing else."""
    values, width = table.values, encoder.cls_token.shape[-1]
    assert values is not None
    if values.ndim != 3 or values.shape[0] != 1 or values.shape[2] != width:
        shape = tuple(values.shape)
        raise UserError(
            f"{table.file.source}: pos_embed has the shape {shape}, not (1, 1 + patches, {width})"
        )
    grid = _grid(table, patches=values.shape[1] - 1)
    rows = values[0]
    if table.order == "XYZ":
        rows, grid = turn_positions(rows, grid=grid), turn_sides(grid)
    if width % 6 == 0 and torch.allclose(rows, sincos_positions(grid, width), atol=1e-4, rtol=0):
        return _Placed("sin-cos, as the file's table is; exact on any grid", loaded=_NAME)
    encoder.adopt_positions(rows, grid=grid)
    line = f"the file's table for {grid} patches (Z, Y, X); other grids by interpolation"
    if rows[1:].any():
        return _Placed(line, loaded=_NAME)
    warning = "pos_embed is zero: this encoder has no positions; positions=sincos gives it ours"
    return _Placed(line, loaded=_NAME, warnings=(warning,))


def _grid(table: _Table, *, patches: int) -> Grid:
    """Patches along the file's axes."""
    said = table.file.facts.get("position_grid")
    if said and table.asked not in (None, tuple(said)):
        raise UserError(
            f"{table.file.source}: grid {table.asked} was asked for, but it says {tuple(said)}"
        )
    side = cube_side(patches)
    grid = table.asked or said or ((side,) * 3 if side else None)
    order = ", ".join(table.order)
    if grid is None:
        raise UserError(
            f"{table.file.source}: has positions of {patches} patches, which is no cube; "
            f"give their grid along {order}, or positions=sincos"
        )
    if math.prod(grid) != patches:
        raise UserError(
            f"{table.file.source}: has positions of {patches} patches; "
            f"a grid of {tuple(grid)} along {order} has {math.prod(grid)}"
        )
    first, second, third = grid
    return first, second, third


def _unknown(skipped: dict[str, str]) -> tuple[str, ...]:
    names = [name for name, why in skipped.items() if why == UNKNOWN]
    if not names:
        return ()
    return (f"{some(names)}: not known here; if the encoder needs them its features differ",)


def _without_effect(name: str, value: object, *, is_used: bool) -> tuple[str, ...]:
    return () if value is None or is_used else (f"{name}={value} has no effect on this file",)
