"""Whether the cluster has what a run needs, and what it gives to training and to view making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmae_ray.budget import Budget, budget, cpus_per_maker
from glmae_ray.config import PretrainConfig
from glmae_ray.config_train import TrainConfig
from glmae_ray.errors import UserError

_OBJECT_STORE_SHARE = 0.5  # of the object store, that Ray Data takes for one dataset at most

Node = Mapping[str, Any]  # as `ray.nodes()` has it


@dataclass(frozen=True)
class Allotment:
    """What each training worker is given by Ray, and what its views take.

    Attributes:
        gpu: Whether it has a GPU.
        cpus: Its CPUs.
        budget: Of the makers of its views.
        warnings: What will be slow, a line each.
        probe_cpus: Of a probe of pre-training; 0 where it shares the cores of others.
    """

    gpu: bool
    cpus: float
    budget: Budget
    warnings: tuple[str, ...]
    probe_cpus: float = 0.0


def allot(cfg: TrainConfig, nodes: Sequence[Node]) -> Allotment:
    """Decide on GPUs and CPUs, and see that the cluster has them, for workers and makers of views.

    Args:
        cfg: The run.
        nodes: Those of the cluster that are alive.

    Raises:
        UserError: It can never give what the run asks for.
    """
    most, cfg = cfg.resources.most, cfg.on(cfg.resources.least)
    cpus, gpus, workers = _sum(nodes, "CPU"), _sum(nodes, "GPU"), cfg.workers
    gpu = gpus > 0 if cfg.resources.gpu is None else cfg.resources.gpu
    waits = cfg.resources.autoscales
    if gpu and workers > gpus and not waits:
        raise UserError(f"resources.workers: {workers} need a GPU each; the cluster has {gpus:g}")
    if not gpu and cfg.engine.precision == "fp16":
        raise UserError("engine.precision: fp16 needs GPUs; use bf16 or float32 on CPUs")
    each = cfg.resources.cpus_per_worker or (1.0 if gpu else 0.5)
    chosen = [node for node in nodes if _places(node, cfg)]
    elsewhere = cpus - _sum(chosen, "CPU")
    left = _sum(chosen, "CPU") - max(0.0, workers * each - elsewhere)
    need = budget(cfg, cpus=left, cpus_per_worker=0) if left > 0 else None
    if (need is None or need.makers == 0) and not waits:
        raise UserError(_no_maker(cfg, each, cpus, chosen))
    room = sum(seats(node, each, gpu=gpu) for node in nodes)
    if room < workers and not waits:
        kind = " and a GPU" if gpu else ""
        raise UserError(
            f"resources.workers: {workers} at {each:g} CPU{kind} each, but the nodes, each by "
            f"itself, have room for {room}; lower resources.cpus_per_worker"
        )
    places = sum(_places(node, cfg) for node in chosen)
    cpus_left = max(cpus_per_maker(cfg), min(left, places * cpus_per_maker(cfg)))
    plan = budget(cfg, cpus=cpus_left + workers * each, cpus_per_worker=each)
    lines = [*_crowding(cfg, most, each, cpus), *_warnings(plan, nodes)]
    if not (isinstance(cfg, PretrainConfig) and cfg.probe.every_steps):
        return Allotment(gpu, each, plan, tuple(lines))
    probe_cpus = _probe_cpus(cfg, each, nodes)
    if probe_cpus == 0:
        lines.append("probe: no CPU of its own; it shares those of workers and makers, after them")
    return Allotment(gpu, each, plan, tuple(lines), probe_cpus)


def seats(node: Node, each: float, *, gpu: bool) -> int:
    """How many workers find room on a node.

    Args:
        node: One of the cluster.
        each: CPUs of a worker.
        gpu: Whether it takes a GPU.
    """
    cpus, gpus = (node["Resources"].get(name, 0.0) for name in ("CPU", "GPU"))
    room = int(cpus / each + 1e-9)
    return min(room, int(gpus)) if gpu else room


def _probe_cpus(cfg: PretrainConfig, each: float, nodes: Sequence[Node]) -> float:
    """CPUs of a probe, beside which workers and a maker of views have theirs.

    Raises:
        UserError: More are asked for than there can be.
    """
    left = _sum(nodes, "CPU") - cfg.workers * each - cpus_per_maker(cfg)
    room = max(0.0, min(left, *(node["Resources"].get("CPU", 0.0) for node in nodes)))
    asked = cfg.probe.cpus
    if asked is None:
        return 1.0 if room >= 1 else 0.0
    if asked > room and not cfg.resources.autoscales:
        raise UserError(
            f"probe.cpus: {asked:g}, but beside {cfg.workers} workers at {each:g} CPU each and a "
            f"maker of views a node has {room:g}; with 0 probes share the cores of others"
        )
    return asked


def _crowding(cfg: TrainConfig, most: int, each: float, cpus: float) -> list[str]:
    """Whether workers of a range could take every CPU: Ray gives those it has to them first."""
    workers, maker = min(most, int(cpus / each)), cpus_per_maker(cfg)
    if workers <= cfg.workers or cpus - workers * each >= maker:
        return []
    return [
        f"resources.workers: {workers} at {each:g} CPU each leave no {maker:g} CPU of "
        f"{cpus:g} to make their views, and would wait for them; lower the most, or "
        "resources.cpus_per_worker"
    ]


def _places(node: Node, cfg: TrainConfig) -> int:
    """How many tasks that make views find room on a node."""
    resources, labels = node["Resources"], node.get("Labels", {})
    if any(labels.get(name) != value for name, value in cfg.pipeline.labels.items()):
        return 0
    needs = {"CPU": cpus_per_maker(cfg), **cfg.pipeline.resources}
    return min(int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items())


def _no_maker(cfg: TrainConfig, each: float, cpus: float, chosen: Sequence[Node]) -> str:
    workers, maker, pipeline = cfg.workers, cpus_per_maker(cfg), cfg.pipeline
    if (pipeline.labels or pipeline.resources) and not chosen:
        wanted = {**pipeline.resources, **pipeline.labels}
        return (
            f"pipeline.resources, pipeline.labels: no node has {wanted} and {maker:g} CPU to make "
            "views; resources.autoscales=true waits for one"
        )
    return (
        f"resources.workers: {workers} at {each:g} CPU each and {maker:g} CPU to make their views "
        f"are {workers * each + maker:g} CPUs; the cluster has {cpus:g}"
    )


def _warnings(plan: Budget, nodes: Sequence[Node]) -> list[str]:
    room = _OBJECT_STORE_SHARE * _sum(nodes, "object_store_memory")
    memory, lines = _sum(nodes, "memory"), []
    if plan.object_store > room:
        lines.append(
            f"object store: {plan.object_store / 1e9:.2f} GB of views are to be ready, Ray Data "
            f"may use {room / 1e9:.2f} GB; fewer will be (pipeline.prefetch_batches, makers)"
        )
    if plan.maker_memory > memory:
        lines.append(
            f"memory: makers of views may need {plan.maker_memory / 1e9:.1f} GB, the cluster has "
            f"{memory / 1e9:.1f} GB for tasks; pipeline.makers bounds them"
        )
    return lines


def _sum(nodes: Sequence[Node], name: str) -> float:
    return sum(node["Resources"].get(name, 0.0) for node in nodes)
