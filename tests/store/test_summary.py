"""The facts of a store: from its index as NumPy computes them, from its files as they lie there."""

import numpy as np
import pytest

from glmae_ray.paths import to_place
from glmae_ray.store.index import VolumeIndex, write_quarantine
from glmae_ray.store.summary import describe, measure
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Volume

NAMES = '{"background": 0, "liver": 1, "spleen": 2}'


def write_case(store, case_id, *, shape, spacing, modality="MR", dtype=np.int16, **change):
    """Put noise into a store, with a liver left of a small spleen, and return its index row."""
    values = np.random.default_rng(len(case_id)).integers(-900, 900, shape).astype(dtype)
    affine = np.eye(4)[:, [2, 1, 0, 3]] * [*spacing, 1]
    label = np.zeros(shape[1:], np.uint8)
    label[2:9, 3:8, 4:20] = 1
    label[3:5, 9:12, 22:24] = 2
    kept = [[float(f(channel)) for channel in values] for f in (np.min, np.max, np.median)]
    row = {
        **{"case_id": case_id, "subject": case_id, "split": "train", "modality": modality},
        **{"channels": shape[0], "shape": list(shape[1:]), "spacing": list(spacing)},
        **{"affine": affine.ravel().tolist(), "source_affine": np.eye(4).ravel().tolist()},
        **{"source_shape": list(shape[:0:-1]), "dtype": values.dtype.name},
        **dict(zip(("minimum", "maximum", "p50"), kept, strict=True)),
        **{"p0_5": kept[0], "p99_5": kept[1], "mean": kept[2], "std": kept[2]},
        **{"box_start": [0, 0, 0], "box_stop": list(shape[1:]), "factors": [[1, 1, 1]] * 3},
        **{"structures": {"liver": 560, "spleen": 12}, "annotated": None, "filled": 0},
        **{"acquisition": {}, "source": f"/scans/{case_id}.nii", "source_hash": case_id},
        **{"source_stamp": case_id, "voxel_hash": case_id, "reader": "nifti"},
        **{"ingest_version": 2, "options": {"label_names": NAMES}},
        **change,
    }
    maps = {"structures": label} if row["structures"] else {}
    store.write(
        Volume(values, affine, modality, case_id), labels=maps,
        label_names={"background": 0, "liver": 1, "spleen": 2}, record=row,
    )  # fmt: skip
    return row


def make_store(folder):
    """Two people; one has two MR cases of two channels, the other a CT without labels."""
    store = VolumeStore.create(folder)
    pair = {"subject": "ann", "split": "val"}
    rows = [
        write_case(store, "ann.1", shape=(2, 12, 30, 40), spacing=(3.0, 0.5, 0.7), **pair),
        write_case(
            store, "ann.22", shape=(2, 16, 32, 36), spacing=(2.0, 0.6, 0.9), dtype=np.float32,
            options={"label_names": NAMES, "crop": "foreground"}, **pair,
            structures={"liver": 560},
        ),
        write_case(
            store, "bob", shape=(1, 20, 25, 50), spacing=(5.0, 1.0, 1.0), modality="CT",
            structures={}, reader="dicom",
        ),
    ]  # fmt: skip
    VolumeIndex.from_records(rows).write(folder)
    rejected = [("a", "truncated"), ("b", "constant"), ("c", "truncated")]
    write_quarantine(
        folder,
        [
            {"source": s, "reason": r, "message": f"{s}: is {r}", "stamp": "", "voxel_hash": ""}
            for s, r in rejected
        ],
    )
    return rows


@pytest.fixture
def folder(tmp_path):
    make_store(tmp_path / "s")
    return tmp_path / "s"


def opened(folder):
    return VolumeStore.open(folder), VolumeIndex.read(folder)


def test_the_tables_are_described_as_numpy_describes_them(folder):
    facts = describe(*opened(folder))
    rows = VolumeIndex.read(folder).records()
    mr = [row for row in rows if row["modality"] == "MR"]
    assert facts["modalities"].keys() == {"CT", "MR"}
    assert facts["modalities"]["MR"] == {
        "cases": 2,
        "channels": {"2": 2},
        "dtypes": {"int16": 1, "float32": 1},
        "shape": {"median": [14, 31, 38], "minimum": [12, 30, 36], "maximum": [16, 32, 40]},
        "spacing": {
            "median": pytest.approx([2.5, 0.55, 0.8]),
            "minimum": [2.0, 0.5, 0.7],
            "maximum": [3.0, 0.6, 0.9],
        },
        "intensity": {
            "p0_5": np.median([row["p0_5"][0] for row in mr]),
            "p50": np.median([row["p50"][0] for row in mr]),
            "p99_5": np.median([row["p99_5"][0] for row in mr]),
            "minimum": min(row["minimum"][0] for row in mr),
            "maximum": max(row["maximum"][0] for row in mr),
        },
    }
    assert (facts["cases"], facts["subjects"]) == (3, 2)
    assert facts["splits"] == {
        "train": {"cases": 1, "subjects": 1},
        "val": {"cases": 2, "subjects": 1},
        "test": {"cases": 0, "subjects": 0},
    }
    assert facts["structures"] == {
        "liver": {"cases": 2, "median_voxels": 560},
        "spleen": {"cases": 1, "median_voxels": 12},
    }
    assert facts["readers"] == {"nifti": 2, "dicom": 1}
    assert facts["fingerprint"] == VolumeIndex.read(folder).fingerprint()
    assert (facts["chunk"], facts["levels"], facts["store"]) == ([32] * 3, 3, str(folder))


def test_only_choices_that_differ_between_cases_are_told(folder):
    assert describe(*opened(folder))["options"] == {
        "crop": [{"value": None, "cases": 2}, {"value": "foreground", "cases": 1}]
    }


def test_rejected_sources_are_counted_by_reason_the_most_frequent_first(folder):
    quarantine = describe(*opened(folder))["quarantine"]
    assert list(quarantine.items()) == [
        ("truncated", {"sources": 2, "example": "a: is truncated"}),
        ("constant", {"sources": 1, "example": "b: is constant"}),
    ]


def test_sizes_are_those_of_the_files_below_each_part(folder):
    sizes = measure(*opened(folder))

    def on_disk(pattern):
        return sum(p.stat().st_size for p in folder.glob(pattern) if p.is_file())

    parts = {name: figures["bytes"] for name, figures in sizes["parts"].items()}
    assert parts == {
        **{f"level_{n}": on_disk(f"cases/*/image/{n}/c.*") for n in range(3)},
        "labels": on_disk("cases/*/labels/*/0/c.*"),
        "documents": on_disk("**/zarr.json") + on_disk("*.parquet"),
        "sum": on_disk("**/*"),
    }
    assert min(parts.values()) > 0
    raw = 2 * 2 * 12 * 30 * 40 + 4 * 2 * 16 * 32 * 36 + 2 * 20 * 25 * 50
    assert sizes["raw"] == raw
    assert sizes["parts"]["level_0"]["ratio"] == pytest.approx(parts["level_0"] / raw)
    assert (sizes["not_indexed"], sizes["missing"]) == (0, 0)


def test_a_store_behind_a_url_has_the_same_sizes(folder, monkeypatch):
    local = measure(*opened(folder))
    copy = to_place("memory://inspect/s")
    copy.fs.put(str(folder), copy.path, recursive=True)
    store, index = opened(folder)
    monkeypatch.setattr(store, "path", copy)
    assert measure(store, index) == local


def test_cases_that_index_and_folders_do_not_share_are_counted(folder):
    store, index = opened(folder)
    write_case(store, "late", shape=(1, 12, 16, 26), spacing=(1.0, 1.0, 1.0))
    (folder / "cases" / "half" / "image").mkdir(parents=True)
    for case_id in ("ann.1", "bob"):
        store.remove(case_id)
    sizes = measure(store, index)
    assert (sizes["not_indexed"], sizes["missing"]) == (1, 2)


def test_a_store_without_a_case_has_facts_too(tmp_path):
    store = VolumeStore.create(tmp_path / "s")
    VolumeIndex.from_records([]).write(tmp_path / "s")
    facts = describe(*opened(tmp_path / "s"))
    assert (facts["cases"], facts["modalities"], facts["structures"]) == (0, {}, {})
    sizes = measure(store, VolumeIndex.read(tmp_path / "s"))
    assert (sizes["raw"], sizes["parts"]["level_0"]) == (0, {"bytes": 0, "ratio": None})


def test_maps_of_a_part_of_the_rows_hold_nothing_of_the_others(folder):
    index = VolumeIndex.read(folder)
    part = VolumeIndex(index.rows.slice(1, 2))
    entries = {name: values.tolist() for name, values in part.entries("structures").items()}
    assert entries == {"liver": [560]}
    assert part.first_channel("p50").tolist() == [row["p50"][0] for row in index.records()[1:]]
    assert part.column("case_id").tolist() == ["ann.22", "bob"]
