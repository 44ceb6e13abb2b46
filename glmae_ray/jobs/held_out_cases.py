"""What finetuning is measured on: whole held-out cases, each rank its share of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.crop_voxels import read_outputs
from glmae_ray.crops import crop_maker
from glmae_ray.engine import Engine
from glmae_ray.labelled import Labelled
from glmae_ray.models.segmenter_files import Which, read_facts
from glmae_ray.paths import to_place
from glmae_ray.ranks import Ranks
from glmae_ray.reading import CaseReader, UnreadableCaseError
from glmae_ray.scans import Scan
from glmae_ray.scores import dice_case
from glmae_ray.seeing import Learned
from glmae_ray.sliding import classify, segment
from glmae_ray.tracking import Record, RunLog, write_event
from glmae_ray.watch import Event

Scores = dict[str, float | None]  # a figure of one case by name; None where it does not count


class HeldOutCases:
    """Dice of segmented held-out cases, or the share of them that is classified right.

    At most `validation.samples` cases, evenly spread over all by id, the same at every step.
    Weights that are better than all before are left as the best.
    """

    def __init__(
        self,
        cfg: FinetuneConfig,
        engine: Engine,
        labelled: Labelled,
        *,
        ranks: Ranks,
        leave: Callable[..., None],
    ) -> None:
        """Choose the cases.

        Args:
            cfg: The run.
            engine: Holds the module.
            labelled: The cases of the run.
            ranks: This worker among the others.
            leave: Writes the module into the run folder, as `last` or `best` (the argument), with
                `step` and `val`, its figures here; rank 0 calls it.
        """
        self._cfg, self._engine, self._ranks, self._leave = cfg, engine, ranks, leave
        self._maker = crop_maker(cfg, labelled, split="val")
        self._learned = Learned.of(labelled.train)
        cases = len(self._maker.index)
        rows = np.linspace(0, cases - 1, min(cases, cfg.validation.samples)).round().astype(int)
        self._rows: list[int] = rows.tolist()[ranks.rank :: ranks.size]
        self._best = read_facts(to_place(cfg.run), which="best")
        self._last: dict[str, Any] | None = None

    def measure(self, step: int, log: RunLog | None) -> tuple[Record, float] | None:
        """See `HeldOut`; `val` has the Dice of each structure or the accuracy, and their `mean`."""
        if step == 0:  # a head of random weights finds nothing
            return None
        self._engine.train(False)
        found = {row: scores for row in self._rows if (scores := self._case(row, step, log))}
        self._engine.train(True)
        cases = {row: scores for part in self._ranks.each(found) for row, scores in part.items()}
        if not cases:
            return None
        val = self._figures(cases)
        self._last = val
        mean = float(val["mean"])
        # One of a step that is done again belongs to work that was lost.
        before = self._best if self._best and self._best["step"] < step else None
        if before is None or mean > before["val"]["mean"]:
            self._best = {"step": step, "val": val}
            self._write("best", step)
        return {"val": val}, 1 - mean

    def leave_last(self) -> None:
        """Write the module after the last step."""
        self._write("last", self._cfg.steps)

    def _write(self, which: Which, step: int) -> None:
        if self._ranks.rank == 0:
            self._leave(which, step=step, val=self._last)

    def _case(self, row: int, step: int, log: RunLog | None) -> Scores | None:
        """Figures of one case; None, and an event, where it cannot be read."""
        facts = self._maker.index.at(row)
        reader = CaseReader(facts["case_id"], store=self._cfg.store, cache=self._maker.cache)
        try:
            array = reader.read_blocks([(facts["case_id"], 0, None)])[0].array()
            if self._cfg.task == "classification":
                return self._classify(array, facts)
            truth = read_outputs(reader, facts["case_id"], self._maker.source(row).outputs)
        except UnreadableCaseError as error:
            line = f"step {step}: validated without {error}"
            event = Event("not_validated", line, {"step": step, "case": facts["case_id"]})
            write_event(to_place(self._cfg.run), event, rank=self._ranks.rank)
            return None
        scan = Scan.of(array, facts, self._cfg.crops)
        predicted = segment(scan, self._predict, **self._settings)
        if log is not None and self._cfg.log.pictures and row == self._rows[0]:
            _paint(log, scan, truth, predicted, step=step)
        known = self._maker.known(row)[1:]
        return dice_case(predicted, truth, structures=self._maker.structures, known=known)

    def _classify(self, array: NDArray[Any], facts: Mapping[str, Any]) -> Scores:
        answer = classify(array, facts, self._predict, **self._settings)
        assert self._maker.targets is not None
        return {"accuracy": float(answer.argmax() == self._maker.targets[facts["case_id"]])}

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "crops": self._cfg.crops,
            "inference": self._cfg.inference,
            "learned": self._learned,
            "device": self._engine.device,
        }

    def _predict(self, image_BCZYX: Tensor) -> Tensor:
        return self._engine({"image": image_BCZYX}, task="predict")

    def _figures(self, cases: Mapping[int, Scores]) -> dict[str, Any]:
        """Means over cases, of each structure and of all; `cases` tells how many there were."""
        names = list(next(iter(cases.values())))
        counted = {
            name: [score for scores in cases.values() if (score := scores[name]) is not None]
            for name in names
        }
        each = {name: statistics.fmean(scores) for name, scores in counted.items() if scores}
        mean = statistics.fmean(each.values()) if each else 0.0
        return {"mean": mean, **each, "cases": len(cases)}


def _paint(
    log: RunLog, scan: Scan, truth: NDArray[np.uint8], predicted: NDArray[np.uint8], *, step: int
) -> None:
    """The middle of what is labelled: the scan, its labels, and what the network says."""
    there = np.argwhere(truth)
    centre = there.mean(0).astype(int) if len(there) else np.array(truth.shape) // 2
    reach = np.minimum(centre, np.array(truth.shape) - 1 - centre)
    box = tuple(slice(c - r, c + r + 1) for c, r in zip(centre, reach, strict=True))
    image, most = scan.window.apply(scan.array[:1, *box])[0], max(1, truth.max())
    panels = {"image": np.clip(image, 0, 1), "labels": truth[box], "prediction": predicted[box]}
    scaled = {name: a if name == "image" else a / most for name, a in panels.items()}
    log.picture("val", scaled, step=step)
