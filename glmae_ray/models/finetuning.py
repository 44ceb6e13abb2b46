"""Finetuning: crops in, the loss or probabilities out, in one forward; and the encoder to start on.

Letters: B samples, V crops of a sample, C channels, ZYX voxels, K outputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmae_ray import segmentation_losses
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.errors import UserError
from glmae_ray.losses import at_least_float32
from glmae_ray.models.compiling import compile_blocks
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.encoder_formats import heads_of
from glmae_ray.models.heads import HEADS
from glmae_ray.models.load_report import LoadReport
from glmae_ray.models.vit3d import Encoder

Batch = dict[str, Tensor]

# What of `model` an encoder is built with; the rest of it is about decoder, head and computing.
SHAPE = ("channels", "patch", "width", "depth", "heads")


class Finetuning(nn.Module):
    """An encoder with a head, and the loss of its task; of segmentation output 0 is background."""

    def __init__(self, cfg: FinetuneConfig, encoder: Encoder, outputs: int, channels: int) -> None:
        """Put the head of the config on an encoder.

        Args:
            cfg: Task, head, crops, loss, and whether the encoder is frozen.
            encoder: Becomes a part of this module.
            outputs: K: structures and background, or classes.
            channels: Of the images.

        Raises:
            UserError: Encoder, crops and images do not fit each other.
        """
        super().__init__()
        _check(cfg, encoder, channels)
        self.task, self.loss = cfg.task, cfg.loss
        head = HEADS[cfg.head.kind]
        self.network = head(encoder, cfg=cfg.head, size=cfg.crops.size, outputs=outputs)
        if cfg.optim.freeze:
            encoder.requires_grad_(False)
        if cfg.model is not None:
            encoder.recompute = cfg.model.activation_checkpointing
            if cfg.model.compile:
                compile_blocks(encoder)

    @property
    def encoder(self) -> Encoder:
        """The encoder inside the network."""
        return cast(Encoder, self.network.encoder)

    def forward(self, batch: Batch, *, task: str = "objective", **_: Any) -> Any:
        """Run one of two tasks on a batch.

        Args:
            batch: For `objective` the crops of samples: `image` float (B, V, C, Z, Y, X), and
                `label` integers (B, V, Z, Y, X) below K with `known` bool (B, V, K), or of
                classification `target` int64 (B, V). For `predict` `image` (B, C, Z, Y, X).
            task: `objective` gives the total under `loss` and each term by name; `predict` gives
                probabilities, at least float32, (B, K, Z, Y, X), or of classification (B, K).
            **_: What a loop tells every module, such as the weight of the batch; no crop here
                knows of another, so nothing depends on it.
        """
        if task == "predict":
            return at_least_float32(self.network(batch["image"])).softmax(dim=1)
        logits = self.network(batch["image"].flatten(0, 1))
        return self._segment(logits, batch) if self.task == "segmentation" else _sort(logits, batch)

    def _segment(self, logits_BKZYX: Tensor, batch: Batch) -> Batch:
        """Dice and cross-entropy; a term of weight 0 is not computed."""
        label, known = batch["label"].flatten(0, 1), batch["known"].flatten(0, 1)
        merged = segmentation_losses.merge_unknown(logits_BKZYX, known)
        terms: Batch = {}
        if self.loss.dice:
            terms["dice"] = segmentation_losses.dice_loss(merged, label, known)
        if self.loss.cross_entropy:
            terms["cross_entropy"] = segmentation_losses.cross_entropy(merged, label)
        weighted = [getattr(self.loss, name) * term for name, term in terms.items()]
        outputs = {f"loss_{name}": term.detach() for name, term in terms.items()}
        return {"loss": torch.stack(weighted).sum(), **outputs}


def _sort(logits_BK: Tensor, batch: Batch) -> Batch:
    """Cross-entropy of classes, and the share of crops that are sorted right."""
    logits, target = at_least_float32(logits_BK), batch["target"].flatten()
    loss = F.cross_entropy(logits, target)
    right = (logits.argmax(dim=1) == target).to(loss.dtype).mean()
    return {"loss": loss, "loss_cross_entropy": loss.detach(), "accuracy": right}


def build_encoder(cfg: FinetuneConfig) -> tuple[Encoder, LoadReport | None]:
    """The encoder that finetuning starts with: that of `init`, or one of random weights.

    One of random weights has its positions, as ours always do; the authors' class leaves them at
    zero, and a baseline from it knows no places (docs/method.md).

    Returns:
        The encoder, and what was loaded; None for random weights.

    Raises:
        UserError: Nothing to load at `init`, or a line for each number in which it is not `model`.
    """
    model = cfg.model
    if cfg.scratch:
        assert model is not None
        return Encoder(**model.model_dump(include=set(SHAPE))), None
    encoder, report = load_encoder(cfg.init, heads=None if model is None else model.heads)
    if model is not None:
        lines = [
            f"model.{name}: {getattr(model, name)}, but {report.source} has {value}"
            for name, value in shape_of(encoder).items()
            if getattr(model, name) != value
        ]
        if lines:
            raise UserError(*lines)
    return encoder, report


def shape_of(encoder: Encoder) -> dict[str, Any]:
    """Channels, patch, width, depth and heads: the fields of `model` that are an encoder's."""
    return {
        "channels": encoder.patch_embed.proj.in_channels,
        "patch": encoder.patch,
        "width": encoder.cls_token.shape[-1],
        "depth": len(encoder.blocks),
        "heads": heads_of(encoder),
    }


def _check(cfg: FinetuneConfig, encoder: Encoder, channels: int) -> None:
    """See that crops, images and encoder fit each other."""
    lines = []
    takes = encoder.patch_embed.proj.in_channels
    if takes != channels and cfg.scratch:
        lines.append(f"model.channels: {takes}, but the images have {channels}")
    elif takes != channels:
        lines.append(
            f"init: {cfg.init} takes {takes} channels, but the images have {channels}; "
            f"glmae export run={cfg.init} out=FOLDER channels={channels} makes one that fits"
        )
    if any(side % part for side, part in zip(cfg.crops.size, encoder.patch, strict=True)):
        lines.append(
            f"crops.size: {cfg.crops.size} is not a multiple of the encoder's patch {encoder.patch}"
        )
    if lines:
        raise UserError(*lines)
