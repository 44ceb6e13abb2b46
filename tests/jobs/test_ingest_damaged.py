"""An archive where half of the files are damaged: the run goes on, every file is accounted for."""

import random

import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.store.index import VolumeIndex, read_files, read_quarantine
from glmae_ray.store.scan import REASONS
from glmae_ray.store.zarr_store import VolumeStore
from tests.store import dicoms, scans
from tests.store.scans import KINDS
from tests.store.test_reader_fuzz import damaged

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SHAPE = (18, 20, 22)


@pytest.mark.parametrize("seed", [1, 2])
def test_damage_stays_with_the_file_that_has_it(tmp_path, capsys, monkeypatch, seed):
    monkeypatch.setenv("GLMAE_SUBJECT_SALT", "for tests")
    rng = random.Random(seed)
    source = tmp_path / "in"
    sound = []
    for n, (name, kind) in enumerate(sorted(KINDS.items())):
        for part in ("sound", "damaged"):
            data = scans.voxels(SHAPE, seed=2 * n + (part == "damaged"))
            path = source / part / f"{name}{kind.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            kind.write(path, data, scans.affine("RAS"))
            sound += [data] if part == "sound" else []
    for n, syntax in enumerate(dicoms.SYNTAXES):
        for part in ("sound", "damaged"):
            data = dicoms.voxels(SHAPE, seed=2 * n + (part == "damaged"))
            folder = source / part / syntax
            dicoms.write_series(folder, data, syntax=syntax, series=f"1.2.{n}.{len(part)}")
    for folder in [source / "damaged", *(source / "damaged").iterdir()]:
        files = sorted(path for path in folder.glob("*") if path.is_file())
        for path in files if folder.name == "damaged" else files[3:4]:
            path.write_bytes(damaged(path.read_bytes(), rng))

    assert main(["ingest", f"source={source}", f"store={tmp_path / 's'}"]) == 0

    rows, store = VolumeIndex.read(tmp_path / "s").records(), VolumeStore.open(tmp_path / "s")
    voxels = [store.read(row["case_id"])[0].transpose(2, 1, 0) for row in rows]
    assert all(any(np.array_equal(data, found) for found in voxels) for data in sound)
    found = [row for row in rows if "/sound/" in row["source"]]
    assert len(found) == len(KINDS) + len(dicoms.SYNTAXES)
    files = read_files(tmp_path / "s")
    assert {row["location"] for row in files} == {
        str(path) for path in source.rglob("*") if path.is_file()
    }
    assert {row["outcome"] for row in files} <= {"case", "quarantined", "not_an_image"}
    assert {row["reason"] for row in read_quarantine(tmp_path / "s")} <= set(REASONS)
    assert len(read_quarantine(tmp_path / "s")) > 5
