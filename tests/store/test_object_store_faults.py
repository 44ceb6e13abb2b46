"""The store on S3 before a server that fails: no harm is done, and what is wrong is told."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time

import numpy as np
import pytest

from glmae_ray import s3
from glmae_ray.errors import UserError
from glmae_ray.paths import names_in, publish, remove_folder, to_place
from glmae_ray.store import remote
from glmae_ray.store.index import VolumeIndex, read_quarantine
from glmae_ray.store.zarr_store import VolumeStore
from tests.store.object_store import fail_share
from tests.store.test_index import record
from tests.store.test_object_store import DOCUMENT
from tests.store.test_zarr_store import volume, write


@pytest.fixture
def impatient(monkeypatch):
    """One try in place of several: the same course in seconds."""
    for module in (s3, remote):
        monkeypatch.setattr(module, "TRIES", 1)


def test_what_a_killed_write_left_is_not_seen_and_is_replaced(proxy, bucket, impatient):
    store, scan = VolumeStore.create(f"{bucket}/ct"), volume()
    proxy.rule = lambda r: "500" if r.method == "PUT" and r.path.endswith(DOCUMENT) else None
    with pytest.raises(OSError, match="InternalError"):
        write(store, scan)
    assert len(store.path.fs.find(store.path.path)) > 10
    assert store.cases() == []
    assert "case.1" not in store
    with pytest.raises(KeyError):
        store.record("case.1")
    proxy.rule = lambda _: None
    store.write(scan, labels={}, label_names={}, record={})
    assert store.cases() == ["case.1"]
    with pytest.raises(KeyError):
        store.read_label("case.1", "structures")


def test_a_server_that_fails_every_third_request_changes_nothing(proxy, bucket):
    proxy.rule = fail_share(0.3, seed=1)
    store, scan, other = VolumeStore.create(f"{bucket}/ct"), volume(), volume("b", seed=5)
    write(store, other)
    label = write(store, scan)
    write(store, scan)  # replaced
    write(store, volume("c"))
    store.remove("c")
    VolumeIndex.from_records([record("case.1")]).write(store.path)
    reader = VolumeStore.open(store.path)
    assert reader.cases() == ["b", "case.1"]
    assert ("b" in reader, "c" in reader) == (True, False)
    for box in (((0, 0, 0), (37, 50, 65)), ((5, 6, 7), (30, 20, 40))):
        (z, y, x), (to_z, to_y, to_x) = box
        pair = reader.read_many([("b", 0, box), ("case.1", 0, box)])
        for crop, whole in zip(pair, (other, scan), strict=True):
            np.testing.assert_array_equal(crop, whole.array[:, z:to_z, y:to_y, x:to_x])
    np.testing.assert_array_equal(reader.read_label("case.1", "structures"), label)
    assert VolumeIndex.read(store.path).case_ids() == ["case.1"]
    failed = [request for request in proxy.requests if proxy.rule(request)]
    assert len(failed) > 0.2 * len(proxy.requests)


def test_an_answer_that_is_lost_after_the_work_was_done_does_no_harm(proxy, bucket):
    proxy.rule = lambda r: "lost" if r.turn == 0 and r.method in ("PUT", "POST") else None
    store, scan = VolumeStore.create(f"{bucket}/ct"), volume()
    label = write(store, scan)
    np.testing.assert_array_equal(store.read("case.1"), scan.array)
    np.testing.assert_array_equal(store.read_label("case.1", "structures"), label)
    store.remove("case.1")
    assert names_in(store.path / "cases") == {"zarr.json"}


@pytest.mark.parametrize("fault", ["500", "503", "drop"])
def test_a_server_that_keeps_failing_is_no_store_without_cases(proxy, bucket, impatient, fault):
    store = VolumeStore.create(f"{bucket}/ct")
    write(store, volume())
    VolumeIndex.from_records([record("a")]).write(store.path)
    proxy.rule = lambda _: fault
    calls = {
        "exists": lambda: VolumeStore.exists(store.path),
        "open": lambda: VolumeStore.open(store.path),
        "contains": lambda: "case.1" in store,
        "cases": store.cases,
        "record": lambda: store.record("case.1"),
        "read": lambda: store.read("case.1"),
        "label": lambda: store.read_label("case.1", "structures"),
        "index": lambda: VolumeIndex.read(store.path),
        "quarantine": lambda: read_quarantine(store.path),
        "remove": lambda: store.remove("case.1"),
        "write": lambda: write(store, volume("b")),
    }
    for name, call in calls.items():
        begin = time.monotonic()
        with pytest.raises(OSError, match=str(store.path)) as caught:
            call()
        assert not isinstance(caught.value, FileNotFoundError), name
        assert time.monotonic() - begin < 15, name
    proxy.rule = lambda _: None
    np.testing.assert_array_equal(store.read("case.1"), volume().array)  # the same store goes on


def _one_line(call, *, within_s=10.0):
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        call()
    assert time.monotonic() - begin < within_s
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def test_without_credentials_the_variables_are_named(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    line = _one_line(lambda: VolumeStore.exists(f"{bucket}/ct"))
    assert line.startswith(f"store: {bucket}/ct/zarr.json: ")
    assert line.endswith("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def test_a_bucket_that_is_not_there_is_named(bucket):
    for meet in (VolumeStore.exists, VolumeStore.open, VolumeStore.create):
        line = _one_line(lambda meet=meet: meet("s3://nothing-here/ct"))
        assert (
            line
            == "store: s3://nothing-here/ct/zarr.json: no such bucket; make it, or name another"
        )
    assert "Invalid bucket name" in _one_line(lambda: VolumeStore.open("s3://no bucket/ct"))


def test_a_server_that_denies_is_quoted(proxy, bucket):
    store = VolumeStore.create(f"{bucket}/ct")
    write(store, volume())
    proxy.rule = lambda _: "403"
    calls = [
        lambda: VolumeStore.exists(store.path),
        lambda: "case.1" in store,
        store.cases,
        lambda: store.read("case.1"),
        lambda: VolumeStore.open(store.path).read("case.1"),
        lambda: write(store, volume("b")),
    ]
    for call in calls:
        line = _one_line(call)
        assert str(store.path) in line
        assert "AccessDenied" in line


def test_an_endpoint_that_does_not_answer_is_named(bucket, monkeypatch, impatient):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        line = _one_line(lambda: VolumeStore.exists(f"{bucket}/ct"))
    assert endpoint in line
    assert line.endswith("is AWS_ENDPOINT_URL right, the server up?")


def test_a_server_that_is_not_s3_is_no_store_without_cases(proxy, bucket):
    store = VolumeStore.create(f"{bucket}/ct")
    proxy.rule = lambda _: "404"
    for call in (lambda: VolumeStore.exists(store.path), lambda: "a" in store, store.cases):
        assert _one_line(call).endswith("is AWS_ENDPOINT_URL one of S3?")


def _meet_silence(url, answers, is_silent):
    s3.SILENCE_S = 2
    os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "2"  # what the user sets counts
    s3.TRIES = remote.TRIES = 2
    store = VolumeStore.open(url)
    answers.put(store.read("case.1").sum())
    assert is_silent.wait(60)
    for call in (lambda: "case.1" in store, lambda: store.read("case.1")):
        begin = time.monotonic()
        try:
            told = ("no error", repr(call()))
        except OSError as error:
            told = (type(error).__name__, str(error))
        answers.put((*told, time.monotonic() - begin))


@pytest.mark.slow
def test_silence_is_waited_for_once_more_and_then_told(proxy, bucket):
    store, scan = VolumeStore.create(f"{bucket}/ct"), volume()
    write(store, scan)
    spawn = multiprocessing.get_context("spawn")
    answers, is_silent = spawn.Queue(), spawn.Event()
    proxy.rule = lambda r: "stall" if r.turn == 0 and "image/0/c." in r.path else None
    process = spawn.Process(target=_meet_silence, args=(str(store.path), answers, is_silent))
    process.start()
    assert answers.get(timeout=300) == scan.array.sum()  # it imports all of this first
    proxy.rule = lambda _: "stall"
    is_silent.set()  # not before: what is asked in between would be answered
    for _ in range(2):
        kind, text, seconds = answers.get(timeout=60)
        assert kind == "OSError", text
        assert str(store.path) in text
        assert seconds < 15
    process.join(60)
    assert process.exitcode == 0


def test_what_cannot_be_removed_is_told(bucket, monkeypatch):
    place = to_place(f"{bucket}/ct")
    publish(place / "a", "1")
    real = type(place.fs).call_s3

    def refuses(fs, method, **options):
        if method == "delete_objects":
            return {"Errors": [{"Key": "ct/a", "Code": "InternalError"}]}
        return real(fs, method, **options)

    monkeypatch.setattr(type(place.fs), "call_s3", refuses)
    with pytest.raises(OSError, match=rf"{place}: ct/a stays: InternalError"):
        remove_folder(place, first="none")
