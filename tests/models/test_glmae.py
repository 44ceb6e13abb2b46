"""GLMAE: terms, gradients, teacher, centre, pictures; in NumPy: see test_against_numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glmae_ray import losses
from glmae_ray.config import PretrainConfig
from glmae_ray.models.augmenting import augment
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.head import Prototypes
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import gather_tokens, patchify, unpatchify
from tests.conftest import tiny_config

ONLY_LOCAL = ("loss.w_rg=0", "loss.w_gg=0", "loss.w_gl=0")
AUGMENTED = ("views.flips=[0.5,0.4,0.3]", "views.jitter_scale=0.3", "views.jitter_shift=0.1")


def build(*words: str) -> tuple[PretrainConfig, GLMAE]:
    cfg = tiny_config(*words)
    torch.manual_seed(0)
    return cfg, GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)


def make_batch(cfg: PretrainConfig, samples: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    windows = torch.tensor([-1000.0, 1000.0]).expand(samples, cfg.model.channels, 2)
    batch = {"window": windows}
    for kind in ("global", "local"):
        views = getattr(cfg.views, f"{kind}_count")
        shape = (samples, views, cfg.model.channels, *getattr(cfg.views, f"{kind}_size"))
        batch[kind] = torch.randint(-1200, 1200, shape, generator=generator).short()
        batch[f"{kind}_seeds"] = torch.randint(0, 2**62, (samples, views), generator=generator)
    return batch


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_loss_is_the_weighted_sum_of_four_terms(channels, samples):
    weights = ("loss.w_rl=2", "loss.w_rg=3", "loss.w_gg=0.5", "loss.w_gl=0.25")
    cfg, module = build(f"model.channels={channels}", *weights)
    outputs = module(make_batch(cfg, samples))
    expected = sum(
        weight * outputs[f"loss_{name}"]
        for name, weight in (("rl", 2), ("rg", 3), ("gg", 0.5), ("gl", 0.25))
    )
    torch.testing.assert_close(outputs["loss"], expected)
    parts = sum(outputs[f"weighted_{name}"] for name in ("rl", "rg", "gg", "gl"))
    torch.testing.assert_close(outputs["loss"], parts)


def test_reconstruction_loss_counts_masked_patches_only_and_ignores_their_pixels_as_input():
    cfg, module = build(*ONLY_LOCAL)
    batch = make_batch(cfg)
    views = module._views(batch, "local")
    masks = module._masks(batch, "local", views)
    z = module._encode(views, masks)
    patches = patchify(views.voxels_BCZYX, views.patch)
    where = masks.hidden_BM.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    other = unpatchify(patches.scatter(1, where, 123), grid=views.grid, patch=views.patch)
    assert not torch.equal(other, views.voxels_BCZYX)
    assert torch.equal(module._encode(views._replace(voxels_BCZYX=other), masks), z)
    hidden = views.all().gather(1, where)
    target = (hidden - hidden.mean(-1, keepdim=True)) / (
        hidden.var(-1, keepdim=True, correction=0) + 1e-6
    ).sqrt()
    expected = (module._decode(z, views, masks) - target).square().mean()
    torch.testing.assert_close(module(batch)["loss_rl"], expected.detach())


def test_every_trainable_weight_gets_a_gradient_and_the_teacher_none():
    cfg, module = build()
    module(make_batch(cfg))["loss"].backward()
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == trainable
    assert not any(name.startswith("teacher") for name in trainable)
    assert any(name.startswith("teacher") for name, _ in module.named_parameters())


def test_the_teacher_is_the_moving_average_of_the_student_in_float64():
    _, module = build()
    with torch.no_grad():
        for parameter in (*module.encoder.parameters(), *module.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    before = [p.double().clone() for p in module.teacher_and_student()[0]]
    student = [p.detach().double() for p in module.teacher_and_student()[1]]
    module.teacher_views.fill_(1)
    for _ in range(3):
        module.teacher_views.fill_(1)
        module.update_teacher(0.996)
    for old, followed, new in zip(before, student, module.teacher_and_student()[0], strict=True):
        expected = old
        for _ in range(3):
            expected = 0.996 * expected + 0.004 * followed
        torch.testing.assert_close(new.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_centre_follows_the_mean_of_the_whole_step_however_it_was_divided():
    cfg, module = build()
    batch = make_batch(cfg, 4)
    calls: list[torch.Tensor] = []
    module.teacher_head.register_forward_hook(lambda *a: calls.append(a[2]))
    for half in (slice(0, 2), slice(2, 4)):
        module({name: value[half] for name, value in batch.items()})
    mean = torch.cat(calls).mean(dim=0)
    module.update_teacher(1.0)
    torch.testing.assert_close(module.center, mean)  # the first step's mean replaces 0
    with torch.no_grad():
        module.teacher_head.prototypes.weight.neg_()
    module(batch)
    module.update_teacher(1.0)
    torch.testing.assert_close(module.center, 0.9 * mean - 0.1 * mean)


def test_prototypes_count_by_direction_only():
    layer = Prototypes(8, 5, bias=False)
    x = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(7)
    torch.testing.assert_close(layer(x), before)
    assert before.abs().max() <= 1


def test_an_untrained_teacher_spreads_its_probability_and_the_entropy_says_so():
    cfg, module = build()
    outputs = module(make_batch(cfg), teacher_temperature=100.0)
    assert outputs["teacher_entropy"].item() == pytest.approx(math.log(32), abs=1e-3)
    torch.testing.assert_close(
        outputs["kl_gg"] + outputs["teacher_entropy"], outputs["loss_gg"], atol=1e-5, rtol=1e-5
    )


def test_the_window_becomes_zero_to_one_and_cuts_what_lies_outside():
    cfg, module = build()
    batch = make_batch(cfg)
    patches = module._views(batch, "global").all()
    assert patches.min() == 0
    assert patches.max() == 1
    narrow = module._views(batch | {"window": batch["window"] / 4}, "global").all()
    torch.testing.assert_close(narrow, ((patches - 0.5) * 4 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_held_out_figures_are_those_of_the_loss_and_of_predicting_the_mean():
    cfg, module = build()
    batch = make_batch(cfg)
    sums, outputs = module(batch, task="held_out"), module(batch)
    for kind, term in (("local", "rl"), ("global", "rg")):
        error, trivial, views = sums[kind].tolist()
        assert views == batch[kind].shape[0] * batch[kind].shape[1]
        assert error / views == pytest.approx(outputs[f"loss_{term}"].item(), rel=1e-5)
        assert trivial / views == pytest.approx(1.0, abs=1e-3)  # noise: no patch without variance


def test_a_picture_is_the_original_where_nothing_was_hidden_and_denormalised_where_it_was():
    cfg, module = build()
    batch = make_batch(cfg, 1)
    with torch.no_grad():
        for parameter in module.decoder.predict.parameters():
            parameter.zero_()  # predicts 0: each hidden patch becomes its own mean
        picture = module(batch, task="picture")["local"]
    original, masked, rebuilt = picture.original, picture.masked, picture.reconstructed
    assert original.shape == batch["local"].shape
    hidden = masked.isnan()
    assert hidden.float().mean().item() == pytest.approx(1 - math.floor(24 * 0.4) / 24, abs=0.2)
    assert torch.equal(rebuilt[~hidden], original[~hidden])
    for corner in np.ndindex(2, 3, 4):
        place = (
            0,
            0,
            0,
            *(slice(c * p, c * p + p) for c, p in zip(corner, (8, 4, 2), strict=True)),
        )
        if hidden[place].all():
            torch.testing.assert_close(rebuilt[place], original[place].mean().expand(8, 4, 2))


def test_every_channel_has_a_window_of_its_own():
    cfg, module = build("model.channels=2")
    batch = make_batch(cfg)
    wide = torch.tensor([[-1000.0, 1000.0], [-2000.0, 2000.0]]).expand(3, 2, 2)
    one = module._views(batch, "global").all()
    both = module._views(batch | {"window": wide}, "global").all()
    inside = (one > 0) & (one < 1)
    first, second = torch.isclose(both, one), torch.isclose(both, (one - 0.5) / 2 + 0.5)
    assert (first | second)[inside].all()
    assert first[inside].float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_loss_of_the_default_config_is_that_of_the_bare_crop_to_the_bit(channels):
    cfg, module = build(*ONLY_LOCAL, f"model.channels={channels}")
    batch = make_batch(cfg)
    unit = ((batch["local"].float() + 1000) / 2000).clamp(0, 1)
    masks = draw_masks(batch["local_seeds"].flatten(), tokens=24, ratio=0.6)
    patches, grid = patchify(unit.flatten(0, 1), (8, 4, 2)), (2, 3, 4)
    kept = gather_tokens(patches, masks.kept_BK)
    z = module.encoder(kept, grid=grid, kept_BK=masks.kept_BK)
    target, _ = losses.standardise(gather_tokens(patches, masks.hidden_BM))
    predicted = module.decoder(z, masks=masks, grid=grid)
    assert torch.equal(
        module(batch)["loss_rl"], losses.reconstruction_loss(predicted, target).mean()
    )


@pytest.mark.parametrize("channels", [1, 2])
def test_the_student_sees_patches_of_the_very_augmented_view_that_the_teacher_sees(channels):
    cfg, module = build(*AUGMENTED, f"model.channels={channels}", "loss.w_rl=0", "loss.w_gl=0")
    batch = make_batch(cfg)
    seen: dict[str, torch.Tensor] = {}
    for name in ("encoder", "teacher_encoder"):
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    module(batch)
    seeds, windows = batch["global_seeds"], batch["window"].unsqueeze(1)
    views, windows = augment(batch["global"], windows, seeds_BV=seeds, cfg=cfg.views)
    low, high = windows[..., None, None, None, :].unbind(-1)
    patches = patchify(((views - low) / (high - low)).clamp(0, 1).flatten(0, 1), (8, 4, 2))
    kept, _ = draw_masks(seeds.flatten(), tokens=patches.shape[1], ratio=cfg.views.mask_ratio)
    assert torch.equal(seen["teacher_encoder"], patches)
    assert torch.equal(seen["encoder"], gather_tokens(patches, kept))
    assert not torch.equal(patches, module._views(batch, "global").all())


def test_held_out_figures_and_pictures_are_never_augmented():
    cfg, plain = build()
    _, augmented = build(*AUGMENTED)
    batch = make_batch(cfg)
    assert not torch.equal(augmented(batch)["loss"], plain(batch)["loss"])
    for kind, sums in plain(batch, task="held_out").items():
        assert torch.equal(augmented(batch, task="held_out")[kind], sums)
    for kind, picture in plain(batch, task="picture").items():
        for one, other in zip(augmented(batch, task="picture")[kind], picture, strict=True):
            assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
