"""Dice and cross-entropy for cases in which only some structures were annotated.

Letters: B crops, K outputs of which the first is background, ZYX voxels. Where nobody looked for a
structure, its voxels carry the label of the background; so what is labelled background may be any
of the structures that are not known, and the network is asked for the sum of their probabilities
and the background's: the marginal loss of Shi, Xiao, Chen and Zhou, "Marginal loss and exclusion
loss for partially supervised multi-organ segmentation", Medical Image Analysis 70 (2021),
arXiv 2007.03868. Dice counts known structures only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from glmae_ray.losses import at_least_float32

# The background's Dice counts too, where all structures are known: MONAI's default, as in UNETR.
_DICE = DiceLoss(include_background=True, to_onehot_y=True, softmax=True, reduction="none")


def merge_unknown(logits_BKZYX: Tensor, known_BK: Tensor) -> Tensor:
    """Logits whose softmax gives the background what structures that are not known had.

    The log of a sum of probabilities is a logsumexp of logits: exact, with a finite gradient, where
    probabilities are too small for float32. Where all is known nothing changes.

    Args:
        logits_BKZYX: Of the network.
        known_BK: bool; what it says of the background has no effect here.

    Returns:
        (B, K, Z, Y, X), at least float32; minus infinity for structures that are not known.
    """
    logits = at_least_float32(logits_BKZYX)
    if known_BK.device.type == "cpu" and known_BK[:, 1:].all():
        return logits  # elsewhere the answer would have to be waited for, and copies are cheap
    unknown = ~known_BK[:, 1:, None, None, None]
    background = F.pad(~unknown, (0, 0, 0, 0, 0, 0, 1, 0), value=False)
    merged = logits.masked_fill(background, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([merged, logits[:, 1:].masked_fill(unknown, -torch.inf)], dim=1)


def cross_entropy(merged_BKZYX: Tensor, label_BZYX: Tensor) -> Tensor:
    """Mean over voxels of -log of the probability of what the label allows; a scalar.

    Args:
        merged_BKZYX: From `merge_unknown`.
        label_BZYX: Integers below K; 0 for whatever is not known.
    """
    return F.cross_entropy(merged_BKZYX, label_BZYX.long())


def dice_loss(merged_BKZYX: Tensor, label_BZYX: Tensor, known_BK: Tensor) -> Tensor:
    """Mean of 1 - soft Dice over the known outputs of all crops, a scalar; 0 if there are none.

    Args:
        merged_BKZYX: From `merge_unknown`.
        label_BZYX: Integers below K.
        known_BK: bool; the background is known where all structures are.
    """
    losses_BK = _DICE(merged_BKZYX, label_BZYX.unsqueeze(1)).flatten(1)
    counted = known_BK.to(losses_BK.dtype)
    return (losses_BK * counted).sum() / counted.sum().clamp(min=1)
