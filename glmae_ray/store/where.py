"""For which rows of the index an expression holds; on whole columns, by pyarrow.

`store/index.py` stays the door to pyarrow: it alone imports this module. A value that is missing
(null, or a channel that a case does not have) counts as false, and so does its opposite: such a
case is neither `std[1] > 0` nor `not std[1] > 0`.
"""

from __future__ import annotations

import ast
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from glmae_ray.expressions import parse
from glmae_ray.store.schema import SCHEMA

_COMPARE = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}


def matching(rows: pa.Table, expression: str) -> NDArray[np.bool_]:
    """Whether an expression holds, for each row, bool (N,).

    Args:
        rows: Columns of `SCHEMA`, with at least those that the expression names.
        expression: See `glmae_ray/expressions.py`.

    Raises:
        ValueError: It is wrong; in one line, to be put behind the expression.
    """
    try:
        truth = _truth(parse(expression), rows)
    except (pa.ArrowException, OverflowError) as error:  # such as a literal beyond 64 bits
        raise ValueError(" ".join(str(error).split())) from None
    if isinstance(truth, pa.Scalar):
        return np.full(rows.num_rows, truth.as_py())
    return pc.fill_null(truth, False).to_numpy()


def _truth(node: ast.expr, rows: pa.Table) -> Any:
    """A node that is true or false: booleans of pyarrow, one a row or one for all."""
    match node:
        case ast.BoolOp(op=op, values=nodes):
            join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            return reduce(join, [_truth(part, rows) for part in nodes])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return pc.invert(_truth(operand, rows))
        case ast.Compare(left=left, ops=ops, comparators=others):
            steps = zip(ops, pairwise([left, *others]), strict=True)
            return reduce(pc.and_kleene, [_compare(op, *pair, rows) for op, pair in steps])
        case ast.Constant(value=bool(value)):
            return pa.scalar(value)
    raise ValueError(f"{ast.unparse(node)} is neither true nor false; compare it with something")


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, rows: pa.Table) -> Any:
    if isinstance(op, ast.In | ast.NotIn):
        found = _is_in(left, right, rows)
        return pc.invert(found) if isinstance(op, ast.NotIn) else found
    one, other = _value(left, rows), _value(right, rows)
    _same_kind((left, one), (right, other))
    return _COMPARE[type(op)](one, other)


def _is_in(left: ast.expr, right: ast.expr, rows: pa.Table) -> Any:
    """`column in [literals]`, or `'text' in column`: part of a word, one of a list, a key."""
    one = _value(left, rows)
    if isinstance(right, ast.List | ast.Tuple):
        choices = [_literal(item) for item in right.elts]
        for item, choice in zip(right.elts, choices, strict=True):
            _same_kind((left, one), (item, choice))
        kind = pa.string() if _kind(left, one) == "text" else pa.float64()
        known = pa.array([choice.as_py() for choice in choices], kind)
        found = pc.is_in(pc.cast(one, kind), known)
        return pc.if_else(pc.is_valid(one), found, None)
    whole = _value(right, rows)
    if not isinstance(one, pa.Scalar) or isinstance(whole, pa.Scalar):
        text = f"{ast.unparse(left)} in {ast.unparse(right)}"
        raise ValueError(f"{text} is neither column in [literals] nor 'text' in column")
    if _kind(left, one) != "text":
        raise ValueError(f"{ast.unparse(left)} is no text; right is 'text' in column")
    if pa.types.is_map(whole.type):
        found = pc.is_valid(pc.map_lookup(whole, one, "first"))
        return pc.if_else(pc.is_valid(whole), found, None)
    if pa.types.is_list(whole.type) and pa.types.is_string(whole.type.value_type):
        return _has_word(whole, one)
    _same_kind((left, one), (right, whole))
    return pc.match_substring(whole, one.as_py())


def _has_word(lists: Any, word: pa.Scalar) -> Any:
    """Whether a word is in each list of words."""
    lists = lists.combine_chunks()  # parents are numbered within a chunk
    there = np.zeros(len(lists), bool)
    hits = pc.equal(pc.list_flatten(lists), word)
    there[pc.filter(pc.list_parent_indices(lists), hits)] = True
    return pa.chunked_array([pc.if_else(pc.is_valid(lists), pa.array(there), None)])


def _value(node: ast.expr, rows: pa.Table) -> Any:
    """A node that has a value: a column, or a scalar for a literal."""
    match node:
        case ast.Name(id=name) if name in SCHEMA.names:
            return rows[name]
        case ast.Name(id=name):
            raise ValueError(f"there is no column {name}; there are {', '.join(SCHEMA.names)}")
        case ast.Subscript(value=below, slice=ast.Constant(value=int(place))):
            return _element(below, _value(below, rows), place)
        case ast.Subscript():
            raise ValueError(f"{ast.unparse(node)} takes no value; right is a number, as in std[0]")
    return _literal(node)


def _element(node: ast.expr, lists: Any, place: int) -> Any:
    """One value of each list; where a list is shorter, none."""
    name, kind = ast.unparse(node), lists.type
    if pa.types.is_fixed_size_list(kind):
        if place >= kind.list_size:
            raise ValueError(f"{name} has {kind.list_size} values, [0] to [{kind.list_size - 1}]")
        return pc.list_element(lists, place)
    if not pa.types.is_list(kind):
        raise ValueError(f"{name} is no list; nothing can be taken out of it by [{place}]")
    padded = pc.list_slice(lists, place, place + 1, return_fixed_size_list=True)
    return pc.list_element(padded, 0)


def _literal(node: ast.expr) -> pa.Scalar:
    match node:
        case ast.Constant(value=value):
            return pa.scalar(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value) | float(value))):
            return pa.scalar(-value)
    raise ValueError(f"{ast.unparse(node)} is no literal and no column")


def _same_kind(one: tuple[ast.expr, Any], other: tuple[ast.expr, Any]) -> None:
    """See that two values are both text or both numbers."""
    if (first := _kind(*one)) != (second := _kind(*other)):
        left, right = ast.unparse(one[0]), ast.unparse(other[0])
        raise ValueError(f"{left} is {first}, {right} is {second}; compare like with like")


def _kind(node: ast.expr, value: Any) -> str:
    """`text` or `a number`."""
    kind = value.type
    if pa.types.is_string(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "a number"
    name = ast.unparse(node)
    if pa.types.is_map(kind) or pa.types.is_boolean(kind):
        raise ValueError(f"{name} cannot be compared; it is neither a text nor a number")
    raise ValueError(f"{name} holds several values; take one of them, such as {name}[0]")
