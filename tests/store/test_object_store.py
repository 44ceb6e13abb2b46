"""The store on S3: all that it does on disk, and in few requests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from ome_zarr_models.v05.image import Image
from ome_zarr_models.v05.image_label import ImageLabel
from zarr.core.sync import sync

from glmae_ray.errors import UserError
from glmae_ray.paths import folders_with, names_in, publish, read_file, remove_folder, to_place
from glmae_ray.store.index import VolumeIndex, read_quarantine, write_quarantine
from glmae_ray.store.zarr_store import VolumeStore, make_pyramid
from tests.store.test_index import record
from tests.store.test_zarr_store import volume, write

DOCUMENT = "cases/case.1/zarr.json"


@pytest.fixture
def store(bucket):
    return VolumeStore.create(f"{bucket}/archive/ct")


def test_a_case_comes_back_as_it_was_written(store):
    scan = volume()
    label = write(store, scan, record={"n": 1})
    np.testing.assert_array_equal(store.read("case.1"), scan.array)
    np.testing.assert_array_equal(store.read_label("case.1", "structures"), label)
    assert store.record("case.1") == {"n": 1}
    boxes = [((1, 2, 3), (17, 9, 20)), ((0, 0, 0), (5, 6, 7))]
    crops = store.read_many([("case.1", 1, box) for box in boxes])
    half = make_pyramid(scan, 3)[1]
    for crop, ((z, y, x), (to_z, to_y, to_x)) in zip(crops, boxes, strict=True):
        np.testing.assert_array_equal(crop, half[:, z:to_z, y:to_y, x:to_x])


def test_a_store_on_s3_holds_the_bytes_of_one_on_disk(store, tmp_path):
    local = VolumeStore.create(tmp_path / "s")
    for place in (store, local):
        write(place, volume())
    files = [file for file in local.path.rglob("*") if file.is_file()]
    assert len(files) == 14
    for file in files:
        copy = read_file(store.path / file.relative_to(local.path).as_posix())
        assert copy == file.read_bytes(), file
    names = store.path.fs.find(store.path.path)
    assert len(names) == len(files)


def test_a_store_opens_with_plain_zarr_and_is_valid_ome_zarr(store):
    scan = volume()
    write(store, scan)
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    root = zarr.open(str(store.path), mode="r", storage_options=options)
    session = sync(root.store.fs.set_session())
    np.testing.assert_array_equal(root["cases/case.1/image/0"][:], scan.array)
    assert list(root["cases"].group_keys()) == ["case.1"]
    image = Image.from_zarr(root["cases/case.1/image"])
    assert len(image.attributes.ome.multiscales[0].datasets) == 3
    ImageLabel.from_zarr(root["cases/case.1/labels/structures"])
    sync(session.close())  # zarr-python does not


def test_a_store_is_made_once_and_found_again(bucket):
    url = f"{bucket}/a/ct"
    assert not VolumeStore.exists(url)
    with pytest.raises(UserError, match=f"store: {url} does not exist; `glmae ingest` makes one"):
        VolumeStore.open(url)
    VolumeStore.create(url, chunk=(16, 24, 32), levels=2)
    with pytest.raises(UserError, match="is there already"):
        VolumeStore.create(url)
    opened = VolumeStore.open(f"{url}/", threads=1)
    assert (opened.chunk, opened.levels, str(opened.path)) == ((16, 24, 32), 2, url)
    to_place(f"{url}/zarr.json").unlink()  # as a killed `create` leaves it
    assert not VolumeStore.exists(url)
    assert VolumeStore.create(url).cases() == []


def test_what_is_no_store_is_refused_in_one_line(bucket):
    publish(to_place(f"{bucket}/other/letter.txt"), "dear")
    publish(to_place(f"{bucket}/old/zarr.json"), '{"attributes": {"glmae": {"format": 1}}}')
    for name, words in (("other", "not a store that glmae made"), ("old", "has format 1")):
        for meet in (VolumeStore.open, VolumeStore.exists, VolumeStore.create):
            with pytest.raises(UserError, match=words) as caught:
                meet(f"{bucket}/{name}")
            assert len(caught.value.lines) == 1
    with pytest.raises(UserError, match=r"gs://a/b is neither a path nor s3://BUCKET/FOLDER"):
        VolumeStore.exists("gs://a/b")


def test_a_store_may_be_a_whole_bucket(bucket):
    store = VolumeStore.create(bucket)
    write(store, volume())
    assert store.cases() == ["case.1"]
    assert store.read("case.1").shape == (2, 37, 50, 65)
    store.remove("case.1")
    assert store.cases() == []


def test_the_tables_come_back_and_are_missed_by_name(store):
    with pytest.raises(UserError, match=rf"{store.path} has no index\.parquet"):
        VolumeIndex.read(store.path)
    assert read_quarantine(store.path) == []
    VolumeIndex.from_records([record("b"), record("a")]).write(store.path)
    assert VolumeIndex.read(str(store.path)).records() == [record("a"), record("b")]
    row = {"source": "x.nii", "reason": "constant", "message": "m", "stamp": "s"}
    write_quarantine(store.path, [row])
    assert row.items() <= read_quarantine(store.path)[0].items()


def test_a_case_is_published_last_and_unpublished_first(proxy, bucket):
    store = VolumeStore.create(f"{bucket}/ct")
    write(store, volume())
    *before, last = [r.path for r in proxy.requests if r.method == "PUT"]
    assert last.endswith(DOCUMENT)
    assert not any(path.endswith(DOCUMENT) for path in before)
    bodies = []

    def killed_after_the_first(request):
        bodies.append(request)
        return "403" if "delete" in request.path and len(bodies) > 2 else None

    proxy.rule = killed_after_the_first
    with pytest.raises(UserError, match="AccessDenied"):
        store.remove("case.1")
    proxy.rule = lambda _: None
    assert "case.1" not in store
    assert "image" in names_in(store.path / "cases" / "case.1")


def test_thousands_of_objects_are_listed_and_removed_by_the_thousand(proxy, bucket):
    place = to_place(f"{bucket}/ct")
    names = [f"case.{number}" for number in range(1003)]
    keys = [f"ct/cases/{name}/zarr.json" for name in names]
    for key in (*keys, *(f"ct/cases/half/image/{level}/zarr.json" for level in range(3))):
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(place.drive, key, b"{}")
    proxy.requests.clear()
    store = VolumeStore(f"{bucket}/ct", chunk=(32, 32, 32), levels=3)
    assert store.cases() == sorted(names)
    assert len(proxy.requests) == 2
    proxy.requests.clear()
    assert remove_folder(place, first="none")
    assert [request.method for request in proxy.requests] == ["GET", "GET", "POST", "POST"]
    assert names_in(place) == set()
    assert not remove_folder(place, first="none")


def test_reading_costs_the_index_of_a_shard_and_its_blocks(proxy, bucket):
    store = VolumeStore.create(f"{bucket}/ct", chunk=(16, 16, 16))
    write(store, volume(shape=(1, 40, 40, 40)))
    store.read("case.1", box=((0, 0, 0), (1, 1, 1)))
    proxy.requests.clear()
    store.read_many([("case.1", 0, ((n, n, n), (n + 4, n + 4, n + 4))) for n in (0, 16, 32, 6)])
    assert len(proxy.requests) <= 2 * 4
    proxy.requests.clear()
    assert "case.1" in store
    assert "case.2" not in store
    assert len(proxy.requests) == 2


def _read_there(raw, answers):
    store = pickle.loads(raw)
    answers.put(store.read("case.1"))
    write(store, volume("case.2"))


def test_a_store_travels_without_its_keys_and_writes_of_others_are_seen_at_once(store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    scan = volume()
    write(store, scan)
    store.read("case.1", box=((0, 0, 0), (1, 1, 1)))
    raw = pickle.dumps(store)
    assert b"hush" not in raw
    assert os.environ["AWS_ENDPOINT_URL"].encode() not in raw
    assert store.cases() == ["case.1"]
    assert "case.2" not in store
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=_read_there, args=(raw, answers))
    process.start()
    np.testing.assert_array_equal(answers.get(timeout=60), scan.array)
    process.join(60)
    assert process.exitcode == 0
    assert store.cases() == ["case.1", "case.2"]
    np.testing.assert_array_equal(store.read("case.2"), volume("case.2").array)


def test_folders_are_found_by_the_file_they_hold(bucket):
    place = to_place(f"{bucket}/deep/down")
    for name in ("b/done", "a/done", "a/more/done", "half/data", "done", "ab/done"):
        publish(place / name, name)
    assert folders_with(place, "done") == ["a", "ab", "b"]
    assert folders_with(place / "a", "done") == ["more"]
    assert names_in(place) == {"a", "ab", "b", "done", "half"}
    assert remove_folder(place / "a", first="done")
    assert folders_with(place, "done") == ["ab", "b"]  # not what only begins like it
    assert read_file(place / "a" / "done") is None


def test_no_path_of_this_machine_is_made_of_a_url(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = VolumeStore.create(f"{bucket}/ct")
    write(store, volume())
    VolumeIndex.from_records([record("a")]).write(store.path)
    assert list(Path(tmp_path).iterdir()) == []
