"""Engine and loop in one process: every ZeRO stage, precision, accumulation, save and load."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import glmae_ray.engine
from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import held_out_reconstruction, mean_over_workers, train_steps
from glmae_ray.models.glmae import GLMAE
from glmae_ray.paths import publish
from tests.conftest import tiny_config
from tests.models.test_glmae import make_batch
from tests.models.test_step_options import NoLookAtValues

STAGES = [
    "engine.zero_stage=0",
    "engine.zero_stage=1",
    "engine.zero_stage=2",
    "engine.zero_stage=3",
]


TWO = "resources.workers=2"
UNEVEN = "resources.workers=[1,3]"  # on two workers
ON_TWO = [f"{name}, two workers" for name in STAGES]


def build_engine(cfg: PretrainConfig) -> Engine:
    torch.manual_seed(0)
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    return Engine(module, cfg=cfg, device=torch.device("cpu"))


def batches(cfg: PretrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """The same samples for ever, dealt to the workers in micro-batches."""
    whole, rank = make_batch(cfg, cfg.global_batch), int(os.environ["RANK"])
    for turn in itertools.count():
        numbers = [number % cfg.global_batch for number in cfg.samples_of(turn, rank=rank)]
        yield {name: v[numbers] for name, v in whole.items()}


def train(words: list[str], folder: str) -> dict[str, list[float]]:
    """Losses and norms of a run, and those of the same run saved and loaded in the middle."""
    cfg = tiny_config("steps=6", "optim.base_lr=0.1", "optim.warmup_steps=1", *words)
    cfg = cfg.on(int(os.environ["WORLD_SIZE"]))
    share_all_weights()
    engine = build_engine(cfg)
    losses, norms, held_out = [], [], []
    rank = int(os.environ["RANK"])
    for info in train_steps(engine, batches(cfg), cfg=cfg, rank=rank):
        losses.append(mean_over_workers(info.outputs)["loss"])
        norms.append(engine.gradient_norm())
        if info.step == 3:
            snapshot = engine.snapshot()
        if info.step == 5:
            engine.snapshot()  # leaves the one before as it is, while somebody holds it
    write(snapshot, Path(folder))
    held_out.append(held_out_reconstruction(engine, [(make_batch(cfg), 1.0)])["r2"])
    with engine.whole_parameters():
        teacher = [p.square().sum().item() for p in engine.module.teacher_encoder.parameters()]
    again = build_engine(cfg)
    again.load(Path(folder))
    resumed = [
        mean_over_workers(info.outputs)["loss"]
        for info in train_steps(again, batches(cfg), cfg=cfg, start=3, rank=rank)
    ]
    held_out.append(held_out_reconstruction(again, [(make_batch(cfg), 1.0)])["r2"])
    center = engine.module.center.tolist()
    found = {"losses": losses, "norms": norms, "resumed": resumed, "held_out": held_out}
    return {**found, "teacher": teacher, "center": center}


def save(engine: Engine, folder: Path) -> None:
    """Write a rank's files. Collective."""
    write(engine.snapshot(), folder)


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write a snapshot. Collective."""
    for name, data in files.items():
        publish(folder / name, data)
    torch.distributed.barrier()


def share_all_weights() -> None:
    """Let ZeRO 3 cut up small weights too: it leaves whole what is below 100,000 numbers."""
    settings = glmae_ray.engine._settings

    def strict(cfg: PretrainConfig, trained: int) -> dict[str, Any]:
        made = settings(cfg, trained)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    glmae_ray.engine._settings = strict


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    cases = {name: [name] for name in STAGES}
    cases["divided"] = ["engine.micro_batch=1"]
    for name in STAGES:
        cases[f"{name}, two workers"] = [name, TWO]
    six = ["global_batch=6", "engine.micro_batch=2"]
    cases |= {"six": six, "six, uneven": [*six, UNEVEN]}
    cases["six, uneven, stage 2"] = [*six, UNEVEN, "engine.zero_stage=2"]
    cases["recomputed"] = ["model.activation_checkpointing=true"]
    cases["bf16"] = ["engine.precision=bf16"]
    cases["bf16, stage 2"] = ["engine.precision=bf16", "engine.zero_stage=2"]
    folder = tmp_path_factory.mktemp("engine")
    return in_own_processes(cases, folder, function="tests.test_engine_and_loop.train")


def in_own_processes(
    cases: dict[str, list[str]], folder: Path, *, function: str
) -> dict[str, dict[str, Any]]:
    """What a function found in each case, with a folder for each.

    Cases of as many workers share their processes, as to start those takes longer than to train.
    """
    worlds: dict[int, dict[str, list[str]]] = {}
    for name, words in cases.items():
        worlds.setdefault(_workers(words), {})[name] = words
    found: dict[str, dict[str, Any]] = {}
    for workers, some in worlds.items():
        calls = [(words, str(folder / name)) for name, words in some.items()]
        found |= zip(some, _call(function, calls, workers=workers), strict=True)
    return found


def in_own_process(words: list[str], folder: Path, *, function: str) -> Any:
    """What a function found: DeepSpeed keeps one world per process."""
    (found,) = _call(function, [(words, str(folder))], workers=_workers(words))
    return found


def _workers(words: list[str]) -> int:
    return 2 if UNEVEN in words else tiny_config(*words).resources.workers


def _call(function: str, calls: list[tuple[list[str], str]], *, workers: int) -> list[Any]:
    """What a function gave on rank 0, call by call, and that it gave the same on the others."""
    module, _, name = function.rpartition(".")
    code = (
        f"import json, sys; from {module} import {name} as call\n"
        "results = [call(*arguments) for arguments in json.loads(sys.argv[1])]\n"
        "print('RESULT', json.dumps(results), flush=True)\n"
        # Else one may be gone while the other still sends, and gloo ends that process.
        "import torch.distributed as world; world.barrier(); world.destroy_process_group()"
    )
    world = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    world["MASTER_PORT"] = str(_free_port()) if workers > 1 else "0"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(calls)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    try:
        with ThreadPoolExecutor(workers) as pool:  # a rank that nobody reads from would wait
            told = list(pool.map(lambda process: process.communicate(timeout=300), ranks))
    finally:
        for process in ranks:
            process.kill()
    results = []
    for process, (out, err) in zip(ranks, told, strict=True):
        assert process.returncode == 0, err
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        results.append(json.loads(line.removeprefix("RESULT ")))
    for other in results[1:]:
        assert other == results[0]
    return results[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("name", STAGES[1:])
def test_every_zero_stage_gives_the_same_losses_and_gradient_norms(runs, name):
    plain, sharded = runs[STAGES[0]], runs[name]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert sharded["held_out"] == pytest.approx(plain["held_out"], abs=1e-4)
    assert sharded["teacher"] == pytest.approx(plain["teacher"], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", STAGES)
def test_two_workers_have_the_losses_the_teacher_and_the_centre_of_one(runs, name):
    one, two = runs[STAGES[0]], runs[f"{name}, two workers"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert max(one["teacher"]) > 0
    assert two["teacher"] == pytest.approx(one["teacher"], rel=1e-4, abs=1e-9)
    assert two["center"] == pytest.approx(one["center"], abs=1e-4)
    assert max(map(abs, two["center"])) > 0.01


@pytest.mark.parametrize("name", ["six, uneven", "six, uneven, stage 2"])
def test_workers_that_do_not_divide_the_micro_batches_have_the_figures_of_one(runs, name):
    one, uneven = runs["six"], runs[name]
    assert uneven["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert uneven["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert uneven["teacher"] == pytest.approx(one["teacher"], rel=1e-4, abs=1e-9)
    assert uneven["center"] == pytest.approx(one["center"], abs=1e-4)
    assert uneven["resumed"] == pytest.approx(one["losses"][3:], rel=1e-4)
    assert uneven["losses"][0] != pytest.approx(runs[STAGES[0]]["losses"][0], rel=1e-4)


def test_activation_checkpointing_changes_nothing(runs):
    assert runs["recomputed"]["losses"] == pytest.approx(runs[STAGES[0]]["losses"], rel=1e-5)


def test_dividing_the_batch_into_micro_batches_changes_nothing(runs):
    assert runs["divided"]["losses"] == pytest.approx(runs[STAGES[0]]["losses"], rel=1e-4)


@pytest.mark.parametrize("name", ["bf16", "bf16, stage 2"])
def test_bfloat16_stays_near_float32(runs, name):
    assert runs[name]["losses"] == pytest.approx(runs[STAGES[0]]["losses"], rel=0.02)


@pytest.mark.parametrize(
    "name",
    [*STAGES, *(f"{name}, two workers" for name in STAGES), "bf16", "bf16, stage 2", "divided"],
)
def test_a_saved_engine_continues_as_if_nothing_had_happened(runs, name):
    run = runs[name]
    assert run["resumed"] == pytest.approx(run["losses"][3:], rel=1e-5)
    assert run["held_out"][1] == pytest.approx(run["held_out"][0], abs=1e-5)


def test_the_run_learns_its_four_samples(runs):
    losses = runs[STAGES[0]]["losses"]
    assert losses[-1] < losses[1]


def test_neither_engine_nor_loop_waits_for_the_device_between_logged_steps():
    """At stage 0. From 1 on DeepSpeed itself looks at the gradient's norm to find overflows."""
    code = "from tests.test_engine_and_loop import step_without_looking; step_without_looking()"
    world = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | world | {"MASTER_PORT": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def step_without_looking() -> None:
    cfg = tiny_config("steps=4")
    engine = build_engine(cfg)
    from deepspeed.accelerator import get_accelerator

    waits: list[int] = []
    type(get_accelerator()).synchronize = lambda *_: waits.append(1)
    with NoLookAtValues():
        assert [info.step for info in train_steps(engine, batches(cfg), cfg=cfg)] == [1, 2, 3, 4]
    assert not waits
