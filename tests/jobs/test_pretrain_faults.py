"""`glmae pretrain` where a case cannot be read, and on a cluster that is too small."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from glmae_ray.cli import main
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load
from glmae_ray.samples import sample_maker
from glmae_ray.store.index import VolumeIndex
from glmae_ray.tracking import read_events, read_metrics
from tests.conftest import TINY

pytestmark = pytest.mark.ray


def words(store: Path, run: Path, *more: str) -> list[str]:
    of_run = [
        f"store={store}",
        f"run={run}",
        "steps=6",
        "optim.warmup_steps=1",
        "log.pictures=false",
        "log.tensorboard=false",
    ]
    return ["pretrain", *TINY, *of_run, "save.every_steps=3", *more]


@pytest.fixture
def damaged(small_store, tmp_path) -> tuple[Path, str]:
    """A store, and the case of it that has lost its voxels."""
    copy = tmp_path / "damaged"
    shutil.copytree(small_store, copy)
    case = VolumeIndex.read(copy).select(split="train").case_ids()[0]
    shutil.rmtree(copy / "cases" / case / "image")
    return copy, case


def test_a_run_goes_on_without_a_case_that_cannot_be_read(damaged, tmp_path, capsys):
    (store, case), run = damaged, tmp_path / "run"
    skip = ("pipeline.on_error=skip", "pipeline.skip_warning=0.1")
    assert main(words(store, run, *skip, "resources.workers=2")) == 0
    events = [e for e in read_events(run) if e["event"] == "stand_in"]
    assert len(events) >= 2  # 24 samples of about 8 cases
    assert {e["rank"] for e in events} <= {0, 1}
    assert all(f"case {case}: " in e["fault"] and e["stand_in"] != case for e in events)
    assert len({e["sample"] for e in events}) == len(events)
    assert [r["samples"] for r in read_metrics(run) if "loss" in r][-1] == 24
    captured = capsys.readouterr()
    assert "are stand-ins, more than pipeline.skip_warning 10.0%" in captured.err
    assert f"the last: case {case}" in captured.err
    assert "MB a micro-batch" in captured.out


@pytest.mark.slow
def test_a_run_that_may_not_skip_ends_with_the_name_of_the_case(damaged, tmp_path, capsys):
    (store, case), run = damaged, tmp_path / "run"
    assert main(words(store, run)) == 1
    assert f"case {case}: " in capsys.readouterr().err


def test_makers_that_no_node_can_take_are_refused_before_anything_is_written(
    small_store, tmp_path, capsys
):
    run = tmp_path / "run"
    assert main(words(small_store, run, "pipeline.labels={pool: cpu}")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no node has {'pool': 'cpu'} and 1 CPU to make views" in line
    assert not run.exists()


@pytest.fixture
def poisoned(small_store, tmp_path) -> tuple[Path, str]:
    """A store, and the case of it whose intensity window is no number."""
    case = VolumeIndex.read(small_store).select(split="train").case_ids()[0]
    return poison(small_store, tmp_path / "poisoned", cases={case}), case


def poison(store: Path, copy: Path, *, cases: set[str]) -> Path:
    """A copy of a store in which the intensity windows of some cases are no numbers."""
    shutil.copytree(store, copy)
    table = pq.read_table(copy / "index.parquet")
    rows = table.to_pylist()
    for row in rows:
        if row["case_id"] in cases:
            # The window of a CT is the run's; that of others comes from their percentiles.
            row |= {"modality": "MR", "p0_5": [math.nan]}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copy / "index.parquet")
    return copy


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_case_that_makes_a_loss_no_number_is_named_and_the_run_learns_without_its_steps(
    poisoned, tmp_path, capsys, stage
):
    (store, case), run = poisoned, tmp_path / "run"
    more = ("resources.workers=2", "log.every_steps=2", f"engine.zero_stage={stage}")
    assert main(words(store, run, *more)) == 0
    printed = capsys.readouterr()
    cfg = load(PretrainConfig, words(store, run, *more)[1:])
    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    row = maker.index.case_ids().index(case)
    bad = [number for number in range(24) if maker.plan.case(number) == row]
    events = [e for e in read_events(run) if e["event"] == "skipped_step"]
    assert [e["step"] for e in events] == sorted({number // 4 + 1 for number in bad})
    for event in events:
        assert case in event["cases"]
        assert set(event["samples"]) & set(bad)
        # Micro-batches of two: the first is that of rank 0.
        assert event["ranks"] == sorted({n % 4 // 2 for n in bad if n // 4 + 1 == event["step"]})
        assert event["line"] in printed.err
    trained = [r for r in read_metrics(run) if "loss" in r]
    assert sum(r["skipped_steps"] for r in trained) == len(events) < 6
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == len(events)
    assert f"skipped steps: {len(events)}; see events.jsonl" in printed.out
    weights = load_file(run / "encoder.safetensors")
    assert all(np.isfinite(value).all() for value in weights.values())
