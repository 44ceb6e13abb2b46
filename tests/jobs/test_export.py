"""`glmae export` of an encoder: files for us, the original code and MONAI, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.networks import nets
from safetensors.torch import load_file

from glmae_ray.cli import main
from glmae_ray.encoder_out import training_facts
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.vit3d import Encoder, patch_grid, patchify
from glmae_ray.paths import to_place
from tests.conftest import tiny_config

SIDES = (16, 12, 8)  # the local view of the tiny config, grid (2, 3, 4)


def write_run(folder: Path, **shape) -> Path:
    """A run's folder as far as an export reads it."""
    cfg = tiny_config()
    torch.manual_seed(0)
    sizes = dict(channels=1, patch=cfg.model.patch, width=24, depth=2, heads=2)
    encoder = Encoder(**(sizes | shape))
    facts = encoder_facts(encoder) | training_facts(cfg, step=8)
    publish_weights(folder / "encoder.safetensors", encoder.state_dict(), facts=facts)
    return folder


@torch.no_grad()
def features(encoder: Encoder, x_BCZYX: torch.Tensor) -> torch.Tensor:
    grid = patch_grid(list(x_BCZYX.shape[2:]), encoder.patch)
    return encoder(patchify(x_BCZYX, encoder.patch), grid=grid)


def test_an_export_leaves_every_format_that_fits_and_says_which_does_not(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    stems = {"encoder", "monai_vit", "monai_vit_cls"}
    files = {f"{stem}.{end}" for stem in stems for end in ("safetensors", "json")}
    files |= {"original.pth", "original.json", "README.md"}
    assert {file.name for file in out.iterdir()} == files
    lines = capsys.readouterr().out.splitlines()
    assert "monai_unetr: left out: MONAI's UNETR has 12 blocks" in lines[0]
    assert "axes: ZYX, as the file says" in lines
    assert lines[-2:] == [
        f"monai_vit_cls: {out / 'monai_vit_cls.safetensors'}",
        f"card: {out / 'README.md'}",
    ]


@pytest.mark.parametrize("name", ["encoder.safetensors", "original.pth"])
def test_what_was_exported_is_loaded_without_an_argument_and_has_the_same_features(tmp_path, name):
    run, out = write_run(tmp_path / "run", channels=2), tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}", "formats=[glmae,original]"]) == 0
    before, _ = load_encoder(run)
    after, report = load_encoder(out / name)
    for sides in (SIDES, (32, 20, 12)):
        x = torch.rand(2, 2, *sides)
        torch.testing.assert_close(features(after, x), features(before, x), atol=1e-5, rtol=1e-5)
    facts = json.loads((out / name).with_suffix(".json").read_text())
    assert facts["origin"]["source"] == str(run / "encoder.safetensors")
    assert facts["window_becomes"] == [0.0, 1.0]
    local = [2, 3, 4] if report.order == "ZYX" else [4, 3, 2]
    assert facts["grid"]["local"] == local
    assert facts["patch"] == ([8, 4, 2] if report.order == "ZYX" else [2, 4, 8])
    # A second time, from there.
    assert main(["export", f"run={out / name}", f"out={tmp_path / 'again'}"]) == 0
    again, _ = load_encoder(tmp_path / "again" / "original.pth")
    torch.testing.assert_close(features(again, x), features(before, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["monai_vit", "monai_vit_cls", "monai_unetr"])
def test_the_facts_beside_a_file_for_monai_build_what_loads_it(tmp_path, name):
    fits = dict(patch=(16, 16, 16), depth=12)
    run, out = write_run(tmp_path / "run", **fits), tmp_path / "out"
    words = [f"run={run}", f"out={out}", f"formats=[{name}]", "grid=[2,3,1]", "channels=4"]
    assert main(["export", *words]) == 0
    facts = json.loads((out / f"{name}.json").read_text())
    assert facts["arguments"]["img_size"] == [16, 48, 32]
    weights = load_file(out / f"{name}.safetensors")
    if name == "monai_unetr":
        net = nets.UNETR(out_channels=2, feature_size=4, **facts["arguments"])
        weights = net.state_dict() | weights
    else:
        net = nets.ViT(**facts["arguments"])
        if name == "monai_vit_cls":
            net.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 24))
    net.load_state_dict(weights, strict=True)
    assert facts["origin"]["channels"] == "4, each the mean of the file's 1 times 1/4"


def test_the_example_for_monai_in_the_documents_runs(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", patch=(16, 16, 16), depth=12)
    encoder, _ = load_encoder(run)
    assert main(["export", f"run={run}", f"out={tmp_path / 'encoder'}", "grid=[2,3,4]"]) == 0
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    (example,) = (block for block in text.split("```python\n") if "UNETR(" in block)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example.split("```")[0], names)
    x = torch.rand(1, 1, 32, 48, 64)
    with torch.no_grad():
        theirs, _ = names["vit"].eval()(x.permute(0, 1, 4, 3, 2))
    ours = features(encoder, x)
    torch.testing.assert_close(theirs[:, 0], ours[:, 0], atol=1e-5, rtol=1e-5)
    kernel = names["unetr"].vit.patch_embedding.patch_embeddings.weight
    assert torch.equal(kernel.permute(0, 1, 4, 3, 2), encoder.patch_embed.proj.weight)


def test_a_file_of_the_authors_naming_is_converted(tmp_path, capsys):
    encoder = load_encoder(write_run(tmp_path / "run"))[0]
    state = {f"module.backbone.{k}": v for k, v in encoder.state_dict().items()}
    state["module.backbone.pos_embed"] = torch.zeros(1, 28, 24)  # as they leave it
    torch.save({"student": state}, tmp_path / "theirs.pth")
    words = ["export", f"run={tmp_path / 'theirs.pth'}", f"out={tmp_path / 'out'}", "heads=2"]
    assert main(words) == 0
    assert "positions=sincos gives it ours" in capsys.readouterr().out
    assert load_encoder(tmp_path / "out")[0].pos_grid == (3, 3, 3)
    assert main([*words, "positions=sincos", "formats=[glmae]"]) == 0
    assert load_encoder(tmp_path / "out")[0].pos_grid is None
    assert main([*words, "positions=sincos"]) == 2
    assert "give grid=[Z,Y,X], patches along each axis" in capsys.readouterr().err


def test_an_export_to_a_bucket_is_loaded_from_there(tmp_path, bucket):
    run = write_run(tmp_path / "run")
    assert main(["export", f"run={run}", f"out={bucket}/out", "formats=[glmae]"]) == 0
    there, _ = load_encoder(f"{bucket}/out")
    here, _ = load_encoder(run)
    x = torch.rand(1, 1, *SIDES)
    assert torch.equal(features(there, x), features(here, x))
    assert to_place(f"{bucket}/out/encoder.json").exists()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("formats=[monai_unetr]", "formats: monai_unetr does not fit: MONAI's UNETR has 12 blocks"),
        ("formats=[torch]", "formats: 'torch' is wrong"),
        ("formats=[onnx]", "formats: onnx: only of a finetuned run; "),
        ("formats=[]", "formats: is empty; known are glmae, original"),
        ("run=nowhere", "has no encoder.safetensors, which a run writes at its end"),
        ("run=nowhere.pth", "nowhere.pth: no such file"),
        ("part=teacher", "has no teacher with timm's names"),
        ("axes=XYZ", "axes XYZ were asked for, but it says ZYX"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(tmp_path, capsys, word, line):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}", word]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error
    assert not out.exists()


def test_an_export_does_not_write_over_its_source(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["export", f"run={run}", f"out={run}"]) == 2
    assert main(["export", f"run={run / 'encoder.safetensors'}", f"out={run}"]) == 2
    assert "is where the encoder comes from" in capsys.readouterr().err
    assert {file.name for file in run.iterdir()} == {"encoder.safetensors", "encoder.json"}
    assert main(["export", f"run={run}", f"out={run}", "formats=[original]"]) == 0
    assert "original.pth" in {file.name for file in run.iterdir()}


def test_a_setting_without_effect_is_told(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    words = ["formats=[glmae]", "heads=4", "file_grid=3", "grid=3", "weights=best"]
    assert main(["export", f"run={run}", f"out={out}", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"weights: has no effect: {run} is no finetuned run" in lines
    assert "warning: heads=4 has no effect on this file" in lines
    assert "warning: grid=(3, 3, 3) has no effect on this file" in lines
    assert "grid: has no effect on glmae, whose positions fit any grid" in lines
