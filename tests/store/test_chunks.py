"""Boxes out of shards: the right voxels in few requests, each chunk once, damage told."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmae_ray.config_data import CacheLimits
from glmae_ray.errors import DamagedError
from glmae_ray.store import chunks
from glmae_ray.store.ranges import LocalRanges, merged
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Volume
from tests.store.object_store import fail_share
from tests.store.test_zarr_store import volume, write

SHAPE = (2, 37, 50, 65)


@pytest.fixture(scope="module")
def scan() -> Volume:
    """Noise, and chunks of nothing but air."""
    noise = volume(shape=SHAPE)
    noise.array[:, :20, 8:, :40] = -1024
    return noise


@pytest.fixture(scope="module")
def store(scan, tmp_path_factory) -> VolumeStore:
    store = VolumeStore.create(tmp_path_factory.mktemp("chunks") / "s", chunk=(8, 16, 12))
    write(store, scan)
    return store


def boxes_in(shape) -> st.SearchStrategy:
    sides = [
        st.tuples(st.integers(0, side - 1), st.integers(1, side)).map(
            lambda ends: (min(ends), max(ends[1], min(ends) + 1))
        )
        for side in shape
    ]
    return st.tuples(*sides).map(lambda ends: tuple(zip(*ends, strict=True)))


@settings(max_examples=60, deadline=None)
@given(boxes=st.lists(boxes_in(SHAPE[1:]), min_size=1, max_size=6), threads=st.sampled_from([1, 3]))
def test_any_boxes_hold_what_slicing_the_volume_gives(store, scan, boxes, threads):
    opened = VolumeStore.open(store.path, threads=threads)
    found = opened.read_many([("case.1", 0, box) for box in boxes])
    for crop, ((z, y, x), (to_z, to_y, to_x)) in zip(found, boxes, strict=True):
        np.testing.assert_array_equal(crop, scan.array[:, z:to_z, y:to_y, x:to_x])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=12), st.integers(0, 40))
def test_neighbours_become_one_range_and_no_range_spans_a_larger_gap(steps, gap):
    spans, end = [], 0
    for before, length in steps:
        spans.append((end + before, end + before + length))
        end += before + length
    groups = merged(spans, gap)
    assert [span for _, members in groups for span in spans[members]] == spans
    for (start, stop), members in groups:
        inside = spans[members]
        assert (start, stop) == (inside[0][0], inside[-1][1])
        assert all(b[0] - a[1] <= gap for a, b in pairwise(inside))
    for (before, _), (after, _) in pairwise(groups):
        assert after[0] - before[1] > gap


def test_a_chunk_that_several_boxes_share_is_decoded_once(store, monkeypatch):
    decoded = []
    real = chunks.blosc.decompress
    monkeypatch.setattr(
        chunks.blosc, "decompress", lambda raw, out: (decoded.append(1), real(raw, out))
    )
    box = ((24, 0, 0), (32, 16, 12))
    store.read_many([("case.1", 0, box)] * 4)
    assert len(decoded) == 2  # one a channel


def test_the_boxes_of_a_sample_are_read_in_few_requests(proxy, bucket):
    store = VolumeStore.create(f"{bucket}/ct", chunk=(8, 16, 12))
    write(store, volume(shape=SHAPE))
    proxy.requests.clear()
    boxes = [((n, n, n), (n + 20, n + 20, n + 20)) for n in range(0, 16, 2)]
    store.read_many([("case.1", level, ((0, 0, 0), (9, 9, 9))) for level in (0, 1)])
    assert len(proxy.requests) == 2 * 3  # of a level: its document, its index, its chunks
    proxy.requests.clear()
    store.read_many([("case.1", 0, box) for box in boxes])
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-7] + b"\x5a" + raw[-6:], "index does not fit its checksum"),
        (lambda raw: raw[:-3000], "index does not fit its checksum"),
        (lambda raw: b"\0" * 9000 + raw[9000:], "is damaged: no chunk begins at byte"),
        (lambda raw: raw[:16] + b"\xff" * 9000 + raw[9016:], "is damaged: "),
    ],
)
def test_damage_is_told_with_the_array_it_is_in(scan, tmp_path, damage, words):
    store = VolumeStore.create(tmp_path / "s")
    write(store, scan)
    shard = store.path / "cases/case.1/image/0/c.0.0.0.0"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DamagedError, match=rf"case\.1/image/0.*{words}"):
        store.read("case.1")
    store.read("case.1", level=1)


def test_a_file_that_ends_early_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    files = LocalRanges(tmp_path)
    file = chunks.File("file", 99, "")
    assert list(files.spans(file, [(2, 4), (5, 9)])) == [b"23", b"5678"]
    with pytest.raises(DamagedError, match="file ends at byte 10"):
        list(files.spans(file, [(8, 12)]))
    assert next(files.tail("file", 3)).raw == b"789"
    assert next(files.tail("file", 30)).raw == b"0123456789"
    assert next(files.tail("none", 3)) is None


def test_a_case_that_was_damaged_and_mended_is_read_again(scan, tmp_path):
    store = VolumeStore.create(tmp_path / "s")
    write(store, scan)
    document = store.path / "cases/case.1/image/0/zarr.json"
    sound = document.read_bytes()
    document.write_bytes(sound[:50])
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"image/0/zarr\.json is damaged"):
            store.read("case.1")
    document.write_bytes(sound)
    np.testing.assert_array_equal(store.read("case.1"), scan.array)


def test_chunks_from_a_bucket_are_kept_on_the_machine_and_not_asked_for_again(
    proxy, bucket, scan, tmp_path
):
    url = f"{bucket}/ct"
    write(VolumeStore.create(url), scan)
    limits = CacheLimits(str(tmp_path / "cache"), 10**9)
    first = VolumeStore.open(url, cache=limits)
    np.testing.assert_array_equal(first.read("case.1"), scan.array)
    proxy.requests.clear()
    for _ in range(2):
        other = VolumeStore.open(url, cache=limits)  # as another process has it
        np.testing.assert_array_equal(
            other.read("case.1", box=((3, 4, 5), (20, 30, 60))),
            scan.array[:, 3:20, 4:30, 5:60],
        )
    shards = [r.path for r in proxy.requests if "image/0/c." in r.path]
    assert len(shards) == 2  # what version of it there is, nothing else


def test_a_case_that_was_replaced_is_not_taken_from_the_cache(bucket, scan, tmp_path):
    url = f"{bucket}/ct"
    store = VolumeStore.create(url)
    write(store, scan)
    limits = CacheLimits(str(tmp_path / "cache"), 10**9)
    VolumeStore.open(url, cache=limits).read("case.1")
    for seed in range(9, 15):  # chunks of noise are all of one length
        write(store, volume(shape=(1, 28, 28, 28), seed=seed))
        found = VolumeStore.open(url, cache=limits).read("case.1")
        np.testing.assert_array_equal(found, volume(shape=(1, 28, 28, 28), seed=seed).array)


def test_the_cache_keeps_within_its_size(bucket, tmp_path):
    url = f"{bucket}/ct"
    store = VolumeStore.create(url)
    for number in range(12):
        write(store, volume(f"c{number}", shape=(1, 64, 96, 96), seed=number))
    limit = 4 * 2**20
    opened = VolumeStore.open(url, cache=CacheLimits(str(tmp_path / "cache"), limit))
    for number in range(12):
        opened.read(f"c{number}")
    kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.val")]
    assert 0 < sum(kept) < limit + 3 * 2**20


def test_a_cache_before_a_server_that_fails_changes_nothing(proxy, bucket, scan, tmp_path):
    url = f"{bucket}/ct"
    write(VolumeStore.create(url), scan)
    proxy.rule = fail_share(0.3, seed=3)
    opened = VolumeStore.open(url, cache=CacheLimits(str(tmp_path / "cache"), 10**9))
    for _ in range(3):
        np.testing.assert_array_equal(opened.read("case.1"), scan.array)


def test_a_cache_that_fails_is_done_without(bucket, scan, tmp_path, monkeypatch):
    url = f"{bucket}/ct"
    write(VolumeStore.create(url), scan)
    opened = VolumeStore.open(url, cache=CacheLimits(str(tmp_path / "cache"), 10**9))

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("get", "set"):
        monkeypatch.setattr(f"diskcache.Cache.{name}", fails)
    np.testing.assert_array_equal(opened.read("case.1"), scan.array)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_arrays_of_nothing_but_air_have_no_file_and_are_read(place, request, tmp_path):
    where = tmp_path / "s" if place == "disk" else f"{request.getfixturevalue('bucket')}/ct"
    store = VolumeStore.create(where)
    air = Volume(np.full((1, 20, 30, 40), -1024, np.int16), volume().affine, "CT", "air")
    label = write(store, air)
    np.testing.assert_array_equal(store.read("air"), air.array)
    np.testing.assert_array_equal(store.read_label("air", "structures"), label)
