"""The checkpoint benchmark: what it calls lost, what it expects, and its stand-in for a store."""

from __future__ import annotations

import time

import pytest

from benchmarks._checkpoint_measure import Block, Weighed
from benchmarks._checkpoint_server import BUCKET, slow_bucket
from benchmarks.checkpoint import shortest_step_s, size_row, time_row
from glmae_ray import checkpoint
from glmae_ray.paths import names_in, to_place
from tests.store.object_store import forget_connections, point_at
from tests.test_checkpoint import write


def steps(*seconds: float, begin: float) -> list[tuple[float, float]]:
    """Steps one behind the other."""
    spans = []
    for length in seconds:
        spans.append((begin, begin + length))
        begin += length
    return spans


def test_lost_is_the_time_stood_still_and_what_steps_beside_a_write_took_longer():
    block = Block(
        wall_s=10.0,
        steps=steps(1.3, 1.2, 1, 1, 1, 4, begin=0.5),
        held_s=0.5,
        writes=[(0.4, 2.0)],  # ends in the midst of the second step
    )
    without = Block(wall_s=8.0, steps=steps(1, 1, 1, begin=20))
    assert block.step_s == pytest.approx([1, 1, 1, 4])
    row = time_row("disk", [block], [without])
    assert row["steps slowed by, s"]["median"] == pytest.approx(0.5)
    assert row["lost, s"]["median"] == pytest.approx(1.0)
    assert row["lost / wall"]["median"] == pytest.approx(0.1)
    assert row["wall / without"]["median"] == pytest.approx(1.25)


def test_a_write_while_training_waits_slows_no_step():
    block = Block(wall_s=5, steps=steps(1, 1, 1, begin=2), held_s=2, writes=[(0.1, 1.9)])
    row = time_row("disk", [block], [Block(wall_s=3, steps=block.steps)])
    assert row["steps slowed by, s"]["median"] == 0
    assert row["lost, s"]["median"] == 2


def test_steps_that_a_write_accompanies_to_the_end_are_compared_with_those_of_a_round_without():
    block = Block(wall_s=4.1, steps=steps(2, 2, begin=0.1), held_s=0.1, writes=[(0, 4)])
    row = time_row("disk", [block], [Block(wall_s=3, steps=steps(1.5, 1.5, begin=9))])
    assert row["steps slowed by, s"]["median"] == pytest.approx(1.0)


def test_with_the_shortest_step_a_checkpoint_takes_a_twentieth_of_the_time():
    lost_s = 1.7
    assert lost_s / (25 * shortest_step_s(lost_s) + lost_s) == pytest.approx(0.05)


def test_float32_weights_teacher_and_two_moments_are_expected():
    found = Weighed({"a.pt": 1_300_000, "b.pt": 400_000}, trained=100_000, teacher=80_000)
    row = size_row(found, 0, 1)
    assert row["expected, MB"] == pytest.approx(1.5, abs=0.1)  # 4 bytes of 100,000 x 3 + 80,000
    assert row["found / expected"] == pytest.approx(1.7 / 1.52, abs=1e-4)


def test_the_stand_in_takes_checkpoints_in_slowly_lists_them_and_deletes_them(monkeypatch):
    with slow_bucket(rate=1e6) as variables:
        point_at(variables["AWS_ENDPOINT_URL"], monkeypatch)
        run = to_place(f"{BUCKET}/run")
        for step in (2, 4):
            write(run, step, parts=1)
        began = time.perf_counter()
        checkpoint.write_part(run / "more", {"large.bin": bytes(2_000_000)}, rank=0)
        took_s = time.perf_counter() - began
        found = checkpoint.complete(run)
        assert [each.step for each in found] == [4, 2]
        assert dict(checkpoint.contents(found[0]))["engine/shard-0.pt"] == b"4 0" * 100
        checkpoint.remove(found[1].place)
        assert [each.step for each in checkpoint.complete(run)] == [4]
        assert took_s > 1.9
    forget_connections()


def test_the_stand_in_takes_in_what_comes_in_parts(monkeypatch):
    with slow_bucket(rate=1e12) as variables:
        point_at(variables["AWS_ENDPOINT_URL"], monkeypatch)
        run = to_place(f"{BUCKET}/run")
        checkpoint.write_part(run, {"large.bin": bytes(110 << 20)}, rank=0)  # parts of 50 MiB
        assert sorted(names_in(run)) == ["large.bin", "part-0.json"]
    forget_connections()
