"""`glmae pretrain init=...`: a run that starts from an encoder file or another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmae_ray.cli import main
from glmae_ray.jobs.starting import begin_from_init
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.encoder_formats import as_original, encoder_facts, publish_weights
from glmae_ray.models.glmae import GLMAE
from tests.conftest import TINY, tiny_config
from tests.jobs.test_export import write_run


def words(store: Path, run: Path, *more: str) -> list[str]:
    # A rate that changes nothing: what the run exports is what it started from.
    shape = (
        *("steps=2", "save.every_steps=1", "optim.base_lr=1e-30"),
        *("log.pictures=false", "log.tensorboard=false"),
    )
    of_run = (f"store={store}", f"run={run}", "optim.warmup_steps=1", "validation.samples=2")
    return ["pretrain", *TINY, *shape, *of_run, *more]


def with_a_table(folder: Path) -> Path:
    """A file of the original layout with positions of its own."""
    encoder, _ = load_encoder(write_run(folder / "source"))
    encoder.adopt_positions(torch.randn(1 + 24, 24), grid=(4, 3, 2))
    tree = as_original(encoder, grid=(4, 3, 2))
    path = folder / "theirs.safetensors"
    publish_weights(path, tree["student"], facts=encoder_facts(encoder, axes="XYZ"))
    return path


def test_student_and_teacher_start_from_the_file_and_the_rest_does_not(tmp_path):
    path = with_a_table(tmp_path)
    cfg = tiny_config(f"init={path}")
    torch.manual_seed(1)
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    decoder = module.decoder.embed.weight.clone()
    begin_from_init(module, cfg)
    expected = load_encoder(path)[0].state_dict()
    assert "pos_embed" in expected
    for copy in (module.encoder, module.teacher_encoder):
        assert copy.state_dict().keys() == expected.keys()
        for name, value in copy.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert torch.equal(module.decoder.embed.weight, decoder)
    teacher, student = module.teacher_and_student()
    assert not any(t.requires_grad for t in teacher)
    assert all(s.requires_grad for s in student)
    assert not {t.data_ptr() for t in teacher} & {s.data_ptr() for s in student}


@pytest.mark.ray
def test_a_run_starts_from_the_file_keeps_its_positions_and_continues(
    small_store, tmp_path, capsys
):
    path, run = with_a_table(tmp_path), tmp_path / "run"
    assert main(words(small_store, run, f"init={path}")) == 0
    out = capsys.readouterr().out
    assert f"init: encoder: 30 tensors of the student from {path}" in out
    assert "init: axes: XYZ, as the file says" in out
    report = json.loads((run / "init.json").read_text())
    assert report["skipped"] == {}
    expected = load_encoder(path)[0].state_dict()
    _check(run, expected)
    # The end is lost; the run continues from a checkpoint, table and all.
    for name in ("summary.json", "encoder.safetensors"):
        (run / name).unlink()
    assert main(words(small_store, run, f"init={path}")) == 0
    assert "init: encoder" not in capsys.readouterr().out
    _check(run, expected)
    origin = json.loads((run / "encoder.json").read_text())["origin"]
    assert origin["sha256"] == report["sha256"]
    # Another file is another run.
    assert main(words(small_store, run)) == 2
    assert f"init: None, but {run} was started with '{path}'" in capsys.readouterr().err
    # So is another content.
    (run / "summary.json").unlink()
    save_file(load_file(path), path)
    assert main(words(small_store, run, f"init={path}")) == 2
    assert f"has changed since {run} was started" in capsys.readouterr().err


def _check(run: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = load_file(run / "encoder.safetensors")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-12, rtol=0)


@pytest.mark.ray
def test_an_encoder_that_does_not_fit_is_a_line_a_number_and_nothing_is_written(
    small_store, tmp_path, capsys
):
    source = write_run(tmp_path / "source", patch=(4, 4, 2), width=48, depth=3, heads=4)
    run = tmp_path / "run"
    assert main(words(small_store, run, f"init={source}")) == 2
    errors = capsys.readouterr().err.splitlines()
    found = [error.split(": ", 1)[1].split(", but")[0] for error in errors]
    assert found == [
        "model.width: 24",
        "model.depth: 2",
        "model.heads: 2",
        "model.patch: (8, 4, 2)",
    ]
    assert errors[0].endswith(f"but {source / 'encoder.safetensors'} has 48")
    assert main(words(small_store, run, f"init={tmp_path / 'nothing'}")) == 2
    assert not run.exists()
