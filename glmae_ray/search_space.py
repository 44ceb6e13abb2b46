"""Search spaces: what may be written for a field, what is drawn from it, what is checked of it."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_GOLDEN = 0.382  # a place inside a range that is neither an end nor a whole number
_EXPONENT = re.compile(r"[-+]?\d+e[-+]?\d+", re.IGNORECASE)
_DIGITS = 12  # of a step on a grid: 0.1 + 0.2 is 0.3


@dataclass(frozen=True)
class Space:
    """The values that one field may take.

    Attributes:
        kind: `uniform` or `loguniform` [low, high], `quniform` [low, high, step], `randint` whole
            numbers from low to below high, `choice` or `grid` a list of values.
        values: What stands behind it.
    """

    kind: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, given: Any) -> Space:
        """Read `{kind: [values]}`.

        Raises:
            ValueError: It is something else, or nothing can be drawn from it.
        """
        if not isinstance(given, dict) or len(given) != 1 or not set(given) <= set(_READERS):
            raise ValueError(f"{given!r} is not one of {{{', '.join(_READERS)}}}: [...]")
        ((kind, values),) = given.items()
        if not isinstance(values, list | tuple):
            raise ValueError(f"{kind}: {values!r} is not a list")
        return cls(kind, _READERS[kind](kind, values))

    @property
    def is_listed(self) -> bool:
        """Whether the values are told one by one."""
        return self.kind in ("choice", "grid")

    def probes(self) -> list[Any]:
        """Values that the field takes if it takes all: ends, one inside, or everything listed."""
        if self.is_listed:
            return list(self.values)
        low, high, *step = self.values
        if self.kind == "randint":
            return [low, high - 1]
        if self.kind == "quniform":
            return [low, _on_grid(low + step[0], low, step[0]), self.inside(high)]
        return [low, low + _GOLDEN * (high - low), high]

    def draw(self, source: random.Random) -> Any:
        """A value; of a grid its first, as `sampled` goes through the others."""
        if self.is_listed:
            return self.values[0 if self.kind == "grid" else source.randrange(len(self.values))]
        low, high, *step = self.values
        if self.kind == "randint":
            return source.randrange(low, high)
        if self.kind == "quniform":
            count = math.floor((high - low) / step[0] + 1e-9)
            return _on_grid(low + step[0] * source.randrange(count + 1), low, step[0])
        if self.kind == "loguniform":
            return math.exp(source.uniform(math.log(low), math.log(high)))
        return source.uniform(low, high)

    def inside(self, value: float) -> float:
        """The nearest number that could be drawn from a range."""
        low, high, *step = self.values
        if self.kind == "randint":
            return int(min(max(round(value), low), high - 1))
        if self.kind == "quniform":
            most = low + step[0] * math.floor((high - low) / step[0] + 1e-9)
            return _on_grid(min(max(value, low), most), low, step[0])
        return float(min(max(value, low), high))


def sampled(spaces: dict[str, Space], number: int, *, seed: int) -> dict[str, Any]:
    """What trial `number` tries: the same on any machine, whatever the others did.

    Grids are gone through in order, the last field fastest; the rest is drawn.
    """
    source = random.Random(f"{seed} {number}")
    sample = {name: space.draw(source) for name, space in spaces.items()}
    grids = {name: space.values for name, space in spaces.items() if space.kind == "grid"}
    place = number
    for name, values in reversed(grids.items()):
        place, position = divmod(place, len(values))
        sample[name] = values[position]
    return sample


def grid_size(spaces: dict[str, Space]) -> int:
    """Trials that go once through all grids; 1 without any."""
    return math.prod(len(space.values) for space in spaces.values() if space.kind == "grid")


def _on_grid(value: float, low: float, step: float) -> float:
    return round(low + step * round((value - low) / step), _DIGITS)


def _range(kind: str, values: Sequence[Any]) -> tuple[float, ...]:
    low, high = _numbers(kind, values, "[low, high]")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{kind}: {low:g} has no logarithm; both ends have to be above 0")
    _below(kind, low, high)
    return low, high


def _steps(kind: str, values: Sequence[Any]) -> tuple[float, ...]:
    low, high, step = _numbers(kind, values, "[low, high, step]")
    _below(kind, low, high)
    if not 0 < step <= high - low:
        raise ValueError(f"{kind}: a step of {step:g} does not fit between {low:g} and {high:g}")
    return low, high, step


def _whole(kind: str, values: Sequence[Any]) -> tuple[int, int]:
    low, high = _numbers(kind, values, "[low, high]")
    if low != round(low) or high != round(high):
        raise ValueError(f"{kind}: {list(values)} are not whole numbers")
    _below(kind, low, high)
    return int(low), int(high)


def _list(kind: str, values: Sequence[Any]) -> tuple[Any, ...]:
    # YAML reads `1e-4` as a text; among nothing but numbers it is one.
    if all(isinstance(v, int | float) or _EXPONENT.fullmatch(str(v)) for v in values):
        values = [float(v) if isinstance(v, str) else v for v in values]
    if not values:
        raise ValueError(f"{kind}: is empty")
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ValueError(f"{kind}: {list(values)} names one twice")
    return tuple(values)


def _numbers(kind: str, values: Sequence[Any], form: str) -> list[float]:
    """The values as numbers; YAML reads `1e-4` as a text."""
    try:
        if len(values) != form.count(",") + 1 or any(isinstance(v, bool) for v in values):
            raise ValueError
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"{kind}: {list(values)} is not {form}") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{kind}: {list(values)} is not finite")
    return numbers


def _below(kind: str, low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"{kind}: is empty, {low:g} is not below {high:g}")


_READERS = {
    "uniform": _range,
    "loguniform": _range,
    "quniform": _steps,
    "randint": _whole,
    "choice": _list,
    "grid": _list,
}
KINDS = frozenset(_READERS)
