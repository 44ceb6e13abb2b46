"""Sample making without Ray: the windows that become 0 and 1."""

import numpy as np
import pytest

from glmae_ray.pipeline import sample_maker
from glmae_ray.store.index import VolumeIndex
from tests.conftest import tiny_config
from tests.store.test_index import record


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
    row = {"modality": "MR", "channels": 2, "minimum": [0, 0], "maximum": [10, 90], **change}
    VolumeIndex.from_records([record("a", **row)]).write(tmp_path)
    cfg = tiny_config(f"store={tmp_path}")
    (source,) = sample_maker(cfg, split="train", kinds=("local",)).sources
    np.testing.assert_array_equal(source.window, window)
