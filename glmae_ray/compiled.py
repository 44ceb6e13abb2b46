"""Loops that numba compiles on first use: strict IEEE arithmetic, the same bits on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile for this machine's vector units; other threads run meanwhile.

    Without `fastmath` the compiler neither reorders sums nor fuses a product with a sum, so
    results do not depend on the machine. The machine code is kept beside the source, or in the
    user's cache folder, for later processes.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no folder to write to: each process compiles anew, a second
        return njit(nogil=True)(function)
