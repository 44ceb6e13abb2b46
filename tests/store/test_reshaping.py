"""Resampling and cropping: where voxels end up, in mm, against independent arithmetic."""

import numpy as np
import pytest
import SimpleITK as sitk

from glmae_ray.store.reshaping import cropped, resampled
from glmae_ray.volume import Volume
from tests.store.scans import affine as file_affine


def volume(shape=(18, 24, 30), *, spacing=(3.0, 1.5, 0.8), dtype=np.float32):
    """A ramp along every axis: linear interpolation of it is exact inside."""
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij")
    array = (100 + 7 * z - 3 * y + 2 * x).astype(dtype)[np.newaxis]
    matrix = file_affine("RAS", spacing=spacing[::-1], degrees=20)[:, [2, 1, 0, 3]]
    return Volume(array, matrix, "MR", "a")


def at(affine, index):
    return affine[:3, :3] @ index + affine[:3, 3]


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (3.0, 0.7, 2.0), (6.0, 4.0, 4.0)])
def test_resampled_voxels_hold_what_lies_at_their_place(spacing):
    source = volume()
    moved, _ = resampled(source, None, spacing=spacing)
    assert moved.spacing == pytest.approx(spacing)
    back = np.linalg.inv(source.affine) @ moved.affine
    inside = np.argwhere(np.ones(moved.shape))
    place = inside @ back[:3, :3].T + back[:3, 3]
    # Where a filter of the width of a new voxel reaches over the edge, the ramp bends.
    reach = np.maximum(1, np.divide(spacing, source.spacing))
    free = np.all((place >= reach) & (place <= np.array(source.shape) - 1 - reach), axis=1)
    assert free.sum() > 20
    wanted = 100 + place @ [7, -3, 2]
    # Sampled at whole voxels, a triangle of uneven width leans by hundredths of a voxel.
    np.testing.assert_allclose(moved.array[0][tuple(inside[free].T)], wanted[free], atol=0.2)


def test_resampling_up_agrees_with_itk():
    source = volume(dtype=np.int16)
    noise = np.random.default_rng(0).integers(-50, 50, source.array.shape)
    source.array[:] += noise.astype(np.int16)
    moved, _ = resampled(source, None, spacing=(1.0, 0.75, 0.8))

    image = sitk.GetImageFromArray(source.array[0].astype(np.float32))
    image.SetSpacing(source.spacing[::-1])
    ratio = np.array([1.0, 0.75, 0.8]) / source.spacing
    grid = sitk.Image([int(n) for n in moved.shape[::-1]], sitk.sitkFloat32)
    grid.SetSpacing([0.8, 0.75, 1.0])
    grid.SetOrigin(((ratio - 1) / 2 * source.spacing)[::-1].tolist())
    itk = sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear))
    inside = (slice(3, -3),) * 3
    assert moved.array.dtype == np.int16
    # Rounded to integers here, not there.
    assert np.abs(moved.array[0][inside] - itk[inside]).max() <= 0.51


def test_labels_take_the_nearest_voxel_and_no_new_value():
    source = volume()
    label = np.zeros(source.shape, np.uint8)
    label[4:9, 5:20, 8:21] = 7
    label[10:12, 5:20, 8:21] = 200
    moved, nearest = resampled(source, label, spacing=(1.0, 2.0, 1.6))
    assert nearest.shape == moved.shape
    assert set(np.unique(nearest)) == {0, 7, 200}
    back = np.linalg.inv(source.affine) @ moved.affine
    index = np.argwhere(np.ones(moved.shape))
    place = index @ back[:3, :3].T + back[:3, 3]
    near = np.floor(place + 0.5 + 1e-9).astype(int).clip(0, np.array(source.shape) - 1)
    np.testing.assert_array_equal(nearest[tuple(index.T)], label[tuple(near.T)])


def test_the_same_spacing_changes_nothing():
    source = volume(dtype=np.int16)
    moved, _ = resampled(source, None, spacing=source.spacing)
    np.testing.assert_array_equal(moved.array, source.array)
    np.testing.assert_allclose(moved.affine, source.affine, atol=1e-12)


def test_a_crop_keeps_every_voxel_in_its_place():
    source = volume(spacing=(2.0, 2.0, 2.0))
    array = np.full(source.array.shape, -1000, np.int16)
    array[0, 5:12, 8:20, 10:22] = 40
    label = np.zeros(source.shape, np.uint8)
    label[3:5, 8:20, 10:22] = 1  # outside of the body by two slices
    crop, inside = cropped(Volume(array, source.affine, "CT", "a"), label)
    assert np.prod(crop.shape) < 0.5 * np.prod(source.shape)
    assert inside.sum() == label.sum()
    index = np.argwhere(inside)[0]
    found = np.linalg.inv(source.affine) @ np.append(at(crop.affine, index), 1)
    np.testing.assert_allclose(found[:3], np.argwhere(label)[0], atol=1e-9)
    start = np.rint(found[:3]).astype(int) - index
    window = tuple(slice(low, low + side) for low, side in zip(start, crop.shape, strict=True))
    np.testing.assert_array_equal(crop.array[0], array[0][window])
    assert (crop.array == 40).sum() == (array == 40).sum()
