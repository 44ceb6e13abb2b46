"""Which tensors of a file are an encoder's, and whether they make a whole one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glmae_ray.errors import UserError
from glmae_ray.models.vit3d import Encoder
from glmae_ray.models.weight_files import WeightFile

KERNEL = "patch_embed.proj.weight"
UNKNOWN = "unknown here"
_ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
_PREFIXES = ("module.backbone.", "backbone.", "module.", "")  # the nearest to an encoder first
_HEADS = ("projector", "predictor", "prototypes", "center", "fc_norm", "last_layer")
_SHOWN = 5


def encoder_tensors(file: WeightFile, *, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder's tensors in float32 under our names, and every other name with the reason.

    Raises:
        UserError: No encoder of that part in the file, or values that are no weights.
    """
    prefix = _prefix(file, part)
    skipped = dict(file.beside)
    tensors: dict[str, Tensor] = {}
    for name, value in file.tensors.items():
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix):
            skipped[name] = _reason(name, otherwise=f"outside {prefix}")
        elif not isinstance(value, Tensor):
            skipped[name] = "not a tensor"
        elif bare.split(".")[0] not in _ENCODER:
            skipped[name] = _reason(bare, otherwise=UNKNOWN)
        else:
            tensors[bare] = value
    lines = [
        f"{file.source}: {name} {fault}"
        for name, value in tensors.items()
        if (fault := _fault(value))
    ]
    if lines:
        raise UserError(*lines[:_SHOWN])
    return {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}, skipped


def load_whole(encoder: Encoder, tensors: dict[str, Tensor], *, source: str) -> None:
    """Give a new encoder all of its weights, and refuse tensors that are not for it.

    Args:
        encoder: Built on the device `meta`; the tensors become its parameters.
        tensors: All but the positions, with the axes of our arrays.
        source: For the messages.

    Raises:
        UserError: A line for each that is missing, of the wrong shape, or too much.
    """
    expected = encoder.state_dict()
    depth = len(encoder.blocks)
    lines = [
        f"{source}: {name} is missing; an encoder of depth {depth} has it"
        for name in expected.keys() - tensors.keys()
    ]
    lines += [
        f"{source}: {name} has the shape {tuple(tensors[name].shape)}; "
        f"width {encoder.cls_token.shape[-1]} needs {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    lines += [
        f"{source}: {name} has no place in this encoder, whose features would be others without it"
        for name in tensors.keys() - expected.keys()
    ]
    if lines:
        more = [f"{source}: and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise UserError(*sorted(lines)[:_SHOWN], *more)
    encoder.load_state_dict(tensors, assign=True)


def some(names: list[str]) -> str:
    """A few of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _prefix(file: WeightFile, part: str) -> str:
    """What stands before the encoder's names: where the patch projection is found."""
    found = [name.removesuffix(KERNEL) for name in file.tensors if name.endswith(KERNEL)]
    wanted = [p for p in found if _names_part(p, part)]
    if not wanted and (part == "student" or file.is_part):
        wanted = [p for p in found if not _names_part(p, "teacher")]
    known = [p for p in _PREFIXES if p in wanted]
    if known:
        return known[0]
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        raise UserError(f"{file.source}: has several encoders, at {some(wanted)}; save one alone")
    entries = list({**file.beside, **file.tensors})
    raise UserError(
        f"{file.source}: has no {part} with timm's names ({KERNEL}, ...); "
        f"it holds {some(entries) or 'nothing'}"
    )


def _names_part(prefix: str, part: str) -> bool:
    return any(piece.startswith(part) for piece in prefix.split("."))


def _reason(name: str, *, otherwise: str) -> str:
    pieces = name.split(".")
    if any(piece.startswith(("decoder", "mask_token")) for piece in pieces):
        return "of the decoder"
    if any("head" in piece or piece in _HEADS for piece in pieces):
        return "of a head"
    return otherwise


def _fault(value: Any) -> str | None:
    if not value.is_floating_point():
        return f"holds {value.dtype}; weights are floating-point numbers"
    return None if value.isfinite().all() else "holds NaN or infinity"
