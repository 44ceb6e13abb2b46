"""Publishing in the background: what a caller waits for, how often, and what failures do."""

from __future__ import annotations

import threading
import time

import pytest

from glmae_ray import outbox
from glmae_ray.outbox import Outbox


class Shop:
    """A store that counts what it is given, and may be closed or slow.

    Attributes:
        given: Name and content of each publication.
        fails: Whether it refuses.
        opens: It answers as soon as this is set.
    """

    def __init__(self) -> None:
        self.given: list[tuple[str, bytes]] = []
        self.tries, self.fails, self.takes_s = 0, False, 0.0
        self.opens = threading.Event()
        self.opens.set()

    def publish(self, place, data):
        self.tries += 1
        assert self.opens.wait(20)
        time.sleep(self.takes_s)
        if self.fails:
            raise OSError(f"{place}: no room")
        self.given.append((place.name, data))


@pytest.fixture
def shop(monkeypatch):
    shop = Shop()
    monkeypatch.setattr(outbox, "publish", shop.publish)
    monkeypatch.setattr(outbox, "EVERY_S", 0.1)
    return shop


@pytest.fixture
def told():
    return []


@pytest.fixture
def box(shop, told):
    return Outbox(lambda kind, line: told.append((kind, line)))


def test_what_is_put_is_published_while_the_caller_goes_on(box, shop, tmp_path):
    shop.opens.clear()
    began = time.monotonic()
    box.put(tmp_path / "a", lambda: b"1")
    assert time.monotonic() - began < 0.5
    assert shop.given == []
    shop.opens.set()
    assert box.flush(timeout_s=10)
    assert shop.given == [("a", b"1")]


def test_a_file_that_grows_is_published_now_and_then_and_last_of_all_whole(box, shop, tmp_path):
    grown = []
    for _ in range(100):
        grown.append(b"x")
        box.put(tmp_path / "a", lambda: b"".join(grown))
        time.sleep(0.005)
    assert box.flush(timeout_s=10)
    assert shop.given[-1] == ("a", b"x" * 100)
    assert 2 <= len(shop.given) <= 12


def test_a_file_that_takes_long_is_published_less_often(box, shop, tmp_path):
    shop.takes_s = 0.05  # so every 0.5 s
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        box.put(tmp_path / "a", lambda: b"large")
        time.sleep(0.01)
    assert shop.tries <= 4


def test_what_fails_is_told_once_tried_again_and_its_end_told(box, shop, told, tmp_path):
    shop.fails = True
    box.put(tmp_path / "a", lambda: b"1")
    box.put(tmp_path / "b", lambda: b"2", every_s=0.0)
    while shop.tries < 6:
        time.sleep(0.02)
    box.put(tmp_path / "a", lambda: b"newer")
    assert [kind for kind, _ in told] == ["late_write"]
    assert told[0][1].endswith("a: no room; it stays in memory until it can be written")
    shop.fails = False
    assert box.flush(timeout_s=10)
    assert sorted(shop.given) == [("a", b"newer"), ("b", b"2")]
    assert [kind for kind, _ in told] == ["late_write", "written_again"]


def test_a_flush_ends_with_the_first_failure_and_says_so(box, shop, tmp_path):
    shop.fails = True
    box.put(tmp_path / "a", lambda: b"1")
    began = time.monotonic()
    assert not box.flush(timeout_s=20)
    assert time.monotonic() - began < 5
    shop.fails = False
    assert box.flush(timeout_s=20)


def test_a_flush_does_not_wait_longer_than_it_is_told(box, shop, tmp_path):
    shop.opens.clear()
    box.put(tmp_path / "a", lambda: b"1")
    began = time.monotonic()
    assert not box.flush(timeout_s=0.3)
    assert 0.25 < time.monotonic() - began < 5
    shop.opens.set()
    assert box.flush(timeout_s=10)


def test_a_flush_takes_what_is_put_while_the_store_is_busy(box, shop, tmp_path):
    shop.opens.clear()
    box.put(tmp_path / "a", lambda: b"old")
    while not shop.tries:
        time.sleep(0.01)
    box.put(tmp_path / "a", lambda: b"new")
    threading.Timer(0.1, shop.opens.set).start()
    assert box.flush(timeout_s=10)
    assert shop.given[-1] == ("a", b"new")


def test_no_thread_is_left_where_nothing_waits(box, shop, tmp_path):
    before = threading.active_count()
    for _ in range(3):
        box.put(tmp_path / "a", lambda: b"1")
        assert box.flush(timeout_s=10)
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_content_that_cannot_be_read_does_not_end_the_thread(box, shop, told, tmp_path):
    def gone():
        raise RuntimeError("it is gone")

    box.put(tmp_path / "a", gone)
    box.put(tmp_path / "b", lambda: b"2")
    assert not box.flush(timeout_s=10)
    assert shop.given == [("b", b"2")]
    assert "it is gone" in told[0][1]
