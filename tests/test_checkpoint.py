"""Checkpoint folders: complete or nothing, compared with what was written, the best one kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmae_ray import checkpoint
from glmae_ray.checkpoint import CorruptError, complete, contents, folder_of, write_part


def write(
    run: Path,
    step: int,
    *,
    sitting: int = 0,
    parts: int = 2,
    missing: tuple[int, ...] = (),
    **facts: Any,
) -> Path:
    """A checkpoint of two ranks, each of which wrote some bytes; but for those that died."""
    folder = folder_of(run, step=step, sitting=sitting)
    for rank in set(range(parts)) - set(missing):
        files = {f"engine/shard-{rank}.pt": f"{step} {rank}".encode() * 100}
        if rank == 0:
            files[checkpoint.STATE] = json.dumps({"step": step, "parts": parts, **facts}).encode()
        write_part(folder, files, rank=rank)
    return folder


def test_a_checkpoint_is_complete_when_every_rank_has_written_its_part(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 4, missing=(1,))
    write(tmp_path, 6, missing=(0,))
    assert [found.step for found in complete(tmp_path)] == [2]
    assert checkpoint.latest_step(tmp_path) == 2
    write(tmp_path, 4, sitting=1)
    assert [(c.step, c.place.name) for c in complete(tmp_path)] == [
        (4, "step-0000004-1"),
        (2, "step-0000002-0"),
    ]


def test_a_run_without_checkpoints_is_at_step_0(tmp_path):
    assert complete(tmp_path / "none") == []
    assert checkpoint.latest_step(tmp_path / "none") == 0


def test_what_was_written_comes_back(tmp_path):
    write(tmp_path, 3, note="x")
    (found,) = complete(tmp_path)
    files = dict(contents(found))
    assert files["engine/shard-1.pt"] == b"3 1" * 100
    assert json.loads(files["state.json"])["note"] == "x"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "has 293 of its 300 bytes"),
        (lambda path: path.write_bytes(b"9" + path.read_bytes()[1:]), "not hold what was written"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_found_and_named(tmp_path, damage, reason):
    folder = write(tmp_path, 3)
    damage(folder / "engine" / "shard-1.pt")
    (found,) = complete(tmp_path)
    with pytest.raises(CorruptError, match=rf"shard-1\.pt .*{reason}"):
        list(contents(found))


def test_the_last_ones_and_the_best_stay(tmp_path):
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5), (4, None), (5, 0.6)):
        write(tmp_path, step, val_loss=loss)
    found = complete(tmp_path)
    assert [c.step for c in checkpoint.surplus(found, keep=2)] == [3, 1]
    assert [c.step for c in checkpoint.surplus(found, keep=1)] == [4, 3, 1]
    assert checkpoint.surplus(found, keep=5) == []


def test_without_a_held_out_loss_the_last_ones_stay(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [c.step for c in checkpoint.surplus(complete(tmp_path), keep=1)] == [2, 1]


def test_what_earlier_sittings_left_unfinished_is_found_and_what_is_being_written_is_not(tmp_path):
    write(tmp_path, 2, sitting=0)
    left = write(tmp_path, 4, sitting=0, missing=(1,))
    write(tmp_path, 4, sitting=1, missing=(1,))
    assert checkpoint.unfinished(tmp_path, before=1) == [left]


def test_a_removed_checkpoint_is_gone_at_once(tmp_path):
    folder = write(tmp_path, 2)
    checkpoint.remove(folder)
    assert not folder.exists()
    assert complete(tmp_path) == []


def test_a_part_that_will_not_be_complete_frees_its_space(tmp_path):
    folder = folder_of(tmp_path, step=2, sitting=0)
    files = {"engine/a.pt": b"1" * 50, "state.json": b"{}"}
    write_part(folder, files, rank=0)
    (folder / "engine" / "a.pt.unfinished").write_bytes(b"1" * 9)
    checkpoint.remove_part(folder, files)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["part-0.json"]
