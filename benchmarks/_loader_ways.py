"""The ways of loading that are compared, by recipe, and the ratios between them.

A way's module is imported by the process that runs it: none holds what another needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks._loader_data import CROP, GLMAE, LZ4_STORE, DataSet, Task
from benchmarks._loader_measure import Batches, Way

# Through Ray Data: a crop alone is too little for a task; samples as in configs/pretrain/base.yaml.
_CROPS_PER_BATCH, _SAMPLES_PER_BATCH = 8, 4
_MONAI = {
    "monai_dataset": ("dataset", "images"),
    "monai_persistent": ("persistent", "persistent-{recipe}"),
    "monai_cache_ram": ("cache", None),
    "monai_cache_ram_no_copy": ("cache without copies", None),
}


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: What ratios call it.
        way: How it loads.
        delivers: Type of the voxels that arrive.
        files: Subfolder of the data set that it reads while it runs; None: nothing.
        has_bar: Whether a ratio rests on it: measured with `--quick` too.
        least: Batches that are measured, at least.
        brief: So slow that it is measured right behind the first batch.
        once: A single run has to do.
        store: In place of the data set's own.
    """

    name: str
    way: Way
    delivers: str
    files: str | None = None
    has_bar: bool = True
    least: int = 4
    brief: bool = False
    once: bool = False
    store: str | None = None


def ways(recipe: str, data: DataSet) -> list[Entry]:
    """All that follow a recipe, without those that read from S3."""
    entries = _ours(recipe, data) + _monai(recipe)
    return entries + (_crop_only(data) if recipe == CROP else _anti_aliased())


def ways_by_s3(store: str, servers: Mapping[str, Mapping[str, str]], *, once: bool) -> list[Entry]:
    """Ours through Ray Data from S3.

    Args:
        store: `s3://BUCKET/FOLDER`.
        servers: Name of the row to the variables that lead to its server.
        once: A single run has to do.
    """
    return [
        Entry(
            name,
            Way(ours_ray, samples=_SAMPLES_PER_BATCH, environment=variables),
            "int16",
            store=store,
            once=once,
        )
        for name, variables in servers.items()
    ]


def ours_in_process(task: Task) -> Batches:
    """Ours in the process that consumes."""
    from benchmarks._loader_ours import in_process

    return in_process(task)


def ours_dataloader(task: Task) -> Batches:
    """Ours in the workers of a torch DataLoader."""
    from benchmarks._loader_ours import data_loader

    return data_loader(task)


def ours_ray(task: Task) -> Batches:
    """Ours through Ray Data."""
    from benchmarks._loader_ours import ray_data

    crops_or_samples = _CROPS_PER_BATCH if task.recipe == CROP else _SAMPLES_PER_BATCH
    return ray_data(task, per_batch=crops_or_samples)


def monai(task: Task, **choices: Any) -> Batches:
    """A data set of MONAI."""
    from benchmarks._loader_monai import monai

    return monai(task, **choices)


def torchio_queue(task: Task, **choices: Any) -> Batches:
    """torchio's queue."""
    from benchmarks._loader_rivals import torchio_queue

    return torchio_queue(task, **choices)


def blosc2_crops(task: Task, **choices: Any) -> Batches:
    """nnssl's files."""
    from benchmarks._loader_rivals import blosc2_crops

    return blosc2_crops(task, **choices)


def blosc2_bytes(task: Task, **choices: Any) -> float:
    """Bytes that a crop of nnssl's files needs."""
    from benchmarks._loader_rivals import blosc2_bytes

    return blosc2_bytes(task, **choices)


def _ours(recipe: str, data: DataSet) -> list[Entry]:
    is_crop = recipe == CROP
    row = partial(Entry, delivers="int16", files="store")
    through_ray = Way(ours_ray, samples=_CROPS_PER_BATCH if is_crop else _SAMPLES_PER_BATCH)
    lz4 = partial(row, files=LZ4_STORE, store=str(data.folder / LZ4_STORE))
    return [
        lz4("ours_in_process_lz4", Way(ours_in_process, processes=2), has_bar=is_crop),
        lz4("ours_ray_lz4", through_ray, has_bar=not is_crop),
        row("ours_in_process", Way(ours_in_process, processes=2)),
        row("ours_one_core", Way(ours_in_process, cores=1), has_bar=False),
        row("ours_ray", through_ray, has_bar=not is_crop),
        row("ours_dataloader", Way(ours_dataloader), has_bar=False),
    ]


def _monai(recipe: str) -> list[Entry]:
    return [
        Entry(
            name,
            Way(partial(monai, kind=kind)),
            "float32",
            files and files.format(recipe=recipe),
            has_bar=recipe == GLMAE and name != "monai_cache_ram_no_copy",
        )
        for name, (kind, files) in _MONAI.items()
    ]


def _anti_aliased() -> list[Entry]:
    """MONAI with a `Resize` that smooths, as ours does: half a minute a sample."""
    entries = []
    for name in ("monai_dataset", "monai_persistent", "monai_cache_ram"):
        kind, _ = _MONAI[name]
        # Without workers: two at once would each take twice as long, and both end together.
        way = Way(partial(monai, kind=kind, anti_aliased=True, workers=0))
        full_name = f"{name}_anti_aliased"
        entries.append(
            Entry(full_name, way, "float32", has_bar=False, least=1, brief=True, once=True)
        )
    return entries


def _crop_only(data: DataSet) -> list[Entry]:
    length = queue_length(data)
    queue = Way(partial(torchio_queue, length=length), samples=length)
    return [
        Entry("torchio_queue", queue, "float32", "images", least=1),
        *_blosc2("blosc2_nnssl", "int16", has_bar=True),
        *_blosc2("blosc2_nnssl_float32", "float32", has_bar=False),
    ]


def queue_length(data: DataSet) -> int:
    """Crops in torchio's queue: ten of each volume; 300, as in its example, at most."""
    return min(300, 10 * len(data.images))


def _blosc2(name: str, dtype: str, *, has_bar: bool) -> Sequence[Entry]:
    crops, reads = partial(blosc2_crops, dtype=dtype), partial(blosc2_bytes, dtype=dtype)
    row = partial(Entry, delivers=dtype, files=dtype)
    return [
        row(name, Way(crops, processes=2, reads=reads), has_bar=has_bar),
        row(f"{name}_one_core", Way(crops, cores=1, reads=reads), has_bar=False),
    ]
