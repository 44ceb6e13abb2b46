"""One case of an evaluation from the store to its scores: what each of Ray's actors does."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_finetune import CropsConfig, EvaluateConfig
from glmae_ray.crop_voxels import read_outputs
from glmae_ray.intensity import window_of
from glmae_ray.jobs.case_workers import Failed
from glmae_ray.jobs.inspect import centre_of
from glmae_ray.jobs.predict_inputs import StoreCase, why_unfit
from glmae_ray.jobs.segmenting import Segmenter, own_device
from glmae_ray.models.segmenter_files import Which
from glmae_ray.pictures import draw_planes, plane_boxes, three_planes
from glmae_ray.reading import CaseReader
from glmae_ray.scores import Score, score_case
from glmae_ray.store.statistics import label_counts
from glmae_ray.structures import outputs_of, unknown_structures
from glmae_ray.volume import Shape

Row = Mapping[str, Any]
Labels = NDArray[np.uint8]  # (Z, Y, X), numbers of outputs


@dataclass
class Evaluated:
    """What one case gave, for each set of weights.

    Attributes:
        scores: Of segmentation, by structure.
        probabilities: Of classification, by class.
        picture: A PNG of the first weights' labels, where one is wanted.
    """

    scores: dict[Which, dict[str, Score | None]] = field(default_factory=dict)
    probabilities: dict[Which, list[float]] = field(default_factory=dict)
    picture: bytes = b""


class Evaluator:
    """Evaluates one case after another, with all weights."""

    def __init__(self, cfg: EvaluateConfig, weights: Sequence[Which]) -> None:
        """Load the run's networks.

        Raises:
            UserError: The run has no such weights.
        """
        self._cfg = cfg
        self._segmenters = {
            which: Segmenter(cfg.run, which, inference=cfg.inference, device=own_device())
            for which in weights
        }

    def do(self, row: Row) -> Evaluated | Failed:
        """Evaluate the case of a row; what is wrong with it concerns no other."""
        try:
            return self._evaluate(row)
        except Exception as error:
            reason = " ".join(str(error).split()) or repr(error)
            return Failed(reason.removeprefix(f"case {row['case_id']}: "))

    def _evaluate(self, row: Row) -> Evaluated | Failed:
        first = next(iter(self._segmenters.values()))
        if reason := why_unfit(StoreCase(self._cfg.store, row), first.facts):
            return Failed(reason)
        reader = CaseReader(row["case_id"], store=self._cfg.store)
        array = reader.read_blocks([(row["case_id"], 0, None)])[0].array()
        if first.classifies:
            shares = {w: s.classify(array, row) for w, s in self._segmenters.items()}
            return Evaluated(probabilities={w: share.tolist() for w, share in shares.items()})
        truth = read_outputs(reader, row["case_id"], outputs_of(row, first.names))
        done = Evaluated()
        for which, segmenter in self._segmenters.items():
            labels = segmenter.label(array, row)
            done.scores[which] = scores = score_case(
                labels,
                truth,
                structures=first.names,
                spacing=row["spacing"],
                tolerances=tolerances(self._cfg, first.names),
                known={*first.names} - {*unknown_structures(row, first.names)},
            )
            if segmenter is first and self._cfg.pictures:
                done.picture = _picture(array, truth, labels, row, segmenter, scores)
        return done


def tolerances(cfg: EvaluateConfig, structures: Sequence[str]) -> dict[str, float]:
    """Of the surface Dice, in mm, by structure."""
    return {name: cfg.tolerances_mm.get(name, cfg.tolerance_mm) for name in structures}


def _picture(
    array: NDArray[Any],
    truth: Labels,
    labels: Labels,
    row: Row,
    segmenter: Segmenter,
    scores: Mapping[str, Score | None],
) -> bytes:
    """Three planes through the largest structure, both label maps outlined, as a PNG."""
    boxes = [
        tuple(slice(low, high) for low, high in zip(*box, strict=True))
        for box in plane_boxes(_middle(truth if truth.any() else labels), truth.shape)
    ]
    crops = CropsConfig.model_validate(segmenter.facts["crops"])
    low, high = window_of(row, crops).ends[0].tolist()
    dices = [score["dice"] for score in scores.values() if score is not None]
    mean = f"{np.mean(dices):.3f}" if dices else "not counted"
    figure = draw_planes(
        three_planes(
            [array[:1, *box] for box in boxes],
            [truth[box] for box in boxes],
            spacing=tuple(row["spacing"]),
            predicted=[labels[box] for box in boxes],
        ),
        title=f"{row['case_id']}   Dice {mean}   labels solid, predicted dashed",
        windows=[(low, high)],
        structures={name: n for n, name in enumerate(segmenter.names, start=1)},
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _middle(labels: Labels) -> Shape:
    """A voxel from the middle of the largest structure, of the scan where there is none."""
    if counts := label_counts(labels):
        return centre_of(labels == max(counts, key=counts.__getitem__))
    z, y, x = (side // 2 for side in labels.shape)
    return z, y, x
