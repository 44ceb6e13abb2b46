"""Data sets of nnU-Net and of the Decathlon: which cases they list, and what they say of them."""

import json
import os

import pytest

from tests.store.test_sources import discover, images, touch


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


def test_an_nnunet_data_set_is_taken_as_it_says(tmp_path):
    folder = nnunet(tmp_path, channels=("T1", "T2"), tests=("p9",))
    sources = discover(str(folder))
    items = sources.items
    assert [(item.case_id, item.split) for item in items] == [
        ("p1", None),
        ("p2", None),
        ("p9", "test"),
    ]
    names = [place.rpartition("/")[2] for place in images(items[1])]
    assert names == ["p2_0000.nii.gz", "p2_0001.nii.gz"]
    assert items[0].label is None
    assert items[1].label.locations == (str(folder / "labelsTr" / "p2.nii.gz"),)
    assert items[1].label_names == {"background": 0, "liver": 1}
    assert [item.annotated for item in items] == [None, ("liver",), None]
    assert {item.modality for item in items} == {"T1"}
    assert set(sources.others) == {str(folder / "dataset.json")}


def test_a_missing_channel_is_still_asked_for(tmp_path):
    folder = nnunet(tmp_path, channels=("T1", "T2"))
    (folder / "imagesTr" / "p2_0001.nii.gz").unlink()
    items = discover(str(folder)).items
    assert not os.path.exists(images(items[1])[1])


def test_data_sets_inside_a_folder_are_found_beside_loose_files(tmp_path):
    nnunet(tmp_path / "Dataset001_A")
    nnunet(tmp_path / "more" / "Dataset002_B", channels=("MR",), cases=("p2", "p3"))
    touch(tmp_path / "loose.nii")
    sources = discover(str(tmp_path))
    ids = [item.case_id for item in sources.items]
    assert ids[:3] == ["p1", "p2", "loose"]
    assert ids[3].startswith("p2-")
    assert ids[4] == "p3"
    assert [item.modality for item in sources.items] == ["CT", "CT", None, "MR", "MR"]
    assert len(sources.others) == 2


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"labels": {}, "name": "x"}'])
def test_a_folder_with_another_dataset_json_is_an_ordinary_folder(tmp_path, content):
    touch(tmp_path / "imagesTr" / "p_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(content)
    sources = discover(str(tmp_path))
    assert [item.case_id for item in sources.items] == ["p_0000"]
    assert len(sources.others) == 1


def test_a_file_beside_a_data_set_s_cases_is_listed_and_not_taken_for_an_image(tmp_path):
    folder = nnunet(tmp_path)
    stray = touch(folder / "labelsTr" / "p7.nii.gz")
    sources = discover(str(folder))
    assert len(sources.items) == 2
    assert sources.rejected[str(stray)].reason == "unlisted"


@pytest.mark.parametrize(
    "about",
    [
        {"channel_names": [], "labels": {}, "file_ending": ".nii.gz"},
        {"channel_names": {"0": 0}, "labels": {}, "file_ending": ".nii.gz"},
        {"channel_names": {"0": "CT"}, "labels": {}, "file_ending": ".mha"},
        {"modality": {"0": "CT"}, "labels": None, "training": []},
        {"modality": {"0": "CT"}, "labels": {"1": ["a"]}, "training": ["imagesTr/p_0000.nii.gz"]},
        {"modality": {"0": "CT"}, "training": ["/far/p.nii.gz"]},
        {"modality": {"0": 7}, "training": ["imagesTr/p_0000.nii.gz"], "test": None},
    ],
)
def test_a_data_set_that_says_wrong_things_is_rejected_and_its_labels_are_no_scans(tmp_path, about):
    for part in ("imagesTr", "labelsTr"):
        touch(tmp_path / part / "p_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    sources = discover(str(tmp_path))
    assert sources.items == []
    reasons = {place.rpartition("/")[2]: e.reason for place, e in sources.rejected.items()}
    assert reasons == {"dataset.json": "unreadable", "p_0000.nii.gz": "unlisted"}


def test_a_list_of_annotations_beside_a_data_set_says_what_was_looked_for(tmp_path):
    folder = nnunet(tmp_path, labels={"background": 0, "liver": 1, "spleen": 2})
    (folder / "cases.json").write_text(json.dumps({"p2": {"structures": ["spleen", "PTV"]}}))
    assert [item.annotated for item in discover(str(folder)).items] == [None, ("spleen",)]


def decathlon(folder, *, modality, training, test=()):
    about = {
        "modality": modality,
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": training,
        "test": list(test),
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return discover(str(folder)).items


def test_a_decathlon_data_set_is_taken_as_it_lists(tmp_path):
    for name in ("imagesTr/h1.nii.gz", "labelsTr/h1.nii.gz", "imagesTs/h2.nii.gz"):
        touch(tmp_path / name)
    pair = {"image": "./imagesTr/h1.nii.gz", "label": "./labelsTr/h1.nii.gz"}
    items = decathlon(
        tmp_path, modality={"0": "MRI"}, training=[pair], test=["./imagesTs/h2.nii.gz"]
    )
    assert [(i.case_id, i.split, i.modality) for i in items] == [
        ("h1", None, "MRI"),
        ("h2", "test", "MRI"),
    ]
    assert items[0].label_names == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert items[0].channels[0].volume is None
    assert items[0].label.locations == (str(tmp_path / "labelsTr/h1.nii.gz"),)


def test_channels_of_a_decathlon_file_are_its_volumes(tmp_path):
    touch(tmp_path / "imagesTr/b1.nii.gz")
    pair = {"image": "./imagesTr/b1.nii.gz", "label": "./labelsTr/b1.nii.gz"}
    (item,) = decathlon(tmp_path, modality={"0": "FLAIR", "1": "T1w"}, training=[pair])
    assert [channel.volume for channel in item.channels] == [0, 1]
    assert len(item.locations) == 2


def test_channels_of_an_nnunet_v1_case_are_its_numbered_files(tmp_path):
    for n in range(2):
        touch(tmp_path / f"imagesTr/p_000{n}.nii.gz")
    pair = {"image": "./imagesTr/p.nii.gz", "label": "./labelsTr/p.nii.gz"}
    (item,) = decathlon(tmp_path, modality={"0": "T1", "1": "T2"}, training=[pair])
    assert [place.rpartition("/")[2] for place in images(item)] == [
        "p_0000.nii.gz",
        "p_0001.nii.gz",
    ]


def test_a_data_set_cannot_name_files_outside_of_it(tmp_path):
    inside = tmp_path / "set"
    touch(tmp_path / "secret.nii.gz")
    touch(inside / "ok.nii.gz")
    training = [{"image": "../secret.nii.gz"}, {"image": "/etc/hosts"}, {"image": "ok.nii.gz"}]
    items = decathlon(inside, modality={"0": "CT"}, training=training)
    assert [item.case_id for item in items] == ["ok"]
