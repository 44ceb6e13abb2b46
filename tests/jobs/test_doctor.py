"""`glmae doctor` through its door: figures, advice, and reasons why a run could not start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from glmae_ray import costs
from glmae_ray.cli import main
from glmae_ray.config import DoctorConfig
from glmae_ray.config_loading import load, shipped
from glmae_ray.costs_memory import memory
from glmae_ray.jobs import doctor
from glmae_ray.jobs.fitting import needed, usable
from glmae_ray.jobs.machine import Gpu, Machine, this_machine
from tests.conftest import TINY
from tests.store.test_summary import make_store

GB = 10**9
CONFIGS = sorted(shipped("pretrain").glob("*.yaml"))
# What TINY says of a run, without places.
RUN = [word for word in TINY if not word.startswith(("store=", "run="))]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of eight CPUs and no GPU, whatever runs the tests."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return use(monkeypatch)


def use(monkeypatch, *, cpus=8, memory=64 * GB, gpus=()):
    there = Machine(cpus, memory, tuple(Gpu("a GPU", size) for size in gpus))
    monkeypatch.setattr(doctor, "this_machine", lambda: there)
    return there


def config(*words):
    return load(DoctorConfig, [*RUN, *words])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_passes_and_the_figures_are_those_of_costs(path, capsys):
    assert main(["doctor", str(path), "--json"]) == 0
    facts, cfg = json.loads(capsys.readouterr().out), load(DoctorConfig, [str(path)])
    assert facts["parameters"] == {**costs.parameters(cfg), "trained": costs.trainable(cfg)}
    assert facts["flops"]["sample"] == costs.flops(cfg)
    step = cfg.global_batch * sum(costs.flops(cfg).values())
    assert (facts["flops"]["step"], facts["flops"]["run"]) == (step, step * cfg.steps)
    assert facts["memory"]["peak"] == memory(cfg).peak
    assert facts["views"]["global"]["kept"] == costs.tokens(cfg, "global").kept
    assert facts["reasons"] == []


def test_the_text_says_the_same_in_a_hundred_columns(capsys):
    assert main(["doctor", str(shipped("pretrain/base.yaml")), "resources.workers=4"]) == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "step 64 samples = 4 x 4 x 4 (workers x micro-batches)",
        "encoder 88,203,264",
        "trained 130,266,112",
        "global 2 160 x 160 x 160 10 x 10 x 10 1000 400 600",
        "local 8 96 x 96 x 96 6 x 6 x 6 216 86 130",
        "a sample 2.11 TFLOP",
        "memory of each device at a micro-batch of 4, bf16, ZeRO 1",
        "moments 260.53 MB AdamW's two",
    ):
        assert line in lines
    assert "views: 30.5 MB a sample" in text
    assert max(map(len, text.splitlines())) <= 100


def test_without_words_it_is_about_the_machine(capsys, monkeypatch):
    use(monkeypatch, cpus=6, memory=32 * GB, gpus=[80 * GB])
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"CPUs 6", "memory 32.00 GB", "GPUs a GPU (80.00 GB)"} <= set(lines)
    assert any(line.startswith("torch 2") for line in lines)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == [{"name": "a GPU", "memory": 80 * GB}]


def test_a_run_states_its_steps_and_its_batch(capsys):
    assert main(["doctor", "model.preset=large", "resources.workers=8"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "glmae doctor: global_batch: is missing; give global_batch=...",
        "glmae doctor: steps: is missing; give steps=...",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["engine.precision=fp16"], "engine.precision: fp16 needs GPUs"),
        (["resources.gpu=true"], "resources.workers: 1 need a GPU each; the cluster has 0"),
        (["resources.workers=4", "resources.cpus_per_worker=2"], "are 9 CPUs; the cluster has 8"),
        (["store=nowhere"], "nowhere"),
    ],
)
def test_a_run_that_could_not_start_ends_with_2_and_the_reason(words, line, capsys):
    assert main(["doctor", *RUN, *words]) == 2
    printed = capsys.readouterr()
    (reason,) = printed.err.splitlines()
    assert reason.startswith("glmae doctor: ")
    assert line in reason
    assert "a sample" in printed.out


@pytest.mark.parametrize("words", [[*RUN, "engine.precision=fp16"], []])
def test_a_cluster_that_does_not_answer_is_the_only_reason(words):
    # A process of its own: the Ray of other tests may live in this one.
    line = [sys.executable, "-m", "glmae_ray.cli", "doctor", *words, "ray.address=127.0.0.1:1"]
    done = subprocess.run([*line, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (reason,) = done.stderr.splitlines()
    assert reason.startswith("glmae doctor: ray.address: 127.0.0.1:1 does not answer (")
    facts = json.loads(done.stdout)
    assert facts["cluster"] == {"address": "127.0.0.1:1", "nodes": []}
    assert ("flops" in facts, "cpus" in facts) == (bool(words), not words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["model.heads=4"],
            "model.heads: 4 heads of 6 of model.width 24; the fused attention kernels of GPUs "
            "want multiples of 8",
        ),
        (["engine.zero_stage=2"], "engine.zero_stage: 2 has nothing to share on one worker"),
    ],
)
def test_what_would_be_slow_is_advice(words, line, capsys):
    assert main(["doctor", *RUN, *words]) == 0
    assert line in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_that_is_too_small_brings_changes_that_fit(gpu, capsys, monkeypatch):
    words = ["global_batch=64", "engine.micro_batch=32"]
    plain = needed(config(*words), gpu=gpu)
    memory = int(plain / 2 / (usable(100, gpu=gpu) / 100))
    # 64 GB of the machine's own beside GPUs, which are what counts then.
    use(monkeypatch, **({"gpus": [memory]} if gpu else {"memory": memory}))
    assert main(["doctor", *RUN, *words, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    (line,) = [line for line in advice if "micro-batch of 32 takes" in line]
    smaller, other = line.split("; ")[1].split(", ")
    for change in (smaller, other):
        fields = change.split(" takes ")[0].split()
        assert needed(config(*words, *fields), gpu=gpu) <= usable(memory, gpu=gpu)
    small = int(smaller.split(" takes ")[0].removeprefix("engine.micro_batch="))
    assert needed(config(*words, f"engine.micro_batch={2 * small}"), gpu=gpu) > usable(
        memory, gpu=gpu
    )
    assert "model.activation_checkpointing=true" in other


def test_a_model_that_fits_nowhere_is_told(capsys, monkeypatch):
    use(monkeypatch, gpus=[1000])
    assert main(["doctor", *RUN]) == 0
    assert "take a smaller model.preset" in capsys.readouterr().out


def test_a_store_is_looked_at(tmp_path, capsys):
    make_store(tmp_path / "s")
    store = f"store={tmp_path / 's'}"
    assert main(["doctor", *RUN, store]) == 2
    printed = capsys.readouterr()
    assert "model.channels: 1, but the store's cases have [1, 2]" in printed.err
    fits = ["model.channels=2", "sampling.where=split == 'val'"]
    assert main(["doctor", *RUN, store, *fits, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert any("2 chosen cases are of the split val" in line for line in facts["advice"])


def test_a_run_folder_of_something_else_is_a_reason(tmp_path, capsys):
    make_store(tmp_path / "s")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    words = [f"store={tmp_path / 's'}", f"run={tmp_path / 'r'}", "model.channels=2"]
    assert main(["doctor", *RUN, *words, "sampling.where=split == 'val'"]) == 2
    assert "is not a run folder and not empty" in capsys.readouterr().err


def test_this_machine_has_cpus_and_memory():
    there = this_machine()
    assert there.cpus >= 2
    assert there.memory > 2**28
    assert there.node()["Resources"]["GPU"] == len(there.gpus)


FIRST, SECOND = Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), Gpu("Other, 1", 24564 * 2**20)


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [
        (None, (FIRST, SECOND)),
        ("", ()),
        ("-1", ()),
        ("0", (FIRST,)),
        ("1", (SECOND,)),
        ("1,0", (SECOND, FIRST)),
        ("1,-1,0", (SECOND,)),
        ("0,2,1", (FIRST,)),
        ("2", ()),
        ("none", ()),
        ("1,1", ()),
        ("GPU-4b3ce15a-7f00-4c6c-9c0e-0f5ed4a3bb21", (SECOND,)),
        ("GPU-4b3c, GPU-4a", (SECOND, FIRST)),
        ("GPU-4", ()),  # begins both
        ("GPU-5", ()),
    ],
)
def test_gpus_are_those_of_the_driver_that_cuda_may_see(chosen, gpus, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        "echo '0, GPU-4a1d0e6c-52c3-4d4f-8a53-6f8f8a0b9c10, NVIDIA H100 80GB HBM3, 81559'\n"
        "echo '1, GPU-4b3ce15a-7f00-4c6c-9c0e-0f5ed4a3bb21, Other, 1, 24564'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert this_machine().gpus == gpus


def test_neither_torch_nor_ray_is_loaded():
    path = str(shipped("pretrain/base.yaml"))
    code = (
        "import sys; from glmae_ray.cli import main; "
        f"assert main(['doctor', {path!r}]) in (0, 2); "
        "assert not {'torch', 'ray', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
