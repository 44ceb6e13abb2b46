"""Pre-training as one would write it for torchrun: DistributedDataParallel, AdamW, a DataLoader.

    torchrun --standalone --nproc-per-node 2 -m benchmarks._torchrun_loop CONFIG.yaml FEED WORKERS

The module, its views and its schedules are the project's; all around them is plain torch. FEED is
`memory`, one batch of noise again and again, or `views`, made from the store by WORKERS processes
of a DataLoader for each rank. RUN/metrics.jsonl gets a line every `log.every_steps`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks._step_rows import batch
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load
from glmae_ray.models.glmae import GLMAE
from glmae_ray.optim import parameter_groups, schedule
from glmae_ray.samples import sample_maker

Batch = dict[str, Tensor]


def main() -> None:
    """Train one rank."""
    config, feed, loaders = sys.argv[1:]
    cfg = load(PretrainConfig, [config])
    local_rank, local_ranks = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(cfg.seed)
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss).to(device)
    if feed == "memory":
        batches = in_memory(cfg, device)
    else:
        batches = loaded(cfg, device, loaders=int(loaders))
    steps = plain_steps(module, batches, cfg=cfg, together=dist.get_world_size() > 1)
    for step, loss in enumerate(steps, start=1):
        if step % cfg.log.every_steps == 0:
            dist.all_reduce(loss)
            if dist.get_rank() == 0:
                write_line(cfg, step=step, loss=loss.item() / dist.get_world_size())
    dist.destroy_process_group()


def plain_steps(
    module: GLMAE, batches: Iterator[Batch], *, cfg: PretrainConfig, together: bool
) -> Iterator[Tensor]:
    """Train; an item is the loss of a step, mean over this rank's micro-batches.

    Args:
        module: On its device.
        batches: This rank's micro-batches.
        cfg: The run.
        together: Whether gradients are averaged over the process group.
    """
    groups = parameter_groups(module.named_parameters(), weight_decay=cfg.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.optim.betas, fused=True)
    device = next(module.parameters()).device
    precision = torch.autocast(device.type, torch.bfloat16, cfg.engine.precision == "bf16")
    model: Any = module
    if together:
        # The module itself keeps its only buffer, the centre, the same on all ranks.
        model = DistributedDataParallel(
            module, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    for step in range(cfg.steps):
        now, losses = schedule(step, cfg=cfg), []
        for turn in range(1, cfg.accumulation + 1):
            waits = together and turn < cfg.accumulation
            with model.no_sync() if waits else nullcontext():
                with precision:
                    outputs = model(next(batches), teacher_temperature=now.teacher_temperature)
                (outputs["loss"] / cfg.accumulation).backward()
            losses.append(outputs["loss"].detach())
        torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = now.lr
        optimizer.step()
        optimizer.zero_grad()
        module.update_teacher(now.teacher_momentum)
        yield torch.stack(losses).mean()


def in_memory(cfg: PretrainConfig, device: torch.device) -> Iterator[Batch]:
    """A micro-batch of noise, again and again."""
    return repeat(batch(cfg.model_copy(update={"global_batch": cfg.micro_batch}), device))


def loaded(cfg: PretrainConfig, device: torch.device, *, loaders: int) -> Iterator[Batch]:
    """The micro-batches that the plan has for this rank, made by processes of a DataLoader."""
    batches = DataLoader(
        Views(cfg, rank=dist.get_rank()),
        batch_size=None,
        num_workers=loaders,
        prefetch_factor=max(1, cfg.pipeline.prefetch_batches),
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn",  # a store's handles do not outlive a fork
    )
    for views in batches:
        yield {name: part.to(device, non_blocking=True) for name, part in views.items()}


class Views(Dataset):
    """A rank's micro-batches by number, as the project's own code makes them."""

    def __init__(self, cfg: PretrainConfig, *, rank: int) -> None:
        self._cfg, self._rank = cfg, rank
        self._maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
        self._names = ["window", *(f"{k}{end}" for k in cfg.loss.kinds for end in ("", "_seeds"))]

    def __len__(self) -> int:
        return self._cfg.steps * self._cfg.accumulation

    def __getitem__(self, turn: int) -> Batch:
        numbers = np.array(self._cfg.samples_of(turn, rank=self._rank))
        columns = self._maker.make({"number": numbers})
        return {name: torch.from_numpy(columns[name]) for name in self._names}


def write_line(cfg: PretrainConfig, *, step: int, loss: float) -> None:
    """Append to RUN/metrics.jsonl."""
    with (Path(cfg.run) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


if __name__ == "__main__":
    main()
