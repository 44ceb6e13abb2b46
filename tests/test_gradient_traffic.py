"""In which type gradients go from rank to rank: DeepSpeed's choice, which docs/method.md states."""

from __future__ import annotations

import inspect
import json
import os
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.distributed._composable import replicate

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config
from tests.models.test_glmae import make_batch

# What sums gradients, and the argument that is sent.
COLLECTIVES = {"all_reduce": "tensor", "reduce_scatter_tensor": "input"}
WORKERS = 2
STAGES = [0, 1, 2, 3]


def config(stage: int) -> PretrainConfig:
    words = (f"engine.zero_stage={stage}", f"resources.workers={WORKERS}")
    return tiny_config("engine.precision=bf16", *words)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """How many numbers rank 0 sent in each type, by stage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = tmp_path_factory.mktemp("traffic") / "sent.json"
    torch.multiprocessing.spawn(backward_in_every_stage, args=(port, found), nprocs=WORKERS)
    return json.loads(found.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_gradients_of_linear_layers_travel_in_16_bits(stage, sent):
    cfg = config(stage)
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    every = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    linear = sum(
        weight.numel()
        for part in module.modules()
        if type(part) is nn.Linear  # neither the prototypes, a kind of it, nor the patch embedding
        for weight in part.parameters()
        if weight.requires_grad
    )
    in_16_bits = {"torch.bfloat16": linear, "torch.float32": every - linear}
    assert sent[stage] == (in_16_bits if stage else {"float": 4 * every})


def backward_in_every_stage(rank: int, port: int, found: Path) -> None:
    """Run one backward pass each; rank 0 writes what it sent."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sent = count_what_is_sent()
    every_sent = [backward(config(stage), sent) for stage in STAGES]
    if rank == 0:
        found.write_text(json.dumps(every_sent))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def backward(cfg: PretrainConfig, sent: Counter[str]) -> dict[str, int]:
    """Numbers by type that one backward pass sends, where `sent` counts what torch is given."""
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    engine = Engine(module, cfg=cfg, device=torch.device("cpu"))
    loss = engine(make_batch(cfg, cfg.micro_batch), teacher_temperature=0.05)["loss"]
    sent.clear()
    engine.backward(loss)
    if cfg.engine.zero_stage == 0:  # torch's DistributedDataParallel, which sends on its own
        assert not sent
        about = replicate.state(module)._ddp._get_ddp_logging_data()
        return {about["dtypes"]: about["total_parameter_size_bytes"]}
    return dict(sent)


def count_what_is_sent() -> Counter[str]:
    """Numbers by type; to be called before DeepSpeed is imported, which keeps the functions."""
    sent: Counter[str] = Counter()
    for name, argument in COLLECTIVES.items():
        send = getattr(torch.distributed, name)

        def counting(*args, send=send, argument=argument, **kwargs):
            given = inspect.signature(send).bind(*args, **kwargs).arguments[argument]
            sent[str(given.dtype)] += given.numel()
            return send(*args, **kwargs)

        setattr(torch.distributed, name, counting)
    return sent
