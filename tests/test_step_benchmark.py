"""The rival of the step benchmark does the same work: same weights, same masks, same loss."""

from __future__ import annotations

import pytest
import torch

from benchmarks._step_monai import ComposedGLMAE, ViewAutoEncoder
from benchmarks._step_rows import Size, Way, config, counted_flops
from glmae_ray import costs
from glmae_ray.config import PretrainConfig
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


# Beginnings of our names, and what MONAI has instead; in the blocks every name is one of these.
RENAMED = {
    "encoder.patch_embed.proj.": "local.patch_embedding.patch_embeddings.",
    "encoder.cls_token": "local.cls_token",
    "encoder.blocks.": "local.blocks.",
    "decoder.embed.": "local.decoder_embed.",
    "decoder.mask_token": "local.mask_tokens",
    "decoder.blocks.": "local.decoder_blocks.",
    "decoder.predict.": "local.decoder_pred.",
    "head.prototypes.weight": "head.last.parametrizations.weight.original1",
}
IN_BLOCKS = {
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.linear1.",
    ".mlp.fc2.": ".mlp.linear2.",
}


def its_name(name: str, cfg: PretrainConfig) -> str:
    """What the rival calls a weight of ours."""
    # MONAI's final norms come last in its lists of blocks.
    name = name.replace("encoder.norm.", f"encoder.blocks.{cfg.model.depth}.")
    name = name.replace("decoder.norm.", f"decoder.blocks.{cfg.model.decoder_depth}.")
    for part, other in IN_BLOCKS.items():
        if ".blocks." in name:
            name = name.replace(part, other)
    starts = [start for start in RENAMED if name.startswith(start)]
    return RENAMED[starts[0]] + name.removeprefix(starts[0]) if starts else name


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of what the loss reaches; MONAI's blocks have norms for cross-attention that are idle."""
    found = {name: weight.grad for name, weight in module.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


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
    my_gradients, its_gradients = gradients(ours), gradients(theirs)
    assert {its_name(name, cfg) for name in my_gradients} == set(its_gradients)
    assert len(my_gradients) == sum(weight.requires_grad for weight in ours.parameters())
    for name, one in my_gradients.items():
        two = its_gradients[its_name(name, cfg)]
        torch.testing.assert_close(
            two, one, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert one.any(), name
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
