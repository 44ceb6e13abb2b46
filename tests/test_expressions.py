"""The grammar of expressions, and that a config with a wrong one is told so at once."""

from __future__ import annotations

import pytest

from glmae_ray.expressions import columns, mistake, parse
from tests.conftest import tiny_config

WRONG = [
    ("", "invalid syntax"),
    ("split = 'train'", "invalid syntax"),
    ("modality == 'CT' and", "invalid syntax"),
    ("__import__('os').system('true')", "__import__('os').system('true') has no place in it"),
    ("len(source) > 3", "len(source) has no place in it"),
    ("source.upper == 'A'", "source.upper has no place in it"),
    ("spacing[0] * 2 > 3", "spacing[0] * 2 has no place in it"),
    ("shape[0:2] == 1", "0:2 has no place in it"),
    ("annotated is None", "is has no place in it"),
    ("annotated == None", "None has no place in it"),
    ("source == b'x'", "b'x' has no place in it"),
    ("source == f'{split}'", "has no place in it"),
    ("(x := 3) == 3", "has no place in it"),
    ("[s for s in source] == 1", "has no place in it"),
    ("(lambda: 1) == 1", "has no place in it"),
    ("split if 1 else 2", "has no place in it"),
    ("~channels == 1", "has no place in it"),
    ("split == 'train' \0", "null byte"),
    ("(" * 500 + "1" + ")" * 500, "right are columns and literals"),
]


@pytest.mark.parametrize(("expression", "reason"), WRONG)
def test_what_is_not_of_the_grammar_is_named_with_what_would_be_right(expression, reason):
    line = mistake(expression)
    assert line is not None
    assert reason in line
    assert "right are columns and literals" in line
    assert "\n" not in line
    with pytest.raises(ValueError, match="right are"):
        parse(expression)


def test_the_columns_of_an_expression_are_known_without_an_index():
    assert columns("'/a/' in source and (spacing[0] < 3 or not split in ['val', 'test'])") == {
        "source",
        "spacing",
        "split",
    }
    assert mistake(" True ") is None
    assert columns("1 < 2 <= -3.5") == set()


def test_a_config_with_wrong_expressions_says_so_a_line_each():
    words = [
        "sampling.where=exit()",
        "sampling.weights={modality = 'MR': 2, channels == 1: 3}",
        "sampling.shares={print: 1, open('x'): 2}",
    ]
    with pytest.raises(Exception, match="sampling") as caught:
        tiny_config(*words)
    lines = caught.value.lines
    assert [line.split(": ")[:2] for line in lines] == [
        ["sampling.where", "'exit()' is wrong"],
        ["sampling.weights", "\"modality = 'MR'\" is wrong"],
        ["sampling.shares", "\"open('x')\" is wrong"],
    ]


def test_a_negative_weight_and_a_share_of_nothing_are_told():
    with pytest.raises(Exception, match="greater than") as caught:
        tiny_config("sampling={weights: {channels == 1: -1}, shares: {channels == 1: 0}}")
    assert [line.split(": ")[0] for line in caught.value.lines] == [
        "sampling.weights.channels == 1",
        "sampling.shares.channels == 1",
    ]


def test_an_expression_may_be_given_on_the_command_line_as_it_is():
    cfg = tiny_config("sampling.where=modality == 'CT' and split in ['train', 'val']")
    assert cfg.sampling.where == "modality == 'CT' and split in ['train', 'val']"
    assert tiny_config().sampling.where == "split == 'train'"
