"""Intensities as the network sees them: one rule for crops and for inference, as MONAI's."""

from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import NormalizeIntensity, ScaleIntensityRange

from glmae_ray.blocks import Blocks
from glmae_ray.config_finetune import CropsConfig
from glmae_ray.intensity import COLUMNS, window_of
from glmae_ray.resizing import axis_taps, resize

VOXELS = np.random.default_rng(0).integers(-1100, 1400, (2, 5, 7, 9)).astype(np.int16)


def row(modality: str) -> dict:
    """What the index says of `VOXELS`."""
    flat = VOXELS.reshape(2, -1)
    facts = {"minimum": flat.min(1), "maximum": flat.max(1), "mean": flat.mean(1)}
    low, high = np.percentile(flat, (0.5, 99.5), axis=1, method="lower")
    facts |= {"std": flat.std(1), "p0_5": low, "p99_5": high}
    assert {"modality", *facts} == COLUMNS
    return {"modality": modality, **{name: values.tolist() for name, values in facts.items()}}


def test_ct_is_mapped_as_monai_maps_a_range():
    window = window_of(row("CT"), CropsConfig(window=(-175, 250)))
    ours = window.apply(VOXELS)
    monai = ScaleIntensityRange(-175, 250, 0.0, 1.0, clip=True)(VOXELS.astype(np.float32))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, monai, atol=1e-6)
    assert window.air(row("CT")["minimum"]).tolist() == [0, 0]


def test_zscore_is_monais_and_cuts_nothing_off():
    window = window_of(row("MR"), CropsConfig(intensity="zscore"))
    monai = NormalizeIntensity(channel_wise=True)(VOXELS.astype(np.float32))
    np.testing.assert_allclose(window.apply(VOXELS), monai, atol=1e-5)
    lowest = window.apply(VOXELS).min(axis=(1, 2, 3))
    np.testing.assert_allclose(window.air(row("MR")["minimum"]), lowest)


def test_other_modalities_take_their_own_percentiles():
    facts = row("MR")
    ends, clips = window_of(facts, CropsConfig())
    assert clips
    assert ends.tolist() == [list(pair) for pair in zip(facts["p0_5"], facts["p99_5"], strict=True)]
    assert window_of(row("CT"), CropsConfig(intensity="percentiles"))[0].tolist() == ends.tolist()


@pytest.mark.parametrize("intensity", ["window", "percentiles", "zscore"])
def test_resizing_applies_the_same_window(intensity):
    window = window_of(row("CT"), CropsConfig(intensity=intensity))
    taps = [axis_taps(np.array([0, side]), 1, side, side) for side in VOXELS.shape[1:]]
    out = np.empty(VOXELS.shape, np.float32)
    resize(Blocks.whole(VOXELS), taps, out, code=window.codes)
    np.testing.assert_allclose(out, window.apply(VOXELS), atol=1e-6)


@pytest.mark.parametrize("intensity", ["percentiles", "zscore"])
def test_a_case_without_contrast_can_be_divided_by(intensity):
    flat = {name: [7.0] for name in ("minimum", "maximum", "p0_5", "p99_5", "mean")}
    window = window_of({"modality": "MR", "std": [0.0], **flat}, CropsConfig(intensity=intensity))
    assert np.isfinite(window.apply(np.full((1, 2, 3, 4), 7))).all()
