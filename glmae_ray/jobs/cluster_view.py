"""Let an elastic run see within seconds that nodes, or a driver of its own, have come or gone.

Ray Train asks Ray's autoscaling coordinator for how many workers there is room, and that actor
looks at the cluster every 20 s only: after the loss of a node Ray Train asks in vain for as many
workers as before. Asked to recompute, it looks at once. It also keeps for three minutes what a
driver asked for that was killed, and which the next one of the same run then waits for.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.experimental import internal_kv

from glmae_ray.beside import beside

_NAMESPACE = b"glmae-driver"
_EVERY_S = 2.0
_NOBODY = ""  # who asks; only the look is wanted


def take_over(run: str, *, run_id: str) -> None:
    """Give back what a killed driver of a run has asked for, and note who asks now.

    Args:
        run: The run folder; one driver at a time trains it.
        run_id: Ray Train's, of this driver.
    """
    before = internal_kv._internal_kv_get(run.encode(), namespace=_NAMESPACE)
    if before is not None:
        coordinator = get_or_create_autoscaling_coordinator()
        ray.get(coordinator.cancel_request.remote(f"train-{before.decode()}"))
    internal_kv._internal_kv_put(run.encode(), run_id.encode(), True, namespace=_NAMESPACE)


def fresh_view() -> AbstractContextManager[None]:
    """Have the coordinator look at the cluster every two seconds while the body runs."""
    return beside(_look, name="cluster-view")


def _look(stop: threading.Event) -> None:
    coordinator = get_or_create_autoscaling_coordinator()
    while not stop.wait(_EVERY_S):
        asked = coordinator.get_reserved_resources.remote(_NOBODY, recompute=True)
        # It may be slow, restart, or be gone with the head; whoever trains finds out.
        ray.wait([asked], timeout=_EVERY_S)
