"""`glmae export` of a finetuned run: files, ONNX, a MONAI bundle, a card, and a push."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import nibabel
import numpy as np
import onnxruntime
import pytest
import torch
from monai.inferers import sliding_window_inference
from nibabel.orientations import io_orientation, ornt_transform

from glmae_ray.cli import main
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.segmenter_files import load_segmenter
from tests.jobs.hub_stand_in import stand_in
from tests.models.finetunes import CLASSIFIES, SIZE
from tests.models.test_segmenter_files import predict, publish

EVALUATION = {
    "weights": "last",
    "intervals": {"mean": {"dice": [0.6, 0.8], "nsd": [0.4, 0.625], "hd95": None}},
    "evaluated": {"store": "/secret/store", "split": "test"},
    "mean": {"dice": 0.7125, "nsd": 0.5, "hd95": None},
    "structures": {"liver": {"dice": 0.9, "nsd": 0.75, "hd95": 4.0}},
    "cases": {"secret_case": {"liver": {"dice": 0.9}}},
    "best": {"mean": {"dice": 0.8125, "nsd": 0.6, "hd95": 3.0}, "structures": {}, "cases": {}},
}


def write_run(folder: Path, *words: str, **options) -> Path:
    """A finetuned run's folder as far as an export reads it."""
    publish(folder, *words, **options)
    config = {"store": "/secret/store", "steps": 4, "crops": {"size": list(SIZE)}, "init": "none"}
    for name, record in (
        ("config", config),
        ("cases", {"train": ["secret_case"] * 5, "val": ["b", "c"]}),
        ("evaluation", EVALUATION),
    ):
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_every_format_is_written_and_said_and_gives_the_same_probabilities(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"last weights of {run}: segmentation, step 4",
        f"segmenter: {out / 'segmenter.safetensors'}",
        f"monai_bundle: {out / 'monai_bundle/models/model.pt'}",
        f"onnx: {out / 'model.onnx'}",
        f"card: {out / 'README.md'}",
    ]
    module, facts = load_segmenter(run)
    again, same = load_segmenter(out)
    assert same == facts
    assert torch.equal(predict(again), predict(module))
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["glmae"]) == facts
    for batch in (1, 3):
        x = torch.rand(batch, 2, *SIZE)
        (theirs,) = session.run(None, {"image": x.numpy()})
        with torch.no_grad():
            ours = module({"image": x}, task="predict")
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=0)
    assert json.loads((out / "model.json").read_text())["onnx_differs_by"] < 1e-4


# Runs where glmae_ray cannot be imported.
_APART = """
import sys
sys.modules["glmae_ray"] = None
import torch
import monai.bundle
meta, config = "configs/metadata.json", "configs/inference.json"
monai.bundle.verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
parser = monai.bundle.ConfigParser()
parser.read_config(config)
network = parser.get_parsed_content("network_def").eval()
network.load_state_dict(torch.load("models/model.pt", weights_only=True))
windows = torch.load("windows.pt", weights_only=True)
with torch.no_grad():
    torch.save(network(windows), "logits.pt")
monai.bundle.run(config_file=config, dataset_dir="scans", output_dir="labels")
"""


def write_scan(path: Path) -> nibabel.Nifti1Image:
    """A scan that is stored upside down and with its axes in another order, in HU."""
    array = np.random.default_rng(0).normal(0, 300, (21, 18, 25)).astype(np.float32)
    affine = np.array([[0, -2.0, 0, 30], [0, 0, 1.5, -7], [-3.0, 0, 0, 11], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(array, affine)
    path.parent.mkdir()
    nibabel.save(image, path)
    return image


def expected_labels(image: nibabel.Nifti1Image, module) -> np.ndarray:
    """Labels on the scan's own grid: our module under MONAI's sliding window along Z, Y, X."""
    canonical = nibabel.as_closest_canonical(image)
    unit = np.clip((canonical.get_fdata(dtype=np.float32) + 175) / 425, 0, 1)
    with torch.no_grad():
        p = sliding_window_inference(
            torch.from_numpy(unit.T.copy())[None, None],
            SIZE,
            sw_batch_size=2,
            predictor=lambda x: module({"image": x}, task="predict"),
            overlap=0.5,
            mode="gaussian",
        )
    labels = nibabel.Nifti1Image(p[0].argmax(0).numpy().T.astype(np.uint8), canonical.affine)
    back = ornt_transform(io_orientation(canonical.affine), io_orientation(image.affine))
    return np.asarray(labels.as_reoriented(back).dataobj)


def test_the_bundle_runs_without_us_and_has_our_outputs(tmp_path):
    run, out = write_run(tmp_path / "run", "model.channels=1"), tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}", "formats=[monai_bundle]"]) == 0
    bundle = out / "monai_bundle"
    image = write_scan(bundle / "scans" / "scan.nii.gz")
    windows = torch.rand(2, 1, *SIZE)
    torch.save(windows.permute(0, 1, 4, 3, 2).contiguous(), bundle / "windows.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", _APART], cwd=bundle, env=env, check=True)
    module, _ = load_segmenter(run)
    logits = torch.load(bundle / "logits.pt", weights_only=True).permute(0, 1, 4, 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(logits, module.network(windows), atol=1e-4, rtol=0)
    labels = nibabel.load(bundle / "labels" / "scan.nii.gz")
    np.testing.assert_allclose(labels.affine, image.affine, atol=1e-5)
    ours = expected_labels(image, module)
    theirs = np.asarray(labels.dataobj)
    assert theirs.shape == ours.shape
    assert len(np.unique(ours)) > 1
    assert (theirs == ours).mean() > 0.999  # but for ties


def test_where_the_bundle_differs_before_the_network_is_told(tmp_path, capsys):
    words = ["crops.intensity=percentiles", "crops.spacing=1.5"]
    run, out = write_run(tmp_path / "run", *words), tmp_path / "out"
    assert main(["export", f"run={run}", f"out={out}", "formats=[monai_bundle]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("monai_bundle: intensities: statistics are of") for line in lines)
    assert any(line.startswith("monai_bundle: spacing: MONAI's Spacingd") for line in lines)
    config = json.loads((out / "monai_bundle" / "configs" / "inference.json").read_text())
    names = [step["_target_"] for step in config["preprocessing"]["transforms"]]
    assert names[2:4] == ["Spacingd", "ScaleIntensityRangePercentilesd"]


def test_the_best_weights_are_exported_on_request_and_the_card_has_their_figures(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    words = ["export", f"run={run}", f"out={tmp_path / 'out'}", "formats=[segmenter]"]
    assert main([*words, "weights=best"]) == 2
    assert "has no segmenter_best.safetensors" in capsys.readouterr().err
    publish(run, weights="best")
    assert main([*words, "weights=best"]) == 0
    assert load_segmenter(tmp_path / "out")[1]["weights"] == "best"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| mean | 0.812 | 0.600 | 3.000 |" in card
    assert "Mean of the last weights: Dice 0.713, NSD 0.500, HD95 (mm) -." in card
    assert "chosen on the validation cases, which flatters there" in card


def test_the_card_says_what_is_known_and_what_is_not_stated_and_names_nobody(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    words = ["export", f"run={run}", f"out={out}", "formats=[segmenter]"]
    assert main([*words, "licence=apache-2.0"]) == 0
    card = (out / "README.md").read_text()
    for line in (
        "license: apache-2.0",
        "pipeline_tag: image-segmentation",
        "# UNETR on a GL-MAE encoder: liver, spleen",
        "- cases: 5 for train, 2 for val",
        "- licence of the data: not stated",
        "- modality: CT",
        "Cases of the split test: 1; in brackets 95 % intervals.",
        "| mean | 0.713 (0.600 to 0.800) | 0.500 (0.400 to 0.625) | - |",
        "| liver | 0.900 | 0.750 | 4.000 |",
        "- `segmenter.safetensors`",
    ):
        assert line in card.splitlines(), line
    assert "secret" not in card
    assert main(["export", f"run={run}", f"out={out}", "formats=[segmenter]"]) == 0
    assert "- licence of the weights: not stated" in (out / "README.md").read_text()


def test_the_encoder_of_a_finetuned_run_is_exported_too(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    words = ["export", f"run={run}", f"out={out}", "formats=[glmae,monai_vit,segmenter]"]
    assert main(words) == 0
    encoder, _ = load_encoder(out)
    expected = load_segmenter(run)[0].encoder
    for name, value in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    assert json.loads((out / "monai_vit.json").read_text())["position_grid"] == [4, 3, 2]


def test_a_classifier_has_no_bundle(tmp_path, capsys):
    words = ["model.channels=1", *CLASSIFIES]
    run = write_run(tmp_path / "run", *words, names=("ill", "healthy"))
    assert main(["export", f"run={run}", f"out={tmp_path / 'out'}"]) == 0
    assert "monai_bundle: left out: it is for segmentation" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.onnx").exists()
    words = ["export", f"run={run}", f"out={tmp_path / 'b'}", "formats=[monai_bundle]"]
    assert main(words) == 2
    assert not (tmp_path / "b").exists()


def test_a_run_of_ct_and_mr_has_no_bundle_unless_its_config_says_one_mapping(tmp_path, capsys):
    run = write_run(tmp_path / "run", modality=["MR", "CT"])
    words = ["export", f"run={run}", f"out={tmp_path / 'out'}", "formats=[monai_bundle]"]
    assert main(words) == 2
    line = "monai_bundle does not fit: one mapping of intensities does not do for CT and MR"
    assert line in capsys.readouterr().err
    write_run(run, "crops.intensity=window", modality=["MR", "CT"])
    assert main(words) == 0


def test_a_segmenter_is_not_written_over_and_options_without_effect_are_told(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["export", f"run={run}", f"out={run}", "weights=last"]) == 2
    assert "is where the segmenter comes from" in capsys.readouterr().err
    assert main(["export", f"run={run}", f"out={tmp_path / 'out'}", "heads=4"]) == 0
    assert "heads: has no effect on a finetuned run's own formats" in capsys.readouterr().out


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # Its storage has a protocol of its own, which no stand-in speaks.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.mark.filterwarnings("ignore:Use 'content=")  # of huggingface_hub, which httpx warns
def test_a_push_sends_what_was_written_and_nothing_else(tmp_path, capsys, hub):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words = ["export", f"run={run}", f"out={out}", "formats=[segmenter,monai_bundle]"]
    assert main([*words, "push=lab/organs"]) == 0
    assert f"pushed: {hub.url}/lab/organs/commit/" in capsys.readouterr().out
    assert hub.repositories["lab/organs"]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_test"}
    on_disk = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    assert set(hub.files) == on_disk - {"notes.txt"}
    for name, content in hub.files.items():
        assert content == (out / name).read_bytes(), name


def test_a_push_that_cannot_be_is_one_line(tmp_path, capsys, hub, monkeypatch):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    words = ["export", f"run={run}", f"out={out}", "formats=[segmenter]"]
    hub.refuses = 403
    assert main([*words, "push=lab/organs"]) == 2
    assert "push: lab/organs: 403 Forbidden" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert main([*words, "push=lab/organs", f"out={tmp_path / 'b'}"]) == 2
    assert "push: HF_TOKEN is not set" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    for word, line in (
        ("push=organs", "push: 'organs' is wrong"),
        ("out=s3://bucket/x push=a/b", "push: needs a local folder to push from"),
    ):
        assert main([*words, *word.split()]) == 2
        assert line in capsys.readouterr().err
