"""UNETR on our encoder: MONAI's convolutional blocks around the tokens of four depths.

Letters: B crops, C channels, ZYX voxels, N patches, E embedding, K outputs. Names of the blocks
are those of `monai.networks.nets.UNETR`, whose `vit` is our `encoder`. Hatamizadeh et al., "UNETR:
Transformers for 3D Medical Image Segmentation", arXiv 2103.10504.
"""

from __future__ import annotations

from monai.networks.blocks.dynunet_block import UnetOutBlock, get_conv_layer
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from glmae_ray.models.vit3d import Encoder, Grid, patch_grid, patchify

SIDES = (1, 2, 4, 8, 16)  # of a patch along one axis
_STEPS = 4  # of the decoder, from the grid of patches up to voxels


class UNETR(nn.Module):
    """Segments crops of any size that the patch divides.

    MONAI's has patches of 16 and doubles every axis in each of its four steps. Here an axis with a
    patch of 8 is doubled in the last three only, and so on; a step that doubles nothing is a 1x1
    convolution. For patches of 16 and 12 blocks it is MONAI's UNETR, but for the CLS token, which
    takes part in attention here and is then dropped.
    """

    def __init__(self, encoder: Encoder, *, size: Grid, outputs: int, feature_size: int) -> None:
        """Put a decoder on an encoder.

        Args:
            encoder: Becomes a part of this module.
            size: Voxels of the crops along Z, Y, X.
            outputs: K, the background included.
            feature_size: Channels at full resolution; each step down has twice as many.

        Raises:
            ValueError: Patch or size are none that it can do.
        """
        super().__init__()
        if reason := why_not(size=size, patch=encoder.patch):
            raise ValueError(reason)
        self.encoder = encoder
        self.after = tap_blocks(len(encoder.blocks))
        width = encoder.cls_token.shape[-1]
        channels = encoder.patch_embed.proj.in_channels
        strides = step_strides(encoder.patch)
        full, half, quarter, eighth = (feature_size * 2**level for level in range(4))
        self.encoder1 = UnetrBasicBlock(3, channels, full, 3, 1, "instance", res_block=True)
        self.encoder2 = _project(width, half, strides[:3])
        self.encoder3 = _project(width, quarter, strides[:2])
        self.encoder4 = _project(width, eighth, strides[:1])
        self.decoder5 = UnetrUpBlock(3, width, eighth, 3, strides[0], "instance", res_block=True)
        self.decoder4 = UnetrUpBlock(3, eighth, quarter, 3, strides[1], "instance", res_block=True)
        self.decoder3 = UnetrUpBlock(3, quarter, half, 3, strides[2], "instance", res_block=True)
        self.decoder2 = UnetrUpBlock(3, half, full, 3, strides[3], "instance", res_block=True)
        self.out = UnetOutBlock(3, full, outputs)

    def forward(self, image_BCZYX: Tensor) -> Tensor:
        """Logits (B, K, Z, Y, X) of crops, floating point as the network's input."""
        patch = self.encoder.patch
        grid = patch_grid(list(image_BCZYX.shape[2:]), patch)
        tokens = self.encoder.taps(patchify(image_BCZYX, patch), grid=grid, after=self.after)
        first, second, third, last = (_volume(x_BNE, grid) for x_BNE in tokens)
        x = self.decoder5(last, self.encoder4(third))
        x = self.decoder4(x, self.encoder3(second))
        x = self.decoder3(x, self.encoder2(first))
        return self.out(self.decoder2(x, self.encoder1(image_BCZYX)))


def why_not(*, size: Grid, patch: Grid) -> str | None:
    """What keeps a UNETR from crops of a size and patches of another, None if nothing does."""
    if any(side not in SIDES for side in patch):
        known = ", ".join(map(str, SIDES))
        return f"UNETR doubles its way up from the patch, whose sides can be {known}, not {patch}"
    if any(side % part for side, part in zip(size, patch, strict=True)):
        return f"crops of {size} are not a multiple of the patch {patch}"
    return None


def tap_blocks(depth: int) -> tuple[int, int, int]:
    """After how many blocks the decoder looks at the tokens, beside the last one.

    At a quarter, half and three quarters of the depth, counted as MONAI counts: blocks number 3,
    6 and 9 of 12, the first being number 0.
    """
    first, second, third = (depth * quarter // 4 + 1 for quarter in (1, 2, 3))
    return first, second, third


def step_strides(patch: Grid) -> list[Grid]:
    """By how much each step of the decoder, the coarsest first, enlarges Z, Y and X: 1 or 2."""
    doublings = [side.bit_length() - 1 for side in patch]
    strides = []
    for step in range(_STEPS):
        z, y, x = (2 if step >= _STEPS - times else 1 for times in doublings)
        strides.append((z, y, x))
    return strides


def _project(width: int, channels: int, strides: list[Grid]) -> UnetrPrUpBlock:
    """MONAI's block from tokens to a skip connection, with a stride of its own for each step."""
    options = dict(kernel_size=3, stride=1, norm_name="instance", conv_block=True, res_block=True)
    steps = len(strides) - 1
    block = UnetrPrUpBlock(
        3, width, channels, num_layer=steps, upsample_kernel_size=strides[0], **options
    )
    for layers, stride in zip(block.blocks, strides[1:], strict=True):
        layers[0] = get_conv_layer(3, channels, channels, stride, stride, is_transposed=True)
    return block


def _volume(tokens_BNE: Tensor, grid: Grid) -> Tensor:
    """Tokens without CLS as a volume of features, (B, E, z, y, x)."""
    return tokens_BNE[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()
