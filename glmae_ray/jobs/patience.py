"""End a run that waits in vain for nodes on which its workers fit; Ray would wait for ever.

Ray Train tries again for as long as it is let, and its limit counts tries over the whole run, so
that one of weeks on machines that come and go would reach it. This one is of each wait.
"""

from __future__ import annotations

import time

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
    TrainControllerState,
)

from glmae_ray.paths import to_place
from glmae_ray.tracking import write_event
from glmae_ray.watch import Event

_WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState)
_TELL_S = 20.0  # a start of the workers is no wait
_PAUSE_S = 0.2  # Ray 2.60 looks for room again and again without one


class WaitedInVainError(Exception):
    """No nodes came on which the workers of a run fit."""


class Patience(ControllerCallback):
    """Tells that a run waits for nodes, and ends it when it has waited long enough."""

    def __init__(self, run: str, *, needs: str, wait_s: float) -> None:
        """Wait for nothing yet.

        Args:
            run: The run folder, which is told.
            needs: Without what it cannot start, as `2 workers with 1 CPU and 1 GPU each`.
            wait_s: How long each wait may be.
        """
        self._run, self._needs, self._wait_s = run, needs, wait_s
        self._since: float | None = None
        self._told = False

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """See Ray's `ControllerCallback`.

        Raises:
            WaitedInVainError: What the run needs did not come; Ray ends it with this.
        """
        if not isinstance(current_state, _WAITING):
            self._since, self._told = None, False
            return
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        waited = now - self._since
        if waited > self._wait_s:
            raise WaitedInVainError(
                f"waited {waited:.0f} s for {self._needs}: {_there()}; ask for less with "
                "resources.workers, or wait longer with another resources.profile; the same "
                "command continues"
            )
        if waited > _TELL_S and not self._told:
            self._told = True
            line = f"waiting for {self._needs}: {_there()}; for {self._wait_s:g} s at most"
            write_event(to_place(self._run), Event("waiting", line, {}), rank=0)
        if current_state is previous_state:
            time.sleep(_PAUSE_S)


def _there() -> str:
    """What the cluster has, and what of it is free."""
    all_of_it, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{free.get(name, 0):g} of {all_of_it.get(name, 0):g} {name}s are free"
        for name in ("CPU", "GPU")
        if name == "CPU" or name in all_of_it
    ]
    return ", ".join(parts)
