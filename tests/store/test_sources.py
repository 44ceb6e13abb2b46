"""Sources: which cases a file, a folder or an nnU-Net data set holds, and what they are called."""

import json
import os

import pytest

from glmae_ray.config import UserError
from glmae_ray.store.sources import discover


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def nnunet(folder, *, channels=("CT",), cases=("p1", "p2"), tests=(), **change):
    """An nnU-Net v2 data set of empty files; every case but the first has a label map."""
    about = {
        "channel_names": {str(n): name for n, name in enumerate(channels)},
        "labels": {"background": 0, "liver": 1, "all": [1, 2]},
        "file_ending": ".nii.gz",
    }
    for part, names in (("Tr", cases), ("Ts", tests)):
        for name in names:
            for n in range(len(channels)):
                touch(folder / f"images{part}" / f"{name}_{n:04d}.nii.gz")
    for name in cases[1:]:
        touch(folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({**about, **change}))
    return folder


def test_a_file_is_one_case(tmp_path):
    path = touch(tmp_path / "Scan 1.NII.gz")
    (item,) = discover(str(path)).items
    assert (item.case_id, item.images, item.subject) == ("Scan_1", (path,), "Scan 1")
    assert (item.label, item.split, item.modality) == (None, None, None)


def test_a_folder_is_searched_to_its_bottom_and_the_rest_is_counted(tmp_path):
    for name in ("b.nii", "a/deep/er.nii.gz", "a/notes.txt", "c.json"):
        touch(tmp_path / name)
    items, ignored = discover(str(tmp_path))
    assert [item.case_id for item in items] == ["er", "b"]
    assert ignored == 2


def test_an_nnunet_data_set_is_taken_as_it_says(tmp_path):
    folder = nnunet(tmp_path, channels=("T1", "T2"), tests=("p9",))
    items, ignored = discover(str(folder))
    assert [(item.case_id, item.split) for item in items] == [
        ("p1", None),
        ("p2", None),
        ("p9", "test"),
    ]
    assert [path.name for path in items[1].images] == ["p2_0000.nii.gz", "p2_0001.nii.gz"]
    assert items[0].label is None
    assert items[1].label == folder / "labelsTr" / "p2.nii.gz"
    assert items[1].label_names == {"background": 0, "liver": 1}
    assert {item.modality for item in items} == {"T1"}
    assert ignored == 1  # dataset.json


def test_a_missing_channel_is_still_asked_for(tmp_path):
    folder = nnunet(tmp_path, channels=("T1", "T2"))
    (folder / "imagesTr" / "p2_0001.nii.gz").unlink()
    items = discover(str(folder)).items
    assert not items[1].images[1].exists()


def test_data_sets_inside_a_folder_are_found_beside_loose_files(tmp_path):
    nnunet(tmp_path / "Dataset001_A")
    nnunet(tmp_path / "more" / "Dataset002_B", channels=("MR",), cases=("p2", "p3"))
    touch(tmp_path / "loose.nii")
    items, ignored = discover(str(tmp_path))
    ids = [item.case_id for item in items]
    assert ids[:3] == ["p1", "p2", "loose"]
    assert ids[3].startswith("p2-")
    assert ids[4] == "p3"
    assert [item.modality for item in items] == ["CT", "CT", None, "MR", "MR"]
    assert ignored == 2


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"channel_names": [], "labels": {}, "file_ending": ""}']
)
def test_a_folder_with_another_dataset_json_is_an_ordinary_folder(tmp_path, content):
    touch(tmp_path / "imagesTr" / "p_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(content)
    items, ignored = discover(str(tmp_path))
    assert ([item.case_id for item in items], ignored) == (["p_0000"], 1)


def test_equal_names_get_a_hash_of_their_place(tmp_path):
    for name in ("a/scan.nii", "b/scan.nii.gz", "c/SCAN.nii", "scan.nii"):
        touch(tmp_path / name)
    ids = [item.case_id for item in discover(str(tmp_path)).items]
    assert ids[0] == "scan"
    assert len({case_id.casefold() for case_id in ids}) == 4
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert [item.case_id for item in discover(str(moved)).items] == ids


@pytest.mark.parametrize(
    ("name", "case_id"),
    [
        ("..", "_"),
        ("...hidden", "_hidden"),
        ("a b/c", "c"),
        ("ä\\n", "_n"),  # Zarr keeps names with two leading underscores for itself
        ("__pycache__", "_pycache__"),
        ("zarr.json", "zarr.json_"),
        ("", "_"),
    ],
)
def test_ids_are_safe_names(tmp_path, name, case_id):
    path = touch(tmp_path / f"{name}.nii")
    assert [item.case_id for item in discover(str(path)).items] == [case_id]


def test_a_name_that_is_no_utf_8_is_written_out(tmp_path):
    path = os.fsencode(tmp_path) + b"/M\xfcller.nii"
    open(path, "wb").close()
    (item,) = discover(str(tmp_path)).items
    assert item.images[0].exists()
    assert item.source.encode().endswith(b"M\\udcfcller.nii")
    assert (item.subject, item.case_id) == ("M\\udcfcller", "M_udcfcller")


def test_a_link_that_leads_back_up_is_not_followed(tmp_path):
    touch(tmp_path / "deep" / "scan.nii")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    assert len(discover(str(tmp_path)).items) == 1


def test_a_source_without_images_is_refused_in_one_line(tmp_path):
    touch(tmp_path / "notes.txt")
    for source, words in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path, "holds no image"),
        (tmp_path / "notes.txt", "holds no image"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            discover(str(source))
        assert len(caught.value.lines) == 1
