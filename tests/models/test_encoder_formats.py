"""Our encoder under the names of the original GL-MAE and of MONAI: there, and back."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR, ViT

from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.encoder_formats import as_monai_unetr, as_monai_vit, as_original
from glmae_ray.models.vit3d import Encoder, patch_grid, patchify
from tests.models.test_encoder_files import (
    GRID,
    TOKENS,
    WIDTH,
    features,
    make_encoder,
    save,
    timm_forward,
    timm_state,
    volumes,
)


@pytest.mark.parametrize("own_table", [False, True])
def test_the_original_layout_takes_our_encoder_there_and_back(tmp_path, own_table):
    encoder = make_encoder()
    if own_table:
        encoder.adopt_positions(torch.randn(1 + TOKENS, WIDTH), grid=GRID)
    tree = as_original(encoder, grid=GRID)
    assert list(tree) == ["student"]
    assert {name.removeprefix("module.backbone.") for name in tree["student"]} == set(timm_state())
    x = volumes()
    bare = {name.removeprefix("module.backbone."): v for name, v in tree["student"].items()}
    theirs = timm_forward(bare, x.permute(0, 1, 4, 3, 2), heads=2)
    torch.testing.assert_close(theirs[:, 0], features(encoder, x)[:, 0], atol=1e-5, rtol=1e-5)
    again, _ = load_encoder(save(tree, tmp_path), heads=2, grid=(4, 3, 2))
    torch.testing.assert_close(features(again, x), features(encoder, x), atol=1e-5, rtol=1e-5)
    assert (again.pos_embed is None) == (not own_table)


def set_eps(net: torch.nn.Module) -> None:
    for part in net.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-6


def monai_vit(*, cls: bool = False) -> ViT:
    net = ViT(
        in_channels=3,
        img_size=(8, 12, 16),
        patch_size=(2, 4, 8),
        hidden_size=WIDTH,
        mlp_dim=4 * WIDTH,
        num_layers=2,
        num_heads=2,
        proj_type="conv",
        qkv_bias=True,
    )
    if cls:
        net.cls_token = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
    set_eps(net)
    return net.eval()


@torch.no_grad()
def without_cls(encoder: Encoder, x_BCZYX: torch.Tensor) -> list[torch.Tensor]:
    """Our blocks on the patches alone: after each block, and after the norm."""
    grid = patch_grid(list(x_BCZYX.shape[2:]), encoder.patch)
    x = encoder.patch_embed(patchify(x_BCZYX, encoder.patch)) + encoder.positions(grid)[1:]
    seen = []
    for block in encoder.blocks:
        x = block(x)
        seen.append(x)
    return [*seen, encoder.norm(x)]


def in_order_of_xyz(tokens_BNE: torch.Tensor, grid=GRID) -> torch.Tensor:
    b, n, e = tokens_BNE.shape
    return tokens_BNE.reshape(b, *grid, e).permute(0, 3, 2, 1, 4).reshape(b, n, e)


@pytest.mark.parametrize("own_table", [False, True])
def test_monais_vit_with_a_cls_token_has_our_features(own_table):
    encoder = make_encoder()
    if own_table:  # with a position for CLS, which MONAI does not add
        encoder.adopt_positions(torch.randn(1 + TOKENS, WIDTH), grid=GRID)
    net = monai_vit(cls=True)
    net.load_state_dict(as_monai_vit(encoder, grid=GRID, cls=True), strict=True)
    x = volumes()
    with torch.no_grad():
        theirs, _ = net(x.permute(0, 1, 4, 3, 2))
    ours = features(encoder, x)
    torch.testing.assert_close(theirs[:, 0], ours[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs[:, 1:], in_order_of_xyz(ours[:, 1:]), atol=1e-5, rtol=1e-5)


def test_monais_vit_without_cls_has_the_features_of_our_patches_alone():
    encoder, net, x = make_encoder(), monai_vit(), volumes(batch=1)
    net.load_state_dict(as_monai_vit(encoder, grid=GRID), strict=True)
    with torch.no_grad():
        last, states = net(x.permute(0, 1, 4, 3, 2))
    for theirs, ours in zip([*states, last], without_cls(encoder, x), strict=True):
        torch.testing.assert_close(theirs, in_order_of_xyz(ours), atol=1e-5, rtol=1e-5)
    # What is lost: patches that attended to CLS.
    assert (last - in_order_of_xyz(features(encoder, x)[:, 1:])).abs().max() > 1e-3


def test_monais_unetr_has_the_features_of_our_patches_alone():
    torch.manual_seed(0)
    encoder = Encoder(channels=2, patch=(16, 16, 16), width=WIDTH, depth=12, heads=2)
    net = UNETR(
        in_channels=2,
        out_channels=3,
        img_size=(64, 48, 32),
        feature_size=4,
        hidden_size=WIDTH,
        mlp_dim=4 * WIDTH,
        num_heads=2,
        proj_type="conv",
        qkv_bias=True,
    ).eval()
    set_eps(net)
    weights = as_monai_unetr(encoder, grid=(2, 3, 4))
    assert weights.keys() == {name for name in net.state_dict() if name.startswith("vit.")}
    net.load_state_dict(net.state_dict() | weights, strict=True)
    x = volumes(batch=1, channels=2, sides=(32, 48, 64)).clamp(0, 1)  # as windowed views are
    with torch.no_grad():
        last, states = net.vit(x.permute(0, 1, 4, 3, 2))
        assert net(x.permute(0, 1, 4, 3, 2)).shape == (1, 3, 64, 48, 32)
    for theirs, ours in zip([*states, last], without_cls(encoder, x), strict=True):
        torch.testing.assert_close(theirs, in_order_of_xyz(ours), atol=1e-5, rtol=1e-5)
