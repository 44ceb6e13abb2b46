"""How many CPUs a process has where a scheduler or a container takes some."""

from __future__ import annotations

import os

import pytest

from glmae_ray.jobs import machine
from glmae_ray.jobs.machine import cpus_here


@pytest.fixture
def sixteen(monkeypatch):
    """A machine of 16 CPUs, all of them allowed, in no container."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "_CPU_LIMITS", ())


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 16),
        ({"quota": "-1\n", "period": "100000\n"}, 16),
        ({"quota": "200000\n", "period": "100000\n"}, 2),
    ],
)
def test_a_container_may_use_what_its_quota_says(sixteen, tmp_path, monkeypatch, files, cpus):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    limits = (("cpu.max",), ("quota", "period"))
    places = tuple(tuple(str(tmp_path / name) for name in names) for names in limits)
    monkeypatch.setattr(machine, "_CPU_LIMITS", places)
    assert cpus_here() == cpus


def test_cores_that_a_scheduler_did_not_give_do_not_count(sixteen, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert cpus_here() == 3


def test_where_nothing_limits_it_a_process_has_the_machine(sixteen):
    assert cpus_here() == 16
