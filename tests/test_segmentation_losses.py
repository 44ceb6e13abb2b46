"""Dice and cross-entropy against MONAI, and against first principles where labels are partial."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from glmae_ray.segmentation_losses import cross_entropy, dice_loss, merge_unknown

SIDES = (5, 4, 3)


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, *SIDES, generator=g, dtype=torch.float64)
    label = torch.randint(4, (2, *SIDES), generator=g).to(torch.uint8)
    return logits, label


def both(logits, label, known):
    merged = merge_unknown(logits, known)
    return dice_loss(merged, label, known), cross_entropy(merged, label)


def test_where_all_is_known_the_sum_is_monais(case):
    logits, label = case
    known = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(merge_unknown(logits, known), logits)
    monai = DiceCELoss(to_onehot_y=True, softmax=True)
    torch.testing.assert_close(sum(both(logits, label, known)), monai(logits, label[:, None]))


def test_a_crop_in_which_all_is_known_is_left_as_it_is_beside_one_in_which_it_is_not(case):
    logits, _ = case
    known = torch.tensor([[True] * 4, [False, True, False, True]])
    assert torch.equal(merge_unknown(logits, known)[0], logits[0])


def test_unknown_structures_count_as_background_and_have_no_dice(case):
    logits, label = case
    known = torch.tensor([[True] * 4, [False, True, False, True]])
    label[1][label[1] == 2] = 0  # as data are labelled where nobody looked
    dice, entropy = both(logits, label, known)
    p = logits.softmax(1)
    dices, logs = [], []
    for n in range(2):
        allowed = [0, 2] if n else [0]
        for k in range(4):
            is_k = label[n] == k
            if known[n, k]:
                overlap = 2 * p[n, k][is_k].sum() + 1e-5
                dices.append(1 - overlap / (p[n, k].sum() + is_k.sum() + 1e-5))
            logs.append(-(p[n, allowed].sum(0) if k == 0 else p[n, k])[is_k].log())
    torch.testing.assert_close(dice, torch.stack(dices).mean())
    torch.testing.assert_close(entropy, torch.cat(logs).mean())


def test_nothing_that_is_said_of_an_unknown_structure_is_punished(case):
    logits, label = case
    known = torch.tensor([[False, True, False, True]] * 2)
    label = torch.zeros_like(label)
    logits[:, 2] = 60  # surely structure 2, which nobody looked for
    logits = logits.requires_grad_()
    dice, entropy = both(logits, label, known)
    assert entropy.item() == pytest.approx(0, abs=1e-9)
    (dice + entropy).backward()
    assert logits.grad.isfinite().all()
    # Between background and the unknown structure there is nothing to learn.
    torch.testing.assert_close(logits.grad[:, 0], torch.zeros_like(logits.grad[:, 0]))


def test_probabilities_too_small_for_float32_have_a_finite_loss_and_gradient(case):
    logits, label = case
    logits = torch.full_like(logits, -200, dtype=torch.float32)
    logits[:, 1] = 200
    logits = logits.requires_grad_()
    known = torch.tensor([[False, True, False, True]] * 2)
    entropy = cross_entropy(merge_unknown(logits, known), torch.zeros_like(label))
    assert entropy.item() == pytest.approx(400 - torch.tensor(2.0).log().item())
    entropy.backward()
    assert logits.grad.isfinite().all()


def test_a_case_in_which_nothing_is_known_teaches_nothing(case):
    logits, label = case
    logits = logits.requires_grad_()
    dice, entropy = both(logits, torch.zeros_like(label), torch.zeros(2, 4, dtype=torch.bool))
    assert dice.item() == 0
    assert entropy.item() == pytest.approx(0, abs=1e-12)
    (dice + entropy).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_losses_are_float32_under_bfloat16(case):
    logits, label = case
    known = torch.ones(2, 4, dtype=torch.bool)
    assert {loss.dtype for loss in both(logits.bfloat16(), label, known)} == {torch.float32}
