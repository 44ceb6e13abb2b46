"""Shards as we encode them, read by zarr-python and tensorstore."""

import json

import numpy as np
import pytest
import tensorstore as ts
import zarr

from glmae_ray.store.layout import array_metadata, shard_key
from glmae_ray.store.shards import encode_shard

SHAPES = [(2, 37, 50, 65), (1, 64, 32, 96), (3, 5, 6, 7), (33, 40, 31)]


def body(shape, dtype, *, air):
    """Air with noise in the middle: some chunks are full, some empty, some cut at the end."""
    array = np.full(shape, air, dtype)
    middle = tuple(slice(side // 3, -(-2 * side // 3)) for side in shape)
    noise = np.random.default_rng(4).integers(0, 200, array[middle].shape)
    array[middle] = noise.astype(dtype)
    return array


def write(folder, array, *, air):
    metadata = array_metadata(array, chunk=(16, 16, 16), fill_value=air)
    shard = encode_shard(array, metadata)
    folder.mkdir(exist_ok=True)
    if shard is not None:
        (folder / shard_key(array.ndim)).write_bytes(shard)
    (folder / "zarr.json").write_text(json.dumps(metadata))
    return shard


def read_by_tensorstore(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return ts.open(spec).result().read().result()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_others_read_what_was_written(tmp_path, shape, dtype):
    air = 0 if dtype == np.uint8 else -1024
    array = body(shape, dtype, air=air)
    write(tmp_path / "a", array, air=air)
    for found in (
        zarr.open_array(tmp_path / "a", mode="r")[:],
        read_by_tensorstore(tmp_path / "a"),
    ):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)


def test_a_shard_is_as_large_as_tensorstores(tmp_path):
    array = body((2, 37, 50, 65), np.int16, air=-1024)
    ours = write(tmp_path / "a", array, air=-1024)
    metadata = array_metadata(array, chunk=(16, 16, 16), fill_value=-1024)
    kvstore = {"driver": "file", "path": f"{tmp_path}/b/"}
    made = ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}, create=True)
    made.result().write(array).result()
    assert len(ours) == (tmp_path / "b/c.0.0.0.0").stat().st_size


def test_chunks_of_air_take_sixteen_bytes_of_index_each():
    array = np.full((1, 64, 64, 64), -1024, np.int16)
    array[0, 40, 41, 42] = 7
    metadata = array_metadata(array, chunk=(16, 16, 16), fill_value=-1024)
    lone = array_metadata(array[:, 32:48, 32:48, 32:48], chunk=(16, 16, 16), fill_value=-1024)
    chunk = encode_shard(array[:, 32:48, 32:48, 32:48], lone)
    assert len(encode_shard(array, metadata)) == len(chunk) + 63 * 16


def test_air_alone_needs_no_shard(tmp_path):
    array = np.full((9, 20, 17), -5, np.int16)
    assert write(tmp_path / "a", array, air=-5) is None
    np.testing.assert_array_equal(read_by_tensorstore(tmp_path / "a"), array)


def test_negative_zero_is_kept(tmp_path):
    array = np.full((1, 16, 16, 16), -0.0, np.float32)
    write(tmp_path / "a", array, air=0.0)
    assert np.signbit(read_by_tensorstore(tmp_path / "a")).all()
