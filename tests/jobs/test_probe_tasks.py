"""Probes of a sitting as tasks of Ray: one at a time; the newest waits, the last is waited for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glmae_ray.jobs.probe_tasks import Probes
from glmae_ray.models.vit3d import Encoder
from glmae_ray.probing import probe
from glmae_ray.tracking import RunLog, read_events, read_metrics
from tests.conftest import tiny_config
from tests.jobs.fakes import ALONE
from tests.test_crops import write_store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("tasks") / "store", cases=4)


def probes_of(store: Path, run: Path, *words: str) -> tuple[Probes, Encoder, RunLog]:
    """Of a run of 8 steps, every two; its encoder, and where the records go."""
    run.mkdir(exist_ok=True)
    given = (f"store={store}", f"run={run}", "steps=8", "probe.every_steps=2", "probe.cpus=0")
    cfg = tiny_config(*given, *words)
    torch.manual_seed(0)
    encoder = Encoder(channels=1, patch=(8, 4, 2), width=24, depth=2, heads=2)
    engine = SimpleNamespace(
        module=SimpleNamespace(encoder=encoder), whole_parameters=contextlib.nullcontext
    )
    log = RunLog(run, step=0, tensorboard=False)
    return Probes(cfg, engine, ranks=ALONE), encoder, log


def test_probes_that_come_too_fast_are_dropped_but_for_the_newest_and_the_last(
    store, local_ray, tmp_path
):
    run = tmp_path / "run"
    probes, encoder, log = probes_of(store, run)
    expected = {}
    for step in range(0, 9):  # no time passes between the steps: none but the first has begun
        cfg = tiny_config(f"store={store}", "probe.every_steps=2")
        if step in (0, 8):
            expected[step] = probe(encoder, cfg).values
        probes.begin(step, log) if step == 0 else probes.after(step, log)
        with torch.no_grad():  # what is probed is the copy of its step
            for parameter in encoder.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    probes.close(log)
    records = {r["step"]: r["probe"] for r in read_metrics(run)}
    dropped = [event["step"] for event in read_events(run)]
    assert sorted([*records, *dropped]) == [0, 2, 4, 6, 8]
    assert {0, 8} <= records.keys()
    for step, values in expected.items():
        assert records[step]["dice"] == pytest.approx(values["dice"], abs=1e-4)


def test_a_sitting_probes_its_first_step_only_where_that_has_no_record(store, local_ray, tmp_path):
    run = tmp_path / "run"
    probes, _, log = probes_of(store, run)
    log.write({"step": 4, "samples": 16, "probe": {"dice": {"mean": 0.5}}})
    probes.begin(4, log)
    probes.begin(8, log)
    probes.close(log)
    assert [r["step"] for r in read_metrics(run)] == [4, 8]


def test_a_probe_that_fails_is_one_event(store, local_ray, tmp_path):
    run = tmp_path / "run"
    probes, encoder, log = probes_of(store, run)
    encoder.norm = torch.nn.LayerNorm(7)  # weights that fit nothing
    probes.begin(8, log)
    probes.close(log)
    assert not read_metrics(run)
    (event,) = read_events(run)
    assert (event["event"], event["step"]) == ("probe_failed", 8)
    assert event["line"].startswith("step 8: the probe failed: ")
    assert "size mismatch for norm.weight" in event["line"]
