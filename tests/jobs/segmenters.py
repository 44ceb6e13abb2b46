"""Run folders of tiny networks of random weights, as `glmae finetune` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glmae_ray.models.segmenter_files import publish_segmenter, segmenter_facts
from glmae_ray.paths import to_place
from glmae_ray.seeing import Learned
from tests.models.finetunes import ANY, CLASSIFIES, SIZE, finetune_config, finetuning

NAMES = ("liver", "left kidney")


def write_segmenter(
    run: Path | str,
    *words: str,
    names: tuple[str, ...] = NAMES,
    modality: tuple[str, ...] = ("CT",),
    weights: Any = "last",
    learned: Learned = ANY,
    seed: int = 0,
) -> str:
    """Write one of one channel and windows of (16, 12, 8); its name."""
    words = ("model.channels=1", *words)
    classifies = "task=classification" in words
    module = finetuning(*words, outputs=len(names) + (not classifies))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if not classifies:  # every output is to be the highest somewhere
            logits = module.network(
                torch.rand(4, module.encoder.patch_embed.proj.in_channels, *SIZE)
            )
            module.network.out.conv.conv.bias -= logits.mean((0, 2, 3, 4))
    facts = segmenter_facts(
        finetune_config(*words),
        module,
        names=names,
        modality=[*modality],
        learned=learned,
        step=4,
        weights=weights,
    )
    publish_segmenter(to_place(run), module, facts=facts)
    return str(run)


def write_classifier(run: Path | str, *words: str, names: tuple[str, ...] = ("ill", "well")) -> str:
    """Write one that sorts scans; its name."""
    return write_segmenter(run, *CLASSIFIES, *words, names=names)
