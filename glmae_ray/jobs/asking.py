"""A task on each of some nodes, and what they answer: pinned there, on nobody's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.remote_function import RemoteFunction
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from glmae_ray.jobs.allotment import Node
from glmae_ray.jobs.text import last_line


class Answer(NamedTuple):
    """What a task gave, or in a line why it gave nothing; no trouble is an empty line."""

    value: Any
    trouble: str = ""


def ask(
    nodes: Sequence[Node], task: RemoteFunction, *args: Any, timeout_s: float | None = None
) -> list[Answer]:
    """Have every node do a task, all at the same time.

    Args:
        nodes: Some of the cluster, as `ray.nodes()` has them.
        task: What they do.
        args: What it is given.
        timeout_s: How long they have together; None: until Ray takes a node for dead.

    Returns:
        Their answers, in the order of the nodes.
    """
    asked = []
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked.append(task.options(num_cpus=0, scheduling_strategy=place).remote(*args))
    answered = set()
    if asked:
        answered = set(ray.wait(asked, num_returns=len(asked), timeout=timeout_s)[0])
    late = Answer(None, f"no answer within {timeout_s or 0:g} s")
    return [_answer(reply) if reply in answered else late for reply in asked]


def _answer(reply: ray.ObjectRef) -> Answer:
    try:
        return Answer(ray.get(reply))
    except RayError as error:
        return Answer(None, last_line(error))
