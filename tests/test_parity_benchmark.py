"""The rival of the parity benchmark does the same work as ours: same losses, step by step."""

from __future__ import annotations

import os
from itertools import islice, repeat

import pytest
import torch

from benchmarks._step_rows import batch
from benchmarks._torchrun_loop import plain_steps
from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import train_steps
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config

STEPS = 6
CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch):
    """The variables of a process group of one."""
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    for name, value in {**group, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield os.environ
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_plain_loop_has_the_losses_of_ours(precision, alone):
    words = ("steps=6", "global_batch=4", "engine.micro_batch=2", "optim.base_lr=0.5")
    cfg = tiny_config(*words, f"engine.precision={precision}")
    views = batch(cfg.model_copy(update={"global_batch": cfg.micro_batch}), CPU)
    engine = Engine(module(cfg), cfg=cfg, device=CPU)
    ours = [info.outputs["loss"] for info in train_steps(engine, repeat(views), cfg=cfg)]
    plain = list(islice(plain_steps(module(cfg), repeat(views), cfg=cfg, together=False), STEPS))
    assert len(ours) == len(plain) == STEPS
    tolerance = 1e-5 if precision == "float32" else 2e-2
    torch.testing.assert_close(
        torch.stack(plain), torch.stack(ours), atol=tolerance, rtol=tolerance
    )
    assert plain[-1] < plain[0] - 10 * tolerance  # it learns, so that equality says something


def module(cfg: PretrainConfig) -> GLMAE:
    torch.manual_seed(0)
    return GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
