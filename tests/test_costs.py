"""Parameters, tokens, operations and bytes from a config, against what the module really has."""

from __future__ import annotations

import pytest
import torch

from glmae_ray import costs
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load, shipped
from glmae_ray.costs_memory import activations, memory, reduce_bucket
from glmae_ray.engine import _settings
from glmae_ray.models.masking import draw_masks
from tests.conftest import tiny_config
from tests.measured_costs import build, measure_bytes, measure_flops

MAE = ("loss.w_rg=0", "loss.w_gg=0", "loss.w_gl=0")
# Rows of an ablation; each leaves out other parts.
ABLATIONS = [
    (),
    MAE,
    ("loss.w_rl=0", "loss.w_gg=0", "loss.w_gl=0"),
    ("loss.w_rl=0", "loss.w_rg=0"),
    ("loss.w_rg=0", "loss.w_gg=0"),
    ("loss.w_rl=0", "loss.w_gl=0"),
    ("loss.w_rl=0", "loss.w_gg=0", "model.channels=2"),
]


def base_config(*words: str) -> PretrainConfig:
    path = str(shipped("pretrain/base.yaml"))
    return load(PretrainConfig, [path, "store=none", "run=none", "engine.zero_stage=0", *words])


@pytest.mark.parametrize(
    "cfg",
    [
        *(tiny_config(*words) for words in ABLATIONS),
        base_config(),
        base_config("model.preset=large", "model.channels=2", "model.patch=[16,8,8]"),
        base_config("model.preset=small", *MAE),
    ],
)
def test_parameters_are_those_of_the_module(cfg):
    module, count = build(cfg), costs.parameters(cfg)
    parts = {"encoder": ["encoder"], "decoder": ["decoder"], "head": ["head"]}
    parts["teacher"] = ["teacher_encoder", "teacher_head"]
    for part, names in parts.items():
        modules = [getattr(module, name) for name in names if hasattr(module, name)]
        there = sum(p.numel() for each in modules for p in each.parameters())
        assert count.get(part, 0) == there
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert costs.trainable(cfg) == trained


@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.99])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_tokens_are_those_that_masks_keep(ratio, kind):
    cfg = base_config(f"views.mask_ratio={ratio}", "views.local_size=[96,64,48]")
    t = costs.tokens(cfg, kind)
    kept, hidden = draw_masks(torch.zeros(1, dtype=torch.int64), tokens=t.every, ratio=ratio)
    assert (t.kept, t.hidden) == (kept.shape[1], hidden.shape[1])
    assert (t.encoded, t.whole) == (1 + t.kept, 1 + t.every)


def test_tokens_of_the_paper():
    assert [costs.tokens(base_config(), kind).every for kind in ("global", "local")] == [1000, 216]
    assert [costs.tokens(base_config(), kind).kept for kind in ("global", "local")] == [400, 86]


@pytest.mark.parametrize("words", ABLATIONS)
def test_operations_are_those_that_torch_counts(words):
    cfg = tiny_config(*words, "engine.micro_batch=1")
    assert sum(costs.flops(cfg).values()) == pytest.approx(measure_flops(cfg), rel=0.01)


@pytest.mark.parametrize(
    "words", [(), ("views.global_size=[160,96,128]", "views.local_size=[96,64,48]"), MAE]
)
def test_operations_of_the_base_model_are_those_that_torch_counts(words):
    cfg = base_config("engine.micro_batch=1", *words)
    assert sum(costs.flops(cfg).values()) == pytest.approx(measure_flops(cfg), rel=0.01)


def test_a_part_without_weight_costs_nothing():
    assert costs.flops(tiny_config(*MAE)).keys() == {"encoder", "decoder"}
    assert costs.flops(tiny_config("loss.w_rl=0", "loss.w_rg=0")).keys() == {
        "encoder",
        "head",
        "teacher",
    }
    assert memory(tiny_config(*MAE)).teacher == 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("words", ABLATIONS)
def test_activations_are_what_autograd_keeps(words, precision):
    cfg = tiny_config(*words, f"engine.precision={precision}", "engine.micro_batch=2")
    assert sum(activations(cfg).values()) == pytest.approx(measure_bytes(cfg).kept, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activations_follow_samples_precision_and_checkpointing(precision, samples, checkpointing):
    cfg = tiny_config(
        f"engine.micro_batch={samples}",
        f"engine.precision={precision}",
        f"model.activation_checkpointing={checkpointing}",
    )
    assert sum(activations(cfg).values()) == pytest.approx(measure_bytes(cfg).kept, rel=0.02)


def test_fake_tensors_keep_what_real_ones_keep():
    cfg = tiny_config("engine.precision=bf16")
    assert measure_bytes(cfg, fake=False).kept == measure_bytes(cfg).kept


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("engine.precision=float32",),
        ("model.activation_checkpointing=true",),
        ("global_batch=4",),
        MAE,
        ("loss.w_rl=0", "loss.w_rg=0"),
        ("model.preset=large", "engine.micro_batch=1", "global_batch=1"),
        ("model.preset=tiny", "model.channels=2", "views.local_size=[96,64,48]"),
    ],
)
def test_the_peak_of_a_step_is_that_of_the_living_tensors(words):
    cfg = base_config(*words)
    assert memory(cfg).peak == pytest.approx(measure_bytes(cfg).peak, rel=0.05)


def test_zero_shards_moments_then_gradients_then_weights():
    on_8 = [
        memory(base_config("resources.workers=8", f"engine.zero_stage={stage}"))
        for stage in range(4)
    ]
    whole = 4 * costs.trainable(base_config())
    shard = -(-whole // 8)
    assert [m.moments for m in on_8] == pytest.approx([2 * whole] + [2 * shard] * 3)
    assert [m.gradients for m in on_8] == pytest.approx([whole, whole, shard, shard])
    assert [m.weights for m in on_8] == pytest.approx([whole] * 3 + [shard])
    assert [m.master for m in on_8] == pytest.approx([0, shard, shard, 0])
    assert on_8[3].teacher == pytest.approx(on_8[0].teacher / 8)
    assert len({m.activations for m in on_8}) == 1


def test_zero_reduces_through_buffers_of_the_size_that_deepspeed_takes(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    trained = costs.trainable(base_config())
    asked = _settings(base_config("engine.zero_stage=1"), trained)["zero_optimization"]
    bucket = DeepSpeedZeroConfig(**asked).reduce_bucket_size
    assert bucket == reduce_bucket(trained) == 50_000_000
    small = base_config("model.preset=tiny")
    assert reduce_bucket(costs.trainable(small)) == costs.trainable(small)
    # Under autocast one for what travels in 16 bits and one for the rest, both of float32.
    precisions = {"float32": 1, "bf16": 2, "fp16": 2}
    for precision, buffers in precisions.items():
        for stage in (1, 2):
            cfg = base_config(f"engine.zero_stage={stage}", f"engine.precision={precision}")
            assert memory(cfg).buffers == buffers * 4 * bucket
    assert memory(base_config()).buffers == 0
