"""torch.compile for the transformer blocks: one graph for all blocks of a shape."""

from __future__ import annotations

import torch
from torch import nn

from glmae_ray.models.vit3d import Block

# Student and decoder see each size of view with and without gradient, the teacher one; the last
# block of decoder and teacher gives fewer tokens: fourteen graphs of one `forward`, and room for
# more. torch stops compiling after eight.
_SHAPES = 24


def compile_blocks(module: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every block inside `module`, each shape when it is first met.

    Blocks and not the whole: twelve equal ones share one graph, so there is little to compile, and
    what surrounds them (masks, gathers, the teacher's inference mode) is no work worth fusing.
    Names in the state dict stay as they are. Raises torch's limit of shapes for the process.

    Args:
        module: Holds the blocks.
        backend: As torch.compile's.
    """
    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(backend=backend, dynamic=False)
