"""NRRD: what only this format has, against SimpleITK where it has an answer."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from glmae_ray.store.readers import read_image
from glmae_ray.store.scan import ReadError
from glmae_ray.volume import to_source_axes
from tests.store.scans import SHAPE, files_of, trusted

DATA = np.random.default_rng(4).integers(-900, 900, SHAPE).astype("<i2")
RAW = DATA.tobytes(order="F")
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "LPS",
    "sizes": "17 22 13",
    "space directions": "(0.9,0,0.1) (0,1.1,0) (-0.3,0,3)",
    "space origin": "(-31,12.5,140)",
    "encoding": "raw",
    "endian": "little",
}


def write_nrrd(folder, body=RAW, *, drop=(), extra="", suffix=".nrrd", **change):
    fields = NRRD | {name.replace("_", " "): value for name, value in change.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if name not in drop]
    path = folder / f"scan{suffix}"
    path.write_bytes(("\n".join(["NRRD0005", *lines]) + f"\n{extra}\n").encode() + body)
    return path


def read(path, volume=None):
    image = read_image([files_of(path, volume=volume)], case_id="a")
    return to_source_axes(image.volume.array[0], image.source_affine), image.source_affine


def assert_as_simpleitk_reads(path):
    voxels, affine = read(path)
    expected, expected_affine = trusted(path)
    np.testing.assert_array_equal(voxels, expected)
    np.testing.assert_allclose(affine, expected_affine, atol=1e-4)


def reason_of(path, volume=None):
    with pytest.raises(ReadError, match="scan") as caught:
        read(path, volume)
    return caught.value.reason


@pytest.mark.parametrize(
    "space", ["left-posterior-superior", "right-anterior-superior", "left-anterior-superior"]
)
def test_the_three_patient_spaces_are_told_apart(tmp_path, space):
    assert_as_simpleitk_reads(write_nrrd(tmp_path, space=space))
    short = write_nrrd(tmp_path, space="".join(word[0] for word in space.split("-")).upper())
    assert_as_simpleitk_reads(short)


def test_without_a_space_the_axes_are_those_of_lps(tmp_path):
    drop = ("space", "space directions", "space origin")
    path = write_nrrd(tmp_path, drop=drop, spacings="0.9 1.1 3")
    assert_as_simpleitk_reads(path)
    np.testing.assert_array_equal(read(path)[1], np.diag([-0.9, -1.1, 3, 1]))
    path = write_nrrd(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"space: LPS", b"space dimension: 3"))
    assert_as_simpleitk_reads(path)


@pytest.mark.parametrize(
    "change",
    [
        {"space_directions": "(0.9,0,nan) (0,1.1,0) (0,0,3)"},
        {"space_directions": "none (0,1.1,0) (0,0,3)"},
        {"space_directions": "(0.9,0,0) (0,1.1,0) (0,0,0)"},
        {"space_directions": "(0.9,0) (0,1.1) (0,3)"},
        {"space_directions": "(1e200,0,0) (0,1.1,0) (0,0,3)"},
        {"space_origin": "(0,inf,0)"},
        {"space_origin": "(0,0)"},
        {"space": "scanner-xyz"},
        {"drop": ("space",)},
        {"drop": ("space", "space directions", "space origin")},
        {"drop": ("space directions",), "spacings": "1 1 3"},
        {"drop": ("space", "space directions", "space origin"), "spacings": "1 -1 3"},
        {"drop": ("space", "space directions", "space origin"), "spacings": "1 nan 3"},
    ],
)
def test_an_nrrd_file_without_a_usable_geometry_is_refused(tmp_path, change):
    assert reason_of(write_nrrd(tmp_path, **change)) == "bad_geometry"


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": "17 22"},
        {"sizes": "17.9 22 13"},
        {"sizes": "1_7 22 13"},
        {"kinds": "domain domain"},
        {"encoding": "hex"},
        {"endian": "middle"},
        {"drop": ("endian",)},
        {"drop": ("sizes",)},
        {"byte_skip": "-2"},
        {"byte_skip": "-1", "encoding": "gzip"},
        {"extra": "spice: RAS\n"},
        {"extra": "space: RAS\n"},
    ],
)
def test_an_nrrd_header_that_contradicts_itself_is_unreadable(tmp_path, change):
    assert reason_of(write_nrrd(tmp_path, **change)) == "unreadable"


def test_comments_keys_and_fields_without_a_use_are_passed_over(tmp_path):
    extra = '# a note\nlabels: "x\ncontent: a_b\nsizes_are:=9 9\nspace:=RAS\nmodality:=CT\n'
    voxels, affine = read(write_nrrd(tmp_path, extra=extra))
    np.testing.assert_array_equal(voxels, DATA)
    np.testing.assert_array_equal(affine[0, :3], [-0.9, 0, 0.3])


def test_fields_may_be_written_in_any_case_and_vectors_with_spaces(tmp_path):
    path = write_nrrd(tmp_path, space_origin="( -31, 12.5, 140 )")
    path.write_bytes(path.read_bytes().replace(b"sizes:", b"Sizes:").replace(b"raw", b"RAW", 1))
    assert_as_simpleitk_reads(path)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["list", "time"])
def test_the_axis_of_an_nrrd_file_that_is_not_of_space_may_come_first_or_last(
    tmp_path, encoding, first, kind
):
    several = np.stack([DATA, DATA + 1, DATA * 2]) if first else np.stack([DATA, DATA + 1], -1)
    rows = NRRD["space directions"]
    sizes, kinds = NRRD["sizes"], "domain domain domain"
    raw = several.tobytes(order="F")
    path = write_nrrd(
        tmp_path,
        zlib.compress(raw, wbits=31) if encoding == "gzip" else raw,
        dimension="4",
        sizes=f"3 {sizes}" if first else f"{sizes} 2",
        space_directions=f"none {rows}" if first else f"{rows} none",
        kinds=f"{kind} {kinds}" if first else f"{kinds} {kind}",
        encoding=encoding,
    )
    voxels, affine = read(path, volume=1)
    np.testing.assert_array_equal(voxels, DATA + 1)
    np.testing.assert_allclose(affine, read(write_nrrd(tmp_path))[1])


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ("RGB-color domain domain domain", "not_an_image"),
        ("vector domain domain domain", "not_an_image"),
        ("domain list domain domain", "not_3d"),
        ("list domain domain time", "not_3d"),
    ],
)
def test_axes_that_are_not_of_space_may_refuse_an_nrrd_file(tmp_path, kinds, reason):
    rows = [f"(0,{n},1)" if kind == "domain" else "none" for n, kind in enumerate(kinds.split())]
    path = write_nrrd(
        tmp_path,
        dimension="4",
        sizes="3 17 22 13",
        kinds=kinds,
        space_directions=" ".join(rows),
        type="uchar",
    )
    assert reason_of(path, volume=0) == reason


@pytest.mark.parametrize(
    ("change", "body"),
    [
        ({}, RAW),
        ({"line_skip": "2"}, b"one\ntwo\n" + RAW),
        ({"byte_skip": "7"}, b"garbage" + RAW),
        ({"byte_skip": "-1"}, b"garbage" + RAW),
        ({"line_skip": "1", "byte_skip": "3"}, b"one\n123" + RAW),
        ({"encoding": "gz"}, zlib.compress(RAW, wbits=31)),
        ({"encoding": "gzip", "line_skip": "1"}, b"one\n" + zlib.compress(RAW, wbits=31)),
        ({"encoding": "gzip", "byte_skip": "3"}, zlib.compress(b"123" + RAW, wbits=31)),
        ({"encoding": "text"}, " ".join(map(str, DATA.ravel(order="F"))).encode()),
    ],
)
@pytest.mark.parametrize("detached", [False, True])
def test_the_voxels_are_found_where_the_nrrd_header_says(tmp_path, change, body, detached):
    if detached:
        (tmp_path / "scan.raw").write_bytes(body)
        change = {**change, "data_file": "./scan.raw"}
    suffix = ".nhdr" if detached else ".nrrd"
    path = write_nrrd(tmp_path, b"" if detached else body, suffix=suffix, **change)
    np.testing.assert_array_equal(read(path)[0], DATA)
    assert_as_simpleitk_reads(path)
