"""Blocks, encoder, decoder, masks and reconstruction against timm and MONAI, same weights, 1e-5."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor, nn

from glmae_ray.models.decoder import Decoder
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import Block, Encoder, gather_tokens, patchify
from tests.conftest import tiny_config
from tests.models.timm_parts import timm_block

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # MONAI's positions

PATCH, SIDES, GRID = (8, 4, 2), (16, 12, 8), (2, 3, 4)
TOKENS = 24
# The tiny encoder and decoder of tests, and the decoder of base: width 576, heads of 48.
WIDTHS = [(24, 2), (12, 2), (576, 12)]
CLOSE = dict(atol=1e-5, rtol=1e-5)


def awake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Make every weight count: biases start at 0 and norms at 1, where mistakes hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def volumes(batch: int, channels: int) -> Tensor:
    return torch.rand(batch, channels, *SIDES, generator=torch.Generator().manual_seed(1))


def monai_block(width: int, *, heads: int, like: Block) -> nn.Module:
    """MONAI's block with the weights of ours."""
    theirs = TransformerBlock(width, 4 * width, heads, qkv_bias=True)
    copy_block(like, theirs)
    return theirs


def copy_block(ours: Block, theirs: nn.Module) -> None:
    names = {"attn.proj": "attn.out_proj", "mlp.fc1": "mlp.linear1", "mlp.fc2": "mlp.linear2"}
    for mine in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        copy(ours.get_submodule(mine), theirs.get_submodule(names.get(mine, mine)))


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if isinstance(theirs, nn.LayerNorm):
        theirs.eps = 1e-6  # MONAI's is torch's default


def timm_block_like(width: int, *, heads: int, like: Block) -> nn.Module:
    """timm's block with the weights of ours; every name is the same."""
    theirs = timm_block(width, heads=heads)
    theirs.load_state_dict(like.state_dict(), strict=True)
    return theirs


@pytest.mark.parametrize("build", [monai_block, timm_block_like])
@pytest.mark.parametrize(("width", "heads"), WIDTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_equals_the_reference_with_the_same_weights(build, width, heads, batch):
    ours = awake(Block(width, heads=heads))
    x = torch.randn(batch, 7, width, generator=torch.Generator().manual_seed(2))
    theirs = build(width, heads=heads, like=ours)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


class TimmEncoder(nn.Module):
    """A vision transformer from timm's blocks, a Conv3d and MONAI's positions."""

    def __init__(self, *, channels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(channels, width, kernel_size=PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(timm_block(width, heads=heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, volumes_BCZYX: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        x = self.patch_embed.proj(volumes_BCZYX).flatten(2).transpose(1, 2)
        x = x + build_sincos_position_embedding(GRID, x.shape[-1], spatial_dims=3)
        if kept_BK is not None:
            x = torch.stack([view[kept] for view, kept in zip(x, kept_BK, strict=True)])
        x = torch.cat([self.cls_token.repeat(len(x), 1, 1), x], dim=1)
        return self.norm(self.blocks(x))


@pytest.mark.parametrize(("batch", "channels"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_encoder_equals_one_of_timms_parts_with_our_weights_loaded_strictly(
    batch, channels, masked
):
    shape = dict(channels=channels, width=24, depth=2, heads=2)
    ours, theirs = awake(Encoder(patch=PATCH, **shape)), TimmEncoder(**shape)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, kept = volumes(batch, channels), None
    patches = patchify(x, PATCH)
    if masked:
        kept, _ = draw_masks(torch.arange(batch), tokens=TOKENS, ratio=0.6)
        patches = gather_tokens(patches, kept)
    actual = ours(patches, grid=GRID, kept_BK=kept)
    torch.testing.assert_close(actual, theirs(x, kept), **CLOSE)


@pytest.mark.parametrize(("batch", "channels"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("build", [monai_block, timm_block_like])
def test_the_whole_decoder_equals_one_of_their_parts_that_fills_in_mask_tokens_one_by_one(
    build, batch, channels
):
    cfg = tiny_config(f"model.channels={channels}")
    width, heads = cfg.model.decoder_width, cfg.model.decoder_heads
    ours = awake(Decoder(cfg.model, values=channels * 64))
    masks = draw_masks(torch.arange(batch), tokens=TOKENS, ratio=0.6)
    kept, hidden = masks
    z = torch.randn(batch, 1 + kept.shape[1], 24, generator=torch.Generator().manual_seed(3))
    positions = build_sincos_position_embedding(GRID, width, spatial_dims=3)[0]
    embedded = ours.embed(z)
    rows = []
    for view, numbers in zip(embedded, kept.tolist(), strict=True):
        tokens = [view[0]]  # CLS has no position
        for patch in range(TOKENS):
            known = view[1 + numbers.index(patch)] if patch in numbers else ours.mask_token[0, 0]
            tokens.append(known + positions[patch])
        rows.append(torch.stack(tokens))
    x = torch.stack(rows)
    for block in ours.blocks:
        x = build(width, heads=heads, like=block)(x)
    everything = ours.predict(ours.norm(x))[:, 1:]
    expected = torch.stack([view[at] for view, at in zip(everything, hidden, strict=True)])
    torch.testing.assert_close(ours(z, masks=masks, grid=GRID), expected, **CLOSE)


@pytest.mark.parametrize(("batch", "channels"), [(1, 2), (3, 1)])
def test_the_reconstruction_loss_equals_that_of_monais_autoencoder_on_the_same_mask(
    batch, channels
):
    cfg = tiny_config(f"model.channels={channels}", "loss.w_rg=0", "loss.w_gg=0", "loss.w_gl=0")
    torch.manual_seed(0)
    ours = awake(GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss))
    theirs = MaskedAutoEncoderViT(
        channels, SIDES, PATCH, hidden_size=24, mlp_dim=96, num_layers=2, num_heads=2,
        decoder_hidden_size=12, decoder_mlp_dim=48, decoder_num_layers=1, decoder_num_heads=2,
        masking_ratio=0.6, qkv_bias=True, pos_embed_type="sincos", decoder_pos_embed_type="sincos",
    )  # fmt: skip
    copy_autoencoder(ours, theirs)
    views, seeds = volumes(batch, channels), torch.arange(batch).unsqueeze(1)
    kept, _ = draw_masks(seeds.flatten(), tokens=TOKENS, ratio=0.6)
    chosen = torch.ones(batch, TOKENS).scatter(1, kept, 0)
    theirs._masking = lambda x, masking_ratio: (gather_tokens(x, kept), kept, chosen)  # noqa: ARG005
    predicted, mask = theirs(views)
    patches = patchify(views, PATCH)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True, correction=0)
    error = (predicted - (patches - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
    unit = torch.tensor([0.0, 1.0]).expand(batch, channels, 2)
    actual = ours({"local": views.unsqueeze(1), "local_seeds": seeds, "window": unit})["loss"]
    torch.testing.assert_close(actual, (error * mask).sum() / mask.sum(), **CLOSE)


def copy_autoencoder(ours: GLMAE, theirs: MaskedAutoEncoderViT) -> None:
    for stack, prefix in ((ours.encoder, ""), (ours.decoder, "decoder_")):
        *blocks, norm = theirs.get_submodule(f"{prefix}blocks")
        for mine, other in zip(stack.blocks, blocks, strict=True):
            copy_block(mine, other)
        copy(stack.norm, norm)
    copy(ours.encoder.patch_embed.proj, theirs.patch_embedding.patch_embeddings)
    copy(ours.decoder.embed, theirs.decoder_embed)
    copy(ours.decoder.predict, theirs.decoder_pred)
    theirs.cls_token.data.copy_(ours.encoder.cls_token.data)
    theirs.mask_tokens.data.copy_(ours.decoder.mask_token.data)


def test_masks_of_neighbouring_seeds_overlap_as_by_chance():
    kept, _ = draw_masks(torch.arange(4000), tokens=216, ratio=0.6)
    shown = torch.zeros(4000, 216).scatter_(1, kept, 1.0)
    together = (shown[:-1] * shown[1:]).sum(1)
    # Hypergeometric: mean 86 * 86 / 216 = 34.24, standard deviation 3.53, of the mean 0.06.
    assert together.mean().item() == pytest.approx(86 * 86 / 216, abs=0.28)
    assert together.std().item() == pytest.approx(3.53, abs=0.2)


def test_masks_keep_as_many_patches_as_monais():
    for tokens, ratio in itertools.product((24, 216, 1000), (0.5, 0.6, 0.75)):
        # The method uses nothing of its module where the ratio is given.
        _, _, mask = MaskedAutoEncoderViT._masking(None, torch.zeros(1, tokens, 1), ratio)
        _, hidden = draw_masks(torch.zeros(1).long(), tokens=tokens, ratio=ratio)
        assert hidden.shape[1] == mask.sum().item()
