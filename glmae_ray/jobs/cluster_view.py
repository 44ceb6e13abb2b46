"""Let an elastic run see within seconds that nodes have come or gone.

Ray Train asks Ray's autoscaling coordinator for how many workers there is room, and that actor
looks at the cluster every 20 s only: after the loss of a node Ray Train asks in vain for as many
workers as before. Asked to recompute, it looks at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

_EVERY_S = 2.0
_NOBODY = ""  # who asks; only the look is wanted


@contextmanager
def fresh_view() -> Iterator[None]:
    """Have the coordinator look at the cluster every two seconds while the body runs."""
    stop = threading.Event()
    thread = threading.Thread(target=_look, args=(stop,), daemon=True, name="cluster-view")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _look(stop: threading.Event) -> None:
    coordinator = get_or_create_autoscaling_coordinator()
    while not stop.wait(_EVERY_S):
        asked = coordinator.get_reserved_resources.remote(_NOBODY, recompute=True)
        # It may be slow, restart, or be gone with the head; whoever trains finds out.
        ray.wait([asked], timeout=_EVERY_S)
