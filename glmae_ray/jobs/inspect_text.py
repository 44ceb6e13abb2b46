"""The facts of `glmae inspect` as text for people: aligned, 100 columns wide; pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH = 100
_MARGIN = 16  # of what stands behind the name of a line
_VALUES_NAMED = 5  # of an option that differs between cases
_LONGEST_VALUE = 60
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def store_lines(facts: Mapping[str, Any]) -> str:
    """Text of what `describe` gives."""
    quarantined = sum(entry["sources"] for entry in facts["quarantine"].values())
    lines = [
        *_entry("store", facts["store"]),
        *_entry(
            "format",
            f"{facts['format']} (OME-Zarr 0.5), chunks {times(facts['chunk'])}, "
            f"{facts['levels']} levels, {facts['codec']}",
        ),
        *_entry("fingerprint", facts["fingerprint"]),
        *_entry("read by", _counted(facts["readers"]) or "-"),
        *_entry("quarantined", f"{quarantined:,} sources"),
        "",
        *_split_table(facts),
    ]
    for word, figures in facts["modalities"].items():
        lines += ["", *_modality_lines(word, figures)]
    if facts["structures"]:
        lines += ["", *_structure_table(facts["structures"])]
    if facts["options"]:
        lines += ["", "choices that differ between cases"]
        for name, values in facts["options"].items():
            lines += _option_lines(name, values)
    if facts["quarantine"]:
        lines += ["", "quarantine"]
    for reason, entry in facts["quarantine"].items():
        lines += _wrapped(f"  {entry['sources']:,} {reason}, such as ", entry["example"], hang=4)
    return "\n".join(lines)


def disk_lines(sizes: Mapping[str, Any]) -> str:
    """Text of what `measure` gives."""
    rows = [["", "", "of raw"]]
    rows += [
        [part.replace("_", " "), _bytes(figures["bytes"]), _percent(figures["ratio"])]
        for part, figures in sizes["parts"].items()
    ]
    rows.append(["raw level 0", _bytes(sizes["raw"]), ""])
    lines = ["", "size on disk", *_table(rows)]
    if sizes["not_indexed"]:
        count = sizes["not_indexed"]
        lines += ["", f"{count:,} stored cases are not in the index; ingest again adopts them"]
    if sizes["missing"]:
        count = sizes["missing"]
        lines += ["", f"{count:,} cases of the index are gone from the store; ingest them again"]
    return "\n".join(lines)


def case_lines(facts: Mapping[str, Any]) -> str:
    """Text of what `inspect_case` gives."""
    lines: list[str] = []
    for name, value in facts.items():
        lines += _matrix(name, value) if name.endswith("affine") else _entry(name, _plain(value))
    return "\n".join(lines)


def times(sides: Iterable[float]) -> str:
    """Sides as `64 x 128 x 128`."""
    return " x ".join(f"{side:.4g}" for side in sides)


def _split_table(facts: Mapping[str, Any]) -> list[str]:
    rows = [["split", "cases", "subjects"]]
    for name, figures in [*facts["splits"].items(), ("all", facts)]:
        rows.append([name, f"{figures['cases']:,}", f"{figures['subjects']:,}"])
    return _table(rows, indent="")


def _modality_lines(word: str, figures: Mapping[str, Any]) -> list[str]:
    channels = " or ".join(sorted(figures["channels"], key=int))
    title = f"{word}: {figures['cases']:,} cases; channels: {channels}; "
    sides = [["", "Z", "Y", "X"]]
    sides.append(["voxels", *_spread(figures["shape"])])
    sides.append(["spacing in mm", *_spread(figures["spacing"])])
    names = ("minimum", "p0_5", "p50", "p99_5", "maximum")
    values = [f"{figures['intensity'][name]:.6g}" for name in names]
    inside = [["", "minimum", "p0.5", "p50", "p99.5", "maximum"], ["channel 0", *values]]
    return [
        title + _counted(figures["dtypes"]),
        "  median over the cases (lowest to highest)",
        *_table(sides),
        "  intensities in the foreground; percentiles are medians over the cases",
        *_table(inside),
    ]


def _spread(figures: Mapping[str, Sequence[float]]) -> list[str]:
    columns = zip(figures["median"], figures["minimum"], figures["maximum"], strict=True)
    return [
        f"{middle:.4g}" if low == high else f"{middle:.4g} ({low:.4g} to {high:.4g})"
        for middle, low, high in columns
    ]


def _structure_table(structures: Mapping[str, Any]) -> list[str]:
    rows = [["structure", "cases", "median voxels"]]
    rows += [
        [name, f"{figures['cases']:,}", f"{figures['median_voxels']:,.0f}"]
        for name, figures in structures.items()
    ]
    return _table(rows, indent="")


def _option_lines(name: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"  {name}"]
    for entry in values[:_VALUES_NAMED]:
        text = "not given" if entry["value"] is None else entry["value"]
        short = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
        lines.append(f"    {short:{_LONGEST_VALUE}} {entry['cases']:>10,} cases")
    if len(values) > _VALUES_NAMED:
        lines.append(f"    {len(values) - _VALUES_NAMED:,} other values")
    return lines


def _table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> list[str]:
    """Columns that line up: the first on its left, the others on their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], _MARGIN - len(indent))
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append((indent + "  ".join([first.ljust(widths[0]), *cells])).rstrip())
    return lines


def _entry(name: str, value: str) -> list[str]:
    return _wrapped(f"{name:{_MARGIN - 1}} ", value, hang=_MARGIN)


def _wrapped(start: str, text: str, *, hang: int) -> list[str]:
    """Lines of at most the width; a path that is longer stays whole."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _matrix(name: str, numbers: Sequence[float]) -> list[str]:
    rows = [[f"{number:.6g}" for number in numbers[n : n + 4]] for n in range(0, len(numbers), 4)]
    names = [name, *[""] * (len(rows) - 1)]
    return _table([[first, *row] for first, row in zip(names, rows, strict=True)], indent="")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items()) or "-"
    if isinstance(value, list):
        if value and isinstance(value[0], list):
            return ", ".join(times(entry) for entry in value)
        return ", ".join(map(_plain, value)) or "-"
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _counted(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _bytes(size: int) -> str:
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"
