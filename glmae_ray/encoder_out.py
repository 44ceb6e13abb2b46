"""The portable encoder that a run leaves: weights, and the facts that its user needs."""

from __future__ import annotations

import json
from typing import Any

import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.weight_files import WEIGHTS
from glmae_ray.paths import Place, read_file

INIT = "init.json"  # in the run folder: what the first weights were loaded from


def export_encoder(
    engine: Engine, *, cfg: PretrainConfig, folder: Place, step: int, rank: int
) -> None:
    """Write `encoder.safetensors` and `encoder.json`: portable weights and what they need.

    Collective; rank 0 writes. Tensor names are timm's, as in the published GL-MAE encoder file.
    """
    with engine.whole_parameters():
        if rank != 0:
            return
        encoder = engine.module.encoder
        tensors = {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in encoder.state_dict().items()
        }
        facts = encoder_facts(encoder) | training_facts(cfg, step=step)
    if (origin := read_file(folder / INIT)) is not None:
        facts["origin"] = json.loads(origin)["origin"]
    publish_weights(folder / WEIGHTS, tensors, facts=facts)


def training_facts(cfg: PretrainConfig, *, step: int) -> dict[str, Any]:
    """What an encoder was trained on."""
    model, views = cfg.model, cfg.views
    grids = {
        kind: [side // part for side, part in zip(size, model.patch, strict=True)]
        for kind, size in (("global", views.global_size), ("local", views.local_size))
    }
    return {
        "step": step,
        "grid": grids,
        "window": {"CT": list(views.window), "other": "percentiles 0.5 and 99.5 of the case"},
        "window_becomes": [0.0, 1.0],
        "spacing_mm": "as acquired; each crop is resized to the view",
    }
