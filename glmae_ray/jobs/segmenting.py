"""A finetuned run as something that labels or classifies scans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmae_ray.config_finetune import CropsConfig, InferenceConfig
from glmae_ray.models.segmenter_files import Which, load_segmenter
from glmae_ray.scans import Scan, axes_of
from glmae_ray.seeing import Lay, Learned, lay_of
from glmae_ray.sliding import classify, segment


class Segmenter:
    """The network of a finetuned run.

    Attributes:
        facts: What its file says of it; see `segmenter_facts`.
        names: Structures in the order of outputs 1, 2, ..., or all classes.
        classifies: Whether it gives a class, not a label map.
        inference: The sliding window.
    """

    def __init__(
        self,
        run: str,
        which: Which = "last",
        *,
        inference: InferenceConfig | None = None,
        device: str = "cpu",
    ) -> None:
        """Load it.

        Args:
            run: The run's folder.
            which: Weights after its last step, or after its best on the validation cases.
            inference: In place of what the run says.
            device: Where it computes.

        Raises:
            UserError: The run has no such weights.
        """
        module, self.facts = load_segmenter(run, which=which)
        self.classifies = self.facts["task"] == "classification"
        self.names: list[str] = self.facts["classes" if self.classifies else "structures"]
        self.inference = inference or InferenceConfig.model_validate(self.facts["inference"])
        self._crops = CropsConfig.model_validate(self.facts["crops"])
        self._learned = Learned.from_dict(self.facts["learned"])
        self._device = device
        self._module = module.to(device)

    @property
    def outputs(self) -> int:
        """Background and structures, or classes."""
        return len(self.names) + (not self.classifies)

    def digest(self) -> str:
        """SHA-256 of weights and facts."""
        whole = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name, tensor in self._module.state_dict().items():
            whole.update(name.encode())
            whole.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return whole.hexdigest()

    def lay(self, row: Mapping[str, Any]) -> Lay:
        """How the network sees a case."""
        z, y, x = row["spacing"]
        axes = axes_of(np.reshape(row["affine"], (4, 4)))
        return lay_of((z, y, x), axes, self._crops, self._learned)

    def label(
        self,
        array: NDArray[Any],
        row: Mapping[str, Any],
        *,
        probabilities: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Label every voxel of a case, (Z, Y, X); structure number n has the value n + 1.

        Args:
            array: (C, Z, Y, X) as stored.
            row: Of the index, or what `Scan.of` needs of one.
            probabilities: (outputs, Z, Y, X), takes those too.
        """
        return segment(
            Scan.of(array, row, self._crops),
            self._predict,
            probabilities=probabilities,
            **self._settings,
        )

    def classify(self, array: NDArray[Any], row: Mapping[str, Any]) -> NDArray[np.float64]:
        """Probabilities (classes,): the mean over windows that cover the foreground box.

        Args:
            array: (C, Z, Y, X) as stored.
            row: As in `label`, with the box.
        """
        return classify(array, row, self._predict, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "crops": self._crops,
            "inference": self.inference,
            "learned": self._learned,
            "device": self._device,
        }

    def _predict(self, image_BCZYX: Tensor) -> Tensor:
        return self._module({"image": image_BCZYX}, task="predict")


def own_device() -> str:
    """The GPU that this process has been given, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
