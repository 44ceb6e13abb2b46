"""Ours: views and crops of a store, in process, through Ray Data, through a torch DataLoader.

Voxels are int16 in the case's own units, as training gets them; the window is applied on the
device. One thread reads and makes a sample: there is a task, a worker or a process per core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks._loader_data import CROP, Task
from glmae_ray.config import PretrainConfig
from glmae_ray.sampling import KINDS
from glmae_ray.store.zarr_store import VolumeStore

Columns = dict[str, np.ndarray]

_CORES = 2
_STEPS = 10**6  # more than any run takes
_NUMBERS_PER_BLOCK, _PREFETCH = 8192, 4  # as for views


def in_process(task: Task) -> Iterator[list[Tensor]]:
    """Sample after sample in the process that consumes them."""
    return map(_making(task), task.numbers())


def data_loader(task: Task) -> Iterator[list[Tensor]]:
    """The same in the workers of a torch DataLoader."""
    loader = DataLoader(
        _Samples(task),
        batch_size=None,
        num_workers=_CORES,
        multiprocessing_context="spawn",  # neither Arrow nor a store's handles outlive a fork
    )
    return iter(loader)


def ray_data(task: Task, *, per_batch: int) -> Iterator[list[Tensor]]:
    """The same through Ray Data; Ray runs before the first sample is asked for.

    Args:
        task: What to deliver.
        per_batch: Crops or samples of a batch.
    """
    from benchmarks._ingest_job import local_ray

    session = ExitStack()
    session.enter_context(local_ray(_CORES))
    batches = _ray_crops if task.recipe == CROP else _ray_views
    return _within(session, batches(task, per_batch))


class _Samples(IterableDataset):
    """A task's samples; each worker of a loader makes its share."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __iter__(self) -> Iterator[list[Tensor]]:
        task, worker = self._task, get_worker_info()
        assert worker is not None  # a loader without workers is `in_process`
        part, parts = task.part + worker.id * task.parts, task.parts * worker.num_workers
        return in_process(replace(task, part=part, parts=parts))


def _within(session: ExitStack, batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    with session:
        yield from batches


def _ray_views(task: Task, size: int) -> Iterator[list[Tensor]]:
    """As `glmae pretrain` has them."""
    from glmae_ray.pipeline import rank_batches, train_dataset
    from glmae_ray.samples import sample_maker

    cfg = _config(task, size)
    maker = sample_maker(cfg, split="train", kinds=KINDS)
    shard = _shard(train_dataset(maker, cfg=cfg, start=0))
    yield from map(_views, rank_batches(shard, cfg=cfg, maker=maker, start=0, rank=0))


def _ray_crops(task: Task, size: int) -> Iterator[list[Tensor]]:
    import ray.data

    read = _reading(task)

    def crops_of(rows: Columns) -> Columns:
        return {"crop": np.stack([read(number) for number in rows["id"].tolist()])}

    numbers = ray.data.range(_STEPS, override_num_blocks=_STEPS // _NUMBERS_PER_BLOCK)
    aligned = numbers.repartition(target_num_rows_per_block=size, strict=True)
    crops = aligned.map_batches(crops_of, batch_size=size, zero_copy_batch=True)
    batches = _shard(crops).iter_torch_batches(batch_size=size, prefetch_batches=_PREFETCH)
    yield from ([batch["crop"]] for batch in batches)


def _shard(dataset: Any) -> Any:
    """What the only worker of a run gets."""
    dataset.context.execution_options.preserve_order = True
    (shard,) = dataset.streaming_split(1, equal=True)
    return shard


def _making(task: Task) -> Callable[[int], list[Tensor]]:
    """What makes a sample from its number."""
    if task.recipe == CROP:
        read = _reading(task)
        return lambda number: [torch.from_numpy(read(number))]
    from glmae_ray.samples import sample_maker

    maker = sample_maker(_config(task), split="train", kinds=KINDS)
    return lambda number: _views(maker.make({"number": np.array([number])}))


def _reading(task: Task) -> Callable[[int], np.ndarray]:
    """What reads a crop, by number."""
    store = VolumeStore.open(task.place, threads=1)

    def read(number: int) -> np.ndarray:
        case, box = task.crop(number)
        return store.read(task.data.case_ids[case], box=box.tolist())

    return read


def _config(task: Task, batch: int = 1) -> PretrainConfig:
    return PretrainConfig(store=task.place, run="none", steps=_STEPS, global_batch=batch)


def _views(batch: Mapping[str, Any]) -> list[Tensor]:
    return [torch.as_tensor(batch[kind]) for kind in KINDS]
