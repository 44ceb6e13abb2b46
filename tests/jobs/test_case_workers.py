"""Actors over cases: every item once, in processes that may die or be told to stop."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import pytest

from glmae_ray.errors import UserError
from glmae_ray.jobs.case_workers import Failed, over_cases

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


class Done(NamedTuple):
    item: int
    process: int
    loaded: float


class Doer:
    """Takes a moment to load, then does one item after another."""

    def __init__(self, fatal: int) -> None:
        if fatal == 100:
            raise UserError("nothing to load")
        self.fatal, self.loaded = fatal, time.time()

    def do(self, item: int) -> Done:
        if item == self.fatal:
            os._exit(9)
        if item < 0:
            raise UserError(f"{item} is below 0")
        return Done(item, os.getpid(), self.loaded)


def test_every_item_is_done_once_and_each_process_loads_once():
    found = dict(over_cases(Doer, -1, todo=range(9)))
    assert {item: done.item for item, done in found.items()} == {n: n for n in range(9)}
    assert len({(done.process, done.loaded) for done in found.values()}) == 1  # of 4 CPUs
    assert os.getpid() not in {done.process for done in found.values()}


def test_a_process_that_dies_costs_the_item_that_it_was_at():
    found = dict(over_cases(Doer, 2, todo=range(5)))
    assert isinstance(found.pop(2), Failed)
    assert {item: done.item for item, done in found.items()} == {n: n for n in (0, 1, 3, 4)}


def test_what_concerns_every_item_ends_the_job_with_its_own_error():
    with pytest.raises(UserError, match="-3 is below 0"):
        list(over_cases(Doer, -1, todo=[1, -3, 2]))


def test_actors_that_cannot_be_made_end_the_job():
    with pytest.raises(UserError, match=r"workers cannot start: .*nothing to load"):
        list(over_cases(Doer, 100, todo=[1, 2]))


def test_nothing_to_do_is_done():
    assert list(over_cases(Doer, -1, todo=[])) == []
