"""Export an encoder: files for us, for the original GL-MAE code, and for MONAI."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable
from typing import Any

import torch

from glmae_ray.config import EncoderFormat, ExportConfig, ExportFormat
from glmae_ray.errors import UserError
from glmae_ray.jobs.formats import Prepared, fitting
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.encoder_formats import (
    Axes,
    as_monai_unetr,
    as_monai_vit,
    as_original,
    encoder_facts,
    publish_facts,
    publish_weights,
    turn_sides,
    why_no_unetr,
)
from glmae_ray.models.load_report import LoadReport
from glmae_ray.models.vit3d import Encoder, Grid
from glmae_ray.models.weight_files import WEIGHTS
from glmae_ray.paths import Place, publish, to_place

FILES: dict[EncoderFormat, str] = {
    "glmae": WEIGHTS,
    "original": "original.pth",
    "monai_vit": "monai_vit.safetensors",
    "monai_vit_cls": "monai_vit_cls.safetensors",
    "monai_unetr": "monai_unetr.safetensors",
}
# Of the facts of the source, what an exported encoder keeps.
_KEPT = ("step", "grid", "window", "window_becomes", "spacing_mm")


def prepare(
    cfg: ExportConfig, source: str | Place, formats: Iterable[ExportFormat] | None
) -> Prepared:
    """Load an encoder and see that it fits.

    Args:
        cfg: Where to write, and what the file leaves open.
        source: A file of weights, or a folder with one.
        formats: Of `FILES`; None: every one that the encoder fits.

    Raises:
        UserError: The encoder cannot be loaded, or has no place in a format.
    """
    encoder, report = load_encoder(
        source,
        channels=cfg.channels,
        axes=cfg.axes,
        part=cfg.part,
        heads=cfg.heads,
        grid=cfg.file_grid,
        positions=cfg.positions,
    )
    obstacle = why_no_unetr(encoder)
    obstacles: dict[ExportFormat, str] = {"monai_unetr": obstacle} if obstacle else {}
    chosen, lines = fitting(formats, known=FILES, obstacles=obstacles)
    places = {name: to_place(cfg.out) / FILES[name] for name in FILES if name in chosen}
    loaded = to_place(report.source).with_suffix("")
    if any(place.with_suffix("") == loaded for place in places.values()):
        raise UserError(f"out: {cfg.out} is where the encoder comes from; name another folder")
    grid = _grid(cfg, encoder, report) if chosen != ["glmae"] else None
    lines += report.lines()
    if cfg.grid and grid is None:
        lines.append("grid: has no effect on glmae, whose positions fit any grid")
    write = functools.partial(_write, encoder=encoder, report=report, grid=grid)
    return Prepared(
        lines=lines,
        facts=_facts("ZYX", encoder, report),
        writers={n: functools.partial(write, place, n) for n, place in places.items()},
    )


def _grid(cfg: ExportConfig, encoder: Encoder, report: LoadReport) -> Grid:
    """Patches along Z, Y, X for which tables of positions are written.

    As asked, else those of the encoder's own table, else of the local view or the crop that it
    was trained on.
    """
    if grid := cfg.grid or encoder.pos_grid:
        return grid
    grids = report.facts.get("grid", {})
    trained = grids.get("local", grids.get("crop"))
    if trained is None:
        raise UserError(
            "grid: is missing, and the file does not say which it was trained on; give "
            "grid=[Z,Y,X], patches along each axis, or formats=[glmae], which needs none"
        )
    return turn_sides(tuple(trained)) if report.order == "XYZ" else tuple(trained)


def _write(
    place: Place,
    name: EncoderFormat,
    *,
    encoder: Encoder,
    report: LoadReport,
    grid: Grid | None,
) -> list[str]:
    """One format, and the facts beside it."""
    if grid is None or name == "glmae":
        facts = _facts("ZYX", encoder, report) | {"names": "glmae"}
        publish_weights(place, encoder.state_dict(), facts=facts)
    else:
        _write_for_others(place, name, encoder, grid=grid, report=report)
    return [place.name, place.with_suffix(".json").name]


def _write_for_others(
    place: Place, name: EncoderFormat, encoder: Encoder, *, grid: Grid, report: LoadReport
) -> None:
    """One file with the axes X, Y, Z, positions of one grid, and facts beside it."""
    facts = _facts("XYZ", encoder, report) | {
        "names": name,
        "positions": "a table of sin-cos" if encoder.pos_grid is None else "a table",
        "position_grid": list(turn_sides(grid)),
    }
    if name == "original":
        buffer = io.BytesIO()
        torch.save(as_original(encoder, grid=grid), buffer)
        publish(place, buffer.getvalue())
        publish_facts(place, facts)
        return
    tensors = as_monai_vit(encoder, grid=grid, cls=name == "monai_vit_cls")
    if name == "monai_unetr":
        tensors = as_monai_unetr(encoder, grid=grid)
    publish_weights(place, tensors, facts=facts | _for_monai(name, encoder, grid))


def _facts(order: Axes, encoder: Encoder, report: LoadReport) -> dict[str, Any]:
    """Of the encoder, of what its source says of its training, and of where it comes from."""
    kept = {key: report.facts[key] for key in _KEPT if key in report.facts}
    if "grid" in kept and order != report.order:
        kept["grid"] = {kind: list(reversed(sides)) for kind, sides in kept["grid"].items()}
    return encoder_facts(encoder, axes=order) | kept | {"origin": report.origin()}


def _for_monai(name: EncoderFormat, encoder: Encoder, grid: Grid) -> dict[str, Any]:
    """The class of MONAI and its arguments, along X, Y, Z; what differs from ours."""
    facts = encoder_facts(encoder, axes="XYZ")
    sides = zip(turn_sides(grid), facts["patch"], strict=True)
    arguments: dict[str, Any] = {
        "in_channels": facts["channels"],
        "img_size": [math.prod(pair) for pair in sides],
        "hidden_size": facts["width"],
        "mlp_dim": 4 * facts["width"],
        "num_heads": facts["heads"],
        "proj_type": "conv",
        "qkv_bias": True,
    }
    if name == "monai_unetr":
        loads = "monai.networks.nets.UNETR; the tensors are its part `vit.`"
    else:
        loads = "monai.networks.nets.ViT"
        arguments |= {"patch_size": facts["patch"], "num_layers": facts["depth"]}
    cls = (
        "kept: set vit.cls_token to a Parameter of (1, 1, hidden_size) before loading"
        if name == "monai_vit_cls"
        else "dropped: patches no longer attend to it, so features differ from ours"
    )
    norm = "MONAI builds LayerNorm with eps 1e-5; set layer_norm_eps for equal features"
    return {"loads_into": loads, "arguments": arguments, "cls_token": cls, "layer_norm": norm}
