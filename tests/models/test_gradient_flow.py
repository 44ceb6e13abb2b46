"""Where gradients may not go: the teacher, pixels of hidden patches, positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import Encoder, patchify, sincos_positions, unpatchify
from glmae_ray.optim import parameter_groups
from tests.models.test_glmae import build, make_batch

PATCH = (8, 4, 2)
KINDS = ("global", "local")


def soft(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with voxels that a gradient can reach, all inside the window."""
    views = {kind: (batch[kind].float() * 0.8).requires_grad_() for kind in KINDS}
    return batch | views


def by_patch(module: GLMAE, batch: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Largest gradient of each patch, (views, N), and which of them were hidden."""
    gradient = batch[kind].grad
    assert gradient is not None
    largest = patchify(gradient.flatten(0, 1), PATCH).abs().amax(-1)
    seeds = batch[f"{kind}_seeds"].flatten()
    _, numbers = draw_masks(seeds, tokens=largest.shape[1], ratio=module.views.mask_ratio)
    hidden = torch.zeros_like(largest).scatter(1, numbers, 1.0).bool()
    return largest, hidden


def assert_visible_only(module: GLMAE, batch: dict[str, Tensor], kind: str) -> None:
    largest, hidden = by_patch(module, batch, kind)
    assert torch.equal(largest[hidden], torch.zeros_like(largest[hidden]))
    assert largest[~hidden].min() > 0


@pytest.mark.parametrize("channels", [1, 2])
def test_consistency_sends_no_gradient_to_pixels_of_hidden_patches(channels):
    """Neither through the student, which must not see them, nor through the teacher, which does."""
    cfg, module = build("loss.w_rl=0", "loss.w_rg=0", f"model.channels={channels}")
    batch = soft(make_batch(cfg))
    module(batch)["loss"].backward()
    for kind in KINDS:
        assert_visible_only(module, batch, kind)


def test_reconstruction_sends_none_to_pixels_of_hidden_patches_through_the_network():
    """As targets they do count, so the gradient is taken of what the decoder says."""
    cfg, module = build("loss.w_gg=0", "loss.w_gl=0")
    said: list[Tensor] = []
    module.decoder.register_forward_hook(lambda *a: said.append(a[2]))
    batch = soft(make_batch(cfg))
    module(batch)
    torch.stack([output.square().sum() for output in said]).sum().backward()
    for kind in KINDS:
        assert_visible_only(module, batch, kind)


def test_a_visible_patch_alone_decides_what_the_encoder_sees_of_a_view():
    """Other voxels in hidden patches, also ones that are no numbers, change no feature."""
    cfg, module = build("loss.w_rl=0", "loss.w_gl=0", "loss.w_gg=0")
    seen: list[Tensor] = []
    module.encoder.register_forward_hook(lambda *a: seen.append(a[2]))
    batch = make_batch(cfg)
    module(batch)
    voxels = patchify(batch["global"].flatten(0, 1).float(), PATCH)
    _, hidden = draw_masks(batch["global_seeds"].flatten(), tokens=voxels.shape[1], ratio=0.6)
    changed = voxels.scatter(1, hidden[..., None].expand(-1, -1, voxels.shape[-1]), torch.nan)
    grid = tuple(side // part for side, part in zip((32, 20, 12), PATCH, strict=True))
    views = unpatchify(changed, grid=grid, patch=PATCH).unflatten(0, (3, 2))
    module(batch | {"global": views})
    assert torch.equal(seen[0], seen[1])


def test_no_gradient_enters_the_teacher():
    """Its answers are constants to autograd, its weights stay without gradient and as they were."""
    cfg, module = build()
    answers: list[Tensor] = []
    module.teacher_head.register_forward_hook(lambda *a: answers.append(a[2]))
    before = [p.clone() for p in module.teacher_and_student()[0]]
    batch = soft(make_batch(cfg))
    module(batch)["loss"].backward()
    assert [a.requires_grad for a in answers] == [False]
    for old, parameter in zip(before, module.teacher_and_student()[0], strict=True):
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(old, parameter)


def test_an_optimizer_step_moves_every_student_weight_and_no_position():
    """Sin-cos is no parameter, of the encoder or of the decoder, and weight decay misses it."""
    cfg, module = build("optim.weight_decay=0.5")
    grid = (4, 5, 6)
    tables = {width: sincos_positions(grid, width).clone() for width in (24, 12)}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    groups = parameter_groups(module.named_parameters(), weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    module(make_batch(cfg))["loss"].backward()
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(before[name], parameter) == name.startswith("teacher"), name
    for width, table in tables.items():
        assert torch.equal(sincos_positions(grid, width), table)
    assert not any("pos" in name for name, _ in module.named_parameters())


def test_an_adopted_table_of_positions_is_saved_but_never_trained():
    encoder = Encoder(channels=1, patch=PATCH, width=24, depth=1, heads=2)
    table = torch.rand(25, 24, requires_grad=True)
    encoder.adopt_positions(table, grid=(2, 3, 4))
    encoder(torch.rand(1, 24, 64), grid=(2, 3, 4)).sum().backward()
    assert table.grad is None
    assert not encoder.positions((2, 3, 4)).requires_grad
    assert "pos_embed" in encoder.state_dict()
    assert "pos_embed" not in dict(encoder.named_parameters())
