"""Expressions on the index: the same cases as Python's own evaluation of them, and clear lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmae_ray.errors import UserError
from glmae_ray.store.index import SCHEMA, VolumeIndex
from tests.store.test_index import record

ROWS = [
    record("a", source="/x/one.nii", spacing=[5.0, 0.9, 0.8], std=[2.0]),
    record("b", source="/y/two.nii", modality="MR", channels=2, std=[0.0, 3.5], split="val"),
    record("c", source="/x/y/three.nrrd", spacing=[1.0, 2.5, 0.7], filled=12, split="test"),
    record("d", modality="PT", annotated=None, std=[7.0]),
]
INDEX = VolumeIndex.from_records(ROWS)


def chosen(expression: str) -> str:
    return "".join(INDEX.where(expression, field="where").case_ids())


@pytest.mark.parametrize(
    ("expression", "cases"),
    [
        ("modality == 'CT'", "ac"),
        ("modality != 'CT' and split == 'train'", "d"),
        ("modality in ['MR', 'PT']", "bd"),
        ("modality not in ('MR', 'PT')", "ac"),
        ("channels in [2, 3.0]", "b"),
        ("modality in []", ""),
        ("'/x/' in source", "ac"),
        ("'/x/' not in source or not split == 'train'", "bcd"),
        ("spacing[0] < 3", "c"),
        ("'spleen' in annotated", "abc"),
        ("'spleen' not in annotated", ""),
        ("'sple' in annotated", ""),
        ("'liver' in structures and 'liv' not in structures", "abcd"),
        ("0.85 < spacing[1] <= 2.5 and spacing[0] > 1", "abd"),
        ("1 < channels", "b"),
        ("filled > -1", "abcd"),
        ("factors[1][2] == 2", "abcd"),
        ("case_id >= 'c'", "cd"),
        ("std[0] > 0", "acd"),
        ("True", "abcd"),
        ("not True or 2 < 1", ""),
        ("spacing[0] == spacing[0]", "abcd"),
        ("box_start[0] < shape[0]", "abcd"),
    ],
)
def test_an_expression_chooses_the_cases_for_which_it_holds(expression, cases):
    assert chosen(expression) == cases


def test_a_missing_value_matches_neither_a_comparison_nor_its_opposite():
    assert chosen("std[1] > 0") == "b"
    assert chosen("not std[1] > 0") == ""
    assert chosen("std[1] != 3.5") == ""
    assert chosen("annotated[0] == 'spleen'") == "abc"
    assert chosen("annotated[0] not in ['spleen']") == ""
    assert chosen("std[1] > 0 or modality == 'PT'") == "bd"


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("modalty == 'CT'", "there is no column modalty; there are case_id, subject, split"),
        ("modality == 3", "modality is text, 3 is a number"),
        ("channels == '1'", "channels is a number, '1' is text"),
        ("channels in [1, 'x']", "channels is a number, 'x' is text"),
        ("split in 'train'", "split in 'train' is neither column in [literals]"),
        ("3 in source", "3 is no text"),
        ("'x' in channels", "'x' is text, channels is a number"),
        ("spacing > 3", "spacing holds several values; take one of them, such as spacing[0]"),
        ("spacing[3] > 3", "spacing has 3 values, [0] to [2]"),
        ("spacing[-1] > 3", "spacing[-1] takes no value"),
        ("spacing['x'] > 3", "spacing['x'] takes no value"),
        ("modality[0] == 'C'", "modality is no list"),
        ("structures == 3", "structures cannot be compared"),
        ("structures[0] == 3", "structures is no list"),
        ("channels == True", "True cannot be compared"),
        ("channels", "channels is neither true nor false"),
        ("split == 'train' and channels", "channels is neither true nor false"),
        ("modality in [split]", "split is no literal"),
        ("-channels == 1", "-channels is no literal and no column"),
        (f"filled < {10**30}", "too large"),
        ("exit()", "exit() has no place in it"),
    ],
)
def test_a_wrong_expression_is_one_line_with_field_value_and_reason(expression, reason):
    with pytest.raises(UserError) as caught:
        INDEX.where(expression, field="sampling.where")
    (line,) = caught.value.lines
    assert line.startswith(f"sampling.where: {expression!r} is wrong: ")
    assert reason in line
    assert "\n" not in line


_VALUES = {
    "modality": st.sampled_from(["'CT'", "'MR'", "'PT'", "''"]),
    "source": st.sampled_from(["'/x/one.nii'", "'/y'"]),
    "channels": st.sampled_from(["1", "2", "1.5"]),
    "filled": st.sampled_from(["0", "12", "-3"]),
    "spacing[0]": st.sampled_from(["1", "3.0", "5"]),
    "shape[2]": st.sampled_from(["50", "51"]),
}


@st.composite
def _comparisons(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(sorted(_VALUES)))
    values = _VALUES[name]
    if draw(st.booleans()):
        listed = ", ".join(draw(st.lists(values, min_size=1, max_size=3)))
        return f"{name} {draw(st.sampled_from(['in', 'not in']))} [{listed}]"
    ops = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    chain = f"{name} {draw(ops)} {draw(values)}"
    return f"{draw(values)} {draw(ops)} {chain}" if draw(st.booleans()) else chain


_EXPRESSIONS = st.recursive(
    _comparisons(),
    lambda parts: st.one_of(
        parts.map("not ({})".format),
        st.tuples(parts, st.sampled_from(["and", "or"]), parts).map(
            lambda found: f"({found[0]}) {found[1]} ({found[2]})"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(_EXPRESSIONS)
def test_where_nothing_is_missing_expressions_mean_what_they_mean_in_python(expression):
    expected = [bool(eval(expression, {}, dict(row))) for row in ROWS]
    np.testing.assert_array_equal(INDEX.matches(expression, field="where"), expected)


@given(st.text(max_size=30))
def test_any_text_at_all_is_an_expression_or_one_clear_line(text):
    try:
        mask = INDEX.matches(text, field="where")
    except UserError as error:
        (line,) = error.lines
        assert line.startswith("where: ")
    else:
        assert (mask.dtype, mask.shape) == (np.bool_, (4,))


def test_a_table_in_several_chunks_gives_the_same(any_chunking: pa.Table):
    index = VolumeIndex(any_chunking)
    for expression in ("std[1] > 0", "spacing[0] < 3", "'/x/' in source", "'kidney' in annotated"):
        expected = INDEX.matches(expression, field="where")
        np.testing.assert_array_equal(index.matches(expression, field="where"), expected)


@pytest.fixture(params=[1, 2, 3])
def any_chunking(request: Any) -> pa.Table:
    parts = [INDEX.rows.slice(0, request.param), INDEX.rows.slice(request.param)]
    return pa.concat_tables(parts)


def test_an_empty_index_has_no_matches():
    empty = VolumeIndex(SCHEMA.empty_table())
    assert len(empty.where("std[0] > 0 and 'x' in source", field="where")) == 0
