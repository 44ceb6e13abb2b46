"""A finetuned module as one ONNX file, compared with itself under onnxruntime before it is kept.

Letters: B windows, C channels, ZYX voxels, K outputs.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmae_ray.models.finetuning import Finetuning
from glmae_ray.models.vit3d import patch_grid
from glmae_ray.models.weight_files import HEADER

NEEDS = ("onnx", "onnxscript", "onnxruntime")
CLOSE = 1e-4  # of probabilities under onnxruntime to torch's


def missing_packages() -> list[str]:
    """Packages that an ONNX file needs and that are not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def as_onnx(module: Finetuning, *, facts: dict[str, Any]) -> bytes:
    """The file: `image` float32 (B, C, Z, Y, X), intensities mapped, into `probabilities`.

    Those are (B, K, Z, Y, X), or (B, K) of a classifier. B is free, the window is that of the
    facts. The facts are the file's metadata `glmae`, as JSON.

    Args:
        module: Stays as it is.
        facts: As `segmenter_facts` gives them.
    """
    size = tuple(facts["crops"]["size"])
    network = _Probabilities(_with_table(module, size)).eval()
    windows = torch.zeros(2, facts["channels"], *size)
    with warnings.catch_warnings():
        # The exporter (torch 2.13) warns of functions of its own that will go.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (windows,),
            input_names=["image"],
            output_names=["probabilities"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[HEADER] = json.dumps(facts)
    return program.model_proto.SerializeToString()


@torch.no_grad()
def difference(data: bytes, module: Finetuning, *, facts: dict[str, Any]) -> float:
    """The largest difference of a probability under onnxruntime to torch's, on random windows.

    Args:
        data: From `as_onnx`.
        module: What it was made of, in evaluation mode.
        facts: The same.
    """
    import onnxruntime

    shape = (1, facts["channels"], *facts["crops"]["size"])
    image = np.random.default_rng(0).random(shape, np.float32)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"image": image})
    ours = module({"image": torch.from_numpy(image)}, task="predict")
    return float(np.abs(theirs - ours.numpy()).max())


class _Probabilities(nn.Module):
    """The module's prediction with tensors in and out."""

    def __init__(self, module: Finetuning) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        return self.module({"image": image}, task="predict")


def _with_table(module: Finetuning, size: tuple[int, ...]) -> Finetuning:
    """A copy with the positions of one size as a table, a constant for whoever traces it."""
    traced = copy.deepcopy(module)
    grid = patch_grid(list(size), module.encoder.patch)
    traced.encoder.adopt_positions(module.encoder.positions(grid), grid=grid)
    return traced
