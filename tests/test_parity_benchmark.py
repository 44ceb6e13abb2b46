"""The rival of the parity benchmark does the same work as ours: same losses, step by step."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from benchmarks._torchrun_loop import plain_steps
from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import train_steps
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config
from tests.models.test_glmae import make_batch

WORKERS, STEPS = 2, 6
TOLERANCES = {"float32": 1e-5, "bf16": 0.02}

Losses = dict[str, dict[str, list[float]]]  # by precision and loop


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Losses of rank 0 at each step, its own micro-batches only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = tmp_path_factory.mktemp("parity") / "losses.json"
    torch.multiprocessing.spawn(train_both, args=(port, found), nprocs=WORKERS)
    return json.loads(found.read_text())


def train_both(rank: int, port: int, found: Path) -> None:
    """Train with both loops; each rank has views of its own, two micro-batches a step."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    losses: Losses = {}
    for precision in TOLERANCES:
        batch = ("global_batch=8", "engine.micro_batch=2", f"resources.workers={WORKERS}")
        words = (f"steps={STEPS}", "optim.base_lr=0.02", f"engine.precision={precision}")
        cfg = tiny_config(*batch, *words)
        engine = Engine(module(cfg), cfg=cfg, device=torch.device("cpu"))
        ours = train_steps(engine, views(cfg, rank), cfg=cfg)
        plain = plain_steps(module(cfg), views(cfg, rank), cfg=cfg, together=True)
        losses[precision] = {
            "ours": [info.outputs["loss"].item() for info in ours],
            "plain": [loss.item() for loss in plain],
        }
    if rank == 0:
        found.write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def module(cfg: PretrainConfig) -> GLMAE:
    torch.manual_seed(0)
    return GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)


def views(cfg: PretrainConfig, rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rank's two micro-batches of a global batch, again and again."""
    every = make_batch(cfg, cfg.global_batch)
    parts = [
        {name: column[list(cfg.samples_of(turn, rank=rank))] for name, column in every.items()}
        for turn in range(cfg.accumulation)
    ]
    return itertools.cycle(parts)


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_plain_loop_has_the_losses_of_ours(precision, losses):
    ours, plain = losses[precision]["ours"], losses[precision]["plain"]
    assert len(ours) == len(plain) == STEPS
    assert plain == pytest.approx(ours, abs=TOLERANCES[precision])
    # It learns, once the centre has started, so that equality says something.
    assert plain[-1] < plain[1] - 10 * TOLERANCES[precision]
