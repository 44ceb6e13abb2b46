"""The facts of `glmae inspect` as text for people: aligned, 100 columns wide; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmae_ray.jobs.text import in_bytes, named, table, times, wrapped

_VALUES_NAMED = 5  # of an option that differs between cases
_LONGEST_VALUE = 60


def store_lines(facts: Mapping[str, Any]) -> str:
    """Text of what `describe` gives."""
    quarantined = sum(entry["sources"] for entry in facts["quarantine"].values())
    lines = [
        *named("store", facts["store"]),
        *named(
            "format",
            f"{facts['format']} (OME-Zarr 0.5), chunks {times(facts['chunk'])}, "
            f"{facts['levels']} levels, {facts['codec']}",
        ),
        *named("fingerprint", facts["fingerprint"]),
        *named("read by", _counted(facts["readers"]) or "-"),
        *named("quarantined", f"{quarantined:,} sources"),
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
        lines += wrapped(f"  {entry['sources']:,} {reason}, such as ", entry["example"], hang=4)
    return "\n".join(lines)


def disk_lines(sizes: Mapping[str, Any]) -> str:
    """Text of what `measure` gives."""
    rows = [["", "", "of raw"]]
    rows += [
        [part.replace("_", " "), in_bytes(figures["bytes"]), _percent(figures["ratio"])]
        for part, figures in sizes["parts"].items()
    ]
    rows.append(["raw level 0", in_bytes(sizes["raw"]), ""])
    lines = ["", "size on disk", *table(rows)]
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
        lines += _matrix(name, value) if name.endswith("affine") else named(name, _plain(value))
    return "\n".join(lines)


def _split_table(facts: Mapping[str, Any]) -> list[str]:
    rows = [["split", "cases", "subjects"]]
    for name, figures in [*facts["splits"].items(), ("all", facts)]:
        rows.append([name, f"{figures['cases']:,}", f"{figures['subjects']:,}"])
    return table(rows, indent="")


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
        *table(sides),
        "  intensities in the foreground; percentiles are medians over the cases",
        *table(inside),
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
    return table(rows, indent="")


def _option_lines(name: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"  {name}"]
    for entry in values[:_VALUES_NAMED]:
        text = "not given" if entry["value"] is None else entry["value"]
        short = text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
        lines.append(f"    {short:{_LONGEST_VALUE}} {entry['cases']:>10,} cases")
    if len(values) > _VALUES_NAMED:
        lines.append(f"    {len(values) - _VALUES_NAMED:,} other values")
    return lines


def _matrix(name: str, numbers: Sequence[float]) -> list[str]:
    rows = [[f"{number:.6g}" for number in numbers[n : n + 4]] for n in range(0, len(numbers), 4)]
    names = [name, *[""] * (len(rows) - 1)]
    return table([[first, *row] for first, row in zip(names, rows, strict=True)], indent="")


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


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"
