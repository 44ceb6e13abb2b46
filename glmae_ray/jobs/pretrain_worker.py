"""What each pre-training worker does: build, resume, train, log, validate, checkpoint."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import psutil
import ray.train
import ray.train.torch
import torch

from glmae_ray import checkpoint
from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.health import Health
from glmae_ray.jobs.starting import begin_from_init
from glmae_ray.loop import (
    StepInfo,
    held_out_reconstruction,
    mean_over_workers,
    not_finite_outputs,
    train_steps,
)
from glmae_ray.models.glmae import GLMAE
from glmae_ray.pipeline import fixed_batches, rank_batches
from glmae_ray.samples import SampleMaker, sample_maker
from glmae_ray.skipped import skipped_step
from glmae_ray.tracking import Record, RunLog, write_event


def train_worker(settings: dict[str, Any]) -> None:
    """Run one worker of a pre-training run to its end; Ray Train's `train_loop_per_worker`."""
    cfg = PretrainConfig.model_validate(settings)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    _share_cores(context.get_local_world_size())
    torch.manual_seed(cfg.seed)  # the same first weights on every rank
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    if cfg.init:
        begin_from_init(module, cfg)
    engine = Engine(module, cfg=cfg, device=device)
    start = checkpoint.resume(engine)
    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    sitting = _Sitting(cfg, engine, start=start, maker=maker)
    shard = ray.train.get_dataset_shard("train")
    batches = rank_batches(
        shard,
        cfg=cfg,
        maker=maker,
        start=start,
        rank=context.get_world_rank(),
        device=device,
        tell=functools.partial(write_event, Path(cfg.run), rank=context.get_world_rank()),
    )
    if start == 0:
        sitting.validate(step=0)
    for info in train_steps(engine, batches, cfg=cfg, start=start):
        sitting.after_step(info)
    checkpoint.export_encoder(engine, cfg=cfg, folder=Path(cfg.run), step=cfg.steps)


class _Sitting:
    """One worker's time between a start and an end of the run: what follows each step."""

    def __init__(
        self, cfg: PretrainConfig, engine: Engine, *, start: int, maker: SampleMaker
    ) -> None:
        context = ray.train.get_context()
        self._cfg, self._engine, self._maker = cfg, engine, maker
        self._rank, self._workers = context.get_world_rank(), context.get_world_size()
        self._held_out = self._make_held_out()
        self._health = Health(cfg)
        self._log: RunLog | None = None
        if self._rank == 0:
            self._log = RunLog(Path(cfg.run), step=start, tensorboard=cfg.log.tensorboard)
        self._first_wait_s: float | None = None
        self._interval: list[StepInfo] = []
        self._peak_memory = 0

    def _make_held_out(self) -> list[dict[str, torch.Tensor]]:
        cfg = self._cfg
        if not cfg.loss.reconstructed:
            return []
        maker = sample_maker(cfg, split="val", kinds=cfg.loss.reconstructed)
        if not len(maker.index):
            return []
        samples = max(self._workers, cfg.validation.samples)
        return fixed_batches(
            maker,
            samples=samples,
            rank=self._rank,
            workers=self._workers,
            device=self._engine.device,
        )

    def after_step(self, info: StepInfo) -> None:
        """Log, validate and checkpoint where it is due; every rank takes part."""
        cfg, step = self._cfg, info.step
        last = step == cfg.steps
        self._interval.append(info)
        if step % cfg.log.every_steps == 0 or last:
            self._write_interval(info)
        if step % cfg.validation.every_steps == 0 or last:
            self.validate(step=step)
        if step % cfg.save.every_steps == 0 or last:
            began = time.perf_counter()
            state = {"step": step, "samples": self._samples(step)}
            checkpoint.save(self._engine, state=state | {"config": cfg.model_dump(mode="json")})
            self._write_aside(step, began, {})

    def validate(self, *, step: int) -> None:
        """Measure the held-out reconstruction and paint the pictures."""
        if not self._held_out:
            return
        began = time.perf_counter()
        figures = held_out_reconstruction(self._engine, self._held_out)
        if self._cfg.log.pictures:
            self._paint(step)
        self._write_aside(step, began, {"val_reconstruction": figures})

    @torch.no_grad()
    def _paint(self, step: int) -> None:
        self._engine.train(False)
        pictures = self._engine(self._held_out[0], task="picture")
        self._engine.train(True)
        for kind, picture in pictures.items():
            panels = {
                "original": picture.original,
                "masked": picture.masked,
                "reconstruction": picture.reconstructed,
            }
            # First sample, first view, first channel.
            arrays = {title: volume[0, 0, 0].cpu().numpy() for title, volume in panels.items()}
            if self._log is not None:
                self._log.picture(kind, arrays, step=step)

    def _write_interval(self, info: StepInfo) -> None:
        """One record for the steps since the last: values of the newest step, times of all."""
        steps, self._interval = self._interval, []
        skipped = torch.stack([s.skipped for s in steps]).sum()
        outputs = mean_over_workers(info.outputs | {"skipped_steps": skipped})
        gradient_norm = self._engine.gradient_norm()
        outputs["skipped_steps"] = round(outputs["skipped_steps"])  # every rank has the same
        if outputs["skipped_steps"]:
            self._tell_of_skipped(steps)
        if self._log is None:
            return
        interval_s, wait_s = sum(s.step_s for s in steps), sum(s.wait_s for s in steps)
        record: Record = {"step": info.step, "samples": self._samples(info.step)}
        if self._first_wait_s is None:
            # The first batch waits for Ray Data to start, which says nothing about its rate.
            self._first_wait_s = steps[0].wait_s
            record["first_batch_s"] = self._first_wait_s
            interval_s, wait_s = interval_s - self._first_wait_s, wait_s - self._first_wait_s
        samples = len(steps) * self._cfg.global_batch
        self._peak_memory = max(self._peak_memory, _memory(self._engine.device))
        record |= outputs | info.schedule._asdict()
        record |= {
            "gradient_norm": gradient_norm,
            "interval_steps": len(steps),
            "interval_samples": samples,
            "interval_s": interval_s,
            "data_wait_s": wait_s,
            "data_wait_share": wait_s / interval_s,
            "samples_per_s": samples / interval_s,
            "peak_memory_bytes": self._peak_memory,
        }
        self._log.write(record)
        for event in self._health.judge(record):
            write_event(Path(self._cfg.run), event, rank=self._rank)

    def _tell_of_skipped(self, steps: list[StepInfo]) -> None:
        """An event a skipped step. Collective; rank 0 writes."""
        for step, not_finite in not_finite_outputs(steps).items():
            if self._rank == 0:
                event = skipped_step(step, not_finite, cfg=self._cfg, maker=self._maker)
                write_event(Path(self._cfg.run), event, rank=0)

    def _write_aside(self, step: int, began: float, record: Record) -> None:
        """A record of what was done beside training, and how long it took."""
        aside = {"step": step, "samples": self._samples(step)} | record
        if self._log is not None:
            self._log.write(aside | {"aside_s": time.perf_counter() - began})

    def _samples(self, step: int) -> int:
        return step * self._cfg.global_batch


def _share_cores(workers_here: int) -> None:
    """Divide the machine's cores among its workers; Ray allows each as many as its CPUs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))


def _memory(device: torch.device) -> int:
    """Bytes that this worker holds: the device's peak on CUDA, else its own resident memory now.

    Shared pages are left out: they are Ray's object store, which a worker maps bit by bit, and
    would look like a leak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
