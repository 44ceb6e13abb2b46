"""What `glmae doctor` has to say: lines of three kinds."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """A line of one of three kinds; a reason is one why the run could not start."""

    kind: Literal["fact", "advice", "reason"]
    line: str
