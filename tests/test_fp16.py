"""float16 in every ZeRO stage: overflows are skipped, and the loss scale that finds them stays.

On the CPU, where no run is started with it, because it is slow.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from glmae_ray.loop import train_steps
from glmae_ray.loss_scale import LossScale
from tests.conftest import tiny_config
from tests.test_engine_and_loop import (
    batches,
    build_engine,
    in_own_process,
    save,
    share_all_weights,
)

RUN = ["steps=8", "optim.base_lr=0.1", "optim.warmup_steps=1", "engine.precision=fp16"]
STAGES = ["0", "1", "2", "3"]


def train(words: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Losses and norms of a run, and those of the same run saved and loaded in the middle."""
    share_all_weights()
    found = {}
    for stage in STAGES:
        cfg = tiny_config(*words, f"engine.zero_stage={stage}")
        engine, again = build_engine(cfg), build_engine(cfg)
        seen: dict[str, Any] = {"losses": [], "norms": [], "resumed": []}
        for info in train_steps(engine, batches(cfg), cfg=cfg):
            seen["losses"].append(float(info.outputs["loss"]))
            seen["norms"].append(engine.gradient_norm())
            if info.step == 5:
                save(engine, Path(folder, stage))
                seen["scale"] = list(engine._scale.state_dict().values())
        again.load(Path(folder, stage))
        seen["loaded"] = list(again._scale.state_dict().values())
        for info in train_steps(again, batches(cfg), cfg=cfg, start=5):
            seen["resumed"].append(float(info.outputs["loss"]))
        found[stage] = seen
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fp16")
    return in_own_process(RUN, folder, function="tests.test_fp16.train")


@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_skipped_until_the_scale_is_small_enough(runs, stage):
    norms, losses = runs[stage]["norms"], runs[stage]["losses"]
    assert norms[:3] == [float("inf")] * 3
    assert all(0 < norm < 100 for norm in norms[3:])
    assert losses[1] == losses[2] == losses[3]
    assert losses[-1] < losses[3] - 1


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_gives_the_same_losses_and_gradient_norms(runs, stage):
    assert runs[stage]["losses"] == pytest.approx(runs["0"]["losses"], rel=1e-3)
    assert runs[stage]["norms"] == pytest.approx(runs["0"]["norms"], rel=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_engine_continues_with_its_scale(runs, stage):
    assert runs[stage]["scale"][0] == 2**13
    assert runs[stage]["loaded"] == runs[stage]["scale"]
    assert runs[stage]["resumed"] == pytest.approx(runs[stage]["losses"][5:], rel=1e-5)


def test_the_scale_follows_overflows_as_that_of_torch():
    ours, dice = LossScale(), random.Random(0)
    torchs = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    torchs.scale(torch.zeros(1))
    for _ in range(9000):
        overflow = dice.random() < 0.0005
        weight.grad = torch.full((1,), torch.inf if overflow else 0.0)
        torchs.step(optimizer)
        torchs.update()
        ours.follow(overflow=overflow)
        assert ours.value == torchs.get_scale()
    assert ours.value != LossScale().value
