"""Real scans: voxel for voxel, and broken files among good ones."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from glmae_ray.cli import main
from glmae_ray.store.index import VolumeIndex, read_quarantine
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.volume import to_source_axes

pytestmark = [pytest.mark.real, pytest.mark.ray]

BROKEN = {
    "truncated_half": "truncated",
    "zero_bytes": "not_an_image",
    "10868_1000884_t2w": "not_an_image",
}


@pytest.fixture(scope="module")
def ingested(real_data, tmp_path_factory):
    """Three people of headneck_ct and the broken files of tricky in one store."""
    folder = tmp_path_factory.mktemp("real")
    origin = real_data / "headneck_ct"
    for part in ("imagesTr", "labelsTr"):
        (folder / "in" / "set" / part).mkdir(parents=True)
        for number in ("001", "002", "003"):
            for path in (origin / part).glob(f"kbp_{number}*"):
                shutil.copy(path, folder / "in" / "set" / part)
    shutil.copy(origin / "dataset.json", folder / "in" / "set")
    shutil.copytree(real_data / "tricky" / "broken", folder / "in" / "broken")
    assert main(["ingest", f"source={folder / 'in'}", f"store={folder / 's'}"]) == 0
    return folder


def test_real_scans_and_labels_come_back_voxel_for_voxel(ingested):
    store, index = VolumeStore.open(ingested / "s"), VolumeIndex.read(ingested / "s")
    assert index.case_ids() == ["kbp_001", "kbp_002", "kbp_003"]
    for row in index.records():
        image = nib.load(row["source"])
        label = nib.load(ingested / "in" / "set" / "labelsTr" / f"{row['case_id']}.nii.gz")
        affine = np.reshape(row["source_affine"], (4, 4))
        for stored, source in (
            (store.read(row["case_id"])[0], image),
            (store.read_label(row["case_id"], "structures"), label),
        ):
            back = to_source_axes(stored, affine)
            np.testing.assert_array_equal(back, np.asanyarray(source.dataobj))
        np.testing.assert_array_equal(affine, image.affine)


def test_broken_files_are_in_quarantine_with_their_reason(ingested):
    rows = read_quarantine(ingested / "s")
    assert {row["source"].split("/")[-1].split(".")[0]: row["reason"] for row in rows} == BROKEN
