"""An encoder under the names that other code expects, and the facts that go with its weights.

Our arrays are (C, Z, Y, X). Pipelines of MONAI feed (C, X, Y, Z); turning the patch kernel and the
table of positions around is all that lies between the two, and loses nothing.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from torch import Tensor

from glmae_ray.models.vit3d import Attention, Encoder, Grid
from glmae_ray.models.weight_files import FORMAT, HEADER
from glmae_ray.paths import Place, publish

Axes = Literal["ZYX", "XYZ"]
Tensors = dict[str, Tensor]

# What `axes` in a file of facts says.
AXES: dict[Axes, str] = {
    "ZYX": "(C, Z, Y, X) pointing to Superior, Anterior, Right",
    "XYZ": "(C, X, Y, Z) pointing to Right, Anterior, Superior",
}
ORIGINAL_PREFIX = "module.backbone."
_TO_MONAI = {
    "patch_embed.proj": "patch_embedding.patch_embeddings",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.linear1.",
    ".mlp.fc2.": ".mlp.linear2.",
}
_UNETR_DEPTH, _UNETR_PATCH = 12, (16, 16, 16)  # fixed in MONAI's UNETR


def turn_sides(sides: Grid) -> Grid:
    """Three numbers along Z, Y, X as along X, Y, Z, or back."""
    z, y, x = sides
    return x, y, z


def turn_kernel(weight_ECZYX: Tensor) -> Tensor:
    """A patch kernel for (C, Z, Y, X) as one for (C, X, Y, Z), or back."""
    return weight_ECZYX.permute(0, 1, 4, 3, 2).contiguous()


def turn_positions(table_NE: Tensor, *, grid: Grid) -> Tensor:
    """A table (1 + N, E) whose patches run over `grid`, with the axes in opposite order."""
    patches = table_NE[1:].reshape(*grid, -1).permute(2, 1, 0, 3)
    return torch.cat([table_NE[:1], patches.reshape(-1, table_NE.shape[-1])])


def as_original(encoder: Encoder, *, grid: Grid) -> dict[str, Tensors]:
    """The layout of the published GL-MAE file: timm's names, axes X, Y, Z, under `student`.

    Args:
        encoder: Whose weights these are.
        grid: Patches along Z, Y, X for which `pos_embed` is written.
    """
    tensors = _turned(encoder)
    tensors["pos_embed"] = _positions(encoder, grid).unsqueeze(0)
    return {"student": {f"{ORIGINAL_PREFIX}{name}": value for name, value in tensors.items()}}


def as_monai_vit(encoder: Encoder, *, grid: Grid, cls: bool = False) -> Tensors:
    """The whole state dict of MONAI's `ViT(..., proj_type="conv", qkv_bias=True)`, axes X, Y, Z.

    Args:
        encoder: Whose weights these are.
        grid: Patches along Z, Y, X of the images.
        cls: Keep the CLS token. MONAI's ViT has one only where it classifies, or where it was
            given one (`vit.cls_token = torch.nn.Parameter(...)`); then features are ours.
    """
    positions = _positions(encoder, grid)
    tensors: Tensors = {}
    for name, value in _turned(encoder).items():
        for ours, theirs in _TO_MONAI.items():
            name = name.replace(ours, theirs)
        tensors[name] = value
    token = tensors.pop("cls_token")
    if cls:
        tensors["cls_token"] = token + positions[0]  # MONAI adds no position to it
    tensors["patch_embedding.position_embeddings"] = positions[1:].unsqueeze(0).contiguous()
    for number in range(len(encoder.blocks)):
        # Part of MONAI's blocks, used by none without cross-attention.
        tensors[f"blocks.{number}.norm_cross_attn.weight"] = torch.ones(_width(encoder))
        tensors[f"blocks.{number}.norm_cross_attn.bias"] = torch.zeros(_width(encoder))
    return tensors


def as_monai_unetr(encoder: Encoder, *, grid: Grid) -> Tensors:
    """The part `vit.` of MONAI's `UNETR`, which has no CLS token."""
    return {f"vit.{name}": value for name, value in as_monai_vit(encoder, grid=grid).items()}


def why_no_unetr(encoder: Encoder) -> str | None:
    """What keeps an encoder out of MONAI's UNETR, None if nothing does."""
    depth, patch = len(encoder.blocks), encoder.patch
    if (depth, patch) == (_UNETR_DEPTH, _UNETR_PATCH):
        return None
    return (
        f"MONAI's UNETR has {_UNETR_DEPTH} blocks and patches of {_UNETR_PATCH}, "
        f"this encoder {depth} and {patch}"
    )


def encoder_facts(encoder: Encoder, *, axes: Axes = "ZYX") -> dict[str, Any]:
    """What someone who loads the encoder has to know; sides in the order of `axes`."""
    turn = turn_sides if axes == "XYZ" else tuple
    grid = encoder.pos_grid
    sincos = "fixed 3-D sin-cos, CLS zero, axes in the order Y, Z, X"
    return {
        "format": FORMAT,
        "width": _width(encoder),
        "depth": len(encoder.blocks),
        "heads": heads_of(encoder),
        "channels": encoder.patch_embed.proj.in_channels,
        "patch": list(turn(encoder.patch)),
        "positions": sincos if grid is None else "a table; other grids by interpolation",
        "position_grid": None if grid is None else list(turn(grid)),
        "layer_norm_eps": encoder.norm.eps,
        "axes": AXES[axes],
    }


def heads_of(encoder: Encoder) -> int:
    """Attention heads of each block."""
    attention = encoder.get_submodule("blocks.0.attn")
    assert isinstance(attention, Attention)
    return attention.heads


def publish_weights(place: Place, tensors: Tensors, *, facts: dict[str, Any]) -> None:
    """Write a safetensors file, its facts in its header, and beside it as JSON.

    Raises:
        UserError: The object store refuses.
        OSError: It cannot be written.
    """
    from safetensors.torch import save

    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    publish(place, save(whole, metadata={HEADER: json.dumps(facts)}))
    publish_facts(place, facts)


def publish_facts(place: Place, facts: dict[str, Any]) -> None:
    """Write the facts of a file of weights beside it."""
    publish(place.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")


def _turned(encoder: Encoder) -> Tensors:
    """Float32 parameters under our names, which are timm's, with axes X, Y, Z."""
    tensors = {name: p.detach().float().cpu() for name, p in encoder.named_parameters()}
    kernel = "patch_embed.proj.weight"
    return tensors | {kernel: turn_kernel(tensors[kernel])}


def _positions(encoder: Encoder, grid: Grid) -> Tensor:
    """Positions of a grid along Z, Y, X, (1 + N, E), in the order X, Y, Z."""
    return turn_positions(encoder.positions(grid).detach().float().cpu(), grid=grid)


def _width(encoder: Encoder) -> int:
    return encoder.cls_token.shape[-1]
