"""Terms of the objective and schedules against NumPy and first principles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glmae_ray import losses
from glmae_ray.models.glmae import GLMAE
from glmae_ray.optim import layer_groups, parameter_groups, schedule
from tests.conftest import tiny_config
from tests.models.finetunes import finetuning


def test_standardised_patches_have_mean_zero_variance_one_and_can_be_undone():
    patches = torch.rand(2, 5, 64, dtype=torch.float64)
    standard, statistics = losses.standardise(patches)
    torch.testing.assert_close(standard.mean(-1), torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(
        standard.var(-1, correction=0), torch.ones(2, 5, dtype=torch.float64), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(standard * statistics.deviation + statistics.mean, patches)


def test_a_patch_of_pure_air_becomes_zero_and_not_a_number():
    standard, _ = losses.standardise(torch.full((1, 1, 64), 0.25))
    assert torch.equal(standard, torch.zeros(1, 1, 64))


def test_predicting_the_mean_costs_one_unless_a_patch_has_no_variance():
    patches = torch.cat([torch.rand(1, 3, 64), torch.zeros(1, 1, 64)], dim=1)
    target, _ = losses.standardise(patches)
    trivial = losses.reconstruction_loss(torch.zeros_like(target), target)
    assert trivial.item() == pytest.approx(0.75, abs=1e-3)


def test_terms_stay_in_float32_under_bfloat16_and_float64_stays_itself():
    for given, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert losses.at_least_float32(torch.zeros(1, dtype=given)).dtype == wanted


def test_every_pair_is_the_mean_over_pairs():
    teacher, student = torch.rand(3, 2, 7).double(), -torch.rand(3, 4, 7).double()
    pairs = [
        -(teacher[b, i] * student[b, j]).sum() for b in range(3) for i in range(2) for j in range(4)
    ]
    torch.testing.assert_close(
        losses.every_pair_cross_entropy(teacher, student), torch.stack(pairs).mean()
    )


def test_entropy_is_ln_k_for_a_uniform_and_zero_for_a_certain_distribution():
    assert losses.entropy(torch.full((2, 4096), 1 / 4096)).item() == pytest.approx(8.318, abs=1e-3)
    assert losses.entropy(torch.eye(5)).item() == 0


def test_the_learning_rate_warms_up_linearly_and_ends_at_zero():
    cfg = tiny_config("steps=100", "optim.warmup_steps=10", "global_batch=256")
    rates = [schedule(step, cfg=cfg).lr for step in range(100)]
    assert rates[:10] == pytest.approx([cfg.lr * (n + 1) / 10 for n in range(10)])
    assert max(rates) == rates[9] == pytest.approx(1.5e-4)
    assert rates[55] == pytest.approx(cfg.lr / 2)
    assert 0 < rates[-1] < 1e-3 * cfg.lr
    assert np.all(np.diff(rates[10:]) < 0)


def test_momentum_rises_to_one_and_temperature_over_the_warm_up():
    cfg = tiny_config("steps=100", "optim.warmup_steps=10")
    values = [schedule(step, cfg=cfg) for step in range(101)]
    assert values[0].teacher_momentum == pytest.approx(0.996)
    assert values[100].teacher_momentum == 1
    assert values[50].teacher_momentum == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi / 2)) / 2)
    assert [values[n].teacher_temperature for n in (0, 5, 10, 99)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )


def test_only_matrices_decay_and_frozen_weights_are_in_no_group():
    cfg = tiny_config()
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    named = dict(module.named_parameters())
    decayed, free = parameter_groups(named.items(), weight_decay=0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    by_id = {id(p): name for name, p in named.items()}
    names = {kind: {by_id[id(p)] for p in group["params"]} for kind, group in
             (("decayed", decayed), ("free", free))}  # fmt: skip
    assert "encoder.patch_embed.proj.weight" in names["decayed"]
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.norm.weight"} <= names["free"]
    assert all(name.endswith("weight") for name in names["decayed"])
    trainable = {name for name, p in named.items() if p.requires_grad}
    assert names["decayed"] | names["free"] == trainable


def test_rates_of_layers_fall_from_the_head_down_by_the_decay():
    module = finetuning("model.depth=3")
    groups = layer_groups(module, weight_decay=0.05, lr=1e-3, layer_decay=0.5)
    by_id = {id(p): name for name, p in module.named_parameters()}
    rates = {by_id[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert rates.keys() == set(by_id.values())
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in groups)
    for name, scale in (
        ("out.conv.conv.bias", 1),
        ("encoder2.transp_conv_init.conv.weight", 1),  # of the head, as its name is MONAI's
        ("encoder.norm.weight", 1),
        ("encoder.blocks.2.mlp.fc1.weight", 0.5),
        ("encoder.blocks.0.norm1.bias", 0.125),
        ("encoder.patch_embed.proj.weight", 0.0625),
        ("encoder.cls_token", 0.0625),
    ):
        assert rates[f"network.{name}"] == scale, name
    free = {by_id[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert free == {n for n, p in module.named_parameters() if p.ndim < 2 or "cls_token" in n}


def test_without_decay_of_rates_the_groups_of_layers_are_the_two():
    module = finetuning()
    groups = layer_groups(module, weight_decay=0.05, lr=1e-3)
    plain = parameter_groups(module.named_parameters(), weight_decay=0.05)
    assert [group["params"] for group in groups] == [group["params"] for group in plain]
