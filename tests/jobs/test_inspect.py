"""`glmae inspect` through its door: text, JSON, the picture of a case, and errors of one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from glmae_ray.cli import main
from glmae_ray.jobs.inspect import centre_of
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.summary import describe, measure
from glmae_ray.store.zarr_store import FORMAT, VolumeStore
from tests.store.test_summary import make_store, write_case


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "s")
    return tmp_path / "s"


def inspect(store, *words):
    return main(["inspect", f"store={store}", *words])


def printed_json(capsys):
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_json_is_the_facts_and_nothing_else(store, capsys):
    assert inspect(store, "--json") == 0
    opened, index = VolumeStore.open(store), VolumeIndex.read(store)
    assert printed_json(capsys) == {**describe(opened, index), "disk": measure(opened, index)}


def test_the_text_says_the_same_in_a_hundred_columns(store, capsys):
    assert inspect(store) == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        f"format {FORMAT} (OME-Zarr 0.5), chunks 32 x 32 x 32, 3 levels, zstd",
        "val 2 1",
        "all 3 2",
        "MR: 2 cases; channels: 2; int16 1, float32 1",
        "voxels 14 (12 to 16) 31 (30 to 32) 38 (36 to 40)",
        "spacing in mm 2.5 (2 to 3) 0.55 (0.5 to 0.6) 0.8 (0.7 to 0.9)",
        "liver 2 560",
        "not given 2 cases",
        "2 truncated, such as a: is truncated",
    ):
        assert line in lines
    size = measure(VolumeStore.open(store), VolumeIndex.read(store))["parts"]["level_0"]
    assert f"level 0 {size['bytes'] / 1e3:.2f} kB {size['ratio']:.1%}" in lines
    assert max(map(len, text.splitlines())) <= 100


def test_cases_that_a_killed_ingest_left_out_of_the_index_are_told(store, capsys):
    write_case(VolumeStore.open(store), "late", shape=(1, 12, 16, 26), spacing=(1.0, 1.0, 1.0))
    assert inspect(store) == 0
    assert "1 stored cases are not in the index; ingest again adopts" in capsys.readouterr().out


@pytest.mark.parametrize("case_id", ["ann.1", "bob"])
def test_a_case_is_its_row_and_a_picture(store, tmp_path, capsys, monkeypatch, case_id):
    monkeypatch.chdir(tmp_path)
    assert inspect(store, f"case={case_id}", "--json") == 0
    facts = printed_json(capsys)
    picture = tmp_path / f"{case_id}.png"
    assert (facts.pop("store"), facts.pop("picture")) == (str(store), str(picture))
    assert facts == VolumeIndex.read(store).row(case_id)
    with Image.open(picture) as shown:
        assert len(shown.convert("RGB").getcolors(maxcolors=100_000) or []) > 50


def test_the_text_of_a_case_names_its_facts_and_where_the_picture_is(store, tmp_path, capsys):
    assert inspect(store, "case=ann.1", f"out={tmp_path / 'a.png'}") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == f"picture {tmp_path / 'a.png'}"
    for line in ("case_id ann.1", "shape 12, 30, 40", "structures liver: 560, spleen: 12"):
        assert line in lines
    assert "affine 0 0 0.7 0" in lines


def drawn(store, tmp_path, monkeypatch, case_id):
    """What is drawn of a case: planes, and the other arguments of `draw_planes`."""
    seen = {}

    class Figure:
        def savefig(self, file, **_):
            file.write(b"")

    def draw(planes, **arguments):
        seen.update(arguments, planes=planes)
        return Figure()

    monkeypatch.setattr("glmae_ray.jobs.inspect.draw_planes", draw)
    assert inspect(store, f"case={case_id}", f"out={tmp_path / 'a.png'}") == 0
    return seen


def test_the_planes_go_through_the_largest_structure(store, tmp_path, monkeypatch):
    reads = []
    read_many = VolumeStore.read_many

    def watched(self, requests):
        reads.extend(requests)
        return read_many(self, requests)

    monkeypatch.setattr(VolumeStore, "read_many", watched)
    axial, coronal, sagittal = drawn(store, tmp_path, monkeypatch, "ann.1")["planes"]
    volume = VolumeStore.open(store).read("ann.1")
    # The liver is the box 2:9, 3:8, 4:20.
    np.testing.assert_array_equal(axial.pixels, volume[:, 5])
    np.testing.assert_array_equal(coronal.pixels, volume[:, :, 5])
    np.testing.assert_array_equal(sagittal.pixels, volume[:, :, :, 11])
    assert (axial.labels == 1).sum() == 5 * 16
    assert (axial.spacing, coronal.spacing, sagittal.spacing) == (
        (0.5, 0.7),
        (3.0, 0.7),
        (3.0, 0.5),
    )
    thickness = [min(np.subtract(stop, start)) for _, _, (start, stop) in reads[:3]]
    assert thickness == [1, 1, 1]


def test_without_structures_they_go_through_the_middle_of_the_foreground(
    store, tmp_path, monkeypatch
):
    planes = drawn(store, tmp_path, monkeypatch, "bob")["planes"]
    volume = VolumeStore.open(store).read("bob")
    np.testing.assert_array_equal(planes[0].pixels, volume[:, 10])
    np.testing.assert_array_equal(planes[2].pixels, volume[:, :, :, 25])
    assert planes[0].labels is None


def test_ct_has_the_window_of_soft_tissue_and_others_their_own_per_channel(
    store, tmp_path, monkeypatch
):
    row = VolumeIndex.read(store).row("ann.1")
    windows = drawn(store, tmp_path, monkeypatch, "ann.1")["windows"]
    assert windows == list(zip(row["p0_5"], row["p99_5"], strict=True))
    assert len(windows) == 2
    assert drawn(store, tmp_path, monkeypatch, "bob")["windows"] == [(-160, 240)]


@given(arrays(bool, st.tuples(*[st.integers(1, 6)] * 3)).filter(np.any))
def test_the_centre_of_a_structure_is_inside_it_however_bent(mask):
    assert mask[centre_of(mask)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["case=ann.2"], "near it: ann.22, ann.1"),
        (["out=a.png"], "no effect without case"),
        (["case=bob", "out=a.jpg"], "does not end in .png"),
        (["case=bob", "out=s/zarr.json/a.png"], "cannot be written"),
    ],
)
def test_what_the_user_can_mend_is_one_line(store, tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert inspect(store, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_place_without_store_index_or_voxels_says_so(store, tmp_path, capsys):
    VolumeStore.open(store).remove("bob")
    assert inspect(store, "case=bob") == 2
    assert "folder is gone" in capsys.readouterr().err
    (store / "index.parquet").unlink()
    assert inspect(store) == 2
    assert "has no index.parquet" in capsys.readouterr().err
    assert inspect(tmp_path / "nothing") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["case=ann.1", "out=a.png"]])
def test_neither_torch_nor_ray_is_brought_in(store, tmp_path, words):
    program = (
        "import sys; from glmae_ray.cli import main; "
        "code = main(['inspect', *sys.argv[1:]]); "
        "print(sorted({'torch', 'ray', 'deepspeed', 'monai'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"store={store}", *words],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.ray
def test_what_ingest_made_is_described_and_drawn(small_store, tmp_path, capsys):
    capsys.readouterr()
    assert inspect(small_store, "--json") == 0
    facts = printed_json(capsys)
    assert facts["cases"] == 12
    assert facts["modalities"]["CT"]["shape"]["minimum"] == [26, 30, 34]
    assert (facts["disk"]["not_indexed"], facts["disk"]["missing"]) == (0, 0)
    assert inspect(small_store, "case=p03", f"out={tmp_path / 'p.png'}") == 0
