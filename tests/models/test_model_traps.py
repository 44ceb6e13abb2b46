"""Traps 1, 2, 3 and 9 of docs/method.md, in what a model computes: what happens to who falls in."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT

from glmae_ray import losses
from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.models.decoder import Decoder
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import Encoder, patchify
from tests.conftest import tiny_config
from tests.models.test_glmae import build, make_batch
from tests.models.test_report_traps import ONLY_MAE

# 1. An encoder built from scratch without positions.

GRIDS = [(10, 10, 10), (6, 6, 6), (6, 4, 3)]  # of base's global and local views, and unequal


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(channels=1, patch=(2, 1, 2), width=24, depth=2, heads=2)


@pytest.mark.parametrize("grid", GRIDS)
def test_an_encoder_from_scratch_knows_where_each_patch_is(grid):
    """The authors' file leaves the table at zero: their baseline "from scratch" has no places."""
    table = encoder().positions(grid)[1:]
    assert table.shape == (math.prod(grid), 24)
    assert table.norm(dim=1).min() > 1
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize("grid", GRIDS)
def test_places_change_the_features_from_the_first_step_and_zero_places_would_not(grid):
    """CLS of a shuffled view is another one; with a table of zeros it is the same."""
    patches = torch.rand(1, math.prod(grid), 4, generator=torch.Generator().manual_seed(1))
    shuffled = patches.flip(1)
    ours, blind = encoder(), encoder()
    blind.adopt_positions(torch.zeros(1 + math.prod(grid), 24), grid=grid)
    moved, unmoved = (
        (part(shuffled, grid=grid)[:, 0] - part(patches, grid=grid)[:, 0]).abs().max().item()
        for part in (ours, blind)
    )
    assert moved > 1e-3
    assert unmoved < 1e-5


def test_patches_of_one_content_differ_by_their_place():
    """Nothing else could tell them apart, so that a decoder would paint one patch everywhere."""
    features = encoder()(torch.ones(1, 72, 4), grid=(6, 4, 3))[0, 1:]
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-3


# 2. The pair of one index, which DINO's loss skips.


def test_global_to_global_holds_the_pairs_of_one_index_and_no_other():
    """Here the student's view is the masked copy of the crop that the teacher of that index sees.

    The answer to each teacher view is certain, so every pair costs another amount.
    """
    logits = np.random.default_rng(0).normal(size=(3, 2, 5))
    log_student = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taught = np.zeros((3, 2, 5))
    for b, i in np.ndindex(3, 2):
        taught[b, i, (2 * b + 3 * i) % 5] = 1
    own = -np.mean([log_student[b, i, (2 * b + 3 * i) % 5] for b, i in np.ndindex(3, 2)])
    skipping = -np.mean([log_student[b, 1 - i, (2 * b + 3 * i) % 5] for b, i in np.ndindex(3, 2)])
    actual = losses.same_view_cross_entropy(torch.tensor(taught), torch.tensor(log_student)).item()
    assert actual == pytest.approx(own, rel=1e-12)
    assert abs(own - skipping) > 0.1


def test_one_global_view_is_enough_for_the_term_that_dino_would_find_empty():
    """Without pairs of one index a single global view would leave nothing to average."""
    cfg, module = build("views.global_count=1", "loss.w_gl=0", "loss.w_rl=0", "loss.w_rg=0")
    module = module.double()
    heard: dict[str, np.ndarray] = {}
    for name in ("head", "teacher_head"):
        module.get_submodule(name).register_forward_hook(
            lambda _part, _in, out, name=name: heard.update({name: out.detach().numpy()})
        )
    actual = module(make_batch(cfg), teacher_temperature=0.05)["loss_gg"].item()
    teacher, student = heard["teacher_head"].reshape(3, 32), heard["head"].reshape(3, 32)
    p = np.exp(teacher / 0.05)
    p /= p.sum(-1, keepdims=True)
    q = np.exp(student / 0.1)
    q /= q.sum(-1, keepdims=True)
    assert actual == pytest.approx(-(p * np.log(q)).sum(-1).mean(), rel=1e-10)


# 3. Cubes hide mistakes of axis order.

UNEQUAL = ("model.patch=16", "views.global_size=[96,64,48]", "views.local_size=[48,32,64]",
           "views.global_count=1", "views.local_count=2")  # fmt: skip


def test_the_whole_objective_trains_on_views_of_unequal_sides():
    """96 x 64 x 48 voxels, a grid of 6 x 4 x 3; no two sides that could be exchanged unseen."""
    cfg, module = build(*UNEQUAL)
    outputs = module(make_batch(cfg, 1))
    outputs["loss"].backward()
    assert {f"loss_{name}" for name in ("rl", "rg", "gg", "gl")} <= set(outputs)
    assert all(value.isfinite() for value in outputs.values())
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_patch_n_is_the_cube_at_its_place_of_the_grid():
    """Z slowest, X fastest, as NumPy counts."""
    volume = torch.rand(1, 2, 96, 64, 48, generator=torch.Generator().manual_seed(0))
    patches = patchify(volume, (16, 16, 16))
    for number, (z, y, x) in enumerate(itertools.product(range(6), range(4), range(3))):
        cube = volume[0, :, 16 * z :, 16 * y :, 16 * x :][:, :16, :16, :16]
        assert torch.equal(patches[0, number], cube.flatten())


@pytest.mark.parametrize("axes", [(3, 2, 4), (2, 4, 3), (4, 3, 2)])
def test_swapped_axes_are_another_view(axes):
    """Voxels with two axes exchanged have other features, also where the grid is a cube."""
    volume = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    part = Encoder(channels=1, patch=(2, 2, 2), width=24, depth=2, heads=2)
    as_is, swapped = (
        part(patchify(v, (2, 2, 2)), grid=(4, 4, 4))[:, 0]
        for v in (volume, volume.permute(0, 1, *axes))
    )
    assert (as_is - swapped).abs().max() > 1e-3


def test_pictures_land_in_place_on_unequal_sides():
    """Every patch has a grey of its own; predicting means gives back the very volume."""
    cfg, module = build(*UNEQUAL, *ONLY_MAE)
    greys = torch.arange(72).reshape(6, 4, 3) * 20 - 720
    volume = greys.repeat_interleave(16, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    batch = make_batch(cfg, 1) | {"global": volume.short().expand(1, 1, 1, 96, 64, 48)}
    with torch.no_grad():
        for parameter in module.decoder.predict.parameters():
            parameter.zero_()
        picture = module(batch, task="picture")["global"]
    expected = (volume.float() + 1000) / 2000
    torch.testing.assert_close(picture.original[0, 0, 0], expected)
    torch.testing.assert_close(picture.reconstructed[0, 0, 0], expected)
    hidden = picture.masked[0, 0, 0].isnan()
    whole = hidden.reshape(6, 16, 4, 16, 3, 16).float().mean(dim=(1, 3, 5))
    _, numbers = draw_masks(batch["global_seeds"].flatten(), tokens=72, ratio=0.6)
    assert torch.equal(whole.flatten().nonzero().flatten(), numbers[0])
    assert set(whole.flatten().tolist()) == {0.0, 1.0}


# 9. MONAI's MaskedAutoEncoderViT.


def monai_autoencoder(**changes: int) -> MaskedAutoEncoderViT:
    small = dict(hidden_size=24, mlp_dim=96, num_layers=1, num_heads=2, decoder_hidden_size=12,
                 decoder_mlp_dim=48, decoder_num_layers=1, decoder_num_heads=2)  # fmt: skip
    return MaskedAutoEncoderViT(1, (16, 12, 8), 4, **(small | changes))


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_monais_autoencoder_fails_under_bfloat16_autocast_and_ours_does_not():
    """Should the first half fail, MONAI has repaired it, and docs/method.md can say so."""
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="Float for the destination and BFloat16 for the source"),
    ):
        monai_autoencoder()(torch.rand(1, 1, 16, 12, 8))
    cfg, module = build()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(make_batch(cfg))
    outputs["loss"].backward()
    assert outputs["loss"].dtype == torch.float32
    assert outputs["loss"].item() == pytest.approx(module(make_batch(cfg))["loss"].item(), rel=0.05)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_decoder_width_of_512_is_no_multiple_of_six_and_ours_is_576_by_twelve_heads():
    """MONAI asserts when it builds; ours says before a run starts what would be right."""
    with pytest.raises(AssertionError, match="divisible by 6"):
        monai_autoencoder(decoder_hidden_size=512, decoder_num_heads=16)
    with pytest.raises(UserError, match=r"model\.decoder_width: 512 is not divisible by 6"):
        tiny_config("model.decoder_width=512", "model.decoder_heads=16")
    cfg = tiny_config("model.decoder_width=576", "model.decoder_heads=12")
    decoder = Decoder(cfg.model, values=64)
    masks = draw_masks(torch.arange(2), tokens=24, ratio=0.6)
    rebuilt = decoder(torch.rand(2, 10, 24), masks=masks, grid=(2, 3, 4))
    assert rebuilt.shape == (2, 15, 64)
    base = PretrainConfig.model_fields["model"].default
    assert (base.preset, base.decoder_width, base.decoder_heads) == ("base", 576, 12)
