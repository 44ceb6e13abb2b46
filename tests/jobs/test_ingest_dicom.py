"""`glmae ingest` on DICOM through its door: series become cases, and nobody's name gets in."""

import json
from pathlib import Path

import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.store.index import VolumeIndex, read_files
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import to_source_axes
from tests.store import dicoms

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SHAPE = (23, 26, 17)
CANARIES = {
    "PatientName": "Canary^Bird",
    "PatientID": "CANARY-4711",
    "AccessionNumber": "CANARY4712",
    "InstitutionName": "Canary Hospital",
    "ReferringPhysicianName": "Canary^Doctor",
    "StudyDate": "19871123",
    "PatientBirthDate": "19420229",
    "SeriesDescription": "canary series",
    "StudyDescription": "canary study",
}


@pytest.fixture(autouse=True)
def salt(monkeypatch):
    monkeypatch.setenv("GLMAE_SUBJECT_SALT", "a secret for tests")


def person(**change):
    def named(dataset, _):
        for keyword, value in {**CANARIES, **change}.items():
            setattr(dataset, keyword, value)

    return named


def archive(folder: Path) -> dict[str, np.ndarray]:
    """Two series of one person in one folder, one of another deep below; a plan; a text."""
    data = {
        name: dicoms.voxels(SHAPE, seed=n) for n, name in enumerate(("1.2.7", "1.2.8", "1.2.9"))
    }
    for series in ("1.2.7", "1.2.8"):
        dicoms.write_series(folder / series, data[series], series=series, change=person())
    for n, path in enumerate(sorted((folder / "1.2.8").iterdir())):
        path.rename(folder / "1.2.7" / f"IM{n:04}")  # no suffix, the same folder
    (folder / "1.2.8").rmdir()
    other = person(PatientID="CANARY-0815")
    deep = folder / "a" / "b"
    dicoms.write_series(deep, data["1.2.9"], series="1.2.9", change=other, syntax="rle")
    (folder / "a" / "notes.txt").write_text("CANARY notes")
    (folder / "a" / "broken.dcm").write_bytes(b"nothing at all")
    return data


def ingest(source, store, *words):
    return main(["ingest", f"source={source}", f"store={store}", *words])


def test_series_become_cases_of_people(tmp_path, capsys):
    data = archive(tmp_path / "in")
    assert ingest(tmp_path / "in", tmp_path / "s") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "ingested 3, already stored 0, quarantined 1"
    )
    index, store = VolumeIndex.read(tmp_path / "s"), VolumeStore.open(tmp_path / "s")
    rows = index.records()
    assert len({row["subject"] for row in rows}) == 2
    by_subject = {row["subject"]: set() for row in rows}
    for row in rows:
        by_subject[row["subject"]].add(row["split"])
    assert all(len(splits) == 1 for splits in by_subject.values())
    assert {row["modality"] for row in rows} == {"MR"}
    found = []
    for row in rows:
        affine = np.reshape(row["source_affine"], (4, 4))
        np.testing.assert_allclose(affine, dicoms.affine(), atol=1e-4)
        found.append(to_source_axes(store.read(row["case_id"])[0], affine))
    for wanted in data.values():
        assert any(np.array_equal(wanted, voxels) for voxels in found)
    files = read_files(tmp_path / "s")
    outcomes = [row["outcome"] for row in files]
    assert (outcomes.count("case"), outcomes.count("quarantined"), len(files)) == (51, 1, 53)


def test_nothing_that_names_a_person_is_in_the_store(tmp_path):
    archive(tmp_path / "in")
    assert ingest(tmp_path / "in", tmp_path / "s") == 0
    words = [
        text.encode() for text in (*CANARIES.values(), "canary", "CANARY", "1.2.7.1", "a secret")
    ]
    for path in (tmp_path / "s").rglob("*"):
        assert not any(word.lower() in str(path).lower().encode() for word in words)
        if path.is_file():
            content = path.read_bytes().lower()
            assert not [word for word in words if word.lower() in content], path
    # Parquet compresses: look into the tables as well.
    rows = [*VolumeIndex.read(tmp_path / "s").records(), *read_files(tmp_path / "s")]
    text = json.dumps(rows).lower()
    assert not [word for word in words if word.decode().lower() in text]


def test_a_second_look_opens_no_file_and_ids_do_not_depend_on_the_place(tmp_path, monkeypatch):
    archive(tmp_path / "in")
    assert ingest(tmp_path / "in", tmp_path / "s") == 0
    ids = VolumeIndex.read(tmp_path / "s").case_ids()

    opened = []
    from glmae_ray.jobs import ingest_tasks

    real = ingest_tasks.read_slice_header
    monkeypatch.setattr(
        ingest_tasks, "read_slice_header", lambda p, salt: opened.append(p) or real(p, salt=salt)
    )
    assert ingest(tmp_path / "in", tmp_path / "s") == 0
    assert [path.name for path in opened] == ["broken.dcm"]

    (tmp_path / "in").rename(tmp_path / "moved")
    assert ingest(tmp_path / "moved", tmp_path / "s") == 0
    assert VolumeIndex.read(tmp_path / "s").case_ids() == ids


def test_people_hashed_with_another_secret_are_refused(tmp_path, monkeypatch, capsys):
    archive(tmp_path / "in")
    assert ingest(tmp_path / "in", tmp_path / "s") == 0
    before = (tmp_path / "s" / "index.parquet").read_bytes()
    monkeypatch.setenv("GLMAE_SUBJECT_SALT", "another")
    assert ingest(tmp_path / "in", tmp_path / "s") == 2
    assert "GLMAE_SUBJECT_SALT" in capsys.readouterr().err
    assert (tmp_path / "s" / "index.parquet").read_bytes() == before


def test_a_salt_is_made_once_and_is_nobody_elses_to_read(tmp_path, monkeypatch):
    from glmae_ray.jobs.subject_salt import subject_salt

    monkeypatch.delenv("GLMAE_SUBJECT_SALT")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first = subject_salt()
    assert len(first) == 64
    assert subject_salt() == first
    (path,) = (tmp_path / "glmae").iterdir()
    assert path.stat().st_mode & 0o077 == 0


def test_a_part_of_a_series_elsewhere_takes_nothing_from_the_whole(tmp_path):
    paths = dicoms.write_series(tmp_path / "full", dicoms.voxels(SHAPE), series="1.2.7")
    (tmp_path / "part").mkdir()
    for path in paths[:10]:
        (tmp_path / "part" / path.name).write_bytes(path.read_bytes())
    assert ingest(tmp_path / "full", tmp_path / "s") == 0
    (whole,) = VolumeIndex.read(tmp_path / "s").case_ids()
    before = VolumeStore.open(tmp_path / "s").read(whole)
    assert ingest(tmp_path / "part", tmp_path / "s") == 0
    assert len(VolumeIndex.read(tmp_path / "s")) == 2
    np.testing.assert_array_equal(VolumeStore.open(tmp_path / "s").read(whole), before)
