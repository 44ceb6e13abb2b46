"""Traps 4 to 8 of docs/method.md, in what a run reports: what happens to who falls in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glmae_ray.config import PretrainConfig
from glmae_ray.health import PATIENCE, Health
from glmae_ray.loop import held_out_reconstruction
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import gather_tokens, patchify
from glmae_ray.tracking import RunLog, summarise
from tests.models.test_glmae import build, make_batch

ONLY_MAE = ("loss.w_gg=0", "loss.w_gl=0")
ONLY_LOCAL = (*ONLY_MAE, "loss.w_rg=0")


# 4. Collapse.

MANY = "model.prototypes=4096"


def records(module: GLMAE, cfg: PretrainConfig, **options: float) -> list[dict[str, float]]:
    outputs = module(make_batch(cfg), **options)
    values = {name: value.item() for name, value in outputs.items()}
    return [{"step": 10 * n, **values} for n in range(1, PATIENCE + 1)]


def warnings(cfg: PretrainConfig, logged: list[dict[str, float]]) -> list[str]:
    health = Health(cfg)
    return [event.line for record in logged for event in health.judge(record)]


def test_a_consistency_term_stuck_at_ln_k_is_told():
    """ln 4096 = 8.318: every answer is every prototype."""
    cfg, module = build(MANY, "loss.student_temperature=1e4")
    logged = records(module, cfg, teacher_temperature=1e4)
    assert logged[0]["teacher_entropy"] == pytest.approx(8.318, abs=1e-3)
    assert logged[0]["loss_gg"] == pytest.approx(8.318, abs=1e-3)
    assert logged[0]["kl_gl"] == pytest.approx(0, abs=1e-4)
    (line,) = warnings(cfg, logged)
    assert "8.318 of at most 8.318 (ln 4096)" in line


def test_a_teacher_without_entropy_is_told():
    """Entropy 0: every answer is one prototype."""
    cfg, module = build(MANY)
    logged = records(module, cfg, teacher_temperature=1e-5)
    assert logged[0]["teacher_entropy"] == pytest.approx(0, abs=0.05)
    (line,) = warnings(cfg, logged)
    assert "collapsed to one answer" in line


def test_an_untrained_objective_is_not_taken_for_a_collapsed_one():
    """At the default temperatures (docs/method.md), before and after the centre has started."""
    cfg, module = build(MANY)
    before = records(module, cfg, teacher_temperature=0.04)
    assert {"teacher_entropy", "kl_gg", "kl_gl", "cls_std_global", "cls_std_local"} <= set(
        before[0]
    )
    module.update_teacher(0.996)
    assert warnings(cfg, before + records(module, cfg, teacher_temperature=0.04)) == []


# 5. Terms start at different sizes.


def test_each_term_is_logged_as_it_is_and_as_it_counts():
    """ln K against about 1: who sees but the sum cannot tell which term moves it."""
    weights = {"rl": 2.0, "rg": 3.0, "gg": 0.5, "gl": 0.25}
    cfg, module = build(MANY, *(f"loss.w_{name}={weight}" for name, weight in weights.items()))
    outputs = module(make_batch(cfg), teacher_temperature=0.07)
    for name, weight in weights.items():
        raw, weighted = outputs[f"loss_{name}"], outputs[f"weighted_{name}"]
        assert weighted.item() == pytest.approx(weight * raw.item(), rel=1e-6)
        assert not raw.requires_grad
    assert 0.5 < outputs["loss_rl"].item() < 2
    assert math.log(4096) / 2 < outputs["loss_gg"].item() < 2 * math.log(4096)


# 6. Pictures of normalised targets.


@pytest.mark.parametrize("channels", [1, 2])
def test_a_decoder_that_is_always_right_paints_the_original(channels):
    """Its output has mean 0 and deviation 1; each patch needs its own two numbers back."""
    cfg, module = build(*ONLY_LOCAL, f"model.channels={channels}")
    batch = make_batch(cfg, 2)
    # Contrast and brightness differ from patch to patch, and some are pure air.
    level = torch.linspace(0, 1, 16)[:, None, None]
    batch["local"] = (batch["local"] * 0.3 * level + 800 * level - 500).short()
    batch["local"][:, 0, ..., :8, :, :] = -1000
    module.decoder.register_forward_hook(lambda *_: right_answer(batch, channels))
    with torch.no_grad():
        picture = module(batch, task="picture")["local"]
    torch.testing.assert_close(picture.reconstructed, picture.original, atol=1e-5, rtol=0)
    assert picture.masked.isnan().any()


def right_answer(batch: dict[str, Tensor], channels: int) -> Tensor:
    """The standardised voxels of the hidden patches, by the formula of docs/method.md."""
    unit = ((batch["local"].float() + 1000) / 2000).clamp(0, 1).flatten(0, 1)
    patches = patchify(unit, (8, 4, 2))
    _, hidden = draw_masks(batch["local_seeds"].flatten(), tokens=24, ratio=0.6)
    x = gather_tokens(patches, hidden)
    assert x.shape[-1] == channels * 64
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


# 7. The best checkpoint on the fold that is reported.


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=8))
def test_the_summary_reports_the_last_figure_beside_the_best(tmp_path_factory, figures):
    """The best of many flatters; the last is what a run that stops on time has."""
    run = tmp_path_factory.mktemp("run")
    log = RunLog(run, step=0, tensorboard=False)
    log.write({"step": 1, "samples": 4, "loss": 1.0, "interval_steps": 1, "interval_samples": 4,
               "interval_s": 1.0, "data_wait_s": 0.0, "peak_memory_bytes": 1})  # fmt: skip
    for step, loss in enumerate(figures, start=1):
        held_out = {"loss": loss, "trivial": 0.8, "r2": 1 - loss / 0.8}
        log.write({"step": step, "samples": 4 * step, "val_reconstruction": held_out})
    summarise(run)
    reported = json.loads((run / "summary.json").read_text())["val_reconstruction"]
    assert reported["last"] == figures[-1]
    assert reported["best"] == min(figures)
    assert reported["r2"] == pytest.approx(1 - figures[-1] / 0.8)


# 8. The normalised loss flatters.


class Bare:
    """An engine without DeepSpeed."""

    def __init__(self, module: GLMAE) -> None:
        self._module, self.train = module, module.train

    def __call__(self, batch: dict[str, Tensor], **options: object) -> object:
        return self._module(batch, **options)


def lazy(module: GLMAE) -> GLMAE:
    """Predict every patch's own mean, which is 0 once it is standardised."""
    with torch.no_grad():
        for parameter in module.decoder.predict.parameters():
            parameter.zero_()
    return module


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_predicting_the_mean_explains_nothing_however_much_air_there_is(share):
    """Air has no variance and makes the loss small for nothing: 0.5 at one half, r2 still 0."""
    cfg, module = build(*ONLY_MAE)
    batch = make_batch(cfg, 8)
    for kind in ("local", "global"):
        views = batch[kind]
        views[: int(share * len(views))] = -1000  # whole people of air
    figures = held_out_reconstruction(Bare(lazy(module)), [(batch, 1.0)])
    for suffix in ("", "_local", "_global"):
        assert figures[f"r2{suffix}"] == 0.0
        assert figures[f"loss{suffix}"] == figures[f"trivial{suffix}"]
        assert figures[f"trivial{suffix}"] == pytest.approx(1 - share, abs=1e-3)


def test_held_out_figures_belong_to_the_batch_and_not_to_chance():
    """Fixed masks: two models are compared on the same hidden patches, in any order of batches."""
    cfg, module = build(*ONLY_MAE)
    batch = make_batch(cfg, 4)
    parts = [({name: value[i : i + 2] for name, value in batch.items()}, 1.0) for i in (0, 2)]
    company = (batch, 0.0)  # only for a rank that has fewer
    figures = []
    for seed, order in ((0, parts), (1, [*parts[::-1], company])):
        torch.manual_seed(seed)
        figures.append(held_out_reconstruction(Bare(module), order))
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    other = batch | {"local_seeds": batch["local_seeds"] + 1}
    again = held_out_reconstruction(Bare(module), [(other, 1.0)])
    assert again["loss_local"] != pytest.approx(figures[0]["loss_local"], rel=1e-6)
    assert again["loss_global"] == pytest.approx(figures[0]["loss_global"], rel=1e-6)
