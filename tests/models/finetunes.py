"""A finetuning config of a few thousand weights, and batches for it, of unequal sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import load
from glmae_ray.models.finetuning import Finetuning, build_encoder
from glmae_ray.seeing import Learned

SIZE = (16, 12, 8)
TINY = [
    "store=none",
    "run=none",
    "init=none",
    "steps=4",
    "global_batch=2",
    "model.channels=2",
    "model.patch=[8,4,2]",
    "model.width=24",
    "model.depth=3",
    "model.heads=2",
    "crops.count=3",
    "crops.size=[16,12,8]",
    "head.feature_size=4",
    "engine.precision=float32",
]
ANY = Learned((0.01,) * 3, (100.0,) * 3, 180.0)  # voxels of all sizes, in scans at all angles
CLASSIFIES = ["task=classification", "targets=classes.csv", "head.kind=linear", "head.hidden=10"]


def finetune_config(*words: str) -> FinetuneConfig:
    """Later words win."""
    return load(FinetuneConfig, [*TINY, *words])


def finetuning(*words: str, outputs: int = 3) -> Finetuning:
    """A module whose every weight counts: norms start at 1 and biases at 0, where mistakes hide."""
    cfg = finetune_config(*words)
    torch.manual_seed(0)
    encoder, _ = build_encoder(cfg)
    return awake(Finetuning(cfg, encoder, outputs, encoder.patch_embed.proj.in_channels))


def awake(module: nn.Module) -> nn.Module:
    """Add a little noise to every weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def crops(
    samples: int = 2, count: int = 3, channels: int = 2, outputs: int = 3
) -> dict[str, Tensor]:
    """A batch of everything that a maker gives to a module."""
    g = torch.Generator().manual_seed(2)
    return {
        "image": torch.rand(samples, count, channels, *SIZE, generator=g),
        "label": torch.randint(outputs, (samples, count, *SIZE), generator=g).to(torch.uint8),
        "known": torch.ones(samples, count, outputs, dtype=torch.bool),
        "target": torch.randint(outputs, (samples, count), generator=g),
    }
