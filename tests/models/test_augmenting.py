"""Flips and jitter: what they do to a view, how often, and that the seed alone decides."""

from __future__ import annotations

import pytest
import torch

from glmae_ray.config_data import ViewsConfig
from glmae_ray.errors import UserError
from glmae_ray.models.augmenting import augment, flip, jitter
from glmae_ray.models.masking import draw_masks
from tests.conftest import tiny_config

BOTH = ViewsConfig(flips=(0.5, 0.4, 0.3), jitter_scale=0.3, jitter_shift=0.1)
WINDOW = torch.tensor([[-1000.0, 1000.0], [20.0, 80.0]])  # two channels


def views(samples: int = 4, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1200, 1200, (samples, count, 2, 6, 5, 4), generator=generator).short()


def seeds(samples: int = 4, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 2**62, (samples, count), generator=torch.Generator().manual_seed(1))


def windows(samples: int = 4) -> torch.Tensor:
    return WINDOW.expand(samples, 1, 2, 2)


@pytest.mark.parametrize(("axis", "dimension"), [(0, -3), (1, -2), (2, -1)])
def test_a_flip_is_the_mirror_image_along_its_axis_in_all_channels(axis, dimension):
    chances = tuple(float(other == axis) for other in range(3))
    flipped = flip(views(), seeds(), chances=chances)
    assert flipped.dtype == torch.int16
    assert torch.equal(flipped, views().flip(dimension))


def test_every_view_is_flipped_or_not_by_itself():
    flipped = flip(views(), seeds(), chances=(0.0, 0.5, 0.0))
    mirrored = (flipped == views().flip(-2)).flatten(2).all(dim=2)
    left = (flipped == views()).flatten(2).all(dim=2)
    assert torch.equal(mirrored, ~left)
    assert 0 < mirrored.sum() < mirrored.numel()


def test_flips_come_as_often_as_asked_and_the_axes_do_not_know_of_each_other():
    many = torch.arange(40_000).reshape(-1, 4) * 2**30 + 3
    corner = torch.arange(8, dtype=torch.int16).reshape(1, 1, 1, 2, 2, 2)
    chances = (0.2, 0.5, 0.7)
    # The first voxel of a flipped 2 x 2 x 2 cube tells by its bits which axes were flipped.
    first = flip(corner, many, chances=chances)[..., 0, 0, 0, 0].flatten()
    axes = torch.stack([first >> 2 & 1, first >> 1 & 1, first & 1]).double()
    # Standard error at most 0.0025; five of them.
    assert (axes.mean(dim=1) - torch.tensor(chances)).abs().max() < 0.0125
    assert (torch.corrcoef(axes) - torch.eye(3)).abs().max() < 0.025


def test_a_jittered_window_scales_about_its_middle_and_shifts():
    scale, shift = 0.4, 0.2
    narrow = jitter(windows(), seeds(), scale=scale, shift=shift)
    assert narrow.shape == (4, 3, 2, 2)
    x = torch.linspace(0, 1, 11)
    low, high = WINDOW.unbind(-1)
    voxels = low[:, None] + (high - low)[:, None] * x  # two channels of eleven voxels
    start, stop = narrow[..., None].unbind(-2)
    seen = (voxels - start) / (stop - start)
    slope = seen[..., -1:] - seen[..., :1]
    offset = seen[..., 5:6] - 0.5  # voxel 5 was the middle
    torch.testing.assert_close(seen, 0.5 + offset + slope * (x - 0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[:, :, 0], seen[:, :, 1], atol=1e-5, rtol=0)
    assert ((slope - 1).abs() <= scale + 1e-5).all()
    assert (offset.abs() <= shift + 1e-5).all()


def test_scale_and_shift_are_uniform_and_do_not_know_of_each_other():
    many = torch.arange(40_000)[:, None] * 2**30 + 3
    start, stop = jitter(torch.tensor([[[[0.0, 1.0]]]]), many, scale=0.5, shift=0.25).unbind(-1)
    a = 1 / (stop - start).flatten().double()
    b = (0.5 - start.flatten().double()) * a - 0.5
    unit = torch.stack([(a - 0.5) / 1.0, (b + 0.25) / 0.5])
    for draws in unit:
        assert draws.min() > -1e-5
        assert draws.max() < 1 + 1e-5
        deciles = torch.histc(draws, bins=10, min=0, max=1) / len(draws)
        assert (deciles - 0.1).abs().max() < 0.0075  # five standard errors
    assert torch.corrcoef(unit)[0, 1].abs() < 0.025


def test_one_of_scale_and_shift_leaves_the_other_alone():
    width = WINDOW[:, 1] - WINDOW[:, 0]
    shifted = jitter(windows(), seeds(), scale=0.0, shift=0.2)
    torch.testing.assert_close(shifted[..., 1] - shifted[..., 0], width.expand(4, 3, 2))
    scaled = jitter(windows(), seeds(), scale=0.2, shift=0.0)
    torch.testing.assert_close(scaled.mean(-1), WINDOW.mean(-1).expand(4, 3, 2), atol=1e-3, rtol=0)


def test_an_augmentation_belongs_to_its_seed_and_not_to_its_neighbours():
    together = augment(views(), windows(), seeds_BV=seeds(), cfg=BOTH)
    for sample in range(4):
        part = slice(sample, sample + 1)
        alone = augment(views()[part], windows(1), seeds_BV=seeds()[part], cfg=BOTH)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[sample])


def test_turning_one_effect_on_changes_no_other():
    only_flips = ViewsConfig(flips=BOTH.flips)
    only_last = ViewsConfig(flips=(0.0, 0.0, BOTH.flips[2]))
    both, _ = augment(views(), windows(), seeds_BV=seeds(), cfg=BOTH)
    flips, _ = augment(views(), windows(), seeds_BV=seeds(), cfg=only_flips)
    last, _ = augment(views(), windows(), seeds_BV=seeds(), cfg=only_last)
    assert torch.equal(both, flips)
    first_two = flip(views(), seeds(), chances=(*BOTH.flips[:2], 0.0))
    assert torch.equal(flip(last, seeds(), chances=(*BOTH.flips[:2], 0.0)), flips)
    assert not torch.equal(first_two, flips)


def test_a_flip_says_nothing_about_the_mask_of_the_same_seed():
    many = torch.arange(20_000)
    corner = torch.arange(2, dtype=torch.int16).reshape(1, 1, 1, 1, 1, 2)
    flipped = flip(corner, many[:, None], chances=(0.0, 0.0, 0.5))[..., 0].flatten().double()
    _, hidden = draw_masks(many, tokens=8, ratio=0.5)
    masks = torch.zeros(len(many), 8).double().scatter_(1, hidden, 1.0)
    related = torch.corrcoef(torch.cat([flipped[None], masks.T]))[0, 1:]
    assert related.abs().max() < 0.035  # five standard errors


def test_what_is_off_does_nothing_at_all():
    before = views(), windows()
    after = augment(*before, seeds_BV=seeds(), cfg=ViewsConfig())
    assert all(one is other for one, other in zip(after, before, strict=True))


def test_augmenting_never_waits_for_the_device():
    # A meta tensor has no values: whatever asks for one on the host fails.
    inputs = (part.to("meta") for part in (views(), windows(), seeds()))
    flipped, jittered = augment(next(inputs), next(inputs), seeds_BV=next(inputs), cfg=BOTH)
    assert flipped.shape == views().shape
    assert jittered.shape == (4, 3, 2, 2)


@pytest.mark.gpu
def test_augmentations_have_the_same_bits_on_cuda(cuda):
    here = augment(views(), windows(), seeds_BV=seeds(), cfg=BOTH)
    there = augment(views().to(cuda), windows().to(cuda), seeds_BV=seeds().to(cuda), cfg=BOTH)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other.cpu())


def test_one_number_is_the_probability_of_a_flip_along_every_axis():
    assert tiny_config("views.flips=0.5").views.flips == (0.5, 0.5, 0.5)
    assert tiny_config("views.flips=[0,0,0.5]").views.flips == (0.0, 0.0, 0.5)


@pytest.mark.parametrize(
    "word", ["views.flips=1.5", "views.jitter_scale=1", "views.jitter_shift=-0.1"]
)
def test_a_probability_or_a_range_beyond_its_limits_is_refused(word):
    name, value = word.split("=")
    with pytest.raises(UserError, match=name) as raised:
        tiny_config(word)
    assert value in str(raised.value)
