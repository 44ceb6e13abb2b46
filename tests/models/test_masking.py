"""Masks: exact counts, uniform, and nothing but the seed decides."""

from __future__ import annotations

import pytest
import torch

from glmae_ray.models.masking import draw_masks


@pytest.mark.parametrize(("tokens", "kept"), [(1000, 400), (216, 86), (64, 25), (2, 1)])
def test_the_share_that_stays_is_rounded_down(tokens, kept):
    keep, hide = draw_masks(torch.arange(3), tokens=tokens, ratio=0.6)
    assert keep.shape == (3, kept)
    assert hide.shape == (3, tokens - kept)


def test_kept_and_hidden_tokens_are_each_token_once():
    keep, hide = draw_masks(torch.arange(5), tokens=50, ratio=0.6)
    everything = torch.cat([keep, hide], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(50).expand(5, 50))


def test_a_mask_belongs_to_its_seed_and_not_to_its_neighbours():
    seeds = torch.tensor([3, 2**62 + 5, 7])
    alone, _ = draw_masks(seeds[1:2], tokens=60, ratio=0.6)
    together, _ = draw_masks(seeds, tokens=60, ratio=0.6)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_the_upper_half_of_a_seed_counts():
    keep, _ = draw_masks(torch.tensor([5, 5 + 2**40]), tokens=60, ratio=0.6)
    assert not torch.equal(keep[0], keep[1])


def test_every_token_and_every_pair_is_hidden_equally_often():
    draws, tokens = 20_000, 20
    _, hide = draw_masks(torch.arange(draws) * 2**31 + 17, tokens=tokens, ratio=0.6)
    hidden = torch.zeros(draws, tokens).scatter_(1, hide, 1.0)
    # Standard error 0.0035; five of them.
    assert (hidden.mean(0) - 0.6).abs().max() < 0.018
    pairs = (hidden.T @ hidden / draws).fill_diagonal_(0.6 * 11 / 19)
    assert (pairs - 0.6 * 11 / 19).abs().max() < 0.018
