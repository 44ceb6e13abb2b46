"""UNETR against MONAI's with the same weights, and on patches that MONAI's does not have."""

from __future__ import annotations

import pytest
import torch
from monai.networks import nets
from torch import Tensor

from glmae_ray.models.encoder_formats import as_monai_vit
from glmae_ray.models.unetr import UNETR, step_strides, tap_blocks, why_not
from glmae_ray.models.vit3d import Encoder
from tests.models.finetunes import awake

SIDES, GRID = (32, 48, 64), (2, 3, 4)


class MonaiWithCls(nets.UNETR):
    """MONAI's UNETR with a CLS token in its ViT, dropped before the convolutions."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        width = options["hidden_size"]
        self.vit.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        for part in self.modules():
            if isinstance(part, torch.nn.LayerNorm):
                part.eps = 1e-6

    def proj_feat(self, x: Tensor) -> Tensor:
        return super().proj_feat(x[:, 1:])


def build(patch=(16, 16, 16), depth: int = 12, size=SIDES, channels: int = 2) -> UNETR:
    torch.manual_seed(0)
    encoder = Encoder(channels=channels, patch=patch, width=24, depth=depth, heads=2)
    return awake(UNETR(encoder, size=size, outputs=3, feature_size=4)).eval()


def turned(x: Tensor) -> Tensor:
    """The last three axes in opposite order."""
    return x.movedim((-1, -2, -3), (-3, -2, -1))


@torch.no_grad()
def test_it_equals_monais_with_the_weights_carried_over():
    ours = build()
    theirs = MonaiWithCls(
        in_channels=2,
        out_channels=3,
        img_size=tuple(reversed(SIDES)),
        feature_size=4,
        hidden_size=24,
        mlp_dim=96,
        num_heads=2,
        proj_type="conv",
        qkv_bias=True,
    ).eval()
    vit = as_monai_vit(ours.encoder, grid=GRID, cls=True)
    weights = {f"vit.{name}": value for name, value in vit.items()}
    for name, value in ours.state_dict().items():
        if not name.startswith("encoder."):
            weights[name] = turned(value) if value.ndim == 5 else value
    theirs.load_state_dict(weights, strict=True)
    x = torch.rand(2, 2, *SIDES)
    torch.testing.assert_close(ours(x), turned(theirs(turned(x))), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((16, 16, 16), [(2, 2, 2)] * 4),
        ((8, 8, 8), [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((1, 4, 16), [(1, 1, 2), (1, 1, 2), (1, 2, 2), (1, 2, 2)]),
    ],
)
def test_steps_enlarge_each_axis_by_its_patch_and_as_late_as_they_can(patch, strides):
    assert step_strides(patch) == strides


@pytest.mark.parametrize("patch", [(16, 8, 4), (8, 8, 8), (2, 1, 16)])
@pytest.mark.parametrize("grid", [(2, 3, 1), (1, 2, 2)])
def test_any_patch_that_is_a_power_of_two_segments_any_size_that_it_divides(patch, grid):
    size = tuple(side * part for side, part in zip(grid, patch, strict=True))
    net = build(patch, depth=2, size=size)
    larger = (2 * size[0], size[1], 3 * size[2])
    for sides in (size, larger):
        assert net(torch.rand(2, 2, *sides)).shape == (2, 3, *sides)


def test_every_tap_and_every_axis_reaches_the_output_and_every_weight_learns():
    net = build((4, 8, 2), depth=4, size=(8, 16, 6))
    net(torch.rand(1, 2, 8, 16, 6)).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("depth", "after"), [(12, (4, 7, 10)), (6, (2, 4, 5)), (24, (7, 13, 19)), (1, (1, 1, 1))]
)
def test_taps_are_a_quarter_half_and_three_quarters_up_as_monai_counts(depth, after):
    assert tap_blocks(depth) == after


def test_the_last_tap_is_what_the_encoder_gives_and_recomputing_changes_nothing():
    encoder = build((8, 4, 2), depth=3, size=(16, 12, 8)).encoder
    patches = torch.rand(2, 24, 128)
    taps = encoder.taps(patches, grid=GRID, after=(1, 2, 3))
    assert [tap.shape for tap in taps] == [(2, 25, 24)] * 4
    torch.testing.assert_close(taps[3], encoder(patches, grid=GRID))
    torch.testing.assert_close(encoder.norm(taps[2]), taps[3])
    encoder.recompute = True
    torch.testing.assert_close(encoder.taps(patches, grid=GRID, after=(1, 2, 3)), taps)


def test_other_patches_and_sizes_are_refused_in_a_line():
    assert "whose sides can be 1, 2, 4, 8, 16, not (16, 12, 8)" in why_not(
        size=(32, 24, 16), patch=(16, 12, 8)
    )
    with pytest.raises(ValueError, match=r"\(32, 40, 16\) are not a multiple of the patch"):
        build((16, 16, 16), depth=1, size=(32, 40, 16))
