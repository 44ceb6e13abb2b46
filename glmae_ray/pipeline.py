"""Ray Data: sample numbers in, finished views out, micro-batches on the device.

Rows are numbers of micro-batches; the task that receives one opens the store, makes the views and
emits them, so no volume travels through the object store. A block is one row and order is kept, so
block k goes to rank k % workers and step g consumes samples [g B, (g + 1) B) on any number of
workers. `rank_batches` checks that this is what arrived.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import ray.train
import torch
from numpy.typing import NDArray
from ray.data.collate_fn import DefaultCollateFn
from torch import Tensor

from glmae_ray.budget import cpus_per_maker
from glmae_ray.config import PretrainConfig
from glmae_ray.making import MakeTurn, count_turns
from glmae_ray.reading import UnreadableCaseError
from glmae_ray.samples import SampleMaker
from glmae_ray.watch import Tell, Watch

Batch = dict[str, Tensor]

_FOR_THE_HOST = ("number", "case", "fault", "made_s")


def train_dataset(maker: SampleMaker, *, cfg: PretrainConfig, start: int) -> ray.data.Dataset:
    """Every sample from step `start` to the end of the run; a row is one micro-batch.

    Args:
        maker: That of the samples.
        cfg: The run, on as many workers as there are.
        start: Steps done.
    """
    turns = count_turns((cfg.steps - start) * cfg.accumulation * cfg.workers)
    views_of = MakeTurn(ray.put(maker), _Rows(cfg, start * cfg.accumulation))
    return turns.map_batches(views_of, batch_size=1, zero_copy_batch=True, **_placement(cfg))


@dataclass(frozen=True)
class PlannedShards:
    """What Ray Train is given as a dataset: which samples there are, but not yet where they begin.

    Attributes:
        maker: That of the samples.
        cfg: The run.
        start: Tells the steps that are done, once the workers have loaded their checkpoint.
    """

    maker: SampleMaker
    cfg: PretrainConfig
    start: Callable[[], int]


class PlannedDataConfig(ray.train.DataConfig):
    """Deals the rest of a run's samples to as many workers as there are.

    Ray Train asks for a dataset before it starts workers; how many there will be, and from which
    checkpoint they go on, is known only when they ask for their shards.
    """

    def __init__(self) -> None:
        """Keep the order of the plan."""
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))

    def configure(
        self, datasets: dict[str, Any], world_size: int, *handles: Any, **more: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """See Ray's `DataConfig.configure`; `datasets` are `PlannedShards` by name."""
        made = {
            name: train_dataset(shards.maker, cfg=shards.cfg.on(world_size), start=shards.start())
            for name, shards in datasets.items()
        }
        return super().configure(made, world_size, *handles, **more)


@dataclass(frozen=True)
class _Rows:
    """The samples of the micro-batch in a row; workers take rows in turn."""

    cfg: PretrainConfig
    first: int  # turn of each worker at which the rows begin

    def __call__(self, row: int) -> range:
        turn, rank = divmod(row, self.cfg.workers)
        return self.cfg.samples_of(self.first + turn, rank=rank)


def _placement(cfg: PretrainConfig) -> dict[str, Any]:
    """Where the tasks that make views run, and how many at a time."""
    pipeline = cfg.pipeline
    options: dict[str, Any] = {"num_cpus": cpus_per_maker(cfg)}
    if pipeline.makers is not None:
        options["compute"] = ray.data.TaskPoolStrategy(size=pipeline.makers)
    if pipeline.resources:
        options["resources"] = dict(pipeline.resources)
    if pipeline.labels:
        options["label_selector"] = dict(pipeline.labels)
    return options


class _Arrived(NamedTuple):
    """A micro-batch, and what the worker itself reads of it: on CUDA a look would be a wait."""

    columns: dict[str, NDArray[Any]]
    batch: Batch


def rank_batches(
    shard: ray.data.DataIterator,
    *,
    cfg: PretrainConfig,
    maker: SampleMaker,
    start: int,
    rank: int,
    device: torch.device | None = None,
    tell: Tell = lambda _: None,
) -> Iterator[Batch]:
    """This rank's micro-batches on its device, from step `start` on.

    Args:
        shard: What Ray Data splits off for this rank.
        cfg: The run.
        maker: That of the samples.
        start: Steps done.
        rank: Of this worker.
        device: Where the batches go; None: the CPU.
        tell: Takes what a person should read: stand-ins, and waits.

    Raises:
        RuntimeError: A batch does not hold the samples that the plan puts there.
    """
    device = device or torch.device("cpu")
    arrived = shard.iter_torch_batches(
        batch_size=1,
        prefetch_batches=cfg.pipeline.prefetch_batches,
        collate_fn=_Collate(pin=device.type == "cuda"),
    )
    watch = Watch(maker, pipeline=cfg.pipeline, tell=tell, free=_free_resources)

    def checked() -> Iterator[Batch]:
        for turn, item in enumerate(_waited_for(arrived, watch), start=start * cfg.accumulation):
            got, planned = item.columns["number"].tolist(), cfg.samples_of(turn, rank=rank)
            if got != list(planned):
                raise RuntimeError(f"rank {rank} was given {got} in place of {planned[0]}...")
            yield item.batch

    return _on_device(checked(), device)


class _Collate(DefaultCollateFn):
    """Columns as tensors that share Ray's memory, or pinned copies for CUDA."""

    def __init__(self, *, pin: bool) -> None:
        super().__init__(combine_chunks=True)
        self._pin = pin

    def __call__(self, batch: Any) -> _Arrived:
        tensors = {name: rows[0] for name, rows in super().__call__(batch).items()}
        columns = {name: tensors.pop(name).numpy() for name in _FOR_THE_HOST}
        if self._pin:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return _Arrived(columns, tensors)


def _waited_for(arrived: Iterable[_Arrived], watch: Watch) -> Iterator[_Arrived]:
    """The same, each wait under watch."""
    batches = iter(arrived)
    while True:
        asked = time.perf_counter()
        with watch.waiting(), _reasons_in_one_line():
            item = next(batches, None)
        if item is None:
            return
        watch.take(item.columns, waited_s=time.perf_counter() - asked)
        yield item


@contextmanager
def _reasons_in_one_line() -> Iterator[None]:
    """Of a task's traceback, which Ray hands on as a text, leave the case that cannot be read."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        reasons = re.findall(rf"{UnreadableCaseError.__name__}: (.*)", str(error))
        if not reasons:
            raise
        raise UnreadableCaseError(reasons[-1]) from None


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device; on CUDA each is copied while the one before it is used."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    before: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = {name: part.to(device, non_blocking=True) for name, part in batch.items()}
            done = copies.record_event()
        if before is not None:
            yield _usable(*before)
        before = (moved, done)
    if before is not None:
        yield _usable(*before)


def _usable(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the device's present stream wait for the copy, and own the memory."""
    present = torch.cuda.current_stream()
    present.wait_event(copied)
    for part in batch.values():
        part.record_stream(present)
    return batch


def _free_resources() -> dict[str, float]:
    """Of the cluster, for `Watch`."""
    names = ("CPU", "object_store_memory")
    free, total = ray.available_resources(), ray.cluster_resources()
    return {name: free.get(name, 0.0) for name in names} | {
        f"total_{name}": total.get(name, 0.0) for name in names
    }


class FixedBatch(NamedTuple):
    """A held-out sample, and what it counts: 0 where a rank only keeps the others company."""

    batch: Batch
    weight: float


def fixed_batches(
    maker: SampleMaker, *, samples: int, rank: int, workers: int, device: torch.device
) -> list[FixedBatch]:
    """The held-out samples of one rank, one a batch, kept in memory; equally many on every rank.

    The same samples count on any number of workers.

    Raises:
        UnreadableCaseError: None stands in for a case here: figures of a run would not compare.
    """
    numbers = range(rank, samples + -samples % workers, workers)
    return [
        FixedBatch(
            {
                name: torch.from_numpy(column).to(device)
                for name, column in maker.make({"number": np.array([number % samples])}).items()
                if name not in _FOR_THE_HOST
            },
            weight=float(number < samples),
        )
        for number in numbers
    ]
