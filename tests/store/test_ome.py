"""The store as other tools see it: OME-Zarr 0.5 groups whose coordinates mean what they say.

Every voxel of the case carries its own position along Z, Y and X in mm, a channel each. A coarser
voxel holds the mean of the positions it covers, which is where its centre has to be.
"""

import posixpath

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05.image import Image
from ome_zarr_models.v05.image_label import ImageLabel
from ome_zarr_models.v05.labels import Labels

from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Volume, spacing_of

SHAPE = (24, 64, 80)
TURN = np.deg2rad(20)
# Index (z, y, x, 1) to RAS+ mm: turned about the long axis, 2.5 x 0.6 x 0.9 mm.
AFFINE = np.array(
    [
        [0, -0.6 * np.sin(TURN), 0.9 * np.cos(TURN), -31.0],
        [0, 0.6 * np.cos(TURN), 0.9 * np.sin(TURN), 12.0],
        [2.5, 0, 0, 140.0],
        [0, 0, 0, 1],
    ]
)
MAPS = {"structures": np.uint8, "lesions": np.int16}


def positions(shape=SHAPE):
    """Position along each axis in mm from the centre of the first voxel, (3, Z, Y, X)."""
    steps = np.reshape(spacing_of(AFFINE), (3, 1, 1, 1))
    return (np.indices(shape) * steps).astype(np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A case of three channels and two label maps, opened with zarr-python alone."""
    store = VolumeStore.create(tmp_path_factory.mktemp("ome") / "s")
    labels = {name: (positions()[2] > 30).astype(kind) for name, kind in MAPS.items()}
    volume = Volume(positions(), AFFINE, "MR", "a")
    record = {"affine": AFFINE.ravel().tolist()}
    names = {"background": 0, "far": 1}
    store.write(volume, labels=labels, label_names=names, record=record)
    return zarr.open_group(str(store.path / "cases" / "a"), mode="r")


def placed(dataset, indices):
    """What the metadata of a level says of its voxels: mm, (3, N)."""
    scale, shift = dataset.coordinateTransformations
    return np.array(scale.scale)[-3:, None] * indices + np.array(shift.translation)[-3:, None]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_voxel_of_a_level_lies_where_its_metadata_says(case, level):
    image = Image.from_zarr(case["image"]).attributes.ome.multiscales[0]
    dataset = image.datasets[level]
    voxels = case["image"][dataset.path][:]
    indices = np.indices(voxels.shape[1:]).reshape(3, -1)
    np.testing.assert_allclose(voxels.reshape(3, -1), placed(dataset, indices), atol=1e-4)
    assert len(image.datasets) == 3
    assert (voxels.shape[1:] == SHAPE) == (level == 0)


def test_a_voxel_of_the_coarsest_level_leads_to_its_place_in_the_patient(case):
    image = Image.from_zarr(case["image"]).attributes.ome.multiscales[0]
    coarse = np.array([[3], [5], [7]])
    in_grid_mm = placed(image.datasets[2], coarse)
    affine = np.reshape(case.attrs["glmae"]["affine"], (4, 4))
    index = in_grid_mm / np.reshape(spacing_of(affine), (3, 1))
    # The same voxels of level 0, averaged by hand.
    factor = np.array(SHAPE) // case["image/2"].shape[1:]
    first, last = coarse[:, 0] * factor, (coarse[:, 0] + 1) * factor - 1
    middle = AFFINE @ [*((first + last) / 2), 1]
    np.testing.assert_allclose(affine @ [*index[:, 0], 1], middle, atol=1e-9)


def test_axes_have_names_and_units_in_metadata_and_arrays(case):
    image = Image.from_zarr(case["image"]).attributes.ome.multiscales[0]
    assert [(axis.name, axis.type) for axis in image.axes] == [
        ("c", "channel"),
        *((name, "space") for name in "zyx"),
    ]
    assert [axis.unit for axis in image.axes[1:]] == ["millimeter"] * 3
    for level in range(3):
        assert case[f"image/{level}"].metadata.dimension_names == ("c", "z", "y", "x")
    for name in MAPS:
        assert case[f"labels/{name}/0"].metadata.dimension_names == ("z", "y", "x")


def test_the_labels_group_lists_its_maps_and_each_lies_on_the_image(case):
    assert Labels.from_zarr(case["labels"]).attributes.ome.labels == list(MAPS)
    image = Image.from_zarr(case["image"]).attributes.ome.multiscales[0]
    for name, kind in MAPS.items():
        label = ImageLabel.from_zarr(case[f"labels/{name}"])
        (dataset,) = label.attributes.ome.multiscales[0].datasets
        voxels = case[f"labels/{name}"][dataset.path]
        assert voxels.dtype == kind
        corner = np.array(voxels.shape)[:, None] - 1
        np.testing.assert_allclose(placed(dataset, corner), placed(image.datasets[0], corner))
        source = label.attributes.ome.image_label.source.image
        assert posixpath.normpath(f"labels/{name}/{source}") == "image"


def test_a_case_without_label_maps_and_with_one_level_is_valid_too(tmp_path):
    store = VolumeStore.create(tmp_path / "s", levels=1)
    volume = Volume(positions((9, 10, 11))[:1], AFFINE, "MR", "a")
    store.write(volume, labels={}, label_names={}, record={})
    case = zarr.open_group(str(store.path / "cases" / "a"), mode="r")
    assert len(Image.from_zarr(case["image"]).attributes.ome.multiscales[0].datasets) == 1
    assert Labels.from_zarr(case["labels"]).attributes.ome.labels == []
