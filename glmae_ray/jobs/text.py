"""Text for people: columns that line up, lines of 100 characters, sizes, what an error says."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

_WIDTH = 100
_MARGIN = 16  # of what stands behind the name of a line
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def times(sides: Iterable[float]) -> str:
    """Sides as `64 x 128 x 128`."""
    return " x ".join(f"{side:.4g}" for side in sides)


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> list[str]:
    """Columns that line up: the first on its left, the others on their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], _MARGIN - len(indent))
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append((indent + "  ".join([first.ljust(widths[0]), *cells])).rstrip())
    return lines


def named(name: str, value: str) -> list[str]:
    """A name, and beside it its value on as many lines as it takes."""
    return wrapped(f"{name:{_MARGIN - 1}} ", value, hang=_MARGIN)


def wrapped(start: str, text: str, *, hang: int) -> list[str]:
    """Lines of at most the width; a path that is longer stays whole."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def in_bytes(size: float) -> str:
    """A size with its unit, powers of 1000."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def last_line(error: BaseException) -> str:
    """What an error says in the end, also one of Ray's with a traceback as its text."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1].strip()
