"""Positions of an encoder file: its grid, another, and a table that is zero, ours or not there."""

from __future__ import annotations

import torch

from glmae_ray.models.encoder_files import cube_side, load_encoder
from glmae_ray.models.encoder_formats import turn_positions
from glmae_ray.models.vit3d import sincos_positions
from tests.models.test_encoder_files import (
    GRID,
    WIDTH,
    features,
    refused,
    save,
    timm_state,
    volumes,
)


def test_the_grid_of_216_patches_is_a_cube_of_six():
    assert int(216 ** (1 / 3)) == 5  # the trap
    assert cube_side(216) == 6
    assert [cube_side(n**3) for n in range(1, 60)] == list(range(1, 60))
    assert [cube_side(n) for n in (2, 24, 215, 217, 1001)] == [None] * 5


def test_a_grid_that_is_no_cube_has_to_be_given(tmp_path):
    path = save(timm_state(), tmp_path)
    (line,) = refused(path, heads=2)
    assert "positions of 24 patches, which is no cube; give their grid along X, Y, Z" in line
    (line,) = refused(path, heads=2, grid=(5, 5, 5))
    assert "a grid of (5, 5, 5) along X, Y, Z has 125" in line
    cube, report = load_encoder(save(timm_state(tokens=216), tmp_path), heads=2)
    assert cube.pos_grid == (6, 6, 6)
    assert "the file's table for (6, 6, 6) patches" in report.positions


def test_positions_of_another_grid_are_interpolated(tmp_path):
    state = timm_state(tokens=27)
    encoder, _ = load_encoder(save(state, tmp_path), heads=2)
    table = state["pos_embed"][0, 1:].reshape(3, 3, 3, WIDTH).permute(3, 2, 1, 0)  # E, Z, Y, X
    expected = torch.nn.functional.interpolate(table[None], size=(5, 2, 4), mode="trilinear")
    actual = encoder.positions((5, 2, 4))
    assert torch.equal(actual[0], state["pos_embed"][0, 0])
    torch.testing.assert_close(actual[1:], expected[0].flatten(1).T)
    assert features(encoder, volumes(sides=(40, 8, 8))).shape == (2, 41, WIDTH)


def test_a_file_with_zero_positions_is_reproduced_and_warned_of(tmp_path):
    state = timm_state(tokens=216, table=torch.zeros(1, 217, WIDTH))
    path = save({"student": state}, tmp_path)
    faithful, report = load_encoder(path, heads=2)
    x = torch.ones(1, 3, 48, 24, 12)
    tokens = features(faithful, x)[0, 1:]
    assert torch.allclose(tokens, tokens[:1].expand_as(tokens), atol=1e-5)  # cannot tell them apart
    (warning,) = report.warnings
    assert "this encoder has no positions; positions=sincos gives it ours" in warning
    ours, report = load_encoder(path, heads=2, positions="sincos")
    assert torch.equal(ours.positions((6, 6, 6)), sincos_positions((6, 6, 6), WIDTH))
    assert report.warnings == ()
    assert "pos_embed" in report.skipped
    assert "pos_embed" not in report.loaded
    assert torch.cdist(features(ours, x)[0, 1:3], features(ours, x)[0, 3:5]).min() > 1e-3


def test_a_table_that_is_our_formula_becomes_the_formula_again(tmp_path):
    table = turn_positions(sincos_positions(GRID, WIDTH), grid=GRID)
    path = save(timm_state(table=table[None] + 5e-5), tmp_path)
    encoder, report = load_encoder(path, heads=2, grid=(4, 3, 2))
    assert encoder.pos_embed is None
    assert "sin-cos, as the file's table is" in report.positions
    # The formula over X, Y, Z is another one over Z, Y, X, and stays a table.
    path = save(timm_state(table=sincos_positions((4, 3, 2), WIDTH)[None]), tmp_path)
    encoder, _ = load_encoder(path, heads=2, grid=(4, 3, 2))
    assert encoder.pos_grid == GRID


def test_a_file_without_positions_gets_the_formula_and_the_report_says_missing(tmp_path):
    state = timm_state()
    del state["pos_embed"]
    encoder, report = load_encoder(save(state, tmp_path), heads=2)
    assert encoder.pos_embed is None
    assert report.missing == ("pos_embed",)
    assert "missing: pos_embed" in report.lines()
