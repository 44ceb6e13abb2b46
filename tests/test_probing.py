"""Which cases and crops probes see: few, the same every time, labels where their tokens are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.models.vit3d import Encoder, patchify
from glmae_ray.probed_cases import probed_cases
from glmae_ray.probing import _looked_at, probe
from tests.conftest import tiny_config
from tests.test_crops import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("probing") / "store", cases=9)


@pytest.fixture(scope="module")
def targets(store) -> Path:
    path = store.parent / "classes.csv"
    rows = [f"p{n},{'rare' if n == 8 else 'common'}" for n in range(9)]
    path.write_text("\n".join(["case_id,class", *rows, "v,common", ""]))
    return path


def config(store: Path, *words: str) -> PretrainConfig:
    return tiny_config(f"store={store}", "probe.every_steps=2", *words)


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(channels=1, patch=(8, 4, 2), width=24, depth=2, heads=2)


def test_cases_are_spread_evenly_and_structures_that_none_of_them_shows_are_left_out(store):
    (segmentation,) = probed_cases(config(store, "probe.cases=2")).values()
    assert segmentation.labelled.train.case_ids() == ["p0", "p8"]
    assert segmentation.labelled.structures == ("liver", "spleen", "kidney")  # p0 has a kidney
    where = "probe.where=case_id in ['p1', 'p3', 'p2']"
    (without,) = probed_cases(config(store, where, "probe.cases=1")).values()
    assert without.labelled.structures == ("liver", "spleen")
    with pytest.raises(UserError, match=r"probe\.cases: the 1 cases to fit on show none of kidney"):
        probed_cases(config(store, where, "probe.cases=1", "probe.structures=[kidney]"))


def test_a_rare_class_is_among_few_cases(store, targets):
    words = (f"probe.targets={targets}", "probe.cases=3")
    (classification,) = probed_cases(config(store, *words)).values()
    assert "p8" in classification.labelled.train.case_ids()
    with pytest.raises(UserError, match=r"probe\.cases: the 1 cases to fit on show none of rare"):
        probed_cases(config(store, f"probe.targets={targets}", "probe.cases=1"))


def test_another_number_of_channels_is_refused(store):
    with pytest.raises(UserError, match=r"has cases of 1 channels, the encoder takes 2"):
        probed_cases(config(store, "model.channels=2"))


def test_figures_of_an_encoder_are_the_same_every_time_and_on_every_seed_of_a_run(store, targets):
    words = (f"probe.targets={targets}", "probe.kinds=[knn,linear,segmentation]")
    first, again, other = (
        probe(encoder(), config(store, *words, f"seed={seed}")) for seed in (0, 0, 5)
    )
    assert first == again == other
    assert not first.faults
    assert first.values["dice"]["liver"] > 0
    json.dumps(first.values)  # goes into the records as it is


def test_the_voxels_that_are_looked_at_are_those_of_their_token():
    label = np.random.default_rng(0).integers(0, 9, (2, 16, 12, 8)).astype(np.uint8)
    found = _looked_at(label, (8, 4, 2))
    patches = patchify(torch.from_numpy(label)[:, None], (8, 4, 2)).reshape(-1, 8, 4, 2)
    # Along 8 voxels the first, third, ... from the middle of each part; along 4 and 2 all.
    assert torch.equal(found.reshape(-1, 4, 4, 2), patches[:, 1::2])
