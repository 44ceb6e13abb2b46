"""Engine and loop in one process: every ZeRO stage, precision, accumulation, save and load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import held_out_reconstruction, train_steps
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config
from tests.models.test_glmae import make_batch

STAGES = [
    "engine.zero_stage=0",
    "engine.zero_stage=1",
    "engine.zero_stage=2",
    "engine.zero_stage=3",
]


def build_engine(cfg: PretrainConfig) -> Engine:
    torch.manual_seed(0)
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    return Engine(module, cfg=cfg, device=torch.device("cpu"))


def batches(cfg: PretrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """The same four samples for ever, cut into micro-batches."""
    whole = make_batch(cfg, cfg.global_batch)
    while True:
        for start in range(0, cfg.global_batch, cfg.micro_batch):
            yield {name: v[start : start + cfg.micro_batch] for name, v in whole.items()}


def train(words: list[str], folder: str) -> dict[str, list[float]]:
    """Losses and norms of a run, and those of the same run saved and loaded in the middle."""
    cfg = tiny_config("steps=6", "optim.base_lr=0.1", "optim.warmup_steps=1", *words)
    engine = build_engine(cfg)
    losses, norms, held_out = [], [], []
    for info in train_steps(engine, batches(cfg), cfg=cfg):
        losses.append(info.outputs["loss"].item())
        norms.append(engine.gradient_norm())
        if info.step == 3:
            engine.save(Path(folder))
    held_out.append(held_out_reconstruction(engine, [make_batch(cfg)])["r2"])
    again = build_engine(cfg)
    again.load(Path(folder))
    resumed = [
        info.outputs["loss"].item() for info in train_steps(again, batches(cfg), cfg=cfg, start=3)
    ]
    held_out.append(held_out_reconstruction(again, [make_batch(cfg)])["r2"])
    return {"losses": losses, "norms": norms, "resumed": resumed, "held_out": held_out}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    """Every variant in a process of its own: DeepSpeed keeps one world per process."""
    cases = {name: [name] for name in STAGES}
    cases["divided"] = ["engine.micro_batch=1"]
    cases["recomputed"] = ["model.activation_checkpointing=true"]
    cases["bf16"] = ["engine.precision=bf16"]
    cases["bf16, stage 2"] = ["engine.precision=bf16", "engine.zero_stage=2"]
    return {
        name: _in_own_process(words, tmp_path_factory.mktemp("engine"))
        for name, words in cases.items()
    }


def _in_own_process(words: list[str], folder: Path) -> dict[str, list[float]]:
    code = (
        "import json, sys; from tests.test_engine_and_loop import train\n"
        "result = train(json.loads(sys.argv[1]), sys.argv[2])\n"
        "print('RESULT', json.dumps(result))"
    )
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words), str(folder)],
        env=os.environ | world,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("name", STAGES[1:])
def test_every_zero_stage_gives_the_same_losses_and_gradient_norms(runs, name):
    plain, sharded = runs[STAGES[0]], runs[name]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert sharded["held_out"] == pytest.approx(plain["held_out"], abs=1e-4)


def test_activation_checkpointing_changes_nothing(runs):
    assert runs["recomputed"]["losses"] == pytest.approx(runs[STAGES[0]]["losses"], rel=1e-5)


def test_dividing_the_batch_into_micro_batches_changes_nothing(runs):
    assert runs["divided"]["losses"] == pytest.approx(runs[STAGES[0]]["losses"], rel=1e-4)


@pytest.mark.parametrize("name", ["bf16", "bf16, stage 2"])
def test_bfloat16_stays_near_float32(runs, name):
    assert runs[name]["losses"] == pytest.approx(runs[STAGES[0]]["losses"], rel=0.02)


@pytest.mark.parametrize("name", [*STAGES, "bf16", "bf16, stage 2", "divided"])
def test_a_saved_engine_continues_as_if_nothing_had_happened(runs, name):
    run = runs[name]
    assert run["resumed"] == pytest.approx(run["losses"][3:], rel=1e-5)
    assert run["held_out"][1] == pytest.approx(run["held_out"][0], abs=1e-5)


def test_the_run_learns_its_four_samples(runs):
    losses = runs[STAGES[0]]["losses"]
    assert losses[-1] < losses[1]
