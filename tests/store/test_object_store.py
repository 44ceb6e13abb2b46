"""The store on S3: all that it does on disk, in few requests, and through a server that fails."""

import multiprocessing
import pickle
import time

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05.image import Image

from glmae_ray.errors import UserError
from glmae_ray.paths import to_place
from glmae_ray.store.zarr_store import VolumeStore
from tests.store.test_zarr_store import NAMES, volume, write


@pytest.fixture
def store(bucket):
    return VolumeStore.create(f"{bucket}/a/store")


def test_x(store):
    scan = volume()
    label = write(store, scan)
    np.testing.assert_array_equal(store.read("case.1"), scan.array)
    np.testing.assert_array_equal(store.read_label("case.1", "structures"), label)
    assert store.cases() == ["case.1"]
    store.remove("case.1")
    assert store.cases() == []


def test_y(proxy, bucket):
    st = VolumeStore.create(f"{bucket}/a/store")
    proxy.requests.clear()
    write(st, volume())
    print(len(proxy.requests))
    [print(r) for r in proxy.requests]
    proxy.requests.clear()
    t = time.time()
    st.read_many([("case.1", 0, ((0, 0, 0), (20, 20, 20)))] * 4)
    print(len(proxy.requests))
    [print(r) for r in proxy.requests]
    proxy.rule = __import__("tests.store.object_store", fromlist=["x"]).fail_share(0.3, seed=1)
    proxy.requests.clear()
    for n in range(3):
        write(st, volume(f"c{n}"))
    st.cases()
    st.record("c1")
    st.read_many([("case.1", 0, ((0, 0, 0), (20, 20, 20)))] * 4)
    print(len(proxy.requests), time.time() - t)
