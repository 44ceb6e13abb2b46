"""The rival of the step benchmark does the same work: same weights, same masks, same loss."""

from __future__ import annotations

import pytest
import torch

from benchmarks._step_monai import ComposedGLMAE, ViewAutoEncoder
from benchmarks._step_rows import Size, Way, config, counted_flops
from glmae_ray import costs
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config
from tests.models.test_against_timm_and_monai import copy_autoencoder
from tests.models.test_glmae import make_batch

EVEN = ("model.patch=4", "views.local_size=[16,12,8]", "views.global_size=[20,16,12]")


def with_masks(autoencoder: ViewAutoEncoder, kept: list[torch.Tensor], tokens: int) -> None:
    """Let each call take the next of these masks in place of one of its own."""
    turns = iter(kept)

    def masking(x, masking_ratio=None):
        index = next(turns)
        mask = torch.ones(len(x), tokens, dtype=torch.int).scatter(1, index, 0)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), index, mask

    autoencoder._masking = masking


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_what_a_user_would_compose_from_monai_has_our_loss_and_our_gradients():
    cfg = tiny_config(*EVEN, "loss.w_gg=0.5", "loss.w_gl=2")
    torch.manual_seed(0)
    ours = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    theirs = ComposedGLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    copy_autoencoder(ours, theirs.local)
    for mine, its in ((ours.head, theirs.head), (ours.teacher_head, theirs.teacher_head)):
        its.mlp.load_state_dict(mine.mlp.state_dict())
        its.last.parametrizations.weight.original1.data.copy_(mine.prototypes.weight)
    theirs.teacher.load_state_dict(theirs.glob.state_dict())
    for part in theirs.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-6
    batch, units = make_batch(cfg), {}
    for kind, autoencoder in (("global", theirs.glob), ("local", theirs.local)):
        views = ours._views(batch, kind)
        masks = ours._masks(batch, kind, views).kept_BK.unflatten(0, batch[kind].shape[:2])
        tokens = views.all().shape[1]
        with_masks(autoencoder, list(masks.unbind(1)), tokens)
        units[kind] = list(((batch[kind].float() + 1000) / 2000).clamp(0, 1).unbind(1))
    mine = ours(batch, teacher_temperature=0.05)["loss"]
    its = theirs(units["global"], units["local"], tau=0.05)
    torch.testing.assert_close(its, mine, atol=1e-5, rtol=1e-5)
    mine.backward()
    its.backward()
    for name, other in (
        ("encoder.patch_embed.proj.weight", "local.patch_embedding.patch_embeddings.weight"),
        ("encoder.blocks.0.attn.qkv.weight", "local.blocks.0.attn.qkv.weight"),
        ("decoder.predict.bias", "local.decoder_pred.bias"),
        ("head.mlp.0.weight", "head.mlp.0.weight"),
    ):
        one, two = (m.get_parameter(n).grad for m, n in ((ours, name), (theirs, other)))
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4, msg=name)
    ours.update_teacher(0.9)
    theirs.update(0.9)
    # MONAI-style centre starts at 0; ours at the first step's mean.
    torch.testing.assert_close(theirs.center[0], 0.1 * ours.center, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", ["glmae", "mae"])
def test_the_need_that_the_benchmark_counts_is_the_need_that_doctor_prints(objective):
    size = Size(96, 64, samples=3, preset="tiny")
    counted = counted_flops(Way(objective, "ours"), size)
    printed = sum(costs.flops(config(Way(objective, "ours"), size)).values())
    assert printed == pytest.approx(counted, rel=0.02)
