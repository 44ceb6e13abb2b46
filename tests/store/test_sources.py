"""Sources: which cases a file, a folder or a glob holds, and what they are called."""

import os

import pytest

from glmae_ray.errors import UserError
from glmae_ray.store.dicom_headers import SliceHeader
from glmae_ray.store.scan import ReadError
from glmae_ray.store.sources import discover as discover_with


def discover(source, **options):
    """Without DICOM: every file without a suffix of an image is something else."""
    return discover_with(source, read_headers=lambda places: [None] * len(places), **options)


def images(item):
    return tuple(image.locations[0] for image in item.channels)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_file_is_one_case(tmp_path):
    path = touch(tmp_path / "Scan 1.NII.gz")
    (item,) = discover(str(path)).items
    assert (item.case_id, images(item), item.subject) == ("Scan_1", (str(path),), "Scan 1")
    assert (item.label, item.split, item.modality) == (None, None, None)


def test_a_folder_is_searched_to_its_bottom_and_the_rest_is_counted(tmp_path):
    for name in ("b.nii", "a/deep/er.nii.gz", "a/notes.txt", "c.json"):
        touch(tmp_path / name)
    sources = discover(str(tmp_path))
    assert [item.case_id for item in sources.items] == ["er", "b"]
    assert set(sources.others) == {str(tmp_path / "a/notes.txt"), str(tmp_path / "c.json")}
    assert len(sources.files) == 4


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
    assert os.path.exists(images(item)[0])
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


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("*/scan?.nii", ["scan1", "scan2"]),
        ("**/*.nii", ["deep", "scan1", "scan2", "top"]),
        ("[ab]", ["deep", "scan1", "scan2"]),
        ("b*", ["scan2"]),
    ],
)
def test_a_glob_takes_files_and_whole_folders(tmp_path, pattern, ids):
    for name in ("a/scan1.nii", "a/x/deep.nii", "b/scan2.nii", "top.nii"):
        touch(tmp_path / name)
    found = discover(f"{tmp_path}/{pattern}")
    assert sorted(item.case_id for item in found.items) == ids
    assert len(found.files) == len(ids)


@pytest.mark.parametrize("pattern", ["*.nrrd", "a**b/*.nii"])
def test_a_glob_that_matches_nothing_or_is_none_is_refused(tmp_path, pattern):
    touch(tmp_path / "top.nii")
    with pytest.raises(UserError, match="source:"):
        discover(f"{tmp_path}/{pattern}")


def test_a_name_with_brackets_that_exists_is_no_glob(tmp_path):
    touch(tmp_path / "scan[1].nii")
    assert len(discover(str(tmp_path / "scan[1].nii")).items) == 1


def test_a_folder_that_cannot_be_listed_is_rejected_and_the_rest_comes_through(
    tmp_path, monkeypatch
):
    touch(tmp_path / "open" / "scan.nii")
    touch(tmp_path / "closed" / "scan.nii")
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    sources = discover(str(tmp_path))
    assert len(sources.items) == 1
    (error,) = sources.rejected.values()
    assert (error.reason, "closed: Permission denied" in error.message) == ("unreadable", True)


def headers_of(kinds):
    """A reader of headers that knows files by the start of their name."""

    def read(places):
        names = [place.rpartition("/")[2] for place in places]
        found = [next((k for s, k in kinds.items() if n.startswith(s)), None) for n in names]
        # Every file is an instance of its own, but for copies: of the same name.
        return [
            kind._replace(instance=name) if isinstance(kind, SliceHeader) else kind
            for kind, name in zip(found, names, strict=True)
        ]

    return read


def test_slices_become_a_case_a_series_wherever_they_lie(tmp_path):
    for name in ("d/1_a", "d/2_a.dcm", "e/1_b", "e/2_b", "notes", "rt.dcm"):
        touch(tmp_path / name)
    one, two = SliceHeader("ab" * 32, "who", "MR", ""), SliceHeader("cd" * 32, "who", None, "")
    broken = ReadError("not_an_image", "a plan")
    look = headers_of({"1_": one, "2_": two, "rt": broken})
    sources = discover_with(str(tmp_path), read_headers=look)
    assert [item.case_id for item in sources.items] == [
        "dicom-abababababababab",
        "dicom-" + "cd" * 8,
    ]
    first, second = sources.items
    assert first.channels[0].locations == (str(tmp_path / "d/1_a"), str(tmp_path / "e/1_b"))
    assert (first.modality, first.subject, second.modality) == ("MR", "who", None)
    assert sources.rejected == {str(tmp_path / "rt.dcm"): broken}
    assert set(sources.others) == {str(tmp_path / "notes")}


def test_a_series_that_was_copied_into_another_folder_is_a_case_a_folder(tmp_path):
    for name in ("d/1_a", "d/1_b", "e/1_a", "e/1_b"):
        touch(tmp_path / name)
    look = headers_of({"1_": SliceHeader("ab" * 32, "who", "MR", "")})
    first, second = discover_with(str(tmp_path), read_headers=look).items
    assert first.case_id == "dicom-" + "ab" * 8
    assert second.case_id.startswith(first.case_id + "-")
    assert first.channels[0].locations == (str(tmp_path / "d/1_a"), str(tmp_path / "d/1_b"))


def test_files_that_have_not_changed_are_not_looked_into_again(tmp_path):
    for name in ("1_a", "2_a"):
        touch(tmp_path / name)
    one = SliceHeader("ab" * 32, "who", "MR", "")
    first = discover_with(str(tmp_path), read_headers=headers_of({"1_": one, "2_": one}))
    known = {first.files[place]: header for place, header in first.headers.items()}
    os.utime(tmp_path / "2_a", (1, 1))
    asked = []

    def look(places):
        asked.extend(places)
        return [one] * len(places)

    second = discover_with(str(tmp_path), read_headers=look, known=known)
    assert asked == [str(tmp_path / "2_a")]
    assert second.items[0].channels == first.items[0].channels
    assert second.items[0].stamp != first.items[0].stamp


def test_single_files_are_of_the_person_named_like_them_or_like_their_folder(tmp_path):
    for name in ("p1/ct.nii", "p2/ct.nii", "p2/late.nii", "scan7.nii"):
        touch(tmp_path / name)
    sources = discover(str(tmp_path))
    assert [item.subject for item in sources.items] == ["ct", "ct", "late", "scan7"]
    assert sources.ambiguous == ["ct"]
    for source in (str(tmp_path), f"{tmp_path}/**/*.nii"):
        sources = discover(source, by_folder=True)
        assert [item.subject for item in sources.items] == ["p1", "p2", "p2", "scan7"]
        assert sources.ambiguous == []


def test_a_long_name_becomes_an_id_that_file_systems_take(tmp_path):
    names = ["x" * 240 + end for end in ("1", "2")]
    for name in names:
        touch(tmp_path / f"{name}.nii")
    ids = [item.case_id for item in discover(str(tmp_path)).items]
    assert len(set(ids)) == 2
    assert max(map(len, ids)) < 150


def test_what_is_no_file_is_named_and_stops_nothing(tmp_path):
    touch(tmp_path / "a.nii")
    touch(tmp_path / "far" / "b.nii")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in" / "self")
    (tmp_path / "in" / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "in" / "pipe")
    sources = discover(str(tmp_path))
    assert [item.case_id for item in sources.items] == ["a", "b"]
    names = {place.rpartition("/")[2] for place in sources.rejected}
    assert names == {"link", "self", "nowhere", "pipe"}


def test_a_header_cannot_take_another_image_for_its_data(tmp_path):
    touch(tmp_path / "ok.nii")
    for name, data in (("a.mhd", "b.mhd"), ("b.mhd", "a.mhd"), ("c.mhd", "ok.nii")):
        (tmp_path / name).write_text(f"ObjectType = Image\nElementDataFile = {data}\n")
    assert len(discover(str(tmp_path)).items) == 4
