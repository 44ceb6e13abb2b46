"""Training under Ray Train without what a run does beside it: engine and loop, timed from within.

Batches come from memory or, as in `glmae pretrain`, from Ray Data. Nothing is validated or saved.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import ray
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from benchmarks._torchrun_loop import Batch, in_memory, plain_steps, write_line
from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import StepInfo, mean_over_workers, train_steps
from glmae_ray.models.glmae import GLMAE
from glmae_ray.pipeline import rank_batches, train_dataset
from glmae_ray.samples import sample_maker

_WARM_UP_SENDS, _SENDS = 2, 7


@dataclass(frozen=True)
class Job:
    """What the workers do; plain data, which Ray Train hands on.

    Attributes:
        config: The run, resolved. Where it names a run folder, rank 0 writes its metrics.jsonl.
        feed: `memory`, a batch of noise again and again, or `views`, made from the store.
        window: Steps that are timed together.
        warm_up: Windows before those that count.
        windows: Those that count.
        threads: Of each worker; None: an equal share of the machine's cores.
        apart: Time the same steps without exchange, in turn with the others, and the exchange
            without steps.
    """

    config: dict[str, Any]
    feed: str
    window: int
    warm_up: int
    windows: int
    threads: int | None = None
    apart: bool = False


class Times(NamedTuple):
    """Seconds of a step, mean over each window, and of an exchange of gradients; of rank 0.

    Attributes:
        together: Of the run.
        apart: Of a plain loop in which each worker keeps its gradients.
        all_reduce: Of one all-reduce of float32 numbers, as many as there are trained weights.
    """

    together: list[float]
    apart: list[float]
    all_reduce: list[float]


def fit(job: Job) -> Times:
    """Run a job on the Ray that runs."""
    from ray.train.torch import TorchTrainer

    cfg = PretrainConfig.model_validate(job.config)
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    each = {"CPU": 1.0 if gpu else 0.5, "GPU": 1.0 if gpu else 0.0}  # as `glmae pretrain` has it
    datasets = {}
    if job.feed == "views":
        maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
        datasets["train"] = train_dataset(maker, cfg=cfg, start=0)
    in_order = ray.data.ExecutionOptions(preserve_order=True)
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as folder:
        trainer = TorchTrainer(
            train,
            train_loop_config=asdict(job),
            scaling_config=ray.train.ScalingConfig(
                num_workers=cfg.resources.workers, use_gpu=gpu, resources_per_worker=each
            ),
            run_config=ray.train.RunConfig(storage_path=folder),  # where nothing is saved
            datasets=datasets,
            dataset_config=ray.train.DataConfig(execution_options=in_order),
        )
        return Times(**trainer.fit().return_value)


def train(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Run one worker; `Times` as a dictionary."""
    job = Job(**settings)
    cfg = PretrainConfig.model_validate(job.config)
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    share = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(job.threads or share)
    torch.manual_seed(cfg.seed)
    engine = Engine(_module(cfg), cfg=cfg, device=device)
    batches = in_memory(cfg, device) if job.feed == "memory" else _from_ray(cfg, device)
    loops: list[Iterator[Any]] = [_logged(train_steps(engine, batches, cfg=cfg), cfg, job.window)]
    if job.apart:
        module = _module(cfg).to(device)
        loops.append(plain_steps(module, in_memory(cfg, device), cfg=cfg, together=False))
    rounds = [
        [_window(loop, job.window, device) for loop in loops]
        for _ in range(job.warm_up + job.windows)
    ]
    together, *apart = map(list, zip(*rounds[job.warm_up :], strict=True))
    sent = _all_reduces(engine, device) if job.apart else []
    return Times(together, *apart or [[]], sent)._asdict()


def _module(cfg: PretrainConfig) -> GLMAE:
    return GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)


def _from_ray(cfg: PretrainConfig, device: torch.device) -> Iterator[Batch]:
    return rank_batches(
        ray.train.get_dataset_shard("train"),
        cfg=cfg,
        maker=sample_maker(cfg, split="train", kinds=cfg.loss.kinds),
        start=0,
        rank=dist.get_rank(),
        device=device,
    )


def _logged(steps: Iterator[StepInfo], cfg: PretrainConfig, window: int) -> Iterator[StepInfo]:
    """The same, with a line in the run's metrics at the end of each window."""
    for info in steps:
        if cfg.run and info.step % window == 0:
            means = mean_over_workers(info.outputs)
            if dist.get_rank() == 0:
                write_line(cfg, step=info.step, loss=means["loss"])
        yield info


def _window(steps: Iterator[Any], count: int, device: torch.device) -> float:
    """Seconds of one step, mean over so many, which all workers begin at once."""
    dist.barrier()
    began = time.perf_counter()
    for _ in islice(steps, count):
        pass
    _wait_for(device)
    return (time.perf_counter() - began) / count


def _all_reduces(engine: Engine, device: torch.device) -> list[float]:
    """Seconds of each of a few all-reduces of as many float32 numbers as have gradients."""
    trained = sum(w.numel() for w in engine.module.parameters() if w.requires_grad)
    gradients = torch.zeros(trained, device=device)
    times = []
    for _ in range(_WARM_UP_SENDS + _SENDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradients)
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return times[_WARM_UP_SENDS:]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
