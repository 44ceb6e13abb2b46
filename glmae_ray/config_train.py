"""What every training verb shares: where it reads and writes, its steps, batch and workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from glmae_ray.config_base import BrokenRulesError, Config, Problem, Share
from glmae_ray.config_data import PipelineConfig
from glmae_ray.config_run import (
    LogConfig,
    RayConfig,
    ResourcesConfig,
    SaveConfig,
    ValidationConfig,
)
from glmae_ray.credentials import ADVICE, has_password


class AdamWConfig(Config):
    """AdamW on a linear warm-up and a cosine to 0."""

    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.05  # on matrices only
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
    def _keep_rules(self) -> Self:
        problems = [*_password_rules(self.model_dump()), *self.rules()]
        if problems:
            raise BrokenRulesError(problems)
        return self


def _password_rules(value: Any, name: str = "") -> Iterator[Problem]:
    """A run is written down and shown: what opens its URLs must not be in them."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _password_rules(below, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _password_rules(below, name)
    elif isinstance(value, str) and has_password(value):
        yield Problem((name,), f"{name}: has a password in its URL; {ADVICE}")


class TrainConfig(JobConfig):
    """Steps of a global batch of samples, on whatever workers there are."""

    store: str
    run: str
    init: str | None = None
    seed: NonNegativeInt = 0
    steps: PositiveInt
    global_batch: PositiveInt
    optim: AdamWConfig = AdamWConfig()
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
        """Peak learning rate."""
        raise NotImplementedError

    @property
    def lr_field(self) -> str:
        """Name of the field that sets it."""
        raise NotImplementedError

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        raise NotImplementedError

    @property
    def sample_bytes(self) -> int:
        """Bytes of what is made for one sample."""
        raise NotImplementedError

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

    def on(self, workers: int) -> Self:
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
        """The batch has to fit the workers, the warm-up the steps."""
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
