"""Twenty steps of a small run give the losses on record: what computes them has not changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.make import RECORD, TERMS, WORDS

# Relative, five times the largest difference between 1 and 2 threads and torch's kernels for
# AVX-512, AVX2 and neither (x86-64): 1.2e-6 in a term, 4.5e-6 in a norm. A momentum of the teacher
# that is off by 0.0001 moves terms by 2e-4, a norm to clip to that is off by 2 % by 5e-4.
CLOSE = {**dict.fromkeys(TERMS, 6e-6), "gradient_norm": 2.5e-5}

Steps = list[dict[str, float]]


def recorded(path: Path) -> Steps:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["words"] == list(WORDS)
    return record["steps"]


def again(folder: Path, *words: str) -> Steps:
    """The same run in a process of its own: DeepSpeed keeps one world per process."""
    out = folder / "again.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.make", "--out", str(out), *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return recorded(out)


def differences(golden: Steps, steps: Steps) -> list[str]:
    """Every figure that is not the one on record."""
    assert len(golden) == len(steps) == 20
    return [
        f"step {number}: {name} {new[name]:.8g}, on record {old[name]:.8g}"
        for number, (old, new) in enumerate(zip(golden, steps, strict=True), start=1)
        for name, tolerance in CLOSE.items()
        if new[name] != pytest.approx(old[name], rel=tolerance)
    ]


def test_every_step_has_the_losses_on_record(tmp_path):
    """If it should differ: `python -m tests.golden.make`, and say in the commit why."""
    assert differences(recorded(RECORD), again(tmp_path)) == []


def test_a_small_change_of_the_recipe_does_not_pass_for_the_record(tmp_path):
    changed = again(tmp_path, "loss.teacher_momentum=0.9961")
    assert differences(recorded(RECORD), changed)
