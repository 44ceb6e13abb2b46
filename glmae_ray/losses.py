"""The terms of the GL-MAE objective as pure functions of tensors.

Letters: B samples, V views, S student views, M masked tokens, P voxel values of a patch,
K prototypes. Grades as in docs/method.md: that both consistency terms exist is V (first-hand),
their form, centre and temperatures are D (ours); standardised targets with eps 1e-6 are L (the
same group's published code).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH_EPS = 1e-6  # in squared units of the [0, 1] intensity window


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, (..., 1): what undoes `standardise`."""

    mean: Tensor
    deviation: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Lift what autocast computed in 16 bits; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def standardise(patches: Tensor) -> tuple[Tensor, PatchStatistics]:
    """Give each patch mean 0 and variance 1: x = (v - mean) / sqrt(variance + 1e-6).

    Args:
        patches: (..., P) voxel values. A patch without variance becomes 0 everywhere.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    deviation = (patches.var(dim=-1, keepdim=True, correction=0) + PATCH_EPS).sqrt()
    return (patches - mean) / deviation, PatchStatistics(mean, deviation)


def reconstruction_loss(predicted_BMP: Tensor, target_BMP: Tensor) -> Tensor:
    """Mean over masked patches of the mean squared error to the standardised target, (B,).

    Args:
        predicted_BMP: The decoder's output for the masked patches.
        target_BMP: Their standardised voxels.
    """
    return (at_least_float32(predicted_BMP) - target_BMP).square().mean(dim=(1, 2))


def teacher_probabilities(logits_BVK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """Centred and sharpened softmax of the teacher's head, (B, V, K) float32."""
    return F.softmax((at_least_float32(logits_BVK) - center_K) / temperature, dim=-1)


def student_log_probabilities(logits_BSK: Tensor, temperature: float) -> Tensor:
    """Log-softmax of the student's head, (B, S, K) float32."""
    return F.log_softmax(at_least_float32(logits_BSK) / temperature, dim=-1)


def same_view_cross_entropy(teacher_BVK: Tensor, student_BVK: Tensor) -> Tensor:
    """Global-to-global: H of teacher view i against student view i, mean over samples and views.

    Unlike DINO, which skips pairs of one view index: here the student's view is the masked copy
    of the very crop that the teacher sees complete, and that pair is the term.

    Args:
        teacher_BVK: Probabilities.
        student_BVK: Log-probabilities of the same views, masked.
    """
    return -(teacher_BVK * student_BVK).sum(dim=-1).mean()


def every_pair_cross_entropy(teacher_BVK: Tensor, student_BSK: Tensor) -> Tensor:
    """Global-to-local: H of every teacher view against every student view, mean over pairs.

    H is linear in each argument, so the mean over pairs is H of the two means.
    """
    return -(teacher_BVK.mean(dim=1) * student_BSK.mean(dim=1)).sum(dim=-1).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean Shannon entropy over all but the last axis, in nats; at most ln K."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
