"""The runs behind an encoder: finetuning, evaluation and prediction.

Grades as in docs/method.md: lineage is the default of the same group's other published code (of
MONAI's UNETR recipe); the rest are decisions of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from glmae_ray import expressions
from glmae_ray.config_base import Chance, Chances, Config, Jitter, Problem, Share, Size, Spacing
from glmae_ray.config_model import ModelConfig
from glmae_ray.config_run import RayConfig
from glmae_ray.config_train import AdamWConfig, JobConfig, TrainConfig

Intensity = Literal["window", "percentiles", "zscore"]


class CropsConfig(Config):
    """The crops of one scan, which are the samples of finetuning."""

    count: PositiveInt = 4  # of one scan in a sample (lineage)
    size: Size = (96, 96, 96)  # voxels along Z, Y, X (verified, for most sets of the paper)
    spacing: Spacing | None = None  # mm along Z, Y, X; None: as acquired
    foreground: Chance = 0.5  # share whose centre is a voxel of a structure (lineage)
    # What becomes of intensities. window: `window` becomes [0, 1]; percentiles: the case's 0.5 and
    # 99.5 do; zscore: its mean and deviation become 0 and 1. None: window for CT, else percentiles.
    intensity: Intensity | None = None
    window: tuple[float, float] = (-175.0, 250.0)  # HU (verified, for abdominal CT)


class AugmentConfig(Config):
    """Random changes of a crop, from the plan's seeds; the first four are lineage."""

    flips: Chances = (0.1, 0.1, 0.1)  # a mirror image along Z, Y, X
    # By a multiple of 90 degrees in the plane (Y, X), of 180 where the sides of a crop differ.
    rotate90: Chance = 0.1
    shift: Jitter = 0.1  # of intensities, by up to so much
    shift_chance: Chance = 0.5
    scale: Jitter = 0.0  # of intensities, by 1 +- so much
    scale_chance: Chance = 0.0
    noise: NonNegativeFloat = 0.0  # standard deviation of Gaussian noise
    noise_chance: Chance = 0.0
    rotate_deg: NonNegativeFloat = 0.0  # about each axis, up to so much
    zoom: Jitter = 0.0  # by 1 +- so much
    affine_chance: Chance = 0.0  # of a rotation and zoom, of voxels whatever their spacing


class HeadConfig(Config):
    """What turns the encoder's tokens into an answer; see `HEADS` in models/heads.py."""

    kind: Literal["unetr", "linear", "mlp"] = "unetr"
    feature_size: PositiveInt = 16  # channels of UNETR at full resolution
    hidden: PositiveInt = 512  # of the MLP


class FinetuneOptimConfig(AdamWConfig):
    """AdamW; layer-wise decay: a layer's rate is that of the one above it times `layer_decay`.

    Without `warmup_steps` it takes 50 of 1000 parts of the run.
    """

    lr: PositiveFloat = 1e-4
    layer_decay: Share = 1.0
    freeze: bool = False  # the encoder keeps its weights
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-5  # lineage
    clip: PositiveFloat = 5.0  # lineage


class FinetuneLossConfig(Config):
    """Weights of the two terms of segmentation (lineage: both 1)."""

    dice: NonNegativeFloat = 1.0
    cross_entropy: NonNegativeFloat = 1.0


class InferenceConfig(Config):
    """The sliding window."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5  # of neighbouring windows (lineage)
    batch: PositiveInt = 2  # windows at a time


class FinetuneConfig(TrainConfig):
    """`glmae finetune`: an encoder and labelled cases into a segmenter or classifier.

    `init` is a run, a file of an encoder, or `none` for first weights at random; it has to be
    stated. A sample is one case's `crops.count` crops.
    """

    init: str
    task: Literal["segmentation", "classification"] = "segmentation"
    # Of segmentation, in the order of the outputs; None: all that any chosen case has.
    structures: tuple[str, ...] | None = None
    targets: str | None = None  # of classification: a CSV with the columns case_id and class
    where: str = "split == 'train'"  # cases to train on, an expression as in `sampling.where`
    val_where: str = "split == 'val'"  # cases to validate on
    # Few labels, nested by seed: the people of a smaller part are among those of a larger one.
    label_fraction: Share = 1.0
    label_cases: PositiveInt | None = None  # so many cases in place of a share
    crops: CropsConfig = CropsConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig | None = None  # None: that of `init`
    head: HeadConfig = HeadConfig()
    loss: FinetuneLossConfig = FinetuneLossConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    inference: InferenceConfig = InferenceConfig()

    @property
    def scratch(self) -> bool:
        """Whether first weights are random."""
        return self.init == "none"

    @property
    def lr(self) -> float:
        """Peak learning rate of the head; layers of the encoder have shares of it."""
        return self.optim.lr

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        stated = self.optim.warmup_steps
        return max(1, round(self.steps * 50 / 1000)) if stated is None else stated

    def rules(self) -> Iterator[Problem]:
        """Task, head, crops and batch have to fit each other."""
        yield from super().rules()
        if self.engine.zero_stage == 3:
            line = "engine.zero_stage: 3 is for pre-training; finetuning takes 0, 1 or 2"
            yield Problem(("engine.zero_stage",), line)
        for field in ("where", "val_where"):
            if reason := expressions.mistake(getattr(self, field)):
                yield Problem((field,), f"{field}: {getattr(self, field)!r} is wrong: {reason}")
        if self.scratch and self.model is None:
            yield Problem(("model", "init"), "model: is missing; init=none has none to take over")
        yield from self._task_rules()
        yield from self._crop_rules()

    def _task_rules(self) -> Iterator[Problem]:
        if (self.head.kind == "unetr") != (self.task == "segmentation"):
            kinds = "unetr" if self.task == "segmentation" else "linear or mlp"
            line = f"head.kind: {self.head.kind} does not do {self.task}; it takes {kinds}"
            yield Problem(("head.kind", "task"), line)
        if self.task == "classification" and self.targets is None:
            line = "targets: is missing; a CSV with the columns case_id and class"
            yield Problem(("targets", "task"), line)
        if self.structures is not None and len({*self.structures}) != len(self.structures):
            yield Problem(("structures",), f"structures: {self.structures} names one twice")
        if self.structures == ():
            yield Problem(("structures",), "structures: is empty")
        if self.loss.dice == self.loss.cross_entropy == 0:
            fields = ("loss.dice", "loss.cross_entropy")
            yield Problem(fields, "loss: every weight is 0; at least one term has to be on")
        if self.label_cases is not None and self.label_fraction != 1:
            fields = ("label_cases", "label_fraction")
            yield Problem(fields, "label_cases: is given beside label_fraction; one of them counts")

    def _crop_rules(self) -> Iterator[Problem]:
        low, high = self.crops.window
        if low >= high:
            line = f"crops.window: {low:g} has to be below {high:g}"
            yield Problem(("crops.window",), line)
        if self.model is None:
            return
        if self.scratch:  # an encoder that is loaded may have positions of another kind
            yield from self.model.width_rules()
        size, patch = self.crops.size, self.model.patch
        fields = ("crops.size", "model.patch")
        if any(side % part for side, part in zip(size, patch, strict=True)):
            line = f"crops.size: {size} is not a multiple of model.patch {patch}"
            yield Problem(fields, line)
        elif math.prod(size) < 2 * math.prod(patch):
            yield Problem(fields, f"crops.size: {size} holds a single patch {patch}")


class EvaluateConfig(JobConfig):
    """`glmae evaluate`: a finetuned run against the labels of a split."""

    run: str
    store: str
    split: Literal["train", "val", "test"] = "test"
    where: str | None = None  # in place of `split`, an expression
    weights: tuple[Literal["last", "best"], ...] = ("last", "best")
    tolerance_mm: PositiveFloat = 2.0  # of the normalised surface Dice
    tolerances_mm: dict[str, PositiveFloat] = {}  # of single structures
    bootstrap: PositiveInt = 1000  # resamplings of cases behind an interval
    seed: NonNegativeInt = 0
    pictures: bool = True
    targets: str | None = None  # of classification, as in finetuning; None: those of the run
    inference: InferenceConfig | None = None  # None: that of the run
    workers: PositiveInt | None = None  # None: one a GPU, or without any one for every 4 CPUs
    ray: RayConfig = RayConfig()

    def rules(self) -> Iterator[Problem]:
        """At least one set of weights, and an expression that can be read."""
        if not self.weights:
            yield Problem(("weights",), "weights: is empty; known are last, best")
        if self.where is not None and (reason := expressions.mistake(self.where)):
            yield Problem(("where",), f"where: {self.where!r} is wrong: {reason}")


class PredictConfig(JobConfig):
    """`glmae predict`: label maps in the geometry of each input."""

    run: str
    source: str | None = None  # a file, a folder, DICOM, ...
    store: str | None = None  # ... or the cases of a store
    where: str | None = None  # which of them, an expression; None: all
    out: str
    modality: str | None = None  # of all; None: as the source says, else that of the run
    weights: Literal["last", "best"] = "last"
    probabilities: bool = False  # also float32 volumes of each structure's probability
    inference: InferenceConfig | None = None  # None: that of the run
    workers: PositiveInt | None = None  # None: one a GPU, or without any one for every 4 CPUs
    ray: RayConfig = RayConfig()

    def rules(self) -> Iterator[Problem]:
        """One kind of input."""
        if (self.source is None) == (self.store is None):
            line = "source: give one of source=FILES and store=STORE"
            yield Problem(("source", "store"), line)
        if self.where is not None and self.store is None:
            yield Problem(("where", "store"), "where: has no effect without store=STORE")
        if self.where is not None and (reason := expressions.mistake(self.where)):
            yield Problem(("where",), f"where: {self.where!r} is wrong: {reason}")
