"""One scan of a prediction from its files to its outputs: what each of Ray's actors does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_finetune import PredictConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.dicom_seg import encode_segmentation
from glmae_ray.jobs.predict_inputs import Case, Input
from glmae_ray.jobs.predict_outputs import Outputs, write_nifti
from glmae_ray.jobs.segmenting import Segmenter, own_device
from glmae_ray.paths import publish
from glmae_ray.store.scan import ReadError
from glmae_ray.store.statistics import label_counts


class Predicted(NamedTuple):
    """A case whose outputs are there, and what its user should read."""

    note: str = ""


class Refused(NamedTuple):
    """A case that has none."""

    reason: str


@dataclass(frozen=True)
class Todo:
    """A case, and what its record will say made its outputs."""

    case: Case
    made_by: Mapping[str, Any]


class Predictor:
    """Predicts on one scan after another."""

    def __init__(self, cfg: PredictConfig) -> None:
        """Load the run's network.

        Raises:
            UserError: There is none.
        """
        self._segmenter = Segmenter(
            cfg.run, cfg.weights, inference=cfg.inference, device=own_device()
        )
        self._outputs, self._probabilities = Outputs(cfg.out), cfg.probabilities

    def do(self, todo: Todo) -> Predicted | Refused:
        """Predict on a scan; what is wrong with it concerns no other.

        Raises:
            UserError: The outputs cannot be written.
        """
        began, case = time.monotonic(), todo.case
        try:
            source = case.open()
        except ReadError as error:
            return Refused(error.message)
        except (OSError, UserError) as error:
            return Refused(" ".join(f"{case.source}: {error}".split()))
        except Exception as error:  # the worst file must not end the job
            return Refused(f"{case.source}: {error!r}; repair or remove it")
        try:
            found, note = self._predict(case, source)
            self._outputs.write_record(
                case.case_id,
                {
                    "case": case.case_id,
                    "source": case.source,
                    "modality": source.row["modality"],
                    **found,
                    "seconds": round(time.monotonic() - began, 2),
                    "made_by": dict(todo.made_by),
                },
            )
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"out: {self._outputs.folder} cannot be written ({reason})") from None
        except (MemoryError, RuntimeError) as error:  # torch's of too little memory is one
            return Refused(f"{case.source}: {' '.join(str(error).split())[:200]}")
        return Predicted(note)

    def _predict(self, case: Case, source: Input) -> tuple[dict[str, Any], str]:
        """Leave the outputs of a case; what its record says of them, and a note."""
        names = self._segmenter.names
        if self._segmenter.classifies:
            shares = self._segmenter.classify(source.array, source.row)
            found = {"class": names[shares.argmax()]}
            return found | {"probabilities": dict(zip(names, shares.tolist(), strict=True))}, ""
        labels = self._label(case, source)
        note = self._write_segmentation(case, source, labels) if case.dicom_seg else ""
        write_nifti(self._outputs.label_map(case.case_id), labels, source)
        lay = self._segmenter.lay(source.row)
        if lay.tilt_deg is not None and not note:
            note = f"{case.source}: lies {lay.tilt_deg:.0f} degrees oblique, and was straightened"
        seen = {"spacing_mm": list(lay.spacing), "straightened_deg": lay.tilt_deg}
        return {"structures": _volumes(labels, names, source), "seen": seen}, note

    def _label(self, case: Case, source: Input) -> NDArray[np.uint8]:
        if not self._probabilities:
            return self._segmenter.label(source.array, source.row)
        shape = (self._segmenter.outputs, *source.array.shape[1:])
        with self._outputs.room_for(shape) as room:
            labels = self._segmenter.label(source.array, source.row, probabilities=room)
            for number, name in enumerate(self._segmenter.names, start=1):
                place = self._outputs.probability(case.case_id, number, name)
                write_nifti(place, room[number], source)
        return labels

    def _write_segmentation(self, case: Case, source: Input, labels: NDArray[np.uint8]) -> str:
        """Write the DICOM-SEG; why there is none."""
        if source.references is None:
            return f"{case.source}: no DICOM-SEG, it is in several files of several frames"
        own, names = source.to_own_axes(labels), self._segmenter.names
        try:
            file = encode_segmentation(own, source.references, structures=names)
        except UserError as error:
            return f"{case.source}: {error}"
        publish(self._outputs.segmentation(case.case_id), file)
        return ""


def _volumes(labels: NDArray[np.uint8], names: list[str], source: Input) -> dict[str, Any]:
    """By structure its value in the label map and how much of it there is."""
    counts = label_counts(labels)
    voxel_ml = float(np.prod(source.row["spacing"])) / 1000
    return {
        name: {"value": value, "ml": round(counts.get(value, 0) * voxel_ml, 3)}
        for value, name in enumerate(names, start=1)
    }
