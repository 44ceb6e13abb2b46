"""What each finetuning worker does: `worker` with a segmenter or classifier and its crops."""

from __future__ import annotations

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
    leave = _Leave(cfg, engine, labelled, rank=ranks.rank)
    held_out = HeldOutCases(cfg, engine, labelled, ranks=ranks, leave=leave)
    maker = crop_maker(cfg, labelled, split="train")
    return Parts(engine, maker, held_out, held_out.leave_last)


class _Leave:
    """Writes the module with all that inference has to know of it."""

    def __init__(
        self, cfg: FinetuneConfig, engine: Engine, labelled: Labelled, *, rank: int
    ) -> None:
        self._cfg, self._engine, self._labelled, self._rank = cfg, engine, labelled, rank

    def __call__(self, which: Which, *, step: int, val: dict[str, Any] | None) -> None:
        """Publish it in the run folder; rank 0 writes."""
        if self._rank != 0:
            return
        run, labelled = to_place(self._cfg.run), self._labelled
        started = read_file(run / INIT)
        facts = segmenter_facts(
            self._cfg,
            self._engine.module,
            names=labelled.classes or labelled.structures,
            modality=list(labelled.modalities),
            step=step,
            weights=which,
            val=val,
            origin=None if started is None else json.loads(started)["origin"],
        )
        publish_segmenter(run, self._engine.module, facts=facts)
