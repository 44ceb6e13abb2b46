"""What Ray Data's tasks run: they count micro-batches, and make each; all of it without torch.

Processes of Ray import this module before they do anything else, so it brings as little with it as
can be: what makes samples comes with the first micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

if TYPE_CHECKING:
    from glmae_ray.reading import Maker

_AT_ONCE = 1024  # micro-batches


def count_turns(count: int) -> ray.data.Dataset:
    """The numbers 0 to `count` - 1 of micro-batches, column `turn`, one a block, without a CPU."""
    turns = ray.data.read_datasource(_Turns(count), override_num_blocks=1, num_cpus=0)
    # Blocks of one row, the least there is: Ray neither splits nor merges micro-batches.
    turns.context.target_max_block_size = 1
    # Counting takes no CPU; what Ray would reserve for it would be a maker's.
    turns.context.op_resource_reservation_ratio = 0.0
    turns.context.enable_progress_bars = False  # of rows; a run shows its own, of steps
    return turns


@dataclass(frozen=True)
class MakeTurn:
    """Makes a micro-batch out of its number.

    Attributes:
        maker: The `Maker`, in Ray's object store: each process fetches it once.
        samples_of: Turn of all workers -> numbers of the samples of its micro-batch.
    """

    maker: ray.ObjectRef
    samples_of: Callable[[int], range]

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Columns of `Maker.make`, each in one row: (1, B, ...)."""
        (turn,) = rows["turn"]
        numbers = np.array(self.samples_of(int(turn)))
        columns = _fetched(self.maker).make({"number": numbers})
        return {name: column[np.newaxis] for name, column in columns.items()}


class _Turns(Datasource):
    """The numbers of micro-batches.

    One task yields them all, as long as the run lasts. A read task a micro-batch would cost 1.5 ms
    each before the first batch, half a minute for a run of 20,000; `repartition` would hold a CPU.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._count

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        facts = BlockMetadata(
            num_rows=self._count, size_bytes=8 * self._count, input_files=None, exec_stats=None
        )
        return [ReadTask(self._blocks, facts)]

    def _blocks(self) -> Iterator[Block]:
        for begin in range(0, self._count, _AT_ONCE):
            turns = np.arange(begin, min(begin + _AT_ONCE, self._count))
            yield BlockAccessor.batch_to_block({"turn": turns})


@functools.lru_cache(maxsize=2)
def _fetched(maker: ray.ObjectRef) -> Maker:
    return ray.get(maker)
