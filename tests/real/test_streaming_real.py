"""Twenty thousand samples of real scans through Ray Data: each once, and memory stays flat."""

from __future__ import annotations

import statistics
from pathlib import Path

import psutil
import pytest
import ray

from glmae_ray.cli import main
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load, shipped
from glmae_ray.pipeline import rank_batches, train_dataset
from glmae_ray.samples import sample_maker
from tests.conftest import start_ray

pytestmark = [pytest.mark.real, pytest.mark.ray, pytest.mark.slow]

SAMPLES, BATCH = 20_000, 8


def own_memory() -> int:
    """Bytes that this process, Ray's workers and its object store hold."""
    me = psutil.Process()
    total = me.memory_info().rss - me.memory_info().shared
    for process in me.children(recursive=True):
        try:
            memory = process.memory_info()
        except psutil.Error:  # it has ended
            continue
        total += memory.rss - memory.shared
    return total + psutil.virtual_memory().shared


def test_a_long_stream_takes_no_more_memory_than_a_short_one(real_data: Path, tmp_path):
    store = tmp_path / "store"
    assert main(["ingest", f"source={real_data / 'headneck_ct'}", f"store={store}"]) == 0
    words = [f"store={store}", "run=none", f"steps={SAMPLES // BATCH}", "resources.workers=1"]
    cfg = load(PretrainConfig, [str(shipped("pretrain/headneck_cpu.yaml")), *words])
    start_ray(cpus=2)
    try:
        maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
        dataset = train_dataset(maker, cfg=cfg, start=0)
        dataset.context.execution_options.preserve_order = True
        (shard,) = dataset.streaming_split(1, equal=True)
        seen, memory = 0, []
        for batch in rank_batches(shard, cfg=cfg, maker=maker, start=0, rank=0):
            seen += len(batch["window"])
            if seen % 400 == 0:
                memory.append(own_memory())
    finally:
        ray.shutdown()
    assert seen == SAMPLES
    quarter = len(memory) // 4
    early, late = (
        statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:])
    )
    print(f"\n{early / 2**20:.0f} MiB in the second quarter, {late / 2**20:.0f} in the last")
    assert late < 1.03 * early
