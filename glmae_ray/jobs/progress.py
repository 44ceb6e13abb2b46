"""How far a job over many cases is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_TELL_S = 5.0  # between two lines where there is no terminal


def with_progress(done: Iterable[Item], total: int, *, what: str) -> Iterator[Item]:
    """Pass on what is done, and show how much of it that is.

    Args:
        done: A case each, as they finish.
        total: How many there will be.
        what: The verb.
    """
    if sys.stderr.isatty():
        yield from tqdm(done, total=total, unit="case", desc=what)
        return
    start = told = time.monotonic()
    for number, outcome in enumerate(done, start=1):
        yield outcome
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            print(f"{what}: {number} of {total}, {told - start:.0f} s", flush=True)
