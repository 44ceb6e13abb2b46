"""Save before Ray Train changes the number of workers, so that a new node costs no work.

Ray ends the workers where they are when the cluster has room for more of them, and what they did
since the last checkpoint would be done again. Its controller waits here until they have saved.
"""

from __future__ import annotations

import time

from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, TrainControllerState

_NAMESPACE = b"glmae-resize"
_WAIT_S = 60.0  # for workers that do not save; they are then ended all the same


class SaveBeforeResize(ControllerCallback):
    """Asks the workers of a run to save, and waits until they have."""

    def __init__(self, run: str) -> None:
        """Remember which run."""
        self._run = run

    def after_controller_state_update(
        self, _: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """See Ray's `ControllerCallback`."""
        if not isinstance(current_state, ResizingState):
            return
        internal_kv._internal_kv_put(self._run.encode(), b"", True, namespace=_NAMESPACE)
        end = time.monotonic() + _WAIT_S
        while save_wanted(self._run) and time.monotonic() < end:
            time.sleep(0.1)
        save_done(self._run)


def save_wanted(run: str) -> bool:
    """Whether Ray waits to change the number of a run's workers."""
    return internal_kv._internal_kv_get(run.encode(), namespace=_NAMESPACE) is not None


def save_done(run: str) -> None:
    """Let Ray change it."""
    internal_kv._internal_kv_del(run.encode(), namespace=_NAMESPACE)
