"""`glmae pretrain run=s3://...`: what a run leaves in a bucket, and that it goes on from there."""

from __future__ import annotations

import json

import pytest

from glmae_ray.cli import main
from glmae_ray.paths import names_in, read_file, to_place
from glmae_ray.tracking import read_events, read_metrics
from tests.conftest import TINY

pytestmark = [
    *(pytest.mark.ray, pytest.mark.slow),
    # Ray 2.60 reads its own snapshot through pydantic's old names.
    pytest.mark.filterwarnings("ignore:The .parse_obj. method is deprecated"),
]

WORDS = [
    *TINY,
    *("optim.warmup_steps=1", "log.every_steps=1", "save.every_steps=2"),
    *("validation.every_steps=2", "validation.samples=4"),
]


def test_a_run_in_a_bucket_leaves_what_one_on_disk_leaves_and_goes_on(
    small_store, bucket, tmp_path, capsys
):
    place, here = to_place(f"{bucket}/runs/a"), tmp_path / "run"
    words = ["pretrain", *WORDS, f"store={small_store}", "steps=4"]
    assert main([*words, f"run={here}"]) == 0
    capsys.readouterr()
    assert main([*words, f"run={place}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {place}"
    assert names_in(place) - {"events"} == names_in(here) - {"events.jsonl"}
    for name in ("pictures", "tensorboard", "checkpoints"):
        assert len(names_in(place / name)) == len(names_in(here / name)), name
    assert json.loads(read_file(place / "summary.json") or b"")["steps"] == 4
    assert losses(place) == pytest.approx(losses(here), rel=1e-5)
    assert len(losses(place)) == 4
    assert not [e for e in read_events(place) if e["event"] == "late_write"]

    steps = [record["step"] for record in read_metrics(place)]
    newest = sorted(names_in(place / "checkpoints"))[-1]
    for lost in ("summary.json", f"checkpoints/{newest}/state.json"):  # as a kill leaves it
        place.fs.rm(f"{place.path}/{lost}")
    assert main([*words, f"run={place}"]) == 0
    assert [record["step"] for record in read_metrics(place)] == steps
    assert losses(place) == pytest.approx(losses(here), rel=1e-5)


def losses(run) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]
