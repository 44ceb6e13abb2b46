"""What every head of HEADS has to do, on unequal sides."""

from __future__ import annotations

import pytest
import torch

from glmae_ray.errors import UserError
from glmae_ray.models.heads import HEADS
from tests.models.finetunes import CLASSIFIES, SIZE, finetune_config, finetuning

TASKS = {"unetr": [], "linear": CLASSIFIES, "mlp": [*CLASSIFIES, "head.kind=mlp"]}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_gives_its_outputs_and_teaches_every_weight(kind):
    module = finetuning(*TASKS[kind], outputs=4)
    assert type(module.network.encoder).__name__ == "Encoder"
    logits = module.network(torch.rand(2, 2, *SIZE))
    assert logits.shape == ((2, 4, *SIZE) if kind == "unetr" else (2, 4))
    logits.square().sum().backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_pooling_is_the_mean_of_patches_without_cls(kind):
    network = finetuning(*TASKS[kind]).network
    x = torch.rand(2, 2, *SIZE)
    seen = {}
    network.encoder.register_forward_hook(lambda *args: seen.update(tokens=args[2]))
    logits = network(x)
    torch.testing.assert_close(logits, network.layers(seen["tokens"][:, 1:].mean(1)))


def test_a_patch_that_unetr_cannot_do_is_one_line():
    cfg = finetune_config("model.patch=[8,6,2]")
    with pytest.raises(UserError, match=r"head.kind: unetr does not fit: .* not \(8, 6, 2\)"):
        HEADS["unetr"](_encoder(cfg), cfg=cfg.head, size=cfg.crops.size, outputs=2)


def _encoder(cfg):
    from glmae_ray.models.finetuning import build_encoder

    return build_encoder(cfg)[0]
