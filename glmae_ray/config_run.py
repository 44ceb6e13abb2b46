"""The sections about where a run runs, when it saves and checks itself, and what it writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from glmae_ray.config_base import Config

_Count = TypeAdapter(PositiveInt)


def _one_or_a_range(given: Any) -> int | tuple[int, int]:
    """Says in one line what is wrong: the union would in two, one for each kind."""
    parts = given if isinstance(given, list | tuple) else [given]
    try:
        numbers = [_Count.validate_python(part) for part in parts]
    except ValidationError:
        numbers = []
    if len(numbers) == 1 and parts is not given:
        return numbers[0]
    if len(numbers) != 2:
        raise PydanticCustomError("workers", "it has to be a number from 1 on, or [least, most]")
    least, most = numbers
    if least > most:
        raise PydanticCustomError("workers", "the least come first, then the most")
    return least, most


# A number, or the least and the most between which a run follows what the cluster has.
Workers = Annotated[int | tuple[int, int], BeforeValidator(_one_or_a_range)]


class ResourcesConfig(Config):
    """What the training workers are given, and how what befalls them is met."""

    workers: Workers = 1
    gpu: bool | None = None  # None: GPUs if the cluster has any
    cpus_per_worker: PositiveFloat | None = None  # None: 1 beside a GPU, else 0.5
    autoscales: bool = False  # the cluster may grow: what it lacks now is waited for
    profile: Literal["local", "cluster", "spot"] = "local"  # limits and patience; docs/running.md
    max_failures: Annotated[int, Field(ge=-1)] | None = None  # None: of the profile; -1: no limit
    hang_s: PositiveFloat | None = None  # a step that takes longer hangs; None: of the profile
    resize_s: PositiveFloat | None = None  # between looks for room for more; None: of the profile

    @property
    def least(self) -> int:
        """Workers without which a run waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that a run has on a cluster that is large enough."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class SaveConfig(Config):
    """When a checkpoint is written, and how many stay beside the best."""

    every_steps: PositiveInt = 500
    every_minutes: PositiveFloat | None = None  # also where so much time passed since the last
    keep: PositiveInt = 2
    background: bool = True  # written while training goes on


class ValidationConfig(Config):
    """The held-out reconstruction: fixed samples of the `val` split with fixed masks."""

    every_steps: PositiveInt = 500
    samples: PositiveInt = 16


class LogConfig(Config):
    """What is written while the run goes on."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True
    pictures: bool = True
    samples: bool = False  # a line a step and worker: which samples it consumed


class RayConfig(Config):
    """Which Ray: RAY_ADDRESS or `address` to join one, else one on this machine is started."""

    address: str | None = None
