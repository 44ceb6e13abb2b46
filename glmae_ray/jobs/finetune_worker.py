"""What each finetuning worker does: `worker` with a segmenter or classifier and its crops."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.crops import crop_maker
from glmae_ray.encoder_out import INIT
from glmae_ray.engine import Engine
from glmae_ray.jobs.held_out_cases import HeldOutCases
from glmae_ray.jobs.worker import Parts, work
from glmae_ray.labelled import Labelled, choose_cases
from glmae_ray.models.finetuning import Finetuning, build_encoder
from glmae_ray.models.segmenter_files import Which, publish_segmenter, segmenter_facts
from glmae_ray.optim import layer_groups
from glmae_ray.paths import read_file, to_place
from glmae_ray.ranks import Ranks
from glmae_ray.seeing import Learned


def train_worker(settings: dict[str, Any]) -> tuple[str, ...]:
    """Run one worker of a finetuning run to its end; Ray Train's `train_loop_per_worker`.

    Returns:
        The lines of a `CommonError`; none where all went well.
    """
    return work(settings, FinetuneConfig, _assemble)


def _assemble(cfg: FinetuneConfig, ranks: Ranks, device: torch.device) -> Parts:
    labelled = choose_cases(cfg)
    encoder, _ = build_encoder(cfg)
    module = Finetuning(cfg, encoder, labelled.outputs, labelled.channels)
    decay, layers = cfg.optim.weight_decay, cfg.optim.layer_decay
    groups = layer_groups(module, weight_decay=decay, lr=cfg.lr, layer_decay=layers)
    engine = Engine(module, cfg=cfg, device=device, groups=groups)
    leave = functools.partial(_leave, cfg, engine, labelled)
    held_out = HeldOutCases(cfg, engine, labelled, ranks=ranks, leave=leave)
    maker = crop_maker(cfg, labelled, split="train")
    return Parts(engine, maker, held_out, held_out.leave_last)


def _leave(
    cfg: FinetuneConfig,
    engine: Engine,
    labelled: Labelled,
    which: Which,
    *,
    step: int,
    val: dict[str, Any] | None,
) -> None:
    """Publish the module in the run folder, with all that inference has to know of it."""
    run = to_place(cfg.run)
    started = read_file(run / INIT)
    facts = segmenter_facts(
        cfg,
        engine.module,
        names=labelled.classes or labelled.structures,
        modality=list(labelled.modalities),
        learned=Learned.of(labelled.train),
        step=step,
        weights=which,
        val=val,
        origin=None if started is None else json.loads(started)["origin"],
    )
    publish_segmenter(run, engine.module, facts=facts)
