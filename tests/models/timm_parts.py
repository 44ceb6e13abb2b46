"""timm's parts of vision transformers, beside any build of torch."""

from __future__ import annotations

import functools

import torch
from torch import nn


def timm_block(width: int, *, heads: int) -> nn.Module:
    """timm's block as docs/method.md wants it: MLP ratio 4, qkv bias, LayerNorm eps 1e-6."""
    _make_torchvision_importable()
    from timm.models.vision_transformer import Block

    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm)


@functools.cache
def _make_torchvision_importable() -> torch.library.Library | None:
    """Let `import torchvision`, which timm needs, succeed where its compiled part does not load.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its operators are missing,
    and registering their shapes fails with "operator torchvision::nms does not exist". Declared
    without code they are enough, as the parts of timm used here call none of them. Can go when
    torchvision imports without its operators. The cache keeps the library, and with it them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
