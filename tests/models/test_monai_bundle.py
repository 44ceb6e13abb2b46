"""The network inside a MONAI bundle against ours; tests/jobs/test_export_segmenter.py runs one."""

from __future__ import annotations

import json

import pytest
import torch

from glmae_ray.models.bundle_scripts import Segmenter
from glmae_ray.models.monai_bundle import bundle_files, network_arguments
from glmae_ray.models.segmenter_files import segmenter_facts
from tests.models.finetunes import ANY, SIZE, finetune_config, finetuning


@pytest.mark.parametrize("own_table", [False, True])
@torch.no_grad()
def test_it_is_ours_along_x_y_z_with_whatever_positions(own_table):
    module = finetuning().eval()
    if own_table:
        module.encoder.adopt_positions(torch.randn(25, 24), grid=(4, 3, 2))
    facts = segmenter_facts(
        finetune_config(), module, names=("a", "b"), modality=["CT"], learned=ANY, step=1
    )
    arguments = json.loads(json.dumps(network_arguments(module, facts)))
    network = Segmenter(**arguments).eval()
    network.load_state_dict(module.state_dict(), strict=True)
    x = torch.rand(2, 2, *SIZE)
    turned = network(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
    torch.testing.assert_close(turned, module.network(x))


def test_no_file_of_a_bundle_imports_us():
    module = finetuning()
    facts = segmenter_facts(
        finetune_config(), module, names=("a", "b"), modality=["CT"], learned=ANY, step=1
    )
    files = bundle_files(module, facts)
    scripts = {name: text for name, text in files.items() if name.endswith(".py")}
    assert {"scripts/bundle_scripts.py", "scripts/unetr.py", "scripts/vit3d.py"} < scripts.keys()
    lines = [line for text in scripts.values() for line in text.splitlines()]
    assert not [line for line in lines if "import" in line and "glmae_ray" in line]
