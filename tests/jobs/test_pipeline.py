"""The pipeline through Ray Data: which samples each worker is given, and what is in them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray
import torch

from glmae_ray.pipeline import rank_batches, train_dataset
from glmae_ray.samples import sample_maker
from tests.conftest import tiny_config

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Rank:
    """Consumes one shard at its own pace."""

    def numbers(self, shard, pause_s: float) -> list[list[int]]:
        seen = []
        for row in shard.iter_batches(batch_size=1, prefetch_batches=2):
            seen.append(row["number"][0].tolist())
            time.sleep(pause_s)
        return seen


@pytest.mark.parametrize("workers", [1, 3])
def test_step_g_consumes_samples_g_b_to_g_plus_1_b_whatever_the_pace(small_store, workers):
    shape = ("steps=5", "global_batch=6", "engine.micro_batch=2", f"resources.workers={workers}")
    cfg = tiny_config(f"store={small_store}", *shape)
    dataset = train_dataset(sample_maker(cfg, split="train", kinds=("local",)), cfg=cfg, start=2)
    dataset.context.execution_options.preserve_order = True
    shards = dataset.streaming_split(workers, equal=True)
    ranks = [Rank.remote() for _ in shards]
    seen = ray.get(
        [
            rank.numbers.remote(shard, 0.1 * number)
            for number, (rank, shard) in enumerate(zip(ranks, shards, strict=True))
        ]
    )
    per_step = 3 // workers
    for step in range(3):
        of_step = [
            batch for rank in seen for batch in rank[step * per_step : (step + 1) * per_step]
        ]
        numbers = sorted(number for batch in of_step for number in batch)
        assert numbers == list(range((step + 2) * 6, (step + 3) * 6))


def test_views_through_ray_are_those_made_in_process(small_store):
    cfg = tiny_config(f"store={small_store}", "steps=2", "optim.warmup_steps=1")
    maker = sample_maker(cfg, split="train", kinds=("global", "local"))
    dataset = train_dataset(maker, cfg=cfg, start=0)
    dataset.context.execution_options.preserve_order = True
    (shard,) = dataset.streaming_split(1, equal=True)
    # Both, to the end: a half-read Ray Data execution leaves a thread behind.
    batch, _ = rank_batches(shard, cfg=cfg, maker=maker, start=0, rank=0)
    expected = maker.make({"number": np.arange(4)})
    for name in ("number", "case", "fault", "made_s"):  # stay with the worker
        del expected[name]
    assert batch.keys() == expected.keys()
    for name, column in expected.items():
        assert torch.equal(batch[name], torch.from_numpy(column)), name
    assert batch["global"].dtype == torch.int16


def test_a_batch_out_of_place_stops_the_run(small_store):
    cfg = tiny_config(f"store={small_store}", "steps=2", "optim.warmup_steps=1")
    maker = sample_maker(cfg, split="train", kinds=("local",))
    dataset = train_dataset(maker, cfg=cfg, start=1)
    (shard,) = dataset.streaming_split(1, equal=True)
    with pytest.raises(RuntimeError, match=r"rank 0 was given \[4, 5, 6, 7\] in place of 0"):
        list(rank_batches(shard, cfg=cfg, maker=maker, start=0, rank=0))
