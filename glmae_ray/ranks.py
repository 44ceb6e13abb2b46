"""What the workers of a run tell each other beside training: small Python values, over gloo.

A group of its own, so that nothing waits for an accelerator, and a peer that is gone or silent is
an error after a stated time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class Ranks(NamedTuple):
    """One worker among those of a run.

    Attributes:
        rank: Of this worker, from 0.
        size: Workers.
        local_rank: Among those of its node.
        group: Of all of them, over gloo; None where there is only one.
    """

    rank: int
    size: int
    local_rank: int
    group: dist.ProcessGroup | None

    @classmethod
    def join(cls, *, local_rank: int, timeout_s: float) -> Ranks:
        """Meet all workers of the process group that runs. Collective.

        Args:
            local_rank: Of this worker among those of its node.
            timeout_s: After so long a peer that does not answer is an error.
        """
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, group)

    def told(self, value: Value) -> Value:
        """What rank 0 has; the others' `value` does not matter. Collective."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def each(self, value: Any) -> list[Any]:
        """The value of every rank, in their order. Collective."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values
