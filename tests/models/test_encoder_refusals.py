"""Encoder files that are refused: each in lines that say what is wrong and where."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from glmae_ray.models.encoder_formats import encoder_facts
from tests.models.test_encoder_files import make_encoder, refused, save, timm_state, write_ours

# What does not make an encoder.


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"blocks.1.attn.qkv.bias": None}, "blocks.1.attn.qkv.bias is missing"),
        ({"cls_token": None}, "cls_token is missing"),
        ({"norm.weight": torch.ones(9)}, "norm.weight has the shape (9,); width 24 needs (24,)"),
        ({"blocks.0.ls1.gamma": torch.ones(24)}, "blocks.0.ls1.gamma has no place"),
        ({"patch_embed.proj.weight": torch.ones(24, 3, 4, 4)}, "a 3-D encoder has 5 sides"),
        ({"norm.bias": torch.full((24,), torch.nan)}, "norm.bias holds NaN"),
        ({"norm.bias": torch.ones(24, dtype=torch.int64)}, "norm.bias holds torch.int64"),
        ({"pos_embed": torch.ones(1, 25, 12)}, "pos_embed has the shape (1, 25, 12)"),
        ({"patch_embed.proj.weight": None}, "has no student with timm's names"),
    ],
)
def test_what_does_not_make_an_encoder_is_one_line_with_what_and_where(tmp_path, change, line):
    state = timm_state() | change
    state = {name: value for name, value in state.items() if value is not None}
    path = save(state, tmp_path)
    (found,) = refused(path, heads=2, grid=(4, 3, 2))
    assert found.startswith(f"{path}: ")
    assert line in found


def test_a_block_that_is_left_out_is_not_passed_over(tmp_path):
    state = {name: v for name, v in timm_state(depth=3).items() if ".1." not in name}
    lines = refused(save(state, tmp_path), heads=2, grid=(4, 3, 2))
    assert "blocks.1.attn.proj.bias is missing; an encoder of depth 3 has it" in lines[0]
    assert lines[-1].endswith("and 7 more")


# What cannot be opened.


def test_a_file_that_needs_code_is_refused_in_one_line(tmp_path):
    tree = {"student": timm_state(), "args": argparse.Namespace(lr=1)}
    (line,) = refused(save(tree, tmp_path))
    assert "holds more than tensors (argparse.Namespace)" in line
    assert "save the state dict alone with torch.save, or as safetensors" in line


@pytest.mark.parametrize("name", ["x.pth", "x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (line,) = refused(tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: ")


def test_nothing_there_is_one_line(tmp_path):
    assert "no such file" in refused(tmp_path / "x.pth")[0]
    assert "has no encoder.safetensors, which a run writes at its end" in refused(tmp_path)[0]
    (line,) = refused(save([1, 2], tmp_path))
    assert "holds a list, not a state dict" in line


# Facts that contradict.


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("heads", 3, "encoder.json: has heads 3, but encoder.safetensors says 2 itself"),
        ("format", 9, "has format 9; this version reads 1"),
    ],
)
def test_facts_that_contradict_the_weights_are_refused(tmp_path, name, value, line):
    folder = write_ours(make_encoder(), tmp_path)
    facts = json.loads((folder / "encoder.json").read_text()) | {name: value}
    (folder / "encoder.json").write_text(json.dumps(facts))
    assert any(line in found for found in refused(folder))


def test_facts_beside_a_file_without_a_header_are_checked_against_its_tensors(tmp_path):
    encoder = make_encoder()
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    facts = encoder_facts(encoder) | {"depth": 3, "width": 48}
    (tmp_path / "encoder.json").write_text(json.dumps(facts))
    lines = refused(tmp_path)
    assert [line.split(": ")[1] for line in lines] == [
        "says width 48, but its tensors have 24",
        "says depth 3, but its tensors have 2",
    ]
    (line,) = refused(write_ours(encoder, tmp_path), axes="XYZ")
    assert "axes XYZ were asked for, but it says ZYX" in line
