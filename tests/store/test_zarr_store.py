"""VolumeStore: what is written comes back, in boxes, levels, processes; and any reader opens it."""

import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from ome_zarr_models.v05.image_label import ImageLabel
from ome_zarr_models.v05.labels import Labels

from glmae_ray.errors import UserError
from glmae_ray.store.readers import read_image
from glmae_ray.store.scan import ImageFiles, Limits
from glmae_ray.store.zarr_store import VolumeStore, make_pyramid, pyramid_factors
from glmae_ray.volume import Volume, to_source_axes
from tests.store import scans
from tests.test_volume import AXES

NAMES = {"background": 0, "liver": 1, "spleen": 2}


def volume(case_id="case.1", *, shape=(2, 37, 50, 65), dtype=np.int16, seed=0):
    values = np.random.default_rng(seed).integers(-1024, 3000, shape).astype(dtype)
    affine = np.array([[0, 0, 1.5, -9], [0, 1.0, 0, 4], [3.0, 0, 0, 7], [0, 0, 0, 1]])
    return Volume(values, affine, "CT", case_id)


def write(store, scan, *, record=None):
    label = (scan.array[0] > 500).astype(np.uint8)
    store.write(
        scan, labels={"structures": label}, label_names=NAMES, record=record or {"case_id": "x"}
    )
    return label


@pytest.fixture
def store(tmp_path):
    return VolumeStore.create(tmp_path / "s.zarr")


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_case_comes_back_as_it_was_written(store, dtype):
    scan = volume(dtype=dtype)
    label = write(store, scan)
    assert store.read("case.1").dtype == dtype
    np.testing.assert_array_equal(store.read("case.1"), scan.array)
    np.testing.assert_array_equal(store.read_label("case.1", "structures"), label)


def test_a_box_is_what_slicing_the_level_gives(store):
    scan = volume()
    write(store, scan)
    for level, array in enumerate(make_pyramid(scan, 3)):
        box = store.read("case.1", level=level, box=((1, 2, 3), (30, 9, 33)))
        np.testing.assert_array_equal(box, array[:, 1:30, 2:9, 3:33])


def test_boxes_of_label_maps_are_what_slicing_gives_in_the_order_asked_for(store):
    labels = {name: write(store, volume(name, seed=seed)) for seed, name in enumerate("ab")}
    boxes = [("b", ((1, 30, 3), (30, 41, 65))), ("a", None), ("b", ((36, 0, 0), (37, 50, 1)))]
    found = store.read_labels([(case, "structures", box) for case, box in boxes])
    for (case, box), label in zip(boxes, found, strict=True):
        start, stop = box or ((0, 0, 0), labels[case].shape)
        window = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
        assert np.issubdtype(label.dtype, np.integer)
        np.testing.assert_array_equal(label, labels[case][window])


def test_a_label_map_says_what_its_values_are_called(store):
    write(store, volume())
    assert store.label_names("case.1") == NAMES
    with pytest.raises(KeyError, match=r"has no case\.2/labels/structures"):
        store.label_names("case.2")


def test_many_reads_keep_their_order(store):
    scans_by_id = {name: volume(name, seed=seed) for seed, name in enumerate("abc")}
    for scan in scans_by_id.values():
        write(store, scan)
    order = ["c", "a", "b", "a"]
    boxes = store.read_many(
        [(name, 0, ((n, 0, 0), (n + 2, 50, 65))) for n, name in enumerate(order)]
    )
    for n, (name, box) in enumerate(zip(order, boxes, strict=True)):
        np.testing.assert_array_equal(box, scans_by_id[name].array[:, n : n + 2])


def test_coarser_levels_are_means_of_the_voxels_they_cover(store):
    scan = volume(shape=(1, 20, 48, 64), dtype=np.float32)
    write(store, scan)
    assert pyramid_factors(scan.shape, scan.spacing, 3) == ((1, 1, 1), (1, 2, 1), (1, 4, 2))
    blocks = scan.array.reshape(1, 20, 12, 4, 32, 2)
    coarse = store.read("case.1", level=2)
    np.testing.assert_allclose(coarse, blocks.mean(axis=(3, 5)), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing", "factors"),
    [
        ((64, 512, 500), (2.5, 0.7, 0.7), ((1, 1, 1), (1, 2, 2), (1, 4, 4))),
        ((300, 512, 500), (1.0, 0.8, 0.8), ((1, 1, 1), (2, 2, 2), (4, 4, 4))),
        ((128, 127, 126), (2.5, 3.9, 3.9), ((1, 1, 1), (2, 1, 1), (4, 2, 2))),
        ((15, 40, 17), (1.0, 1.0, 1.0), ((1, 1, 1), (1, 2, 2), (1, 4, 2))),
        ((9, 10, 11), (1.0, 2.0, 3.0), ((1, 1, 1), (1, 1, 1), (1, 1, 1))),
    ],
)
def test_finer_axes_are_halved_first_and_short_ones_never(shape, spacing, factors):
    assert pyramid_factors(shape, spacing, 3) == factors


def test_a_store_opens_with_plain_zarr(store):
    scan = volume()
    label = write(store, scan)
    root = zarr.open(str(store.path), mode="r")
    np.testing.assert_array_equal(root["cases/case.1/image/0"][:], scan.array)
    np.testing.assert_array_equal(root["cases/case.1/labels/structures/0"][:], label)
    assert root["cases/case.1/image/0"].metadata.dimension_names == ("c", "z", "y", "x")


def test_groups_are_valid_ome_zarr(store):
    write(store, volume())
    case = zarr.open_group(str(store.path / "cases" / "case.1"), mode="r")

    image = Image.from_zarr(case["image"]).attributes.ome.multiscales[0]
    assert [axis.name for axis in image.axes] == ["c", "z", "y", "x"]
    scale, shift = image.datasets[2].coordinateTransformations
    assert scale.scale == [1, 3.0, 4.0, 3.0]
    assert shift.translation == [0, 0, 1.5, 0.75]  # the centre of 4 and of 2 voxels
    assert Labels.from_zarr(case["labels"]).attributes.ome.labels == ["structures"]
    label = ImageLabel.from_zarr(case["labels/structures"]).attributes.ome.image_label
    assert {entry.name: entry.label_value for entry in label.properties} == NAMES
    assert label.source.image == "../../image"


def test_a_shard_holds_a_whole_level_and_leaves_air_out(store):
    values = np.full((1, 40, 70, 100), -1024, np.int16)
    values[0, :32, :32, :32] = volume(shape=(1, 32, 32, 32)).array[0]
    write(store, Volume(values, volume().affine, "CT", "air"))
    folder = store.path / "cases" / "air" / "image" / "0"
    (shard,) = (path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")
    assert shard.stat().st_size < 32**3 * 2
    np.testing.assert_array_equal(store.read("air"), values)


def test_a_store_travels_to_another_process_and_reads_there(store):
    scan = volume()
    write(store, scan)
    opened = VolumeStore.open(store.path, threads=1)
    opened.read("case.1", box=((0, 0, 0), (1, 1, 1)))
    copy = pickle.loads(pickle.dumps(opened))
    assert (copy.path, copy.chunk, copy.levels, copy.threads) == (store.path, (32,) * 3, 3, 1)
    np.testing.assert_array_equal(copy.read("case.1"), scan.array)


def test_a_second_write_replaces_the_first(store):
    write(store, volume(), record={"n": 1})
    store.read("case.1")
    scan = volume(shape=(1, 20, 21, 22), seed=5)
    store.write(scan, labels={}, label_names={}, record={"n": 2})
    np.testing.assert_array_equal(store.read("case.1"), scan.array)
    assert store.record("case.1") == {"n": 2}
    with pytest.raises(KeyError):
        store.read_label("case.1", "structures")


def test_a_case_without_its_document_is_not_there_and_is_written_anew(store):
    scan = volume()
    write(store, scan)
    (store.path / "cases" / "case.1" / "zarr.json").unlink()
    assert store.cases() == []
    assert "case.1" not in store
    store.write(scan, labels={}, label_names={}, record={})
    assert store.cases() == ["case.1"]
    assert not (store.path / "cases" / "case.1" / "labels" / "structures").exists()


def test_no_document_of_a_case_exists_before_its_last_array(store, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("glmae_ray.store.layout.labels_attributes", killed)
    with pytest.raises(KeyboardInterrupt):
        write(store, volume())
    assert (store.path / "cases" / "case.1" / "image" / "zarr.json").exists()
    assert store.cases() == []


def test_a_case_published_later_is_found(store):
    reader = VolumeStore.open(store.path)
    with pytest.raises(KeyError, match=r"case\.1"):
        reader.read("case.1")
    write(store, volume())
    assert reader.read("case.1").shape == (2, 37, 50, 65)


def test_a_box_outside_its_level_is_an_error(store):
    write(store, volume())
    with pytest.raises(ValueError, match="is not inside"):
        store.read("case.1", box=((0, 0, 0), (38, 50, 65)))


def test_create_keeps_chunk_levels_and_codec(tmp_path):
    VolumeStore.create(tmp_path / "s", chunk=(16, 24, 32), levels=2, codec="lz4")
    store = VolumeStore.open(tmp_path / "s")
    assert (store.chunk, store.levels, store.codec) == ((16, 24, 32), 2, "lz4")


def test_a_store_from_before_there_were_codecs_is_of_zstd(store):
    document = store.path / "zarr.json"
    document.write_text(document.read_text().replace(', "codec": "zstd"', ""))
    assert "codec" not in document.read_text()
    assert VolumeStore.open(store.path).codec == "zstd"


def test_voxels_come_back_from_lz4_and_plain_zarr_reads_them(tmp_path):
    store, scan = VolumeStore.create(tmp_path / "s", codec="lz4"), volume()
    label = write(store, scan)
    np.testing.assert_array_equal(VolumeStore.open(store.path).read("case.1"), scan.array)
    np.testing.assert_array_equal(store.read_label("case.1", "structures"), label)
    root = zarr.open(str(store.path), mode="r")
    np.testing.assert_array_equal(root["cases/case.1/image/0"][:], scan.array)
    assert '"lz4"' in (store.path / "cases/case.1/image/0/zarr.json").read_text()


def test_what_is_no_store_is_refused_in_one_line(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for path, words in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "other", "not a store"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            VolumeStore.open(path)
        assert len(caught.value.lines) == 1
    with pytest.raises(UserError, match="not a store"):
        VolumeStore.create(tmp_path / "other")


def test_a_store_of_another_format_is_refused(tmp_path):
    zarr.create_group(str(tmp_path / "s"), attributes={"glmae": {"format": 1}})
    for meet in (VolumeStore.open, VolumeStore.exists, VolumeStore.create):
        with pytest.raises(UserError, match="has format 1, this version reads 2"):
            meet(tmp_path / "s")


def test_a_store_whose_making_was_killed_is_made_again(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    VolumeStore.create(tmp_path / "s")
    (tmp_path / "s" / "zarr.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            VolumeStore.create(tmp_path / "s")
    assert not VolumeStore.exists(tmp_path / "s")
    VolumeStore.create(tmp_path / "s")
    assert VolumeStore.exists(tmp_path / "s")


def test_what_lies_where_the_document_should_be_is_named(tmp_path):
    VolumeStore.create(tmp_path / "s")
    (tmp_path / "s" / "zarr.json").write_text("[")
    (tmp_path / "file").write_text("dear")
    with pytest.raises(UserError, match=r"s/zarr\.json is no JSON object; restore it"):
        VolumeStore.open(tmp_path / "s")
    for meet in (VolumeStore.open, VolumeStore.exists, VolumeStore.create):
        with pytest.raises(UserError, match="not a store that glmae made"):
            meet(tmp_path / "file")


def test_a_record_is_replaced_and_the_rest_stays(store):
    scan = volume()
    write(store, scan, record={"n": 1})
    store.write_record("case.1", {"n": 2, "words": ["ö"]})
    assert VolumeStore.open(store.path).record("case.1") == {"n": 2, "words": ["ö"]}
    np.testing.assert_array_equal(store.read("case.1"), scan.array)


def test_a_case_that_is_not_there_has_no_record_and_gets_none(store):
    for call in (lambda: store.record("a"), lambda: store.write_record("a", {})):
        with pytest.raises(KeyError, match="has no a"):
            call()
    assert store.cases() == []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    axes=st.sampled_from(AXES),
    shape=st.lists(st.integers(8, 40), min_size=3, max_size=3, unique=True),
    dtype=st.sampled_from(["u1", "i1", "<i2", ">i2", "u2", ">i4", "f4", ">f8"]),
    spacing=st.tuples(*[st.floats(0.25, 9.0, width=32)] * 3),
    degrees=st.floats(-40, 40),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    fractions=st.booleans(),
)
def test_from_any_file_to_the_store_and_back_nothing_changes(
    tmp_path, axes, shape, dtype, spacing, degrees, suffix, fractions
):
    data = scans.voxels(shape, dtype=np.dtype(dtype))
    if fractions and data.dtype.kind == "f":
        data = data / 4
    path = tmp_path / f"scan{suffix}"
    nib.save(nib.Nifti1Image(data, scans.affine(axes, spacing=spacing, degrees=degrees)), path)
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    store = VolumeStore.create(tmp_path / "s", chunk=(8, 16, 32))

    files = ImageFiles(suffix, (path,))
    image = read_image([files], case_id="a", modality="CT", limits=Limits(min_voxels=1))
    store.write(image.volume, labels={}, label_names={}, record={})

    back = to_source_axes(store.read("a")[0], image.source_affine)
    np.testing.assert_array_equal(back, data)
    np.testing.assert_allclose(image.source_affine, nib.load(path).affine, atol=1e-12)
