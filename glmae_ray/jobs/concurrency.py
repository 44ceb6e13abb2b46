"""How many trials a cluster holds at a time, so that none waits for what another never gives.

A trial holds its workers and at least one maker of its views; its Tune function and Ray Train's
controller take no CPU. Trials that are counted this way fit beside each other, each with makers
of its own: workers of one never wait for the makers of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from glmae_ray.budget import cpus_per_maker
from glmae_ray.config_train import TrainConfig
from glmae_ray.jobs.allotment import Allotment, Node


class Room(NamedTuple):
    """What trials share.

    Attributes:
        trials: At a time.
        makers: Of views, of each trial at most; None: as many as find CPUs.
    """

    trials: int
    makers: int | None


def room(cfg: TrainConfig, allotment: Allotment, nodes: Sequence[Node], *, most: int) -> Room:
    """Decide how many trials run at a time.

    Args:
        cfg: A trial's run, on a fixed number of workers.
        allotment: What it is given; that it fits once has been seen to.
        nodes: Those of the cluster that are alive.
        most: More than this are not wanted.
    """
    worker = {"CPU": allotment.cpus, "GPU": 1.0 if allotment.gpu else 0.0}
    maker = {"CPU": cpus_per_maker(cfg), **cfg.pipeline.resources}
    free = [dict(node["Resources"]) for node in nodes]
    labelled = [_has_labels(node, cfg) for node in nodes]
    makers = [part for part, fits in zip(free, labelled, strict=True) if fits]
    # Workers go where no maker could, as long as there is such a place.
    workers = sorted(free, key=lambda part: any(part is place for place in makers))
    count = 0
    while (
        count < most
        and _take(makers, maker)
        and all(_take(workers, worker) for _ in range(cfg.workers))
    ):
        count += 1
    count = max(1, count)
    if count == 1:
        return Room(1, cfg.pipeline.makers)
    left = sum(n["Resources"].get("CPU", 0.0) for n in nodes) / count - cfg.workers * allotment.cpus
    share = max(1, math.floor(left / cpus_per_maker(cfg) + 1e-9))
    return Room(count, min(share, cfg.pipeline.makers or share))


def _has_labels(node: Node, cfg: TrainConfig) -> bool:
    labels = node.get("Labels", {})
    return all(labels.get(name) == value for name, value in cfg.pipeline.labels.items())


def _take(places: Sequence[dict[str, float]], needs: dict[str, float]) -> bool:
    """Take something from the first place that has it; whether there is one."""
    for place in places:
        if all(place.get(name, 0.0) >= amount - 1e-9 for name, amount in needs.items()):
            for name, amount in needs.items():
                place[name] = place.get(name, 0.0) - amount
            return True
    return False
