"""The cluster that a run would join, for `glmae doctor`: what its nodes say, and if a run fits."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from glmae_ray.config import DoctorConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs import node_look
from glmae_ray.jobs.allotment import Node, allot, seats
from glmae_ray.jobs.doctor_nodes import Look, NodeFacts, judge
from glmae_ray.jobs.findings import Finding
from glmae_ray.jobs.launching import nodes_alive
from glmae_ray.jobs.machine import PACKAGES
from glmae_ray.jobs.node_look import MISSING, OURS
from glmae_ray.jobs.ray_session import ray_session

_PATIENCE_S = 60.0  # a node that is busy takes half of that to start a process
_RAYS_OWN = "ray.io/"  # labels that Ray gives to every node


class Cluster(NamedTuple):
    """What is there, and what is to be said of it.

    Attributes:
        address: By which it was joined.
        nodes: That Ray counts as alive; none where it could not be joined.
        findings: Of its nodes, and of the run if there is one.
    """

    address: str
    nodes: tuple[NodeFacts, ...]
    findings: tuple[Finding, ...]

    def facts(self) -> dict[str, Any]:
        """Address and nodes as JSON has them."""
        return {"address": self.address, "nodes": [asdict(node) for node in self.nodes]}


def look_at_cluster(cfg: DoctorConfig, address: str) -> Cluster:
    """Join a cluster, ask its nodes, and see whether the run could start there.

    Args:
        cfg: The run, with whole paths; without a run only its `ray` counts.
        address: By which it is joined.
    """
    try:
        # Ray prints here what its nodes log; what is printed as JSON has to stay JSON.
        with redirect_stdout(sys.stderr), ray_session(cfg.ray):
            alive = sorted(nodes_alive(), key=lambda node: str(node["NodeManagerAddress"]))
            nodes = tuple(_look_at(alive))
            findings = list(
                judge(nodes, versions=node_look.versions(PACKAGES), source=node_look.source())
            )
            if cfg.asks:
                findings += _check_resources(cfg, alive)
                able = [node for node, facts in zip(alive, nodes, strict=True) if _able(facts)]
                findings += _check_storage(cfg, able)
            return Cluster(address, nodes, tuple(findings))
    except UserError as error:
        return Cluster(address, (), tuple(Finding("reason", line) for line in error.lines))


def _able(node: NodeFacts) -> bool:
    """Whether a node could work, and has what answers for it."""
    return node.cpus > 0 and node.look is not None and node.look.versions[OURS] != MISSING


def _look_at(alive: Sequence[Node]) -> Iterator[NodeFacts]:
    import ray
    from ray import cloudpickle

    from glmae_ray.jobs.asking import ask

    cloudpickle.register_pickle_by_value(node_look)
    answers = ask(alive, ray.remote(node_look.look), PACKAGES, timeout_s=_PATIENCE_S)
    for node, answer in zip(alive, answers, strict=True):
        there = _of_ray(node)
        if answer.trouble:
            yield replace(there, trouble=answer.trouble)
        else:
            ahead_s, doubt_s = _clock(node)
            yield replace(there, look=Look(**answer.value), ahead_s=ahead_s, doubt_s=doubt_s)


def _clock(node: Node) -> tuple[float | None, float]:
    """How far a node's clock is ahead, if it tells, and half the time that asking took."""
    import ray

    from glmae_ray.jobs.asking import ask

    task, found = ray.remote(node_look.now), []
    for _ in range(2):  # a process that has the task already answers sooner
        asked = time.time()
        (answer,) = ask([node], task, timeout_s=_PATIENCE_S)
        doubt_s = (time.time() - asked) / 2
        if not answer.trouble:
            found.append((doubt_s, answer.value - asked - doubt_s))
    doubt_s, ahead_s = min(found, default=(0.0, None))
    return ahead_s, doubt_s


def _of_ray(node: Node) -> NodeFacts:
    resources, labels = node["Resources"], node.get("Labels", {})
    return NodeFacts(
        address=node["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory=int(resources.get("memory", 0)),
        object_store=int(resources.get("object_store_memory", 0)),
        labels={name: value for name, value in labels.items() if not name.startswith(_RAYS_OWN)},
    )


def _check_resources(cfg: DoctorConfig, alive: Sequence[Node]) -> Iterator[Finding]:
    """Workers, and CPUs for their views: what the run itself would say."""
    try:
        allotment = allot(cfg, alive)
    except UserError as error:
        yield from (Finding("reason", line) for line in error.lines)
        return
    yield Finding("fact", allotment.budget.line())
    yield from (Finding("advice", line) for line in allotment.warnings)
    room = sum(seats(node, allotment.cpus, gpu=allotment.gpu) for node in alive)
    if room < cfg.resources.most:
        line = f"resources.workers: room for {room} of up to {cfg.resources.most} now"
        yield Finding("fact", f"{line}; others come with nodes")


def _check_storage(cfg: DoctorConfig, able: Sequence[Node]) -> Iterator[Finding]:
    from glmae_ray.jobs.doctor_storage import check_storage

    if able:
        yield from check_storage(cfg, able, timeout_s=_PATIENCE_S)
