"""Volume: canonical axes, and the way back."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from glmae_ray.volume import Volume, canonical_affine, to_canonical, to_source_axes
from tests.store import scans

AXES = [
    "".join(codes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*order)
]


@pytest.mark.parametrize("axes", AXES)
def test_every_orientation_becomes_what_nibabel_calls_closest_canonical(axes):
    image = nib.Nifti1Image(scans.voxels(), scans.affine(axes))
    canonical = nib.as_closest_canonical(image)

    array = to_canonical(scans.voxels(), image.affine)

    np.testing.assert_array_equal(array, np.asanyarray(canonical.dataobj).T)
    affine = canonical_affine(image.affine, source_shape=scans.SHAPE)
    np.testing.assert_allclose(affine[:, [2, 1, 0, 3]], canonical.affine, atol=1e-9)


@pytest.mark.parametrize("degrees", [0.0, 20.0, -44.0])
@pytest.mark.parametrize("axes", AXES)
def test_back_in_the_files_axes_nothing_has_changed(axes, degrees):
    source_affine = scans.affine(axes, degrees=degrees)
    array = to_canonical(scans.voxels(), source_affine)
    np.testing.assert_array_equal(to_source_axes(array, source_affine), scans.voxels())


def test_a_voxel_keeps_its_place_in_the_patient():
    source_affine = scans.affine("PIR", degrees=15.0)
    source = scans.voxels()
    source[3, 20, 11] = 999
    affine = canonical_affine(source_affine, source_shape=scans.SHAPE)

    (place,) = np.argwhere(to_canonical(source, source_affine) == 999)

    np.testing.assert_allclose(affine @ (*place, 1), source_affine @ (3, 20, 11, 1), atol=1e-9)


def test_axes_of_a_volume_point_up_forward_and_right():
    source_affine = scans.affine("LPI")
    affine = canonical_affine(source_affine, source_shape=scans.SHAPE)
    volume = Volume(to_canonical(scans.voxels(), source_affine)[None], affine, "CT", "a")

    assert volume.shape == (13, 22, 17)
    assert volume.spacing == pytest.approx((3.0, 1.1, 0.9))
    np.testing.assert_allclose(volume.direction, [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-12)
    assert orientations.aff2axcodes(volume.affine) == ("S", "A", "R")
    np.testing.assert_allclose(volume.origin, affine @ (0, 0, 0, 1) @ np.eye(4)[:, :3])
