"""The model of scaling: what it says is sent is what DeepSpeed sends, and rings are rings."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks._scaling_measure import Case, series
from benchmarks._scaling_model import (
    Cluster,
    Exchange,
    Feeding,
    Link,
    bytes_sent,
    exchanges,
    linear_weights,
    measured_link,
    predict,
    seconds,
    views_per_step,
)
from benchmarks._scaling_rows import prediction_rows
from benchmarks._step_rows import batch
from glmae_ray.config import PretrainConfig
from glmae_ray.costs import parameters, trainable
from glmae_ray.engine import Engine
from glmae_ray.loop import train_steps
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config

WORKERS, STAGES, TURNS = 2, (0, 1, 2, 3), 2
# What sends tensors, and the argument that is the whole of them.
COLLECTIVES = {
    "all_reduce": "tensor",
    "reduce_scatter_tensor": "input",
    "all_gather_into_tensor": "output_tensor",
    "broadcast": "tensor",
}


def run_of(workers: int, *words: str) -> PretrainConfig:
    """One sample a worker and micro-batch, two micro-batches a step."""
    batch_words = (f"global_batch={TURNS * workers}", "engine.micro_batch=1")
    return tiny_config(*batch_words, f"resources.workers={workers}", *words)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """For each stage the bytes that a step under bf16 autocast hands to each collective."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = tmp_path_factory.mktemp("sent") / "sent.json"
    torch.multiprocessing.spawn(one_step_a_stage, args=(port, found), nprocs=WORKERS)
    return json.loads(found.read_text())


def one_step_a_stage(rank: int, port: int, found: Path) -> None:
    """Run the second step of each stage; rank 0 writes what it sent."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sent = count_bytes()
    counts = []
    for stage in STAGES:
        cfg = run_of(WORKERS, "engine.precision=bf16", f"engine.zero_stage={stage}")
        module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
        engine = Engine(module, cfg=cfg, device=torch.device("cpu"))
        one = batch(cfg.model_copy(update={"global_batch": 1}), torch.device("cpu"))
        steps = train_steps(engine, itertools.repeat(one), cfg=cfg)
        next(steps)
        sent.clear()
        next(steps)
        counts.append(dict(sent))
    if rank == 0:
        found.write_text(json.dumps(counts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def count_bytes() -> Counter[str]:
    """Bytes by collective; to be called before DeepSpeed is imported, which keeps the functions."""
    sent: Counter[str] = Counter()
    for name, argument in COLLECTIVES.items():
        send = getattr(torch.distributed, name)

        def counting(*args, send=send, name=name, argument=argument, **kwargs):
            tensor = inspect.signature(send).bind(*args, **kwargs).arguments[argument]
            kind = name.removesuffix("_tensor").removesuffix("_into")
            sent[kind] += tensor.numel() * tensor.element_size()
            return send(*args, **kwargs)

        setattr(torch.distributed, name, counting)
    return sent


def modelled(stage: int) -> Counter[str]:
    found: Counter[str] = Counter()
    cfg = run_of(WORKERS, "engine.precision=bf16", f"engine.zero_stage={stage}")
    for part in exchanges(cfg):
        found[part.collective] += part.bytes
    return found


def test_at_stage_0_gradients_of_all_weights_go_out_once_in_float32():
    # By torch's DistributedDataParallel: tests/test_gradient_traffic.py looks at what it sends.
    assert modelled(0) == {"all_reduce": 4 * trainable(run_of(WORKERS))}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_and_weights_that_deepspeed_sends_are_those_of_the_model(stage, counted):
    sent, model = Counter(counted[stage]), modelled(stage)
    assert set(sent) == set(model)
    small = 4 * 4 * (tiny_config().model.prototypes + 8)  # centre, norms: what the model leaves out
    for collective, size in model.items():
        assert size <= sent[collective] <= size + small


@pytest.mark.slow
def test_stage_3_sends_no_more_than_the_model_says_and_its_gradients_and_teacher_exactly(counted):
    sent, model = Counter(counted[3]), modelled(3)
    assert sent["reduce_scatter"] == model["reduce_scatter"]
    assert sent["broadcast"] == model["broadcast"]
    assert model["broadcast"] < sent["all_gather"] <= model["all_gather"]


def test_linear_layers_have_as_many_weights_as_in_the_module():
    for words in [(), ("loss.w_gg=0", "loss.w_gl=0"), ("loss.w_rl=0", "loss.w_rg=0")]:
        cfg = tiny_config(*words)
        module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
        counts = {True: 0, False: 0}  # by whether it is trained
        for part in module.modules():
            if type(part) is nn.Linear:  # not the prototypes, a kind of it
                for weight in part.parameters():
                    counts[weight.requires_grad] += weight.numel()
        assert linear_weights(cfg) == counts[True]
        if cfg.loss.uses_teacher:
            assert linear_weights(cfg, teacher=True) == counts[False]


@given(workers=st.integers(1, 9), numbers=st.integers(1, 5))
def test_a_ring_of_any_size_sends_what_the_model_says(workers, numbers):
    size = numbers * workers * 4
    sent = ring_all_reduce(np.ones((workers, numbers * workers), np.float32))
    assert bytes_sent([Exchange("all_reduce", size, 1)], workers=workers) == pytest.approx(sent)
    halves = [Exchange("reduce_scatter", size, 1), Exchange("all_gather", size, 1)]
    assert bytes_sent(halves, workers=workers) == pytest.approx(sent)


def ring_all_reduce(values: np.ndarray) -> int:
    """Sum over ranks (N, numbers) by passing parts around; bytes that each rank sent."""
    workers, total = len(values), values.sum(axis=0)
    parts = [np.split(rank, workers) for rank in values]
    sent = 0
    for adds, turn in itertools.product((True, False), range(workers - 1)):
        moved = [(rank, (rank - turn + (not adds)) % workers) for rank in range(workers)]
        bufs = [parts[rank][part].copy() for rank, part in moved]
        for (rank, part), buf in zip(moved, bufs, strict=True):
            target = parts[(rank + 1) % workers]
            target[part] = target[part] + buf if adds else buf
        sent += bufs[0].nbytes
    for rank in parts:
        np.testing.assert_array_equal(np.concatenate(rank), total)
    return sent


def test_only_trained_weights_have_gradients_and_the_teacher_travels_at_stage_3_alone():
    cfg = run_of(4)
    assert [part.bytes for part in exchanges(cfg)] == [4 * trainable(cfg)]
    teacher = parameters(cfg)["teacher"]
    without = run_of(4, "engine.zero_stage=3", "loss.w_gg=0", "loss.w_gl=0")
    kinds = {part.collective for part in exchanges(without)}
    assert kinds == {"reduce_scatter", "all_gather"}
    at_3 = exchanges(run_of(4, "engine.zero_stage=3"))
    assert next(part.bytes for part in at_3 if part.collective == "broadcast") == 2 * 4 * teacher


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_sends_nothing_and_is_as_fast_as_it_is(stage):
    cfg = run_of(1, f"engine.zero_stage={stage}")
    said = predict(cfg, alone_s=0.5, link=Link(1e9, 1e-3))
    assert (said.sent_bytes, said.exchange_s) == (0, 0)
    assert (said.step_s, said.efficiency, said.limit) == (0.5, 1, "compute")


def test_the_prediction_is_the_step_plus_the_all_reduce_that_was_measured():
    cfg = run_of(2)
    link = measured_link(trainable(cfg), workers=2, all_reduce_s=0.25)
    assert link.bytes_per_s == pytest.approx(4 * trainable(cfg) / 0.25)
    assert predict(cfg, alone_s=1.0, link=link).step_s == pytest.approx(1.25)
    assert predict(cfg, alone_s=1.0, link=link, overlap=0.8).step_s == pytest.approx(1.05)
    hidden = predict(cfg, alone_s=1.0, link=link, overlap=1.0)
    assert hidden.efficiency == hidden.efficiency_fed == 1


def test_views_limit_where_cores_are_too_few():
    cfg = run_of(2)
    needed = views_per_step(cfg)
    assert needed == TURNS * (cfg.views.global_count + cfg.views.local_count)
    slow = predict(cfg, alone_s=1.0, link=Link(1e12), feeding=Feeding(needed / 6, cores=3))
    assert (slow.step_s, slow.limit) == (pytest.approx(2.0), "views")
    assert slow.cores == pytest.approx(6, rel=1e-3)
    assert slow.efficiency == pytest.approx(0.5)
    enough = predict(cfg, alone_s=1.0, link=Link(1e12), feeding=Feeding(needed / 6, cores=7))
    assert enough.limit == "compute"
    assert enough.efficiency > 0.99


def test_latency_grows_with_the_depth_of_a_tree():
    sent = [Exchange("all_reduce", 0, 3)]
    times = [seconds(sent, workers=n, link=Link(1.0, 1e-3)) for n in (1, 2, 64, 512)]
    assert times == pytest.approx([0, 0.006, 0.036, 0.054])


@given(counts=st.lists(st.integers(1, 512), min_size=2, max_size=5), stage=st.sampled_from(STAGES))
def test_more_workers_are_never_more_efficient(counts, stage):
    cluster = Cluster()
    found = [
        predict(
            run_of(count, f"engine.zero_stage={stage}"), alone_s=0.01, link=cluster.link(count)
        ).efficiency
        for count in sorted(counts)
    ]
    assert found == sorted(found, reverse=True)


def test_weak_scaling_keeps_the_micro_batch_and_strong_scaling_the_batch_that_counts_divide():
    cfg = tiny_config("global_batch=8", "engine.micro_batch=2")
    found = series(cfg, (1, 2, 3, 8, 16))
    assert found["weak"] == [Case(n, 2 * n, 2) for n in (1, 2, 3, 8, 16)]
    assert found["strong"] == [Case(1, 8, 2), Case(2, 8, 2), Case(8, 8, 1)]
    for case in itertools.chain(*found.values()):
        run = case.config(cfg.model_dump(mode="json"))
        assert run.workers * run.micro_batch * run.accumulation == case.global_batch


def test_every_number_that_a_prediction_rests_on_is_in_the_table_and_says_where_it_is_from():
    rows = prediction_rows(tiny_config("engine.precision=bf16"), views_per_s=80.0, known=[])
    predicted = [row for row in rows if "GPUs" in row]
    assert {(row["GPUs"], row["ZeRO"]) for row in predicted} == {
        (gpus, stage) for gpus in (8, 64, 512) for stage in STAGES
    }
    sources = {row["taken for given"]: row.get("source") for row in rows if "GPUs" not in row}
    assert sources["views a core makes a second"] == "measured in this run"
    assert sources["share of the exchange that is hidden"] == "assumed"
    numbers = [row["value"] for row in rows if "GPUs" not in row]
    cluster = Cluster()
    for number in (cluster.cores, cluster.used, cluster.reached, cluster.per_node):
        assert number in numbers
