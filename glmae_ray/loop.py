"""The training loop as a generator of steps, and the held-out reconstruction."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmae_ray.config_train import TrainConfig
from glmae_ray.engine import Engine
from glmae_ray.optim import Schedule, schedule

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step.

    Attributes:
        step: Steps done, this one included.
        outputs: The module's terms and monitors, mean over this worker's micro-batches; tensors
            on the device, so that a step that is not logged never waits for it.
        skipped: 1 where the step changed nothing, because loss or gradient was not finite on some
            rank; else 0. A tensor on the device too.
        schedule: The scheduled values that the step used.
        step_s: Seconds of the whole step, the wait for data included.
        wait_s: Seconds of it that passed waiting for data.
    """

    step: int
    outputs: Batch
    skipped: Tensor
    schedule: Schedule
    step_s: float
    wait_s: float


def train_steps(
    engine: Engine,
    batches: Iterator[Batch],
    *,
    cfg: TrainConfig,
    start: int = 0,
    rank: int | None = None,
) -> Iterator[StepInfo]:
    """Train from step `start` to the end of the run, one optimizer step an item.

    A step that the engine skips counts: its samples are consumed, the schedules move on.

    Args:
        engine: Holds the module; its state is that of step `start`.
        batches: This worker's micro-batches, the first one that of step `start`.
        cfg: The run, on as many workers as there are.
        start: Steps already done.
        rank: Of this worker; may be left out where all of them weigh alike.

    Raises:
        ValueError: They do not, and it is left out.
    """
    if rank is None and cfg.turns % cfg.workers:
        raise ValueError("rank: is needed where workers do not divide the micro-batches of a step")
    for step in range(start, cfg.steps):
        values = schedule(step, cfg=cfg)
        options = _forward_options(values)
        began, wait_s, parts = time.perf_counter(), 0.0, []
        for turn in range(step * cfg.accumulation, (step + 1) * cfg.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - asked
            weight = cfg.weight_of(turn, rank=rank or 0)
            outputs = engine(batch, weight=weight, **options)
            if weight != 1:
                outputs = {name: weight * value for name, value in outputs.items()}
            engine.backward(outputs["loss"])
            engine.step(lr=values.lr)
            parts.append({name: value.detach() for name, value in outputs.items()})
        if values.teacher_momentum is not None:
            engine.update_teacher(values.teacher_momentum)
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        took_s = time.perf_counter() - began
        yield StepInfo(step + 1, means, engine.skipped, values, took_s, wait_s)


def _forward_options(values: Schedule) -> dict[str, float]:
    """The scheduled values that the module's forward takes."""
    temperature = values.teacher_temperature
    return {} if temperature is None else {"teacher_temperature": temperature}


def mean_over_workers(outputs: Batch) -> dict[str, float]:
    """Terms and monitors of the whole global batch. Collective; waits for the device."""
    means = torch.stack([value.float() for value in outputs.values()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(means)
        means /= torch.distributed.get_world_size()
    return dict(zip(outputs, means.tolist(), strict=True))


def not_finite_outputs(steps: Sequence[StepInfo]) -> dict[int, dict[int, list[str]]]:
    """Of skipped steps: step -> rank -> what it lost of its loss and the terms. Collective.

    Waits for the device; every rank gives the same steps.
    """
    names = [name for name in steps[0].outputs if name == "loss" or name.startswith("loss_")]
    values = torch.stack([torch.stack([s.outputs[n].float() for n in names]) for s in steps])
    lost = (~torch.isfinite(values)).float()
    everyone = [lost]
    if torch.distributed.is_initialized():
        everyone = [torch.empty_like(lost) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, lost)
    skipped = torch.stack([info.skipped for info in steps]).tolist()
    table = torch.stack(everyone, dim=1).bool().tolist()  # steps, ranks, names
    return {
        info.step: {
            rank: list(itertools.compress(names, flags))
            for rank, flags in enumerate(ranks)
            if any(flags)
        }
        for info, ranks, was in zip(steps, table, skipped, strict=True)
        if was
    }


@torch.no_grad()
def held_out_reconstruction(
    engine: Engine, batches: Iterable[tuple[Batch, float]]
) -> dict[str, float]:
    """Reconstruction of fixed views under fixed masks. Collective: equally many on every rank.

    Args:
        engine: Holds the module.
        batches: This worker's share of the held-out samples, and what each counts.

    Returns:
        `loss` and `trivial`, the loss of predicting every patch's own mean, over all views and
        per kind (`loss_local`, ...); r2 = 1 - loss / trivial, the share of the variance inside
        hidden patches that the model explains.
    """
    engine.train(False)
    parts = [engine(batch, task="held_out", weight=weight) for batch, weight in batches]
    engine.train(True)
    sums = {kind: torch.stack([part[kind] for part in parts]).sum(0) for kind in parts[0]}
    if torch.distributed.is_initialized():
        for total in sums.values():
            torch.distributed.all_reduce(total)
    figures = _figures(torch.stack(list(sums.values())).sum(0), "")
    for kind, total in sums.items():
        figures |= _figures(total, f"_{kind}")
    return figures


def _figures(total: Tensor, suffix: str) -> dict[str, float]:
    error, trivial, views = total.tolist()
    return {
        f"loss{suffix}": error / views,
        f"trivial{suffix}": trivial / views,
        f"r2{suffix}": 1 - error / trivial,
    }
