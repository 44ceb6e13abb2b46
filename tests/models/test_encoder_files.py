"""Loading encoder files, ours and the original GL-MAE's, on unequal sides, patches and channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glmae_ray.errors import UserError
from glmae_ray.models.encoder_files import load_encoder, with_channels
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.load_report import LoadReport
from glmae_ray.models.vit3d import Encoder, patch_grid, patchify

PATCH, GRID, WIDTH = (8, 4, 2), (2, 3, 4), 24
TOKENS = 24


def make_encoder(*, channels: int = 3, depth: int = 2, heads: int = 2) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(channels=channels, patch=PATCH, width=WIDTH, depth=depth, heads=heads)
    with torch.no_grad():  # biases and norms start alike; a swap of two would not show
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def volumes(batch: int = 2, channels: int = 3, sides=(16, 12, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(encoder: Encoder, x_BCZYX: torch.Tensor) -> torch.Tensor:
    grid = patch_grid(list(x_BCZYX.shape[2:]), encoder.patch)
    return encoder(patchify(x_BCZYX, encoder.patch), grid=grid)


# Built by hand, key by key, so that reading is not tested by writing.
def timm_state(
    *, patch=(2, 4, 8), channels=3, tokens=TOKENS, depth=2, table: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """A state dict of timm's ViT by its shapes alone; axes X, Y, Z."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    e = WIDTH
    state = {"cls_token": draw(1, 1, e), "pos_embed": draw(1, 1 + tokens, e)}
    if table is not None:
        state["pos_embed"] = table
    state |= {
        "patch_embed.proj.weight": draw(e, channels, *patch),
        "patch_embed.proj.bias": draw(e),
    }
    for n in range(depth):
        shapes = {
            "norm1": (e,),
            "attn.qkv": (3 * e, e),
            "attn.proj": (e, e),
            "norm2": (e,),
            "mlp.fc1": (4 * e, e),
            "mlp.fc2": (e, 4 * e),
        }
        for name, shape in shapes.items():
            state[f"blocks.{n}.{name}.weight"] = draw(*shape)
            state[f"blocks.{n}.{name}.bias"] = draw(shape[0])
    return state | {"norm.weight": draw(e), "norm.bias": draw(e)}


@torch.no_grad()
def timm_forward(state: dict[str, torch.Tensor], x_BCXYZ: torch.Tensor, heads: int) -> torch.Tensor:
    """What such a state dict computes, in torch's functions alone."""
    f = torch.nn.functional
    weight = state["patch_embed.proj.weight"]
    x = f.conv3d(x_BCXYZ, weight, state["patch_embed.proj.bias"], stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    cls = state["cls_token"] + state["pos_embed"][:, :1]
    x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return f.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return f.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    depth = sum(name.endswith("qkv.bias") for name in state)
    for block in (f"blocks.{n}" for n in range(depth)):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).reshape(x.shape), f"{block}.attn.proj")
        hidden = f.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")


def save(tree: object, folder: Path, name: str = "theirs.pth") -> Path:
    torch.save(tree, folder / name)
    return folder / name


def refused(path: Path, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_encoder(path, **options)
    return list(caught.value.lines)


# The layout of the original.


@pytest.mark.parametrize("prefix", ["module.backbone.", "backbone.", "module.", ""])
@pytest.mark.parametrize("key", ["student", "state_dict", "model", None])
def test_the_original_layout_gives_its_features_whatever_prefix_and_key(tmp_path, prefix, key):
    state = timm_state()
    renamed = {f"{prefix}{name}": value for name, value in state.items()}
    path = save({key: renamed, "epoch": 3} if key else renamed, tmp_path)
    encoder, report = load_encoder(path, heads=2, grid=(4, 3, 2))
    x_ZYX = volumes()
    expected = timm_forward(state, x_ZYX.permute(0, 1, 4, 3, 2), heads=2)
    actual = features(encoder, x_ZYX)
    by_their_order = actual[:, 1:].reshape(2, *GRID, WIDTH).permute(0, 3, 2, 1, 4)
    torch.testing.assert_close(actual[:, 0], expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        by_their_order.reshape(2, TOKENS, WIDTH), expected[:, 1:], atol=1e-5, rtol=1e-5
    )
    assert encoder.patch == PATCH
    assert set(report.loaded) == set(state)
    assert report.skipped == ({"epoch": "not weights"} if key else {})
    assert report.missing == ()


def test_axes_zyx_takes_a_foreign_file_as_it_is(tmp_path):
    state = timm_state(patch=PATCH)
    encoder, report = load_encoder(save(state, tmp_path), heads=2, grid=GRID, axes="ZYX")
    x = volumes(batch=1)
    torch.testing.assert_close(features(encoder, x), timm_forward(state, x, 2), atol=1e-5, rtol=0)
    assert report.axes == "ZYX, as asked"


def test_student_and_teacher_of_one_file_are_told_apart(tmp_path):
    student, teacher = timm_state(), timm_state()
    teacher["norm.bias"] = torch.ones(WIDTH)
    path = save({"student": student, "teacher": teacher, "args": 1}, tmp_path)
    options = dict(heads=2, grid=(4, 3, 2))
    for part, other, state in (("student", "teacher", student), ("teacher", "student", teacher)):
        encoder, report = load_encoder(path, part=part, **options)
        assert torch.equal(encoder.norm.bias, state["norm.bias"])
        assert report.skipped == {other: "a part that was not asked for", "args": "not weights"}
    for tree, part in (({"student": student}, "teacher"), ({"teacher": teacher}, "student")):
        (line,) = refused(save(tree, tmp_path), part=part, **options)
        assert f"has no {part} with timm's names" in line


def test_student_and_teacher_side_by_side_in_one_state_dict_are_told_apart(tmp_path):
    state = {f"student.backbone.{name}": value for name, value in timm_state().items()}
    state |= {f"teacher.backbone.{name}": value + 1 for name, value in timm_state().items()}
    path = save(state, tmp_path)
    for part, offset in (("student", 0), ("teacher", 1)):
        encoder, report = load_encoder(path, part=part, heads=2, grid=(4, 3, 2))
        assert torch.equal(encoder.norm.bias, timm_state()["norm.bias"] + offset)
        assert len(report.skipped) == len(timm_state())
        assert report.warnings == ()
    both = {f"{name}.{k}": v for name in ("a", "b") for k, v in timm_state().items()}
    (line,) = refused(save(both, tmp_path), heads=2)
    assert "has several encoders, at a., b.; save one alone" in line


def test_decoder_and_heads_are_skipped_with_a_reason_and_the_unknown_with_a_warning(tmp_path):
    state = {f"module.backbone.{name}": value for name, value in timm_state().items()}
    state["module.backbone.mask_token"] = torch.zeros(1)
    state["module.backbone.decoder_blocks.0.norm1.weight"] = torch.zeros(1)
    state["module.head.last_layer.weight_g"] = torch.zeros(1)
    state["module.backbone.registers"] = torch.zeros(1)
    state["module.other"] = torch.zeros(1)
    _, report = load_encoder(save(state, tmp_path), heads=2, grid=(4, 3, 2))
    assert report.skipped == {
        "module.backbone.mask_token": "of the decoder",
        "module.backbone.decoder_blocks.0.norm1.weight": "of the decoder",
        "module.head.last_layer.weight_g": "of a head",
        "module.backbone.registers": "unknown here",
        "module.other": "outside module.backbone.",
    }
    (warning,) = report.warnings
    assert "module.backbone.registers: not known here" in warning
    text = "\n".join(report.lines())
    assert "skipped: 2 of the decoder (module.backbone.mask_token, " in text
    assert f"warning: {warning}" in text


# Channels, heads and precision.


@pytest.mark.parametrize(("had", "wanted"), [(1, 4), (3, 2), (4, 1), (2, 2)])
def test_a_repeated_image_has_the_same_features_at_any_number_of_channels(tmp_path, had, wanted):
    path = save(timm_state(channels=had), tmp_path)
    options = dict(heads=2, grid=(4, 3, 2))
    before, _ = load_encoder(path, **options)
    after, report = load_encoder(path, channels=wanted, **options)
    image = volumes(batch=1, channels=1)
    torch.testing.assert_close(
        features(after, image.expand(-1, wanted, -1, -1, -1)),
        features(before, image.expand(-1, had, -1, -1, -1)),
        atol=1e-5,
        rtol=1e-5,
    )
    assert after.patch_embed.proj.in_channels == wanted
    rule = f"{wanted}, each the mean of the file's {had} times {had}/{wanted}"
    assert report.channels == (rule if had != wanted else f"{had}, as in the file")


def test_the_channels_rule_gives_every_channel_the_same_kernel():
    kernel = torch.randn(6, 3, *PATCH)
    changed, _ = with_channels(kernel, 2)
    torch.testing.assert_close(changed[:, 0], kernel.mean(dim=1) * 3 / 2)
    assert torch.equal(changed[:, 0], changed[:, 1])


def test_heads_are_asked_for_where_neither_file_nor_convention_tells(tmp_path):
    path = save(timm_state(), tmp_path)
    (line,) = refused(path, grid=(4, 3, 2))
    assert "does not say its heads; give heads (width is 24)" in line
    (line,) = refused(path, grid=(4, 3, 2), heads=5)
    assert "width 24 is not divisible by 5 heads" in line
    _, report = load_encoder(path, grid=(4, 3, 2), heads=4)
    assert report.heads == "4, as asked; the file does not say"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in timm_state().items()}
    save_file(state, tmp_path / "theirs.safetensors")
    encoder, _ = load_encoder(tmp_path / "theirs.safetensors", heads=2, grid=(4, 3, 2))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.norm.bias, state["norm.bias"].float())
    assert all(p.requires_grad and not p.is_meta for p in encoder.parameters())


# Ours.


def write_ours(encoder: Encoder, folder: Path) -> Path:
    facts = encoder_facts(encoder)
    publish_weights(folder / "encoder.safetensors", encoder.state_dict(), facts=facts)
    return folder


@pytest.mark.parametrize("own_table", [False, True])
@pytest.mark.parametrize("with_json", [True, False])
def test_our_file_gives_the_same_encoder_back(tmp_path, own_table, with_json):
    encoder = make_encoder()
    if own_table:
        encoder.adopt_positions(torch.randn(1 + TOKENS, WIDTH), grid=GRID)
    folder = write_ours(encoder, tmp_path)
    if not with_json:
        (folder / "encoder.json").unlink()
    again, report = load_encoder(folder)
    for sides in ((16, 12, 8), (8, 20, 4)):
        x = volumes(batch=1, sides=sides)
        assert torch.equal(features(again, x), features(encoder, x))
    assert report.axes == "ZYX, as the file says"
    assert report.heads == "2, as the file says"
    assert (report.skipped, report.missing, report.warnings) == ({}, (), ())


def test_a_report_is_plain_json(tmp_path):
    _, report = load_encoder(save(timm_state(), tmp_path), heads=2, grid=(4, 3, 2))
    assert isinstance(report, LoadReport)
    facts = json.loads(json.dumps(report.as_dict()))
    assert facts["sha256"] == report.sha256
    assert len(facts["loaded"]) == len(timm_state())
    assert facts["origin"]["axes"] == "XYZ, by default: the file does not say"
