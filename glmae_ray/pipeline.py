"""Ray Data: sample numbers in, finished views out, micro-batches on the device.

Rows are sample numbers; the task that receives them opens the store, makes the views and emits
them, so no volume travels through the object store. A block is exactly one micro-batch and order
is kept, so block k goes to rank k % workers and step g consumes samples [g B, (g + 1) B) on any
number of workers. `rank_batches` checks that this is what arrived.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from glmae_ray.config import PretrainConfig
from glmae_ray.sampling import Plan
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.views import Source, make_views

Columns = dict[str, np.ndarray]

_NUMBERS_PER_BLOCK = 8192


@dataclass(frozen=True)
class SampleMaker:
    """Makes the columns of any sample of one split; plain data that travels with every task.

    Attributes:
        store: Path of the store; each process opens it once.
        threads: Threads of the store's reader in each task.
        sources: The cases of the split, in the order that the plan counts them.
        plan: Sample number -> case, boxes, seeds.
        kinds: The kinds of view that the loss uses.
    """

    store: str
    threads: int
    sources: list[Source]
    plan: Plan
    kinds: tuple[str, ...]

    def make(self, rows: Columns) -> Columns:
        """Make the samples whose numbers are in `rows["number"]`.

        Returns:
            A kind's views int16 (B, V, C, Z, Y, X), its mask seeds int64 (B, V), the window
            float32 (B, C, 2) that becomes [0, 1], and the numbers int64 (B,).
        """
        samples = [self._sample(int(number)) for number in rows["number"]]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample(self, number: int) -> Columns:
        source = self.sources[self.plan.case(number)]
        store = _open_store(self.store, self.threads)
        sample: Columns = {"number": np.asarray(number)}
        for kind in self.kinds:
            draw = self.plan.draw(number, kind)
            size = getattr(self.plan.views, f"{kind}_size")
            views, window = make_views(store, source, draw.boxes, size=size)
            sample[kind] = views
            sample[f"{kind}_seeds"] = draw.mask_seeds
            sample["window"] = np.asarray(window, dtype=np.float32)
        return sample


def sample_maker(
    cfg: PretrainConfig, *, split: str, kinds: tuple[str, ...], threads: int = 1
) -> SampleMaker:
    """The maker of one split's samples.

    Args:
        cfg: The run; another split draws other boxes and masks from the same seed.
        split: `train` or `val`.
        kinds: `local`, `global` or both.
        threads: Threads of the store's reader in each task.
    """
    index = VolumeIndex.read(cfg.store).select(split=split)
    sources = [
        Source(
            case_id=row["case_id"],
            shape=tuple(row["shape"]),
            factors=tuple(tuple(factors) for factors in row["factors"]),
            window=_window(row, cfg.views.window),
        )
        for row in index.records()
    ]
    seed = cfg.seed if split == "train" else cfg.seed + 2**32
    plan = Plan(seed=seed, foreground=index.boxes(), views=cfg.views)
    return SampleMaker(cfg.store, threads, sources, plan, kinds)


def _window(row: Mapping[str, Any], hounsfield: tuple[float, float]) -> np.ndarray:
    """The intensities (C, 2) of a case that become 0 and 1."""
    if row["modality"] == "CT":
        return np.tile(hounsfield, (row["channels"], 1))
    window = np.stack([row["p0_5"], row["p99_5"]], axis=1)
    # Where nearly all voxels are alike, percentiles meet; where all are, one unit is as good.
    flat = window[:, 0] == window[:, 1]
    window[flat] = np.stack([row["minimum"], row["maximum"]], axis=1)[flat]
    window[:, 1] += window[:, 0] == window[:, 1]
    return window


def train_dataset(maker: SampleMaker, *, cfg: PretrainConfig, start: int) -> ray.data.Dataset:
    """Every sample from step `start` to the end of the run, one micro-batch a block."""
    first, total = start * cfg.global_batch, (cfg.steps - start) * cfg.global_batch
    # Few blocks of bare numbers, cut lazily: a read task a micro-batch would cost 1.5 ms each
    # before the first batch, half a minute for a run of 20,000.
    numbers = ray.data.range(total, override_num_blocks=1 + total // _NUMBERS_PER_BLOCK)
    # A block that Ray splits or merges by size would break the alignment of steps.
    numbers.context.target_max_block_size = None

    def views_of(rows: Columns) -> Columns:
        return maker.make({"number": rows["id"] + first})

    aligned = numbers.repartition(target_num_rows_per_block=cfg.micro_batch, strict=True)
    return aligned.map_batches(views_of, batch_size=cfg.micro_batch, zero_copy_batch=True)


def rank_batches(
    shard: ray.data.DataIterator, *, cfg: PretrainConfig, start: int, rank: int
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches on its device, from step `start` on.

    Raises:
        RuntimeError: A batch does not hold the samples that the plan puts there.
    """
    batches = shard.iter_torch_batches(
        batch_size=cfg.micro_batch, prefetch_batches=cfg.pipeline.prefetch_batches
    )
    first, stride = start * cfg.global_batch, cfg.resources.workers * cfg.micro_batch
    for turn, batch in enumerate(batches):
        number = batch.pop("number")
        begin = first + turn * stride + rank * cfg.micro_batch
        if number.tolist() != list(range(begin, begin + cfg.micro_batch)):
            raise RuntimeError(f"rank {rank} was given {number.tolist()} in place of {begin}...")
        yield batch


def fixed_batches(
    maker: SampleMaker, *, samples: int, rank: int, workers: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """The held-out samples of one rank, one a batch, kept in memory; equally many on every rank."""
    numbers = range(rank, samples - samples % workers, workers)
    return [
        {
            name: torch.from_numpy(column).to(device)
            for name, column in maker.make({"number": np.array([number])}).items()
        }
        for number in numbers
    ]


@functools.lru_cache(maxsize=4)
def _open_store(path: str, threads: int) -> VolumeStore:
    # Ray Data unpickles the maker for every task; the store's open arrays should outlive one.
    return VolumeStore.open(path, threads=threads)
