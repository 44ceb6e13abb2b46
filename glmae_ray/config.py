"""Every run as one frozen, typed tree: sections, defaults, and the rules between fields.

Beside a default stands where it comes from: verified in a first-hand source on GL-MAE, lineage
(the default of the same group's other published code), or a decision of ours. docs/method.md has
all of them with the tests that pin them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from glmae_ray import expressions
from glmae_ray.config_base import Config, Problem, Size
from glmae_ray.config_data import SamplingConfig, ViewsConfig
from glmae_ray.config_model import ModelConfig
from glmae_ray.config_probe import ProbeConfig
from glmae_ray.config_run import RayConfig
from glmae_ray.config_train import AdamWConfig, JobConfig, TrainConfig


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


class OptimConfig(AdamWConfig):
    """AdamW on a linear warm-up and a cosine to 0; decisions of ours but for the warm-up.

    Without `warmup_steps` it takes 40 of 1600 parts of the run (40: lineage; 1600: verified, a
    checkpoint's name).
    """

    base_lr: PositiveFloat = 1.5e-4  # for 256 volumes a step; scaled linearly with global_batch


class PretrainConfig(TrainConfig):
    """`glmae pretrain`: a store into an encoder; `init` is one to start from: a file, or a run."""

    sampling: SamplingConfig = SamplingConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig.model_validate({})
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    probe: ProbeConfig = ProbeConfig()

    @property
    def lr(self) -> float:
        """Peak learning rate after linear scaling with the global batch."""
        return self.optim.base_lr * self.global_batch / 256

    @property
    def lr_field(self) -> str:
        """Name of the field that sets it."""
        return "optim.base_lr"

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's views, int16."""
        voxels = sum(
            getattr(self.views, f"{kind}_count") * math.prod(getattr(self.views, f"{kind}_size"))
            for kind in self.loss.kinds
        )
        return 2 * voxels * self.model.channels

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up; 40 of 1600 epochs where nothing is stated."""
        stated = self.optim.warmup_steps
        return max(1, round(self.steps * 40 / 1600)) if stated is None else stated

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
        yield from self.probe.problems()
        yield from super().rules()

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
        yield from model.width_rules()
        yield from model.width_rules("decoder_")


class DoctorConfig(PretrainConfig):
    """`glmae doctor`: what a pre-training run would cost, and whether it could start."""

    store: str = ""
    run: str = ""
    # Stand-ins: a run states its own, and without a field of one nothing is asked about it.
    steps: PositiveInt = 1
    global_batch: PositiveInt = 1

    @property
    def asks(self) -> bool:
        """Whether a run was described at all, and not only a Ray."""
        return bool(self.model_fields_set - {"ray"})

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
    finetune: dict[str, Any] = {}  # fields of configs/finetune/demo.yaml to change
    ray: RayConfig = RayConfig()


EncoderFormat = Literal["glmae", "original", "monai_vit", "monai_vit_cls", "monai_unetr"]
SegmenterFormat = Literal["segmenter", "monai_bundle", "onnx"]
ExportFormat = Literal[EncoderFormat, SegmenterFormat]
_HUB = r"^[\w.-]+/[\w.-]+$"


class ExportConfig(JobConfig):
    """`glmae export`: an encoder or a finetuned run in files that other code expects."""

    run: str  # a run's folder, or a file of an encoder
    out: str
    formats: tuple[ExportFormat, ...] | None = None  # None: every one that fits
    weights: Literal["last", "best"] = "last"  # of a finetuned run
    licence: str | None = None  # of the weights, as an SPDX name; None: the card says not stated
    data_licence: str | None = None  # of the scans and labels behind them
    push: Annotated[str, Field(pattern=_HUB)] | None = None  # USER/REPO on the Hugging Face Hub
    # Of an encoder's formats.
    grid: Size | None = None  # of written positions, patches along Z, Y, X; None: the local view's
    channels: PositiveInt | None = None  # None: as many as the encoder has
    positions: Literal["file", "sincos"] = "file"  # sincos: the formula in place of the file's
    # What a file of others leaves open.
    part: Literal["student", "teacher"] = "student"
    axes: Literal["XYZ", "ZYX"] | None = None  # None: XYZ where the file does not say
    heads: PositiveInt | None = None  # None: width / 64 where the file does not say
    file_grid: Size | None = None  # of its positions, along its own axes; None: a cube

    def rules(self) -> Iterator[Problem]:
        """Something to write, and a local folder where it is to be pushed."""
        if self.formats == ():
            known = (*get_args(EncoderFormat), *get_args(SegmenterFormat))
            yield Problem(("formats",), f"formats: is empty; known are {', '.join(known)}")
        if self.push is not None and "://" in self.out:
            line = f"push: needs a local folder to push from, not out={self.out}"
            yield Problem(("push", "out"), line)
