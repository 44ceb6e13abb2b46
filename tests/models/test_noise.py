"""The hash behind masks and augmentations, against plain Python integers."""

from __future__ import annotations

import pytest
import torch

from glmae_ray.models.noise import happens, noise, uniform

SEEDS = [0, 1, 5, 2**31, 2**32 - 1, 5 + 2**40, 2**62 + 11, 2**63 - 1]


def lowbias32(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("number", [0, 1, 999, 2**31, 2**31 + 4])
def test_noise_is_that_of_exact_integers(number):
    expected = [
        lowbias32(lowbias32(lowbias32(seed % 2**32) ^ number) ^ seed >> 32) for seed in SEEDS
    ]
    assert noise(torch.tensor(SEEDS), number).tolist() == expected


def test_uniform_fills_its_range_evenly_and_leaves_out_one():
    draws = uniform(torch.arange(100_000) * 2**29, 3)
    assert draws.dtype == torch.float32
    assert draws.min() >= -1
    assert draws.max() < 1
    deciles = torch.histc(draws, bins=10, min=-1, max=1) / len(draws)
    assert (deciles - 0.1).abs().max() < 0.005  # five standard errors


@pytest.mark.parametrize("chance", [0.0, 0.25, 1.0])
def test_what_has_a_chance_happens_that_often(chance):
    share = happens(torch.arange(100_000), 2**31, chance=chance).float().mean().item()
    # Never and always are exact; else five standard errors.
    assert share == pytest.approx(chance, abs=5 * (chance * (1 - chance) / 100_000) ** 0.5)


@pytest.mark.gpu
def test_noise_has_the_same_bits_on_cuda(cuda):
    seeds = torch.tensor(SEEDS)
    for number in (0, 2**31 + 3):
        assert torch.equal(noise(seeds.to(cuda), number).cpu(), noise(seeds, number))
        assert torch.equal(uniform(seeds.to(cuda), number).cpu(), uniform(seeds, number))
