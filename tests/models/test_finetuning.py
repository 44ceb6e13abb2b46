"""The finetuning module through its one forward, and the encoders it starts from."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from glmae_ray.errors import UserError
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.finetuning import Finetuning, build_encoder
from glmae_ray.models.vit3d import Encoder
from glmae_ray.optim import layer_groups
from tests.models.finetunes import CLASSIFIES, SIZE, crops, finetune_config, finetuning


def test_the_objective_is_dice_and_cross_entropy_of_all_crops_with_the_weights_of_the_config():
    module, batch = finetuning("loss.dice=2", "loss.cross_entropy=0.5"), crops()
    outputs = module(batch, weight=0.0, teacher_temperature=0.07)
    logits = module.network(batch["image"].flatten(0, 1))
    monai = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=2, lambda_ce=0.5)
    expected = monai(logits, batch["label"].flatten(0, 1)[:, None])
    torch.testing.assert_close(outputs["loss"], expected)
    parts = 2 * outputs["loss_dice"] + 0.5 * outputs["loss_cross_entropy"]
    torch.testing.assert_close(outputs["loss"], parts)


def test_a_term_of_weight_0_is_not_computed():
    outputs = finetuning("loss.dice=0")(crops())
    assert outputs.keys() == {"loss", "loss_cross_entropy"}
    assert torch.equal(outputs["loss"], outputs["loss_cross_entropy"])


def test_what_is_not_known_of_one_crop_changes_the_loss_of_that_crop_alone():
    module, batch = finetuning("loss.dice=0"), crops(samples=1)
    batch["label"].zero_()
    whole = module(batch)["loss"]
    batch["known"][0, 1] = torch.tensor([False, False, True])
    p = module({"image": batch["image"][0, 1:2]}, task="predict")
    gained = (p[:, :2].sum(1).log() - p[:, 0].log()).mean() / 3
    torch.testing.assert_close(whole - module(batch)["loss"], gained)


def test_predictions_are_probabilities_in_the_shape_of_the_crops():
    module = finetuning()
    image = crops()["image"][:, 0]
    with torch.no_grad():
        p = module({"image": image}, task="predict")
    assert p.shape == (2, 3, *SIZE)
    torch.testing.assert_close(p, module.network(image).softmax(1))


def test_classification_has_its_loss_and_accuracy():
    module, batch = finetuning(*CLASSIFIES), crops()
    outputs = module(batch)
    p = module({"image": batch["image"].flatten(0, 1)}, task="predict")
    target = batch["target"].flatten()
    torch.testing.assert_close(outputs["loss"], -p[range(6), target].log().mean())
    assert outputs["accuracy"] == (p.argmax(1) == target).float().mean()


def test_a_frozen_encoder_learns_nothing_and_is_in_no_group():
    module = finetuning("optim.freeze=true", "optim.layer_decay=0.5")
    module(crops())["loss"].backward()
    assert all(p.grad is None for p in module.encoder.parameters())
    groups = layer_groups(module, weight_decay=0.1, lr=1e-3, layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {1.0}
    members = {id(p) for group in groups for p in group["params"]}
    assert members == {id(p) for p in module.parameters() if p.requires_grad}
    assert not members & {id(p) for p in module.encoder.parameters()}


def test_a_few_steps_fit_a_batch():
    module, batch = finetuning(), crops(samples=1, count=2)
    batch["label"] = (batch["image"][:, :, 0] > 0.5).to(torch.uint8)
    groups = layer_groups(module, weight_decay=1e-5, lr=1e-2, layer_decay=0.8)
    optimizer = torch.optim.AdamW(groups)
    first = module(batch)["loss"].item()
    for _ in range(30):
        optimizer.zero_grad()
        module(batch)["loss"].backward()
        optimizer.step()
    assert module(batch)["loss"].item() < 0.5 * first


def test_a_baseline_of_random_weights_has_positions():
    encoder, report = build_encoder(finetune_config())
    assert report is None
    positions = encoder.positions((2, 3, 4))
    assert torch.cdist(positions[1:], positions[1:]).fill_diagonal_(1).min() > 0.1


def test_a_width_without_positions_is_refused_before_anything_is_built():
    with pytest.raises(UserError, match=r"model.width: 32 is not divisible by 6"):
        finetune_config("model.width=32")
    assert finetune_config("model.width=32", "init=theirs.pth").model.width == 32


def write_encoder(folder, **shape):
    sizes = dict(channels=2, patch=(8, 4, 2), width=24, depth=3, heads=2) | shape
    encoder = Encoder(**sizes)
    facts = encoder_facts(encoder)
    publish_weights(folder / "encoder.safetensors", encoder.state_dict(), facts=facts)
    return encoder


@pytest.mark.parametrize("stated", [True, False])
def test_finetuning_starts_from_the_weights_of_a_run(tmp_path, stated):
    before = write_encoder(tmp_path)
    cfg = finetune_config(f"init={tmp_path}")
    if not stated:
        cfg = cfg.model_copy(update={"model": None})
    encoder, report = build_encoder(cfg)
    assert report.source == str(tmp_path / "encoder.safetensors")
    module = Finetuning(cfg, encoder, outputs=3, channels=2)
    for name, value in before.state_dict().items():
        assert torch.equal(module.encoder.state_dict()[name], value), name


def test_every_number_in_which_an_encoder_is_not_the_model_is_a_line(tmp_path):
    write_encoder(tmp_path, channels=1, patch=(8, 4, 4), width=48)
    with pytest.raises(UserError) as caught:
        build_encoder(finetune_config(f"init={tmp_path}"))
    source = tmp_path / "encoder.safetensors"
    assert list(caught.value.lines) == [
        f"model.channels: 2, but {source} has 1",
        f"model.patch: (8, 4, 2), but {source} has (8, 4, 4)",
        f"model.width: 24, but {source} has 48",
    ]


def test_images_of_other_channels_and_crops_of_other_sizes_are_refused(tmp_path):
    encoder = write_encoder(tmp_path, patch=(16, 8, 16))
    cfg = finetune_config(f"init={tmp_path}").model_copy(update={"model": None})
    with pytest.raises(UserError) as caught:
        Finetuning(cfg, encoder, outputs=3, channels=4)
    channels, size = caught.value.lines
    assert f"takes 2 channels, but the images have 4; glmae export run={tmp_path}" in channels
    assert "crops.size: (16, 12, 8) is not a multiple of the encoder's patch" in size
    with pytest.raises(UserError, match=r"model.channels: 2, but the images have 1"):
        Finetuning(finetune_config(), build_encoder(finetune_config())[0], 3, channels=1)


def test_checkpointing_of_activations_is_that_of_the_config():
    module = finetuning("model.activation_checkpointing=true")
    assert module.encoder.recompute
    plain, batch = finetuning(), crops()
    for each in (module, plain):
        each(batch)["loss"].backward()
    for (name, one), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
