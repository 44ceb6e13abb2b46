"""Expressions on the columns of the index, such as `split == 'train' and spacing[0] < 3`: grammar.

An expression is Python's notation and a small part of it: columns by name, one value of a column
of lists (`spacing[0]`), literals; `== != < <= > >=`, also chained; `in` and `not in` a list of
literals; `'text' in column` for a part of a word, for one of a list of words (`'liver' in
annotated`) or for a key (`'liver' in structures`); `and`, `or`, `not`. There is nothing in it that
could be called. `store/where.py` says for which cases one holds.
"""

from __future__ import annotations

import ast

_PARTS = (
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn),
    *(ast.Name, ast.Load, ast.Subscript, ast.Constant, ast.List, ast.Tuple),
)
_LITERALS = (str, int, float)  # and bool, which is an int
_RIGHT = (
    "right are columns and literals, compared (==, !=, <, <=, >, >=, in, not in) "
    "and joined by and, or, not"
)


def parse(expression: str) -> ast.expr:
    """The tree of an expression that holds nothing but what the grammar allows.

    Raises:
        ValueError: It does not; in one line, to be put behind the expression.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{error.msg}; {_RIGHT}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        # A null character; too many brackets inside each other.
        raise ValueError(f"{error or 'it is nested too deeply'}; {_RIGHT}") from None
    for node in ast.walk(tree):
        is_value = not isinstance(node, ast.Constant) or isinstance(node.value, _LITERALS)
        if not (isinstance(node, _PARTS) and is_value):
            found = ast.unparse(node) or type(node).__name__.lower()  # an operator has no text
            raise ValueError(f"{found} has no place in it; {_RIGHT}")
    return tree


def columns(expression: str) -> set[str]:
    """Names of the columns in an expression.

    Raises:
        ValueError: As in `parse`.
    """
    return {node.id for node in ast.walk(parse(expression)) if isinstance(node, ast.Name)}


def mistake(expression: str) -> str | None:
    """What is wrong with an expression, in one line; None: nothing that shows without the index."""
    try:
        parse(expression)
    except ValueError as error:
        return str(error)
    return None
