"""Sample making without Ray: windows, air, cases that cannot be read, threads, processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from glmae_ray.reading import UnreadableCaseError, fault_texts
from glmae_ray.samples import SampleMaker, sample_maker
from glmae_ray.store.index import VolumeIndex
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import Volume
from tests.conftest import tiny_config
from tests.store.test_index import record

KINDS = ("global", "local")
MADE = ("number", "case", "global", "local", "global_seeds", "local_seeds", "window")
SHAPE = (41, 57, 66)


def write_store(path: Path, *, cases: int = 6, dtype: type = np.int16) -> Path:
    """People whose left half is tissue, noise about 100, and whose right half is air."""
    store, rows = VolumeStore.create(path, chunk=(16, 16, 16)), []
    for seed in range(cases):
        voxels = np.full((1, *SHAPE), -1000, dtype)
        noise = np.random.default_rng(seed).integers(0, 200, (1, *SHAPE[:2], 33))
        voxels[..., :33] = noise.astype(dtype)
        volume = Volume(voxels, np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]], "CT", f"p{seed}")
        store.write(volume, labels={}, label_names={}, record={})
        factors = [list(level) for level in pyramid_factors(SHAPE, (1.0, 1.0, 1.0), 3)]
        place = {"shape": list(SHAPE), "box_start": [0, 0, 0], "box_stop": list(SHAPE)}
        kind = {"factors": factors, "dtype": np.dtype(dtype).name}
        rows.append(record(volume.case_id, **place, **kind))
    VolumeIndex.from_records(rows).write(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("samples") / "store")


@pytest.fixture
def damaged(store, tmp_path) -> Path:
    """The same, but the voxels of p2 are gone and the chunks of p4 are overwritten."""
    copy = tmp_path / "damaged"
    shutil.copytree(store, copy)
    for level in range(3):
        shutil.rmtree(copy / f"cases/p2/image/{level}")
        shard = copy / f"cases/p4/image/{level}/c.0.0.0.0"
        raw = shard.read_bytes()
        shard.write_bytes(b"\xff" * (len(raw) - 1000) + raw[-1000:])  # the index is in the end
    return copy


def maker_of(store: Path, *words: str, threads: int = 1) -> SampleMaker:
    cfg = tiny_config(f"store={store}", *words)
    return sample_maker(cfg, split="train", kinds=KINDS, threads=threads)


def digest(columns) -> str:
    return hashlib.sha256(b"".join(columns[name].tobytes() for name in MADE)).hexdigest()


def digest_here(maker: SampleMaker, numbers: list[int]) -> str:
    return digest(maker.make({"number": np.array(numbers)}))


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"modality": "CT"}, [[-1000, 1000], [-1000, 1000]]),
        ({"p0_5": [1, 20], "p99_5": [9, 80]}, [[1, 9], [20, 80]]),
        ({"p0_5": [5, 20], "p99_5": [5, 80], "maximum": [7, 99]}, [[0, 7], [20, 80]]),
        ({"p0_5": [5, 0], "p99_5": [5, 0], "minimum": [5, 0], "maximum": [5, 0]}, [[5, 6], [0, 1]]),
    ],
)
def test_every_channel_has_a_window_that_can_be_divided_by(tmp_path, change, window):
    row = {"modality": "MR", "channels": 2, "minimum": [0, 0], "maximum": [10, 90]}
    row |= {"p0_5": [1, 1], "p99_5": [2, 2]}
    VolumeIndex.from_records([record("a", **{**row, **change})]).write(tmp_path)
    np.testing.assert_array_equal(maker_of(tmp_path).source(0).window, window)


def test_the_columns_have_the_shapes_and_types_that_the_module_takes(store):
    columns = maker_of(store).make({"number": np.arange(3)})
    assert columns["global"].shape == (3, 2, 1, 32, 20, 12)
    assert columns["local"].shape == (3, 3, 1, 16, 12, 8)
    assert columns["global"].dtype == columns["local"].dtype == np.int16
    assert columns["global_seeds"].shape == (3, 2)
    assert columns["window"].tolist() == [[[-1000, 1000]]] * 3
    assert list(fault_texts(columns["fault"])) == ["", "", ""]


def test_no_view_shows_only_air_where_there_is_tissue(store):
    maker, redrawn = maker_of(store), 0
    for number in range(40):
        columns = maker.make({"number": np.array([number])})
        for kind in KINDS:
            assert (columns[kind].max(axis=(2, 3, 4, 5)) > -500).all()
            starts = maker.plan.draw(number, kind).boxes[:, 0, 2]
            redrawn += np.count_nonzero(starts >= 34)  # such boxes hold nothing else
    assert redrawn > 10


def test_samples_are_the_same_alone_in_company_and_on_any_number_of_threads(store):
    numbers = list(range(12))
    together = digest_here(maker_of(store), numbers)
    assert digest_here(maker_of(store, threads=4), numbers) == together
    alone = [maker_of(store).make({"number": np.array([n])}) for n in reversed(numbers)]
    stacked = {name: np.concatenate([one[name] for one in reversed(alone)]) for name in MADE}
    assert digest(stacked) == together
    threads = VolumeStore.open(store, threads=4)
    boxes = [("p1", level, ((0, 0, 0), (9, 9, 9))) for level in (0, 1, 0)]
    for one, other in zip(
        threads.read_many(boxes), VolumeStore.open(store).read_many(boxes), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_samples_are_the_same_in_processes_that_were_started_anew(store):
    maker, numbers = maker_of(store), [3, 1, 8]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        there = pool.starmap(digest_here, [(maker, numbers)] * 2)
    assert there == [digest_here(maker, numbers)] * 2


def test_floating_point_cases_fill_the_codes_and_say_where_their_window_lies(tmp_path):
    path = write_store(tmp_path / "floats", cases=1, dtype=np.float32)
    columns = maker_of(path).make({"number": np.arange(4)})
    assert columns["window"].tolist() == [[[-32767, 32767]]] * 4
    hu = columns["local"].astype(np.float64) / 32767 * 1000
    assert -1000.1 <= hu.min() <= hu.max() <= 200.1
    assert (columns["local"].max(axis=(2, 3, 4, 5)) > -0.5 * 32767).all()


@pytest.mark.parametrize(("case", "reason"), [("p2", "has no p2/image"), ("p4", "is damaged")])
def test_a_case_that_cannot_be_read_is_named(damaged, case, reason):
    maker = maker_of(damaged, f"sampling.where=case_id == '{case}'")
    with pytest.raises(UnreadableCaseError, match=f"case {case}: .*{reason}"):
        maker.make({"number": np.array([0])})


def test_another_case_stands_in_and_every_number_is_still_made_once(store, damaged):
    whole, maker = maker_of(store), maker_of(damaged, "pipeline.on_error=skip")
    numbers = np.arange(30)
    columns = maker.make({"number": numbers})
    assert columns["number"].tolist() == numbers.tolist()
    faults = list(fault_texts(columns["fault"]))
    for place, number in enumerate(numbers):
        planned = maker.source(maker.plan.case(number)).case_id
        used = maker.source(columns["case"][place]).case_id
        if planned in ("p2", "p4"):
            assert faults[place].startswith(f"case {planned}: ")
            assert used not in ("p2", "p4")
        else:
            assert (used, faults[place]) == (planned, "")
            alone = whole.make({"number": np.array([number])})
            np.testing.assert_array_equal(alone["global"][0], columns["global"][place])
    assert sum(map(bool, faults)) == 10
    assert digest(columns) == digest_here(maker, numbers.tolist())  # again, the same


def test_a_store_of_which_nothing_can_be_read_ends_the_run(damaged):
    chosen = "sampling.where=case_id in ('p2', 'p4')"
    maker = maker_of(damaged, chosen, "pipeline.on_error=skip")
    with pytest.raises(
        UnreadableCaseError, match=r"case p[24]: .* nor can the [0-9]+ that stood in"
    ):
        maker.make({"number": np.array([0])})
