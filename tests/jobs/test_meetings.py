"""When the workers of a run meet, and what they are told there; without Ray."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ray.train.v2.api.preemption import PreemptionInfo

from glmae_ray.jobs import meetings
from glmae_ray.jobs.meetings import Meetings, Orders
from tests.conftest import tiny_config
from tests.jobs.fakes import ALONE, Outside, Thread, on_threads


class World(Outside):
    """The same with a clock, in seconds."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1.7e9  # another clock

    def goes(self, *nodes: str, in_s: float | None) -> None:
        """Announce that nodes go away."""
        deadline = None if in_s is None else int(1000 * (self.time() + in_s))
        self.notice = PreemptionInfo(deadline, {node: [0] for node in nodes})

    def put_into(self, patch: pytest.MonkeyPatch) -> World:
        super().put_into(patch)
        patch.setattr(meetings, "time", self)
        return self


@pytest.fixture
def world(monkeypatch) -> World:
    return World().put_into(monkeypatch)


def meet(*words: str) -> Meetings:
    return Meetings(tiny_config(*words), ranks=ALONE, start=0)


def train(
    where: Meetings, world: World, steps: range, *, step_s: float, save_s: float | None = 0.0
) -> dict[int, Orders]:
    """What was ordered at which step; saving takes its time as well."""
    found = {}
    for step in steps:
        world.now += step_s
        if orders := where.after(step):
            found[step] = orders
            if orders.save:
                world.now += save_s or 0.0
                where.saved(took_s=save_s)
    return found


# When


@pytest.mark.parametrize(
    ("step_s", "met"),
    [(0.25, [1, 9, 17, 25]), (0.9, [1, 3, 5, 7]), (2.0, [1, 2, 3, 4]), (30.0, [1, 2, 3, 4])],
)
def test_workers_meet_after_the_first_step_and_then_about_every_two_seconds(world, step_s, met):
    found = train(meet(), world, range(1, met[-1] + 1), step_s=step_s)
    assert list(found) == met
    assert not any(orders.save or orders.stop or orders.leaving for orders in found.values())


def test_a_first_step_that_compiles_does_not_set_the_pace(world):
    where = meet()
    train(where, world, range(1, 2), step_s=60.0)
    assert list(train(where, world, range(2, 30), step_s=0.1)) == [2, 22]


def test_steps_of_no_time_do_not_put_off_a_meeting_for_ever(world):
    found = train(meet(), world, range(1, 2002), step_s=0.0)
    assert list(found) == [1, 2001]


def test_a_run_that_continues_meets_after_its_first_step(world):
    where = Meetings(tiny_config(), ranks=ALONE, start=500)
    assert list(train(where, world, range(501, 506), step_s=1.0)) == [501, 503, 505]


# Minutes


def test_a_checkpoint_is_due_so_many_minutes_after_the_last(world):
    found = train(meet("save.every_minutes=1"), world, range(1, 301), step_s=1.0)
    saved = [step for step, orders in found.items() if orders.save]
    assert saved == [61, 121, 181, 241]
    assert not any(found[step].leaving for step in saved)


def test_a_checkpoint_for_another_reason_counts(world):
    where = meet("save.every_minutes=1")
    train(where, world, range(1, 51), step_s=1.0)
    where.saved(took_s=1.0)  # of save.every_steps
    found = train(where, world, range(51, 121), step_s=1.0)
    assert [step for step, orders in found.items() if orders.save] == [111]


# Nodes that go away


def test_nodes_that_go_away_are_saved_for_once_and_late_but_in_time(world):
    where = meet()
    where.saved(took_s=5.0)
    train(where, world, range(1, 10), step_s=1.0)
    world.goes("a", in_s=60)
    end = world.now + 60
    found = train(where, world, range(10, 100), step_s=1.0, save_s=5.0)
    ((step, orders),) = [(step, orders) for step, orders in found.items() if orders.save]
    assert orders.leaving
    saved_at = end - 60 + (step - 9)
    assert saved_at + 5.0 < end - 2  # the margin
    assert saved_at > end - 20


@given(
    step_s=st.floats(0.01, 40),
    save_s=st.floats(0, 60),
    notice_s=st.floats(1, 600),
    steps_before=st.integers(0, 300),
)
def test_whatever_the_pace_the_late_checkpoint_is_written_before_the_deadline(
    step_s, save_s, notice_s, steps_before
):
    longest = max(2.0, step_s)
    assume(notice_s > 2 * longest + 2 * save_s + 2)  # else there is no time to lose
    with pytest.MonkeyPatch.context() as patch:
        world = World().put_into(patch)
        where = meet()
        where.saved(took_s=save_s)
        train(where, world, range(1, steps_before + 1), step_s=step_s)
        world.goes("a", in_s=notice_s)
        deadline, step, saved = world.now + notice_s, steps_before, []
        while world.now < deadline:
            step += 1
            began = world.now
            found = train(where, world, range(step, step + 1), step_s=step_s, save_s=save_s)
            saved += [(began + step_s, world.now) for orders in found.values() if orders.save]
    ((began, ended),) = saved
    assert ended <= deadline - 2 + 0.001
    assert began >= deadline - (2 * longest + 2 * save_s + 2) - 0.001


def test_where_no_deadline_is_known_it_is_time_at_once_and_only_once(world):
    where = meet()
    where.saved(took_s=1.0)
    world.goes("a", in_s=None)
    found = train(where, world, range(1, 60), step_s=1.0, save_s=1.0)
    assert [step for step, orders in found.items() if orders.save] == [1]
    assert found[1].leaving


def test_where_it_is_not_known_how_long_a_checkpoint_takes_it_is_time_at_once(world):
    where = meet()
    world.goes("a", in_s=300)
    found = train(where, world, range(1, 200), step_s=1.0, save_s=None)
    assert [step for step, orders in found.items() if orders.save] == [1]


def test_what_is_saved_at_once_is_saved_again_late_when_it_is_known_how_long_that_takes(world):
    where = meet()
    world.goes("a", in_s=60)
    found = train(where, world, range(1, 60), step_s=1.0, save_s=1.0)
    first, late = (step for step, orders in found.items() if orders.save)
    assert first == 1
    assert 45 < late < 58


def test_another_node_that_goes_is_saved_for_as_well(world):
    where = meet()
    where.saved(took_s=1.0)
    world.goes("a", in_s=None)
    train(where, world, range(1, 10), step_s=1.0, save_s=1.0)
    world.goes("a", "b", in_s=None)
    found = train(where, world, range(10, 20), step_s=1.0, save_s=1.0)
    assert [orders.leaving for orders in found.values()].count(True) == 1
    world.goes("b", in_s=None)  # a is gone
    found = train(where, world, range(20, 30), step_s=1.0)
    assert not any(orders.save for orders in found.values())


# Signals, other numbers of workers


def test_a_signal_is_met_with_a_checkpoint_and_the_end(world):
    where = meet()
    train(where, world, range(1, 4), step_s=1.0)
    world.stop = "SIGTERM"
    found = train(where, world, range(4, 6), step_s=1.0)
    assert list(found.values()) == [Orders(7, save=True, stop="SIGTERM")]


def test_who_waits_to_change_the_number_of_workers_waits_until_they_have_saved(world):
    where = meet()
    world.resize = True
    (orders,) = train(where, world, range(1, 2), step_s=1.0).values()
    assert orders == Orders(3, save=True, leaving=True)
    assert world.resize
    where.saved_and_waited()
    assert not world.resize


def test_all_workers_do_what_the_first_finds_and_each_asks_ray_equally_often(world):
    def work(ranks: Thread) -> list[tuple[int, Orders]]:
        where = Meetings(tiny_config("resources.workers=2"), ranks=ranks, start=0)
        if ranks.rank:  # has another opinion of the pace
            where._met -= 1000
        found = []
        for step in range(1, 8):
            ranks.each(None)
            if ranks.rank == 0:
                world.now += 1.0
                world.stop = "SIGINT" if step == 4 else None  # gone when others could look
            ranks.each(None)
            if orders := where.after(step):
                found.append((step, orders))
            if ranks.rank:
                where.saved_and_waited()
        return found

    world.stop = None
    first, second, third = on_threads(3, work)
    assert first == second == third
    assert [step for step, _ in first] == [1, 3, 5, 7]
    assert world.notices_asked == 3 * 4


def test_only_the_first_worker_lets_others_go_on(world):
    world.resize = True
    on_threads(2, lambda r: r.rank and Meetings(tiny_config(), ranks=r, start=0).saved_and_waited())
    assert world.resize
