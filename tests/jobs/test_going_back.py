"""A run whose steps are skipped in a row takes an earlier checkpoint and goes on behind them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from glmae_ray import checkpoint
from glmae_ray.cli import main
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load
from glmae_ray.engine import Engine
from glmae_ray.errors import UserError
from glmae_ray.jobs.sitting import Sitting
from glmae_ray.jobs.sittings import read_sittings
from glmae_ray.loop import mean_over_workers, train_steps
from glmae_ray.samples import sample_maker
from glmae_ray.store.index import VolumeIndex
from glmae_ray.tracking import Record, read_events
from tests.conftest import tiny_config
from tests.jobs.fakes import WITHOUT_STORE, Outside, Weights, sit, step_info
from tests.jobs.test_pretrain_faults import poison, words
from tests.test_engine_and_loop import batches, build_engine, in_own_process, share_all_weights


@pytest.fixture(autouse=True)  # workers of Ray are other processes
def outside(monkeypatch) -> Outside:
    return Outside().put_into(monkeypatch)


def train(sitting: Sitting, weights: Weights, until: int, *, bad: set[int]) -> None:
    """Weights that tell at which step they were changed; bad steps change nothing."""
    for step in range(sitting.start + 1, until + 1):
        if step not in bad:
            weights.content = bytes([step])
        sitting.after_step(step_info(step, skipped=step in bad))


def run_of(run: Path, *words: str, bad: set[int], until: int = 12) -> Weights:
    """A run of 20 steps up to one of them; what it has then."""
    weights = Weights()
    more = ("steps=20", "save.every_steps=4", "save.keep=9", "optim.rewind_after=3")
    sitting = sit(run, weights, *more, *words)
    train(sitting, weights, until, bad=bad)
    sitting.close()
    return weights


def went_back(run: Path) -> list[Record]:
    return [event for event in read_events(run) if event["event"] == "went_back"]


def passed(run: Path) -> dict[int, list[list[int]]]:
    return {found.step: found.state["passed"] for found in checkpoint.complete(run)}


def test_so_many_bad_steps_in_a_row_take_the_run_back_past_their_samples(tmp_path):
    weights = run_of(tmp_path, bad={6, 7, 8}, until=8)
    assert weights.content == b"\4"
    (event,) = went_back(tmp_path)
    assert (event["step"], event["to"], event["checkpoint"]) == (8, 4, "step-0000004-0")
    assert event["rank"] == 0
    assert event["line"].startswith("step 8: 3 or more steps in a row were skipped; ")
    assert "the samples of steps 5 to 8 are left behind" in event["line"]
    assert passed(tmp_path) == {8: [[4, 8]], 4: []}


def test_what_a_run_passed_is_known_to_every_later_checkpoint_and_sitting(tmp_path):
    run_of(tmp_path, bad={6, 7, 8}, until=12)
    run_of(tmp_path, bad={14, 15, 16}, until=20)
    assert passed(tmp_path) == {
        4: [], 8: [[4, 8]], 12: [[4, 8]], 16: [[4, 8], [12, 16]], 20: [[4, 8], [12, 16]],
    }  # fmt: skip


def test_bad_steps_that_are_not_in_a_row_do_not_take_it_back(tmp_path):
    assert run_of(tmp_path, bad={5, 6, 8, 9, 11, 12}, until=13).content == b"\15"
    assert went_back(tmp_path) == []


def test_steps_are_counted_where_they_are_logged(tmp_path):
    run_of(tmp_path, "log.every_steps=5", bad={5, 6, 7, 8}, until=9)
    assert went_back(tmp_path) == []
    run_of(tmp_path, "log.every_steps=5", bad={10, 11, 12}, until=15)
    assert went_back(tmp_path) == []  # 13 to 15 were good
    weights = run_of(tmp_path, "log.every_steps=5", bad={17, 18, 19, 20}, until=20)
    assert (weights.content, went_back(tmp_path)) == (bytes([16]), [])  # nothing follows the last


def test_no_checkpoint_is_written_amid_bad_steps_that_would_push_the_good_ones_out(tmp_path):
    words = ("save.every_steps=1", "save.keep=1")
    assert run_of(tmp_path, *words, bad={6, 7, 8}, until=8).content == b"\5"
    assert [event["to"] for event in went_back(tmp_path)] == [5]


def test_a_checkpoint_is_taken_once_and_then_the_one_before_it(tmp_path):
    weights = run_of(tmp_path, bad=set(range(9, 15)), until=14)
    assert [(event["step"], event["to"]) for event in went_back(tmp_path)] == [(11, 8), (14, 4)]
    assert weights.content == b"\4"


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path):
    run_of(tmp_path, bad=set(), until=9)
    sitting = sit(tmp_path, weights := Weights(), "steps=20", "optim.rewind_after=3")
    file = tmp_path / "checkpoints" / "step-0000008-0" / "engine" / "weights-0.pt"
    file.write_bytes(b"\7")
    train(sitting, weights, 11, bad={9, 10, 11})
    sitting.close()
    assert weights.content == b"\4"
    assert [event["event"] for event in read_events(tmp_path) if event["step"] < 9] == [
        "checkpoint_corrupt"
    ]


def test_without_an_earlier_checkpoint_the_run_stops_with_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        run_of(tmp_path, bad={1, 2, 3})
    (line,) = caught.value.lines
    assert line.startswith("step 3: 3 steps in a row were skipped for numbers that are not finite")
    for word in ("no earlier checkpoint", "see events.jsonl", "optim.base_lr"):
        assert word in line


def test_when_all_checkpoints_were_taken_the_run_stops(tmp_path):
    with pytest.raises(UserError, match=r"^step 10: 3 steps in a row were skipped"):
        run_of(tmp_path, bad=set(range(5, 20)), until=19)
    assert [(event["step"], event["to"]) for event in went_back(tmp_path)] == [(7, 4)]


# With DeepSpeed


def train_and_go_back(words: list[str], folder: str) -> dict[str, Any]:
    """Losses of a run that goes back at step 7, and of one that goes on there from step 3."""
    shape = ("steps=9", "save.every_steps=3", "save.keep=9", "optim.rewind_after=3")
    words = [*shape, "optim.base_lr=0.1", "optim.warmup_steps=1", *words]
    cfg = tiny_config(f"run={folder}/run", *WITHOUT_STORE, *words)
    share_all_weights()
    engine = build_engine(cfg)
    found: dict[str, Any] = {"losses": {}}
    with pytest.MonkeyPatch.context() as patch:
        Outside().put_into(patch)
        sitting = sit(Path(cfg.run), engine, *words)
        for info in train_steps(engine, poisoned(cfg), cfg=cfg):
            sitting.after_step(info)
            found["losses"][info.step] = mean_over_workers(info.outputs)["loss"]
        sitting.close()
    found["events"] = [event["event"] for event in read_events(Path(cfg.run))]
    found["passed"] = checkpoint.complete(Path(cfg.run))[0].state["passed"]
    with engine.whole_parameters():
        found["finite"] = all(bool(p.isfinite().all()) for p in engine.module.parameters())
    other = build_engine(cfg)
    other.load(Path(cfg.run) / "checkpoints" / "step-0000003-0")
    found["expected"] = losses_from(other, cfg, start=7)
    other.load(Path(cfg.run) / "checkpoints" / "step-0000003-0")
    found["undisturbed"] = losses_from(other, cfg, start=3)
    return found


def poisoned(cfg: PretrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Steps 5 to 7 have a window that is no number."""
    for turn, batch in enumerate(batches(cfg)):
        is_bad = 4 <= turn // cfg.accumulation < 7
        yield batch | {"window": batch["window"] * (float("nan") if is_bad else 1.0)}


def losses_from(engine: Engine, cfg: PretrainConfig, *, start: int) -> list[float]:
    rest = itertools.islice(batches(cfg), start * cfg.accumulation, None)
    return [
        mean_over_workers(info.outputs)["loss"]
        for info in train_steps(engine, rest, cfg=cfg, start=start)
    ]


@pytest.mark.parametrize(
    "stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))]
)
def test_after_it_a_run_is_one_that_has_gone_on_from_that_checkpoint(tmp_path, stage):
    words, function = [f"engine.zero_stage={stage}"], f"{__name__}.train_and_go_back"
    found = in_own_process(words, tmp_path, function=function)
    losses = {int(step): loss for step, loss in found["losses"].items()}
    assert [step for step, loss in losses.items() if loss != loss] == [5, 6, 7]
    assert [losses[8], losses[9]] == pytest.approx(found["expected"], rel=1e-6)
    # Step 4, which was good, is undone: its weights would have another loss.
    assert losses[8] != pytest.approx(found["undisturbed"][1], rel=1e-3)
    told = [kind for kind in found["events"] if kind != "loss_not_finite"]
    assert told == [*["skipped_step"] * 3, "went_back"]
    assert found["passed"] == [[3, 7]]
    assert found["finite"]


# Through the door


def bad_steps(cfg: PretrainConfig, cases: set[str]) -> list[int]:
    """Steps that a sample of one of the cases is in."""
    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    rows = {maker.index.case_ids().index(case) for case in cases}
    numbers = range(cfg.steps * cfg.global_batch)
    return sorted({n // cfg.global_batch + 1 for n in numbers if maker.plan.case(n) in rows})


def seed_with(arguments: list[str], cases: set[str], pattern: str) -> str:
    """A seed with which the bad steps of a run are those that a pattern of letters shows."""
    for seed in range(2000):
        cfg = load(PretrainConfig, [*arguments[1:], f"seed={seed}"])
        bad = bad_steps(cfg, cases)
        shown = "".join("b" if step in bad else "." for step in range(1, cfg.steps + 1))
        if re.fullmatch(pattern, shown):
            return f"seed={seed}"
    raise AssertionError("no seed has such a plan")


def arguments_of(store: Path, run: Path) -> list[str]:
    shape = ("steps=8", "global_batch=2", "save.every_steps=1", "save.keep=9", "log.every_steps=1")
    return words(store, run, *shape, "optim.rewind_after=2", "resources.workers=2")


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_bad_cases_goes_back_and_ends_with_finite_weights(small_store, tmp_path, capsys):
    run, cases = tmp_path / "run", set(train_cases(small_store)[:2])
    arguments = arguments_of(poison(small_store, tmp_path / "poisoned", cases=cases), run)
    arguments.append(seed_with(arguments, cases, r"\.\.bb\.b?\.+b?"))
    assert main(arguments) == 0
    (event,) = (event for event in read_events(run) if event["event"] == "went_back")
    assert (event["step"], event["to"], event["rank"]) == (4, 2, 0)
    assert event["line"] in capsys.readouterr().err
    found = checkpoint.complete(run)
    assert {c.step: c.state["passed"] for c in found if c.step in (2, 4, 8)} == {
        2: [], 4: [[2, 4]], 8: [[2, 4]],
    }  # fmt: skip
    assert 3 not in {c.step for c in found}
    weights = load_file(run / "encoder.safetensors")
    assert all(np.isfinite(value).all() for value in weights.values())


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_bad_from_its_beginning_ends_at_once_with_one_line(
    small_store, tmp_path, capsys
):
    run, cases = tmp_path / "run", set(train_cases(small_store))
    store = poison(small_store, tmp_path / "poisoned", cases=cases)
    assert main(arguments_of(store, run)) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("glmae pretrain: "))
    assert line.startswith("glmae pretrain: step 2: 2 steps in a row were skipped")
    assert len(read_sittings(run)) == 1  # another try would not change it


def train_cases(store: Path) -> list[str]:
    return VolumeIndex.read(store).select(split="train").case_ids()
