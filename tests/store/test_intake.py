"""Intake: from a file to a store and back to the file's own axes, whatever the file is like."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmae_ray.store.intake import Choices, Pending, take_in
from glmae_ray.store.items import SourceImage, SourceItem
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import canonical_affine, to_source_axes
from tests.store import scans

_PAIRS = ("LR", "PA", "IS")
_AXES = st.permutations(_PAIRS).flatmap(lambda pairs: st.tuples(*map(st.sampled_from, pairs)))
_SIDES = st.tuples(st.integers(16, 23), st.integers(17, 30), st.integers(16, 40))
_SPACING = st.tuples(*3 * [st.floats(0.3, 7.0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("intake")


@settings(max_examples=40, deadline=None)
@given(
    axes=_AXES,
    shape=_SIDES,
    spacing=_SPACING,
    degrees=st.floats(-30, 30),
    dtype=st.sampled_from(["u1", "i1", "<i2", ">i2", "<u2", ">i4", "<f4", ">f8"]),
    scaling=st.sampled_from([(1, 0), (1, -1024), (2, 3), (0.37, -5.5), (-1, 0)]),
    seed=st.integers(0, 9),
)
def test_what_goes_in_comes_back_in_the_files_own_axes(
    folder, axes, shape, spacing, degrees, dtype, scaling, seed
):
    data = scans.voxels(shape, dtype=np.dtype(dtype), seed=seed)
    if data.dtype.kind == "f":
        data += 0.25
    elif data.dtype == np.int8:
        data = (data.astype(np.int16) % 120 - 60).astype(np.int8)
    image = nib.Nifti1Image(data, scans.affine(axes, spacing=spacing, degrees=degrees))
    image.header.set_slope_inter(*scaling)
    path = folder / "scan.nii.gz"
    nib.save(image, path)
    expected = nib.load(path)  # rounded to what the scaled integers can hold
    item = SourceItem("a", (SourceImage(".nii.gz", (str(path),)),))
    store = VolumeStore(folder / "store", chunk=(16, 16, 16), levels=2)

    record = take_in(Pending(item, "train"), store=store, choices=Choices()).record

    affine = np.reshape(record["source_affine"], (4, 4))
    np.testing.assert_allclose(affine, expected.affine, atol=1e-4)
    back = to_source_axes(store.read("a")[0], affine)
    np.testing.assert_array_equal(back, expected.get_fdata().astype(np.float32))
    stored = np.reshape(record["affine"], (4, 4))
    np.testing.assert_allclose(stored, canonical_affine(affine, source_shape=shape), atol=1e-9)
    # The axes point to Superior, Anterior and Right as nearly as the scan allows.
    assert np.argmax(np.abs(stored[:3, :3]), axis=0).tolist() == [2, 1, 0]
    assert (np.diag(stored[[2, 1, 0], :3]) > 0).all()
