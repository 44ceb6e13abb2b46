"""Which cases a run shows, with which weights, and what is said where that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from glmae_ray.config_data import SamplingConfig
from glmae_ray.errors import UserError
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases
from tests.store.test_index import record

ROWS = [
    record("a", source="/one/a.nii"),
    record("b", source="/one/b.nii", spacing=[5.0, 1.0, 1.0]),
    record("c", source="/two/c.nii", modality="MR"),
    record("d", source="/two/d.nii", modality="MR", split="val"),
    record("e", source="/two/e.nii", spacing=[5.0, 1.0, 1.0]),
]
INDEX = VolumeIndex.from_records(ROWS)


def weights_of(**section) -> list[float]:
    weights = select_cases(INDEX, SamplingConfig(**section)).weights
    assert weights is not None
    assert weights.dtype == np.float64
    return weights.tolist()


def mistakes(**section) -> list[str]:
    with pytest.raises(UserError) as caught:
        select_cases(INDEX, SamplingConfig(**section))
    return list(caught.value.lines)


def test_the_default_chooses_the_training_split_all_alike():
    selection = select_cases(INDEX, SamplingConfig())
    assert selection.index.case_ids() == ["a", "b", "c", "e"]
    assert selection.weights is None


def test_weights_of_expressions_that_hold_together_multiply():
    weights = {"modality == 'MR'": 3, "spacing[0] > 3": 0.5, "'/two/' in source": 4}
    assert weights_of(weights=weights) == [1, 0.5, 12, 2]
    assert weights_of(weights={"modality == 'MR'": 0}, where="True") == [1, 1, 0, 0, 1]


def test_shares_balance_data_sets_whatever_their_sizes():
    shares = {"'/one/' in source": 1, "'/two/' in source": 3}
    assert weights_of(where="True", shares=shares) == pytest.approx([0.5, 0.5, 1, 1, 1])


def test_within_a_share_cases_are_in_proportion_to_their_weights():
    section = {
        "shares": {"modality == 'MR'": 1, "modality == 'CT'": 1},
        "weights": {"spacing[0] > 3": 2},
    }
    assert weights_of(**section) == pytest.approx([0.2, 0.4, 1, 0.4])


def test_every_wrong_expression_is_told_at_once():
    lines = mistakes(where="splt == 1", weights={"channels": 2}, shares={"spacing > 1": 1})
    assert [line.split(": ")[0] for line in lines] == [
        "sampling.where",
        "sampling.weights",
        "sampling.shares",
    ]


def test_a_filter_that_leaves_nothing_names_what_there_is():
    (line,) = mistakes(where="modality == 'PT'")
    assert line == (
        "sampling.where: \"modality == 'PT'\" selects no case; "
        "the store has 3 train CT, 1 train MR, 1 val MR"
    )
    with pytest.raises(UserError, match="selects no case; the store has none"):
        select_cases(VolumeIndex.from_records([]), SamplingConfig())


def test_weights_that_leave_nothing_or_have_no_end_are_told():
    (line,) = mistakes(weights={"True": 0})
    assert line.startswith("sampling.weights: the largest weight of the 4 chosen cases is 0")
    (line,) = mistakes(weights={"True": 1e308, "channels == 1": 1e308})
    assert "is inf" in line


def test_a_case_of_no_share_or_of_two_and_a_share_of_no_case_are_told():
    lines = mistakes(
        shares={"modality == 'MR'": 1, "'/two/' in source": 1, "modality == 'PT'": 2},
    )
    assert len(lines) == 3
    assert "\"modality == 'PT'\" holds for no chosen case" in lines[0]
    assert "2 of 4 chosen cases, such as a, match none" in lines[1]
    assert "1 of 4 chosen cases, such as c, match several" in lines[2]
    (line,) = mistakes(
        shares={"modality == 'MR'": 1, "modality == 'CT'": 1}, weights={"modality == 'MR'": 0}
    )
    assert "holds for no chosen case with a weight above 0" in line


def test_the_columns_that_are_needed_are_enough(tmp_path):
    INDEX.write(tmp_path)
    sampling = SamplingConfig(
        where="filled == 0", weights={"std[0] > 1": 2}, shares={"'/' in source": 1}
    )
    needed = columns_to_select(sampling)
    assert needed == {"case_id", "split", "modality", "filled", "std", "source"}
    selection = select_cases(VolumeIndex.read(tmp_path, columns=needed), sampling)
    assert len(selection.index) == 5
    unknown = SamplingConfig(where="nowhere == 1")
    index = VolumeIndex.read(tmp_path, columns=columns_to_select(unknown))
    with pytest.raises(UserError, match="there is no column nowhere"):
        select_cases(index, unknown)
