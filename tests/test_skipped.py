"""A step with a number that is not finite changes nothing on any rank, and is told of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import mean_over_workers, not_finite_outputs, train_steps
from glmae_ray.models.glmae import GLMAE
from glmae_ray.skipped import samples_of, skipped_step
from tests.conftest import tiny_config
from tests.models.test_glmae import build, make_batch
from tests.test_engine_and_loop import (
    STAGES,
    TWO,
    batches,
    build_engine,
    in_own_process,
    in_own_processes,
    share_all_weights,
)

CASES = {
    **{name: [name] for name in STAGES},
    **{f"{name}, two workers": [name, TWO] for name in STAGES},
    "divided": [TWO, "engine.micro_batch=1"],
    "divided, stage 2": [TWO, "engine.micro_batch=1", "engine.zero_stage=2"],
    "bf16": ["engine.precision=bf16", TWO],
    "bf16, stage 2": ["engine.precision=bf16", "engine.zero_stage=2", TWO],
}
# Step -> what goes wrong in it, on the last rank alone and in the first micro-batch alone.
POISONS = {1: "window", 3: "window", 5: "gradient", 7: "loss"}


def train_poisoned(words: list[str], _folder: str) -> dict[str, Any]:
    """What a run with bad steps did, and the losses of one that leaves those steps out."""
    cfg = tiny_config("steps=8", "optim.base_lr=0.1", "optim.warmup_steps=1", *words)
    share_all_weights()
    engine, found = build_engine(cfg), {"losses": [], "kept": [], "skipped": [], "lost": {}}
    before = everything(engine)
    for info in train_steps(engine, poisoned(cfg, engine.module), cfg=cfg):
        after = everything(engine)
        found["kept"].append(same(before, after))
        found["skipped"].append(info.skipped.item())
        found["lost"] |= not_finite_outputs([info])
        if info.step not in POISONS:
            found["losses"].append(mean_over_workers(info.outputs)["loss"])
        before = after
    other = build_engine(cfg)
    found["expected"] = [
        mean_over_workers(info.outputs)["loss"]
        for step in range(1, 9)
        if step not in POISONS
        for info in one_step(other, cfg, step)
    ]
    found["finite"] = all(bool(value.isfinite().all()) for value in before.values())
    difference = [(v - before[n]).abs().max().item() for n, v in everything(other).items()]
    return {**found, "difference": max(difference)}


def one_step(engine: Engine, cfg: PretrainConfig, step: int) -> Iterator[Any]:
    steps = train_steps(engine, batches(cfg), cfg=cfg, start=step - 1)
    yield next(steps)


def poisoned(cfg: PretrainConfig, module: GLMAE) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the run, and a module whose loss goes wrong where `POISONS` says."""
    now, objective = {"poison": ""}, module._objective
    is_last = int(os.environ["RANK"]) == cfg.resources.workers - 1

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        outputs = objective(*args)
        if now["poison"] == "gradient":  # of a root at 0: infinity times 0
            outputs["loss"] = outputs["loss"] + (0 * outputs["loss"]).sqrt()
        if now["poison"] == "loss":  # its gradient is finite
            outputs["loss"] = outputs["loss"] + math.inf
        return outputs

    module._objective = wrong
    for turn, batch in enumerate(batches(cfg)):
        step, part = divmod(turn, cfg.accumulation)
        now["poison"] = POISONS.get(step + 1, "") if is_last and part == 0 else ""
        if now["poison"] == "window":
            batch = batch | {"window": torch.full_like(batch["window"], torch.nan)}
        yield batch


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of weights, teacher, centre and this rank's moments."""
    with engine.whole_parameters():
        state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    state |= {n: b.clone() for n, b in engine.module.named_buffers()}
    adam = getattr(engine._optimizer, "optimizer", engine._optimizer)
    for number, moments in enumerate(adam.state.values()):
        state |= {f"{number} {name}": value.clone() for name, value in moments.items()}
    return state


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Before its first update an optimizer has no moments, or zeros."""
    return all(
        torch.equal(before.get(name, torch.zeros_like(value)), value)
        for name, value in after.items()
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("none")
    return in_own_processes(CASES, folder, function="tests.test_skipped.train_poisoned")


@pytest.mark.parametrize("name", CASES)
def test_a_bad_number_on_one_rank_changes_neither_weights_nor_moments_nor_teacher_on_any(
    runs, name
):
    bad = [step in POISONS for step in range(1, 9)]
    assert runs[name]["skipped"] == bad
    assert runs[name]["kept"] == bad


@pytest.mark.parametrize("name", CASES)
def test_the_run_goes_on_like_one_that_left_those_steps_out(runs, name):
    run = runs[name]
    assert run["losses"] == run["expected"]
    assert run["difference"] == 0
    assert run["finite"]
    assert run["losses"][-1] < run["losses"][1]  # the first is that of a centre at 0


@pytest.mark.parametrize("name", CASES)
def test_the_rank_and_the_terms_are_known(runs, name):
    last = "1" if TWO in CASES[name] else "0"
    terms = ["loss", "loss_rl", "loss_rg", "loss_gg", "loss_gl"]
    all_terms = {last: terms}
    assert runs[name]["lost"] == {"1": all_terms, "3": all_terms, "5": {}, "7": {last: ["loss"]}}


def overflow_under_fp16(words: list[str], _folder: str) -> list[float]:
    """Steps that count as skipped where a loss scaler looks after the gradients."""
    cfg = tiny_config("steps=8", *words)
    engine = build_engine(cfg)
    engine._scaled = True  # fp16 itself needs a GPU; the gradients are skipped all the same
    return [
        info.skipped.item() for info in train_steps(engine, poisoned(cfg, engine.module), cfg=cfg)
    ]


@pytest.mark.slow
def test_under_fp16_a_gradient_that_overflows_is_no_fault_but_a_loss_is(tmp_path):
    found = in_own_process(
        ["engine.zero_stage=1", TWO], tmp_path, function="tests.test_skipped.overflow_under_fp16"
    )
    assert found == [1, 0, 1, 0, 0, 0, 1, 0]


def test_a_skipped_step_moves_neither_teacher_nor_centre_and_forgets_what_it_saw():
    cfg, module = build()
    module(make_batch(cfg))
    module.update_teacher(0.9, skipped=torch.ones(()))
    assert (module.center == 0).all()
    assert module.center_started == 0
    clean = {**make_batch(cfg)}
    module(clean | {"window": torch.full_like(clean["window"], torch.nan)})
    module.update_teacher(0.9, skipped=torch.ones(()))
    assert (module.teacher_sum == 0).all()
    module(clean)
    module.update_teacher(0.9)
    cfg, other = build()
    other(clean)
    other.update_teacher(0.9)
    for (name, value), expected in zip(
        module.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


class _Index:
    def at(self, row: int) -> dict[str, str]:
        return {"case_id": f"case-{row}"}


class _Maker:
    index = _Index()

    def case(self, number: int) -> int:
        return number % 3


@pytest.mark.parametrize("words", [(), (TWO,), (TWO, "engine.micro_batch=1")])
def test_the_samples_of_all_ranks_are_those_of_the_step(words):
    cfg = tiny_config(*words)
    ranks = range(cfg.resources.workers)
    numbers = np.array([samples_of(3, rank=rank, cfg=cfg) for rank in ranks])
    assert sorted(numbers.ravel().tolist()) == [8, 9, 10, 11]
    if cfg.micro_batch == 1:
        assert numbers.tolist() == [[8, 10], [9, 11]]


def test_an_event_names_samples_and_cases_of_the_rank_that_lost_its_loss():
    cfg = tiny_config(TWO)
    event = skipped_step(2, {1: ["loss", "loss_rg"]}, cfg=cfg, maker=_Maker())
    assert event.facts == {
        "step": 2, "samples": [6, 7], "cases": ["case-0", "case-1"], "ranks": [1],
        "not_finite": ["loss", "loss_rg"],
    }  # fmt: skip
    assert event.line.startswith("step 2: skipped, because loss and loss_rg on rank 1 was not a")
    for word in ("samples 6, 7 of case-0, case-1;", "glmae inspect", "a lower optim.base_lr"):
        assert word in event.line


def test_where_only_the_gradient_is_bad_all_samples_are_named_and_a_long_list_is_cut():
    cfg = tiny_config("global_batch=12", TWO)
    event = skipped_step(1, {}, cfg=cfg, maker=_Maker())
    assert event.facts["samples"] == list(range(12))
    assert (event.facts["ranks"], event.facts["not_finite"]) == ([], ["gradient"])
    assert "the gradient, though no rank's loss, was not" in event.line
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 4 more of case-0, case-1, case-2;" in event.line
