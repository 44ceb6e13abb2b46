"""Patches, positions and the encoder on unequal sides; see also test_against_timm_and_monai."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding

from glmae_ray.models.vit3d import (
    Encoder,
    gather_tokens,
    patch_grid,
    patchify,
    sincos_positions,
    unpatchify,
)

PATCH = (8, 4, 2)


def volumes(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 16, 12, 8, generator=torch.Generator().manual_seed(0))


def test_unpatchify_inverts_patchify_on_unequal_sides():
    patches = patchify(volumes(), PATCH)
    grid = patch_grid((16, 12, 8), PATCH)
    assert grid == (2, 3, 4)
    assert patches.shape == (2, 24, 3 * 64)
    assert torch.equal(unpatchify(patches, grid=grid, patch=PATCH), volumes())


def test_patch_embedding_equals_the_convolution_it_is_named_after():
    encoder = Encoder(channels=3, patch=PATCH, width=24, depth=1, heads=2)
    projection = encoder.patch_embed.proj
    weight, bias = projection.weight, projection.bias
    expected = torch.nn.functional.conv3d(volumes(), weight, bias, stride=PATCH)
    actual = encoder.patch_embed(patchify(volumes(), PATCH))
    torch.testing.assert_close(actual, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    ("grid", "width"), [((2, 3, 4), 48), ((6, 6, 6), 192), ((10, 4, 1), 6), ((10, 10, 10), 768)]
)
def test_positions_equal_monai_with_a_zero_row_for_cls(grid, width):
    expected = build_sincos_position_embedding(grid, width, spatial_dims=3)[0]
    actual = sincos_positions(grid, width)
    assert torch.equal(actual[0], torch.zeros(width))
    torch.testing.assert_close(actual[1:], expected, atol=1e-5, rtol=0)


def test_positions_tell_every_patch_of_a_grid_apart():
    positions = sincos_positions((3, 4, 5), 24)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1


def test_all_patches_by_number_give_what_all_patches_in_order_give():
    encoder = Encoder(channels=3, patch=PATCH, width=24, depth=2, heads=2)
    patches, grid = patchify(volumes(), PATCH), (2, 3, 4)
    shuffled = torch.stack([torch.randperm(24), torch.randperm(24)])
    in_order = encoder(patches, grid=grid)
    by_number = encoder(gather_tokens(patches, shuffled), grid=grid, kept_BK=shuffled)
    torch.testing.assert_close(by_number[:, 0], in_order[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        by_number[:, 1:], gather_tokens(in_order[:, 1:], shuffled), atol=1e-5, rtol=1e-5
    )
