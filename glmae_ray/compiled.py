"""Loops that numba compiles on first use: strict IEEE arithmetic, the same bits on any machine.

All of them are in this file: numba keeps machine code until the file that it is of changes, and
does not look at what a function calls in others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
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


@compiled
def paste(chunks, table, fill_value, start, out):  # type: ignore[no-untyped-def]
    """Fill `out` (Z, Y, X) with a box that begins at `start`; table (Z, Y, X)."""
    for z in range(len(out)):
        _paste_plane(chunks, table, fill_value, start, z, out[z])


@compiled
def _paste_plane(chunks, table, fill_value, start, z, out):  # type: ignore[no-untyped-def]
    """Fill `out` (Y, X) with plane `z` of a box that begins at `start`; table (Z, Y, X)."""
    deep, high, wide = chunks.shape[1:]
    flat = chunks.reshape(-1)
    rows, columns = out.shape
    z_grid, z_inside = divmod(start[0] + z, deep)
    first_x = start[2] // wide
    for y in range(rows):
        y_grid, y_inside = divmod(start[1] + y, high)
        line = out[y]
        x, x_grid, inside = 0, first_x, start[2] - first_x * wide
        while x < columns:
            count = min(wide - inside, columns - x)
            place = table[z_grid, y_grid, x_grid]
            here = np.uint64(x)  # unsigned: numba would look for negative ones
            if place < 0:
                for n in range(np.uint64(count)):
                    line[here + n] = fill_value
            else:
                there = np.uint64(((place * deep + z_inside) * high + y_inside) * wide + inside)
                for n in range(np.uint64(count)):
                    line[here + n] = flat[there + n]
            x, x_grid, inside = x + count, x_grid + 1, 0


@compiled
def pick(chunks, table, fill_value, axes, values, out):  # type: ignore[no-untyped-def]
    """Fill `out` (Z, Y, X) with what `values` (65536,) has for single voxels of an array.

    `axes`: for Z, Y and X, which chunk of the grid each output is in, and where inside of it.
    """
    z_grid, z_inside, y_grid, y_inside, x_grid, x_inside = axes
    deep, high, wide = chunks.shape[1:]
    flat = chunks.reshape(-1)
    outside = values[np.uint16(fill_value)]
    for z in range(len(out)):
        for y in range(out.shape[1]):
            line, places = out[z, y], table[z_grid[z], y_grid[y]]
            row = (z_inside[z] * high + y_inside[y]) * wide
            for x in range(out.shape[2]):
                place = places[x_grid[x]]
                if place < 0:
                    line[x] = outside
                else:
                    line[x] = values[
                        np.uint16(flat[place * deep * high * wide + row + x_inside[x]])
                    ]


@compiled
def resize_planes(source, axes, plane, reduced, code, is_rounded, out):  # type: ignore[no-untyped-def]
    """`reduced` holds the newest planes of the source at the size of the output's planes."""
    chunks, table, fill_value, start = source
    index_z, weight_z, index_y, weight_y, index_x, weight_x = axes
    kept, across = len(reduced), len(weight_x[0])
    row = np.empty(plane.shape[1], np.float32)
    total = np.empty(reduced.shape[1], np.float32)
    ready = np.uint32(0)  # unsigned: numba would look for negative ones
    for z in range(len(out)):
        for t in range(len(index_z)):
            while ready <= index_z[t, z]:
                _paste_plane(chunks, table, fill_value, start, np.int64(ready), plane)
                place = reduced[ready % kept]
                for y in range(len(weight_y[0])):
                    _blend(plane, index_y[:, y], weight_y[:, y], row)
                    _pick(row, index_x, weight_x, place[y * across : (y + 1) * across])
                ready += np.uint32(1)
        _blend(reduced, index_z[:, z] % kept, weight_z[:, z], total)
        _store(total, code, is_rounded, out[z])


@compiled
def _blend(lines, index, weight, out):  # type: ignore[no-untyped-def]
    """Weighted sum of whole lines, two at a time: half the traffic of the sum so far."""
    pairs = len(index) // 2
    for pair in range(pairs):
        a, b = lines[index[2 * pair]], lines[index[2 * pair + 1]]
        weight_a, weight_b = weight[2 * pair], weight[2 * pair + 1]
        if pair == 0:
            for x in range(len(out)):
                out[x] = a[x] * weight_a + b[x] * weight_b
        else:
            for x in range(len(out)):
                out[x] = out[x] + a[x] * weight_a + b[x] * weight_b
    if 2 * pairs < len(index):
        a, weight_a = lines[index[2 * pairs]], weight[2 * pairs]
        for x in range(len(out)):
            out[x] += a[x] * weight_a


@compiled
def _pick(line, index, weight, out):  # type: ignore[no-untyped-def]
    """Weighted sum of single voxels of a line."""
    a, b, weight_a, weight_b = index[0], index[1], weight[0], weight[1]
    for x in range(len(out)):
        out[x] = line[a[x]] * weight_a[x] + line[b[x]] * weight_b[x]
    for t in range(2, len(index)):
        a, weight_a = index[t], weight[t]
        for x in range(len(out)):
            out[x] += line[a[x]] * weight_a[x]


@compiled
def _store(values, code, is_rounded, out):  # type: ignore[no-untyped-def]
    for n in range(len(out)):
        value = min(max(np.float64(values[n]), code.low), code.high) * code.scale + code.shift
        out[n] = np.rint(value) if is_rounded else value
