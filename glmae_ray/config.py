"""Every run as one frozen, typed tree: sections, defaults, and the rules between fields.

Beside a default stands where it comes from: verified in a first-hand source on GL-MAE, lineage
(the default of the same group's other published code), or a decision of ours. docs/method.md has
all of them with the tests that pin them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from glmae_ray import expressions
from glmae_ray.config_base import BrokenRulesError, Config, Problem, Share, Size
from glmae_ray.config_data import PipelineConfig, SamplingConfig, ViewsConfig
from glmae_ray.config_model import ModelConfig
from glmae_ray.config_run import (
    LogConfig,
    RayConfig,
    ResourcesConfig,
    SaveConfig,
    ValidationConfig,
)


class LossConfig(Config):
    """Weights and temperatures of the four terms. A term of weight 0 is never computed.

    That the terms exist is verified; every number here is a decision of ours.
    """

    w_rl: NonNegativeFloat = 1.0  # reconstruction of local views
    w_rg: NonNegativeFloat = 1.0  # reconstruction of global views
    w_gg: NonNegativeFloat = 1.0  # global-to-global consistency
    w_gl: NonNegativeFloat = 1.0  # global-to-local consistency
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)  # over the warm-up
    teacher_momentum: Annotated[float, Field(ge=0, le=1)] = 0.996  # rises to 1 on a cosine
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @property
    def uses_teacher(self) -> bool:
        """Whether any consistency term is on, and with it teacher and heads."""
        return self.w_gg > 0 or self.w_gl > 0

    @property
    def reconstructed(self) -> tuple[str, ...]:
        """The kinds of view that a decoder rebuilds."""
        return _on(**{"local": self.w_rl > 0, "global": self.w_rg > 0})

    @property
    def masked_kinds(self) -> tuple[str, ...]:
        """The kinds of view that the student encodes."""
        return _on(**{"local": self.w_rl + self.w_gl > 0, "global": self.w_rg + self.w_gg > 0})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of view that are made; the teacher sees nothing but global ones."""
        has_global = "global" in self.masked_kinds or self.uses_teacher
        return _on(**{"local": "local" in self.masked_kinds, "global": has_global})


def _on(**kinds: bool) -> tuple[str, ...]:
    return tuple(kind for kind, used in kinds.items() if used)


class OptimConfig(Config):
    """AdamW on a linear warm-up and a cosine to 0; decisions of ours but for the warm-up."""

    base_lr: PositiveFloat = 1.5e-4  # for 256 volumes a step; scaled linearly with global_batch
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.05  # on matrices only
    # None: 40 of 1600 parts of the run (40: lineage; 1600: verified, a checkpoint's name).
    warmup_steps: NonNegativeInt | None = None
    clip: PositiveFloat = 1.0  # norm of the whole gradient
    # So many steps in a row that are skipped, for numbers that are not finite, take the run back
    # to its last checkpoint and past their samples.
    rewind_after: PositiveInt = 5


class EngineConfig(Config):
    """What DeepSpeed is asked for."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["float32", "bf16", "fp16"] = "bf16"  # decision: ours
    micro_batch: PositiveInt | None = None  # samples per forward; None: the worker's whole share


class JobConfig(Config):
    """The root of one verb's tree."""

    def rules(self) -> Iterator[Problem]:
        """Yield what is wrong between fields that are each right by themselves."""
        yield from ()

    @model_validator(mode="after")
    def _keep_rules(self) -> JobConfig:
        problems = list(self.rules())
        if problems:
            raise BrokenRulesError(problems)
        return self


class PretrainConfig(JobConfig):
    """`glmae pretrain`: a store into an encoder."""

    store: str
    run: str
    init: str | None = None  # an encoder to start from: a file, or the folder of another run
    seed: NonNegativeInt = 0
    steps: PositiveInt
    global_batch: PositiveInt
    sampling: SamplingConfig = SamplingConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig.model_validate({})
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    resources: ResourcesConfig = ResourcesConfig()
    pipeline: PipelineConfig = PipelineConfig()
    save: SaveConfig = SaveConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()
    ray: RayConfig = RayConfig()
    accept_store_change: bool = False  # continue, though the store is no longer what it was

    @property
    def lr(self) -> float:
        """Peak learning rate after linear scaling with the global batch."""
        return self.optim.base_lr * self.global_batch / 256

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up; 40 of 1600 epochs where nothing is stated."""
        stated = self.optim.warmup_steps
        return max(1, round(self.steps * 40 / 1600)) if stated is None else stated

    @property
    def workers(self) -> int:
        """Training workers; of a range the most, until `on` says how many there are."""
        return self.resources.most

    @property
    def micro_batch(self) -> int:
        """Samples in one forward of one worker."""
        return self.engine.micro_batch or self.global_batch // self.workers

    @property
    def turns(self) -> int:
        """Micro-batches of one optimizer step, over all workers."""
        return self.global_batch // self.micro_batch

    @property
    def accumulation(self) -> int:
        """Forwards of one worker in one optimizer step."""
        return math.ceil(self.turns / self.workers)

    def on(self, workers: int) -> PretrainConfig:
        """The run as so many workers do it; what one of them computes at a time stays."""
        resources = self.resources.model_copy(update={"workers": workers})
        engine = self.engine.model_copy(update={"micro_batch": self.micro_batch})
        return self.model_copy(update={"resources": resources, "engine": engine})

    def samples_of(self, turn: int, *, rank: int) -> range:
        """Numbers of the samples in a rank's micro-batch; a step has `accumulation` turns.

        Where the workers do not divide the micro-batches of a step, its last turn is not one for
        all: those that have none repeat one, with weight 0.
        """
        step, slot = self._slot(turn, rank)
        first = step * self.global_batch + slot % self.turns * self.micro_batch
        return range(first, first + self.micro_batch)

    def weight_of(self, turn: int, *, rank: int) -> float:
        """What a micro-batch counts beside the mean of 1: 0 for one that is only repeated.

        The mean over all workers' turns, with these weights, is that over the global batch.
        """
        _, slot = self._slot(turn, rank)
        return self.workers * self.accumulation / self.turns if slot < self.turns else 0.0

    def _slot(self, turn: int, rank: int) -> tuple[int, int]:
        step, turn = divmod(turn, self.accumulation)
        return step, turn * self.workers + rank

    def rules(self) -> Iterator[Problem]:
        """Geometry, widths, loss weights and the batch have to fit each other."""
        yield from self._view_rules()
        yield from self._model_rules()
        for field, expression in self.sampling.expressions:
            if reason := expressions.mistake(expression):
                yield Problem((field,), f"{field}: {expression!r} is wrong: {reason}")
        if not self.loss.kinds:
            names = ("loss.w_rl", "loss.w_rg", "loss.w_gg", "loss.w_gl")
            yield Problem(names, "loss: every weight is 0; at least one term has to be on")
        yield from self._batch_rules()
        if self.log.samples and "://" in self.run:
            line = "log.samples: needs a local or shared run folder, which can be appended to"
            yield Problem(("log.samples", "run"), line)
        if self.optim.warmup_steps is not None and self.optim.warmup_steps > self.steps:
            line = f"optim.warmup_steps: {self.optim.warmup_steps} is more than steps {self.steps}"
            yield Problem(("optim.warmup_steps", "steps"), line)

    def _batch_rules(self) -> Iterator[Problem]:
        batch, workers, micro = self.global_batch, self.workers, self.engine.micro_batch
        fields = ("global_batch", "resources.workers", "engine.micro_batch")
        if micro is None and batch % workers:
            line = f"global_batch: {batch} is not a multiple of resources.workers {workers}"
            yield Problem(fields, f"{line}; with engine.micro_batch it need not be")
        elif micro is not None and batch % micro:
            line = f"global_batch: {batch} is not a multiple of engine.micro_batch {micro}"
            yield Problem(fields, line)
        elif micro is not None and batch < workers * micro:
            product = f"resources.workers {workers} times engine.micro_batch {micro}"
            yield Problem(fields, f"global_batch: {batch} is less than {product}")

    def _view_rules(self) -> Iterator[Problem]:
        patch = self.model.patch
        for name in ("global_size", "local_size"):
            size = getattr(self.views, name)
            fields = (f"views.{name}", "model.patch")
            if any(side % part for side, part in zip(size, patch, strict=True)):
                line = f"views.{name}: {size} is not a multiple of model.patch {patch}"
                yield Problem(fields, line)
            elif math.prod(size) < 2 * math.prod(patch):
                line = f"views.{name}: {size} holds one patch {patch}; masking needs at least two"
                yield Problem(fields, line)
        for name in ("global_scale", "local_scale", "window"):
            low, high = getattr(self.views, name)
            if low > high or (name == "window" and low == high):
                line = f"views.{name}: {low:g} has to be below {high:g}"
                yield Problem((f"views.{name}",), line)

    def _model_rules(self) -> Iterator[Problem]:
        model = self.model
        if model.compile and self.engine.zero_stage == 3:
            line = "model.compile: not with engine.zero_stage 3, which takes weights out of blocks"
            yield Problem(("model.compile", "engine.zero_stage"), line)
        for part in ("", "decoder_"):
            width, heads = getattr(model, f"{part}width"), getattr(model, f"{part}heads")
            fields = (f"model.{part}width", f"model.{part}heads")
            if width % 6:
                # Sine and cosine of three axes: six equal parts.
                line = f"model.{part}width: {width} is not divisible by 6 (sin-cos of three axes)"
                yield Problem(fields[:1], line)
            if width % heads:
                line = f"model.{part}width: {width} is not divisible by its {heads} heads"
                yield Problem(fields, line)


class DoctorConfig(PretrainConfig):
    """`glmae doctor`: what a pre-training run would cost, and whether it could start here."""

    store: str = ""
    run: str = ""
    # Stand-ins: a run states its own, and without any field nothing is asked about a run.
    steps: PositiveInt = 1
    global_batch: PositiveInt = 1

    @property
    def asks(self) -> bool:
        """Whether a run was described at all."""
        return bool(self.model_fields_set)

    def rules(self) -> Iterator[Problem]:
        """As those of the run, which has to state its steps and its batch."""
        missing = {"steps", "global_batch"} - self.model_fields_set if self.asks else set()
        for field in sorted(missing):
            yield Problem((field,), f"{field}: is missing; give {field}=...")
        yield from (problem for problem in super().rules() if not missing & set(problem.fields))


class DemoConfig(JobConfig):
    """`glmae demo`: phantom people through the whole path."""

    out: str = "glmae-demo"
    only: Literal["phantoms"] | None = None
    people: PositiveInt = 40
    seed: NonNegativeInt = 0
    pretrain: dict[str, Any] = {}  # fields of configs/pretrain/demo.yaml to change
    ray: RayConfig = RayConfig()


ExportFormat = Literal["glmae", "original", "monai_vit", "monai_vit_cls", "monai_unetr"]


class ExportConfig(JobConfig):
    """`glmae export`: an encoder under the names that other code expects."""

    run: str  # a run's folder, or a file of an encoder
    out: str
    formats: tuple[ExportFormat, ...] | None = None  # None: every one that the encoder fits
    grid: Size | None = None  # of written positions, patches along Z, Y, X; None: the local view's
    channels: PositiveInt | None = None  # None: as many as the encoder has
    positions: Literal["file", "sincos"] = "file"  # sincos: the formula in place of the file's
    # What a file of others leaves open.
    part: Literal["student", "teacher"] = "student"
    axes: Literal["XYZ", "ZYX"] | None = None  # None: XYZ where the file does not say
    heads: PositiveInt | None = None  # None: width / 64 where the file does not say
    file_grid: Size | None = None  # of its positions, along its own axes; None: a cube
