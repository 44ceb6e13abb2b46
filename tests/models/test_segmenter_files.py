"""A finetuned module into the files of a run folder, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmae_ray.errors import UserError
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.segmenter_files import load_segmenter, publish_segmenter, segmenter_facts
from glmae_ray.paths import to_place
from tests.models.finetunes import ANY, CLASSIFIES, SIZE, finetune_config, finetuning


def publish(run, *words, names=("liver", "spleen"), weights="last", modality=("CT",), **more):
    module = finetuning(*words, outputs=len(names) + ("task=classification" not in words))
    cfg = finetune_config(*words)
    facts = segmenter_facts(
        cfg,
        module,
        names=names,
        modality=list(modality),
        learned=ANY,
        step=4,
        weights=weights,
        **more,
    )
    publish_segmenter(to_place(run), module, facts=facts)
    return module.eval(), facts


@torch.no_grad()
def predict(module, sides=SIZE):
    image = torch.rand(2, 2, *sides, generator=torch.Generator().manual_seed(3))
    return module({"image": image}, task="predict")


def test_a_module_comes_back_in_evaluation_mode_with_its_outputs_and_facts(tmp_path):
    module, facts = publish(tmp_path, val={"dice": 0.5}, origin={"source": "there"})
    again, read = load_segmenter(tmp_path)
    assert not again.training
    assert read == json.loads((tmp_path / "segmenter.json").read_text()) == facts
    for sides in (SIZE, (24, 8, 10)):
        assert torch.equal(predict(again, sides), predict(module, sides))
    assert (read["structures"], read["classes"]) == (["liver", "spleen"], [])
    assert (read["channels"], read["step"], read["val"]) == (2, 4, {"dice": 0.5})
    assert read["crops"]["size"] == list(SIZE)


def test_the_best_weights_lie_beside_the_last(tmp_path, bucket):
    for run in (tmp_path, f"{bucket}/run"):
        last, _ = publish(run)
        best, _ = publish(run, "model.depth=2", weights="best")
        assert torch.equal(predict(load_segmenter(run)[0]), predict(last))
        assert torch.equal(predict(load_segmenter(run, which="best")[0]), predict(best))


def test_a_classifier_comes_back_too(tmp_path):
    words = [*CLASSIFIES, "head.kind=mlp"]
    module, _ = publish(tmp_path, *words, names=("ill", "healthy", "unsure"))
    again, facts = load_segmenter(tmp_path)
    assert (facts["task"], facts["classes"]) == ("classification", ["ill", "healthy", "unsure"])
    assert torch.equal(predict(again), predict(module))


def test_positions_of_a_file_of_others_stay_with_the_module(tmp_path):
    module = finetuning()
    module.encoder.adopt_positions(torch.randn(25, 24), grid=(4, 3, 2))
    facts = segmenter_facts(
        finetune_config(), module, names=("a", "b"), modality=["CT"], learned=ANY, step=1
    )
    publish_segmenter(tmp_path, module, facts=facts)
    assert torch.equal(predict(load_segmenter(tmp_path)[0]), predict(module.eval()))


def test_another_run_starts_from_the_encoder_of_a_finetuned_one(tmp_path):
    module, _ = publish(tmp_path)
    encoder, report = load_encoder(tmp_path / "segmenter.safetensors")
    for name, value in module.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    assert not report.warnings
    assert report.heads == "2, as the file says"


def test_what_is_no_segmenter_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no segmenter.safetensors, which glmae finetune"):
        load_segmenter(tmp_path)
    _, facts = publish(tmp_path)
    path = tmp_path / "segmenter.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_segmenter(tmp_path)
    for changes, reason in (
        ({"format": 2}, "has format 2; this version reads segmenters of format 1"),
        ({"structures": ["liver"]}, "does not fit what it says of itself: .*network.out"),
    ):
        path.write_bytes(whole)
        save_file(load_file(path), path, metadata={"glmae": json.dumps(facts | changes)})
        with pytest.raises(UserError, match=reason):
            load_segmenter(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="has no head"):
        load_segmenter(tmp_path)
