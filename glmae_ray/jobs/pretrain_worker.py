"""What each pre-training worker does: build, resume, train; `Sitting` has what follows a step."""

from __future__ import annotations

import os
from typing import Any

import ray.train
import ray.train.torch
import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.encoder_out import export_encoder
from glmae_ray.engine import Engine
from glmae_ray.errors import CommonError
from glmae_ray.jobs.held_out_views import HeldOutViews
from glmae_ray.jobs.sitting import Sitting
from glmae_ray.jobs.starting import begin_from_init
from glmae_ray.loop import train_steps
from glmae_ray.models.glmae import GLMAE
from glmae_ray.paths import to_place
from glmae_ray.pipeline import rank_batches
from glmae_ray.ranks import Ranks
from glmae_ray.samples import sample_maker

_PATIENCE_S = 600.0  # with a worker that does not come to a meeting


def train_worker(settings: dict[str, Any]) -> tuple[str, ...]:
    """Run one worker of a pre-training run to its end; Ray Train's `train_loop_per_worker`.

    Returns:
        The lines of a `CommonError`; none where all went well.
    """
    try:
        _train(settings)
    except CommonError as error:
        return error.lines
    return ()


def _train(settings: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    cfg = PretrainConfig.model_validate(settings).on(workers)
    _share_cores(context.get_local_world_size())
    torch.manual_seed(cfg.seed)  # the same first weights on every rank
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    if cfg.init:
        begin_from_init(module, cfg)
    engine = Engine(module, cfg=cfg, device=ray.train.torch.get_device())
    ranks = Ranks.join(local_rank=context.get_local_rank(), timeout_s=_PATIENCE_S)
    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    held_out = HeldOutViews(cfg, engine, ranks=ranks)
    sitting = Sitting(cfg, engine, ranks=ranks, maker=maker, held_out=held_out)
    batches = rank_batches(
        ray.train.get_dataset_shard("train"),
        cfg=cfg,
        maker=maker,
        start=sitting.start,
        rank=rank,
        device=engine.device,
        tell=sitting.tell,
    )
    with sitting:
        if sitting.start == 0:
            sitting.validate(step=0)
        for info in train_steps(engine, batches, cfg=cfg, start=sitting.start, rank=rank):
            if not sitting.after_step(info):
                break
        else:
            run = to_place(cfg.run)
            export_encoder(engine, cfg=cfg, folder=run, step=cfg.steps, rank=rank)


def _share_cores(workers_here: int) -> None:
    """Divide the machine's cores among its workers; Ray allows each as many as its CPUs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
