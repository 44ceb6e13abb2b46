"""Manifests: a table that names cases, and every way in which it can be wrong."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmae_ray.errors import UserError
from glmae_ray.store.dicom_headers import SliceHeader
from glmae_ray.store.scan import ReadError
from glmae_ray.store.sources import discover

NAMES = "Liver=1|Spleen=2|Kidney=3"


def write(path, rows):
    """A manifest as CSV or Parquet, by its name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def found(path, headers=lambda places: [None] * len(places)):
    return discover(str(path), read_headers=headers)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_row_says_all_there_is_to_say(tmp_path, suffix):
    for name in ("ct/a.nii.gz", "seg/a.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"123")
    row = {
        "case_id": "0001",
        "image": "ct/a.nii.gz",
        "label": "seg/a.nii.gz",
        "subject": "p1",
        "split": "val",
        "modality": "CT",
        "structures": "Liver|Spleen",
        "label_names": NAMES,
    }
    sources = found(write(tmp_path / f"cases{suffix}", [row]))
    (item,) = sources.items
    assert (item.case_id, item.subject, item.split, item.modality) == ("0001", "p1", "val", "CT")
    assert item.locations == [str(tmp_path / "ct/a.nii.gz"), str(tmp_path / "seg/a.nii.gz")]
    assert item.label_names == {"Liver": 1, "Spleen": 2, "Kidney": 3}
    assert item.annotated == ("Liver", "Spleen")
    assert item.size == 6
    assert len(sources.files) == 3
    assert list(sources.others.values()) == ["the manifest"]


def test_what_is_not_said_has_the_usual_meaning(tmp_path):
    rows = [
        {"case_id": "a", "image": "a_0.nrrd|a_1.nrrd", "label": ""},
        {"case_id": "b", "image": "/far/b.nii", "label": "/far/b_seg.nii"},
        {"case_id": "c", "image": "s3://bucket/c.mha"},
    ]
    for name in ("a_0.nrrd", "a_1.nrrd"):
        (tmp_path / name).touch()
    sources = found(write(tmp_path / "cases.csv", rows[:2]))
    first, second = sources.items
    assert [channel.reader for channel in first.channels] == [".nrrd", ".nrrd"]
    assert (first.subject, first.split, first.label, first.annotated) == ("a", None, None, None)
    assert second.locations == ["/far/b.nii", "/far/b_seg.nii"]
    assert (second.annotated, second.label_names) == (None, {})


def test_a_manifest_in_parquet_may_use_lists(tmp_path):
    rows = [
        {"case_id": "a", "image": ["t1.nii", "t2.nii"], "structures": ["x", "y"], "label": "l.nii"}
    ]
    (item,) = found(write(tmp_path / "cases.parquet", rows)).items
    assert [place.rpartition("/")[2] for place in item.locations] == ["t1.nii", "t2.nii", "l.nii"]
    assert item.annotated == ("x", "y")


def test_a_folder_with_one_series_is_an_image(tmp_path):
    for name in ("one", "two", "two_more"):
        (tmp_path / "scan").mkdir(exist_ok=True)
        (tmp_path / "scan" / name).touch()
    one, two = SliceHeader("ab" * 32, "x", None, "1"), SliceHeader("cd" * 32, "x", None, "2")
    path = write(tmp_path / "cases.csv", [{"case_id": "a", "image": "scan/"}])

    (item,) = found(path, lambda _: [None, one, one]).items
    assert [p.rpartition("/")[2] for p in item.locations] == ["two", "two_more"]
    assert item.case_id == "a"

    sources = found(path, lambda _: [two, one, one])
    assert sources.items == []
    assert {error.reason for error in sources.rejected.values()} == {"not_3d"}
    assert len(sources.rejected) == 4  # the folder and its files


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"case_id": "a", "scan": "x.nii"}], ["no column image"]),
        ([{"case_id": "a", "image": ""}], ["row 1: image is empty"]),
        (
            [{"case_id": "a", "image": "x.nii"}, {"case_id": "a", "image": "y.nii"}],
            ["row 2: case_id 'a' is that of row 1 too"],
        ),
        (
            [{"case_id": "a", "image": "x.nii", "split": "training"}],
            ["row 1: split 'training' is none of train, val, test"],
        ),
        (
            [{"case_id": "a", "image": "x.nii", "label_names": "Liver"}],
            ["row 1: label_names 'Liver' is not NAME=NUMBER"],
        ),
        (
            [{"case_id": "a", "image": "x.nii"}, {"case_id": "b", "image": "x.nii|y.nii"}],
            ["row 2: image 'x.nii' is that of row 1 too"],
        ),
        (
            [{"case_id": "a", "image": "x.nii", "label_names": "L=1|S=1"}],
            ["row 1: label_names has a name or a number twice"],
        ),
        (
            [{"case_id": "a", "image": "x.nii", "label_names": "L=1", "structures": "Liver"}],
            ["row 1: structures 'Liver' is not in label_names"],
        ),
        (
            [{"case_id": "", "image": "x.nii"}, {"case_id": "b", "image": "y.nii", "split": "y"}],
            ["row 1: case_id is empty", "row 2: split 'y'"],
        ),
    ],
)
def test_every_mistake_is_a_line(tmp_path, rows, words):
    with pytest.raises(UserError) as caught:
        found(write(tmp_path / "cases.csv", rows))
    assert len(caught.value.lines) == len(words)
    for line, part in zip(caught.value.lines, words, strict=True):
        assert part in line


@pytest.mark.parametrize("name", ["gone.csv", "broken.parquet", "empty.csv", "binary.csv"])
def test_a_table_that_cannot_be_read_is_refused_in_one_line(tmp_path, name):
    contents = {"broken.parquet": b"PAR1 no", "empty.csv": b"", "binary.csv": b"\xff\xfe\x00"}
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(UserError) as caught:
        found(tmp_path / name)
    assert len(caught.value.lines) == 1


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    found(write(tmp_path / "cases.csv", [{"case_id": "a", "image": "x.nii", "age": "3"}]))
    assert "not used: age" in capsys.readouterr().out


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_from_a_spreadsheet_may_separate_by_other_signs(tmp_path, separator):
    text = "case_id,image,split\na,x.nii,test\n".replace(",", separator)
    (tmp_path / "cases.csv").write_text(text)
    (item,) = found(tmp_path / "cases.csv").items
    assert (item.case_id, item.split) == ("a", "test")


def test_an_id_that_can_stay_as_it_is_does(tmp_path):
    rows = [{"case_id": "e/f", "image": "x.nii"}, {"case_id": "e_f", "image": "y.nii"}]
    first, second = found(write(tmp_path / "cases.csv", rows)).items
    assert second.case_id == "e_f"
    assert first.case_id.startswith("e_f-")


def test_damaged_slices_of_a_folder_are_rejected_not_left_out(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "scan").mkdir(exist_ok=True)
        (tmp_path / "scan" / name).touch()
    broken = ReadError("truncated", "two: short")
    path = write(tmp_path / "cases.csv", [{"case_id": "a", "image": "scan"}])
    sources = found(path, lambda _: [SliceHeader("ab" * 32, "x", None, "1"), broken])
    assert sources.rejected == {str(tmp_path / "scan" / "two"): broken}


def test_an_id_cannot_leave_the_store(tmp_path):
    names = ("../../etc", "..", "a/../b", ".")
    rows = [{"case_id": name, "image": f"{n}.nii"} for n, name in enumerate(names)]
    items = found(write(tmp_path / "cases.csv", rows)).items
    for item in items:
        assert "/" not in item.case_id
        assert not item.case_id.startswith(".")
