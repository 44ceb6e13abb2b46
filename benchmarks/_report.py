"""What all benchmarks share: their arguments, facts about the machine, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from glmae_ray.paths import publish

Row = Mapping[str, Any]


def arguments(question: str) -> argparse.Namespace:
    """The command line: `quick` and `out`.

    Args:
        question: What the benchmark answers, for `--help`.
    """
    return parser(question).parse_args()


def parser(question: str) -> argparse.ArgumentParser:
    """The same before it is parsed, for a benchmark that has more to ask."""
    asked = argparse.ArgumentParser(description=question)
    asked.add_argument("--quick", action="store_true", help="within 10 minutes on 2 cores")
    asked.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    return asked


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """The machine and the versions of packages; nothing that names a host or a path."""
    load_1min, *_ = os.getloadavg()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(load_1min, 2),  # of other work: above 0.5, figures are noisy
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in sorted(packages)},
    }


def spread(values: Sequence[float], *, digits: int = 4) -> dict[str, float]:
    """Median, lowest and highest of repeats."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()}


def report(
    name: str,
    *,
    rows: Sequence[Row],
    ratios: Mapping[str, float],
    facts: Mapping[str, Any],
    out: Path,
) -> None:
    """Print a table of the rows and the ratios, and write everything to a JSON file.

    Args:
        name: Of the benchmark.
        rows: What was measured; those with the same first key are a table, in which keys that
            rows lack are left blank.
        ratios: "what / against what" to a number.
        facts: What `environment` found, before the work began.
        out: The file.
    """
    for _, alike in groupby(rows, key=lambda row: next(iter(row))):
        print_table(list(alike))
        print()
    print_table([{"ratio": what, "value": round(value, 3)} for what, value in ratios.items()])
    document = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": dict(facts),
        "rows": list(rows),
        "ratios": {what: round(value, 4) for what, value in ratios.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    publish(out, json.dumps(document, indent=2) + "\n")


def print_table(rows: Sequence[Row]) -> None:
    """Print rows as aligned columns, in the order in which keys first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(names))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and "median" in value:
        return f"{value['median']:.4g} ({value['min']:.4g}-{value['max']:.4g})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") or "unknown"
