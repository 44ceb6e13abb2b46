"""`glmae doctor`: what a pre-training run would cost, and whether it could start here. No torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from glmae_ray import costs
from glmae_ray.config import DoctorConfig
from glmae_ray.costs_memory import activations, memory
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import allot
from glmae_ray.jobs.doctor_text import machine_lines, run_lines
from glmae_ray.jobs.fitting import memory_advice
from glmae_ray.jobs.machine import PACKAGES, Machine, this_machine
from glmae_ray.paths import is_url, to_place

_HEAD_MULTIPLE = 8  # 16 bytes in 16 bits: what flash and memory-efficient attention align to

Facts = dict[str, Any]


class Finding(NamedTuple):
    """A line of one of three kinds; a reason is one why the run could not start."""

    kind: Literal["fact", "advice", "reason"]
    line: str


Check = Callable[[DoctorConfig, Machine], Iterator[Finding]]


def run(cfg: DoctorConfig, *, as_json: bool = False) -> None:
    """Print what the run costs and what is off; without any field, what this machine has.

    Raises:
        UserError: The run could not start; a line for each reason, after all the rest is printed.
    """
    machine = this_machine()
    if not cfg.asks:
        facts = machine_facts(machine)
        print(json.dumps(facts) if as_json else machine_lines(facts))
        return
    facts = {**cost_facts(cfg), **examine(cfg, machine)}
    print(json.dumps(facts) if as_json else run_lines(facts), flush=True)
    if facts["reasons"]:
        raise UserError(*facts["reasons"])


def examine(cfg: DoctorConfig, machine: Machine) -> dict[str, list[str]]:
    """Lines of all checks: `facts`, `advice`, and `reasons` why the run cannot start."""
    lines: dict[str, list[str]] = {"facts": [], "advice": [], "reasons": []}
    for check in CHECKS:
        for kind, line in check(cfg, machine):
            lines[kind if kind == "advice" else f"{kind}s"].append(line)
    return lines


def machine_facts(machine: Machine) -> Facts:
    """Versions, CPUs, memory and GPUs."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        **asdict(machine),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


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
    if cfg.run and is_url(cfg.run):
        line = f"run: {cfg.run} is a URL; run folders are local or shared so far"
        yield Finding("reason", line)
        return
    if not cfg.store:
        return
    from glmae_ray.jobs.pretrain import check_probe, check_store
    from glmae_ray.jobs.run_folder import check_run

    names = [name for name in ("store", "run", "init") if getattr(cfg, name)]
    cfg = cfg.model_copy(update={name: str(to_place(getattr(cfg, name))) for name in names})
    odd: list[str] = []
    told: list[str] = []
    try:
        facts = check_store(cfg, tell=odd.append)
        check_probe(cfg, tell=told.append)
        if cfg.run:
            check_run(cfg, Path(cfg.run), facts)
        if cfg.init:
            from glmae_ray.jobs.starting import check_init  # brings torch with it

            check_init(cfg, Path(cfg.run))
    except UserError as error:
        yield from (Finding("reason", line) for line in error.lines)
    yield from (Finding("advice", line) for line in odd)
    yield from (Finding("fact", line) for line in told)


def check_place(cfg: DoctorConfig, machine: Machine) -> Iterator[Finding]:
    """CPUs, GPUs and memory of this machine, unless the run joins a Ray that is elsewhere."""
    if address := cfg.ray.address or os.environ.get("RAY_ADDRESS"):
        yield Finding("fact", f"ray.address: the run joins {address}; this machine is not judged")
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


# Each looks at the config and this machine; one that looks at a cluster joins them here.
CHECKS: tuple[Check, ...] = (check_inputs, check_place, check_model)
