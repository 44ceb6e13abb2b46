"""`glmae doctor`: what a pre-training run would cost, and whether it could start. No torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glmae_ray import costs
from glmae_ray.config import DoctorConfig
from glmae_ray.costs_memory import activations, memory
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import allot
from glmae_ray.jobs.doctor_text import cluster_lines, found_lines, machine_lines, run_lines
from glmae_ray.jobs.findings import Finding
from glmae_ray.jobs.fitting import memory_advice
from glmae_ray.jobs.machine import PACKAGES, Machine, this_machine
from glmae_ray.jobs.node_look import versions
from glmae_ray.paths import to_place

if TYPE_CHECKING:
    from glmae_ray.jobs.doctor_cluster import Cluster

_HEAD_MULTIPLE = 8  # 16 bytes in 16 bits: what flash and memory-efficient attention align to

Facts = dict[str, Any]
Check = Callable[[DoctorConfig, Machine], Iterator[Finding]]


def run(cfg: DoctorConfig, *, as_json: bool = False) -> None:
    """Print what the run costs and what is off, of the cluster too where one is named.

    Without a run, what this machine has, or the cluster.

    Raises:
        UserError: The run could not start; a line for each reason, after all the rest is printed.
    """
    cfg = _with_whole_paths(cfg)
    machine, cluster = this_machine(), _cluster(cfg)
    facts = cost_facts(cfg) if cfg.asks else machine_facts(machine)
    text = [run_lines(facts) if cfg.asks else machine_lines(facts)]
    found = [finding for check in CHECKS for finding in check(cfg, machine)] if cfg.asks else []
    if cluster is not None:
        facts["cluster"] = cluster.facts()
        text.append(cluster_lines(facts["cluster"]))
        found += cluster.findings
    if cfg.asks or cluster is not None:
        facts |= _by_kind(found)
        text.append(found_lines(facts))
    print(json.dumps(facts) if as_json else "\n\n".join(filter(None, text)), flush=True)
    if facts.get("reasons"):
        raise UserError(*facts["reasons"])


def _with_whole_paths(cfg: DoctorConfig) -> DoctorConfig:
    """As the run would make them; places that are not named stay empty."""
    named = [name for name in ("store", "run", "init") if getattr(cfg, name)]
    if not named:
        return cfg
    from glmae_ray.jobs.launching import with_whole_paths  # brings NumPy and pyarrow with it

    return with_whole_paths(cfg, *named)


def _cluster(cfg: DoctorConfig) -> Cluster | None:
    """The one that a run would join; None where it would start a Ray of its own."""
    address = _address(cfg)
    if address is None:
        return None
    from glmae_ray.jobs.doctor_cluster import look_at_cluster  # brings Ray with it

    return look_at_cluster(cfg, address)


def _address(cfg: DoctorConfig) -> str | None:
    return cfg.ray.address or os.environ.get("RAY_ADDRESS") or None


def _by_kind(found: Iterable[Finding]) -> dict[str, list[str]]:
    """Lines as `facts`, `advice`, and `reasons` why the run cannot start."""
    lines: dict[str, list[str]] = {"facts": [], "advice": [], "reasons": []}
    for kind, line in found:
        lines[kind if kind == "advice" else f"{kind}s"].append(line)
    return lines


def machine_facts(machine: Machine) -> Facts:
    """Versions, CPUs, memory and GPUs."""
    packages = versions(PACKAGES)
    return {
        "python": packages.pop("python"),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        **asdict(machine),
    }


def cost_facts(cfg: DoctorConfig) -> Facts:
    """All figures that follow from the config alone; bytes, and operations of each part."""
    sample = costs.flops(cfg)
    step = cfg.global_batch * sum(sample.values())
    return {
        "steps": cfg.steps,
        "batch": {
            "samples": cfg.global_batch,
            "workers": cfg.workers,
            "accumulation": cfg.accumulation,
            "micro_batch": cfg.micro_batch,
        },
        "parameters": {**costs.parameters(cfg), "trained": costs.trainable(cfg)},
        "views": {kind: _view_facts(cfg, kind) for kind in cfg.loss.kinds},
        "flops": {"sample": sample, "step": step, "run": cfg.steps * step},
        "engine": cfg.engine.model_dump(mode="json"),
        "memory": asdict(memory(cfg)),
        "activations": activations(cfg),
    }


def _view_facts(cfg: DoctorConfig, kind: str) -> Facts:
    t = costs.tokens(cfg, kind)
    masked = kind in cfg.loss.masked_kinds
    return {
        **{"views": t.views, "size": t.size, "grid": t.grid, "tokens": t.every},
        **({"kept": t.kept, "hidden": t.hidden} if masked else {"kept": t.every, "hidden": 0}),
    }


def check_inputs(cfg: DoctorConfig, _machine: Machine) -> Iterator[Finding]:
    """Store, run folder and encoder to start from, as far as they are named."""
    if not cfg.store:
        return
    from glmae_ray.jobs.pretrain import check_probe, check_store
    from glmae_ray.jobs.run_folder import check_run

    odd: list[str] = []
    told: list[str] = []
    try:
        facts = check_store(cfg, tell=odd.append)
        check_probe(cfg, tell=told.append)
        if cfg.run:
            check_run(cfg, to_place(cfg.run), facts)
        if cfg.init:
            from glmae_ray.jobs.starting import check_init  # brings torch with it

            check_init(cfg, to_place(cfg.run))
    except UserError as error:
        yield from (Finding("reason", line) for line in error.lines)
    yield from (Finding("advice", line) for line in odd)
    yield from (Finding("fact", line) for line in told)


def check_place(cfg: DoctorConfig, machine: Machine) -> Iterator[Finding]:
    """CPUs, GPUs and memory of this machine, unless the run joins a Ray, which is asked itself."""
    if _address(cfg) is not None:
        return
    try:
        allotment = allot(cfg, [machine.node()])
    except UserError as error:
        yield from (Finding("reason", line) for line in error.lines)
        return
    yield Finding("fact", allotment.budget.line())
    for line in (*allotment.warnings, *memory_advice(cfg, machine, gpu=allotment.gpu)):
        yield Finding("advice", line)


def check_model(cfg: DoctorConfig, _machine: Machine) -> Iterator[Finding]:
    """What would run, and slowly or for nothing."""
    model = cfg.model
    for part in ("", "decoder_"):
        width, heads = getattr(model, f"{part}width"), getattr(model, f"{part}heads")
        if (size := width // heads) % _HEAD_MULTIPLE:
            yield Finding(
                "advice",
                f"model.{part}heads: {heads} heads of {size} of model.{part}width {width}; the "
                f"fused attention kernels of GPUs want multiples of {_HEAD_MULTIPLE}",
            )
    stage = cfg.engine.zero_stage
    if stage and cfg.workers == 1:
        yield Finding(
            "advice",
            f"engine.zero_stage: {stage} has nothing to share on one worker; 0 saves its buffers",
        )


# Each looks at the config and this machine; jobs/doctor_cluster.py looks at a cluster.
CHECKS: tuple[Check, ...] = (check_inputs, check_place, check_model)
