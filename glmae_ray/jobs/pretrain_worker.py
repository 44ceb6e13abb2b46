"""What each pre-training worker does: `worker` with the module, the views and the encoder of it."""

from __future__ import annotations

from typing import Any

import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.encoder_out import export_encoder
from glmae_ray.engine import Engine
from glmae_ray.jobs.held_out_views import HeldOutViews
from glmae_ray.jobs.probe_tasks import Probes
from glmae_ray.jobs.starting import begin_from_init
from glmae_ray.jobs.worker import Parts, work
from glmae_ray.models.glmae import GLMAE
from glmae_ray.paths import to_place
from glmae_ray.ranks import Ranks
from glmae_ray.samples import sample_maker


def train_worker(settings: dict[str, Any]) -> tuple[str, ...]:
    """Run one worker of a pre-training run to its end; Ray Train's `train_loop_per_worker`.

    Returns:
        The lines of a `CommonError`; none where all went well.
    """
    return work(settings, PretrainConfig, _assemble)


def _assemble(cfg: PretrainConfig, ranks: Ranks, device: torch.device) -> Parts:
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    if cfg.init:
        begin_from_init(module, cfg)
    engine = Engine(module, cfg=cfg, device=device)
    folder = to_place(cfg.run)

    def leave() -> None:
        export_encoder(engine, cfg=cfg, folder=folder, step=cfg.steps, rank=ranks.rank)

    return Parts(
        engine,
        sample_maker(cfg, split="train", kinds=cfg.loss.kinds),
        HeldOutViews(cfg, engine, ranks=ranks),
        leave,
        Probes(cfg, engine, ranks=ranks) if cfg.probe.every_steps else None,
    )
