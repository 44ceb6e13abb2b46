"""What every section of a config is made of: frozen models, types of fields, broken rules."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt

from glmae_ray.errors import UserError


class Problem(NamedTuple):
    """A rule that is broken: the dotted fields it is about, and its one line."""

    fields: tuple[str, ...]
    line: str


class BrokenRulesError(UserError):
    """Fields that are each right by themselves and do not fit each other."""

    def __init__(self, problems: list[Problem]) -> None:
        """Keep the problems; their lines are what the user reads."""
        super().__init__(*(problem.line for problem in problems))
        self.problems = problems


class Config(BaseModel):
    """A frozen section: unknown keys are errors, numbers written as text (`1e-4`) are numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


def _same_on_every_axis(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, int | float) else value


_OnEveryAxis = BeforeValidator(_same_on_every_axis)
Size = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], _OnEveryAxis]
Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], _OnEveryAxis]
Share = Annotated[float, Field(gt=0, le=1)]
Chance = Annotated[float, Field(ge=0, le=1)]
Chances = Annotated[tuple[Chance, Chance, Chance], _OnEveryAxis]
Jitter = Annotated[float, Field(ge=0, lt=1)]  # at 1 a view could come out without any contrast
