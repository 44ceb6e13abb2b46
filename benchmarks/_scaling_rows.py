"""The tables of the scaling benchmark: what was measured, what is predicted, what is assumed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._report import Row, spread
from benchmarks._scaling_measure import FEEDS, MEMORY, WEAK, Case, Found, Series
from benchmarks._scaling_model import Cluster, Feeding, Prediction, measured_link, predict
from benchmarks._training import Times
from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import build, merge
from glmae_ray.costs import flops, trainable

_STEP, _PLAIN = "step, s", "step without exchange, s"
_GPUS = (8, 64, 512)
_STAGES = (0, 1, 2, 3)
_MORE = 4  # micro-batches of a step, beside 1
# DeepSpeed sums gradients after the backward pass (stage 0) or in its midst, while it stands still
# (stages 1 and 2, `overlap_comm` off). Stage 3 hides some; how much was not measured.
_OVERLAP = 0.0


def measured_rows(wanted: Series, tree: Mapping[str, Any], found: Found) -> list[Row]:
    """A row for each series, feed and number of workers."""
    rows: list[Row] = []
    for (name, cases), feed in itertools.product(wanted.items(), FEEDS):
        first = cases[0]
        a_worker = _rate(first, found[first, feed]) / first.workers
        for case in cases:
            runs = found[case, feed]
            seconds = _pooled(runs, "together")
            row = {
                "scaling": name,
                "feed": feed,
                "workers": case.workers,
                "global batch": case.global_batch,
                "micro-batch": case.micro_batch,
                "samples/s": spread([case.global_batch / second for second in seconds]),
                "efficiency": round(_rate(case, runs) / case.workers / a_worker, 4),
            }
            if feed == MEMORY:
                row |= _exchange(case.config(dict(tree)), runs)
            rows.append(row)
    return rows


def _exchange(cfg: PretrainConfig, runs: Sequence[Times]) -> Row:
    """What a step takes with and without exchange, and what the model makes of it."""
    step, alone = (_pooled(runs, name) for name in ("together", "apart"))
    row: Row = {_STEP: spread(step), _PLAIN: spread(alone)}
    if cfg.resources.workers == 1:
        return row
    sent = _pooled(runs, "all_reduce")
    link = measured_link(
        trainable(cfg), workers=cfg.resources.workers, all_reduce_s=statistics.median(sent)
    )
    alone_s, step_s = statistics.median(alone), statistics.median(step)
    said = predict(cfg, alone_s=alone_s, link=link)
    return row | {
        "all-reduce, s": spread(sent),
        "link, GB/s": round(link.bytes_per_s / 1e9, 3),
        "sent a worker, MB": round(said.sent_bytes / 1e6, 1),
        "overlap, measured": round(1 - (step_s - alone_s) / said.exchange_s, 2),
        "step predicted, s": round(said.step_s, 4),
        "predicted / measured": round(said.step_s / step_s, 4),
    }


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Efficiencies, how right the model was, and what a step without exchange says of both."""
    found: dict[str, float] = {}
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        case, several = (row["scaling"], row["feed"]), f"{row['workers']} workers"
        alone = first.setdefault(case, row)
        if row is not alone:
            found[f"{', '.join(case)}: efficiency of {several}"] = row["efficiency"]
        if case != (WEAK, MEMORY):
            continue
        if row is alone:
            found["step / plain loop's, fewest workers"] = _median(row, _STEP) / _median(
                row, _PLAIN
            )
        else:
            found[f"step predicted / measured, {several}"] = row["predicted / measured"]
            contention = _median(row, _PLAIN) / _median(alone, _PLAIN)
            found[f"step without exchange, {several} / {alone['workers']}"] = contention
    return found


def _median(row: Row, name: str) -> float:
    return row[name]["median"]


def prediction_rows(cfg: PretrainConfig, *, views_per_s: float, known: Sequence[Row]) -> list[Row]:
    """Weak scaling of a run on clusters, and then what that rests on.

    Args:
        cfg: The run; each GPU gets its micro-batch, or several of them in a step.
        views_per_s: Of one core.
        known: Measured rows of this very run on the accelerators in question; none: assume.
    """
    cluster = Cluster()
    weak = [row for row in known if row["scaling"] == WEAK and row["feed"] == MEMORY]
    if weak:
        micro_s = _median(weak[-1], _PLAIN)
    else:
        micro_s = cluster.step_s(_on(cfg, gpus=1, stage=0, turns=1))
    measured = weak[-1].get("overlap, measured") if weak else None
    overlap = _OVERLAP if measured is None else min(1.0, max(0.0, measured))
    loads = [*((stage, 1) for stage in _STAGES), (cfg.engine.zero_stage, _MORE)]
    rows: list[Row] = []
    for (stage, turns), gpus in itertools.product(loads, _GPUS):
        said = predict(
            _on(cfg, gpus=gpus, stage=stage, turns=turns),
            alone_s=turns * micro_s,
            link=cluster.link(gpus),
            overlap=overlap,
            feeding=Feeding(views_per_s, cluster.cores),
        )
        load = {"GPUs": gpus, "ZeRO": stage, "samples a GPU": turns * cfg.micro_batch}
        rows.append(load | {_PLAIN: turns * micro_s} | _columns(said))
    facts = {
        "step of one micro-batch without exchange, s": (micro_s, bool(weak)),
        "views a core makes a second": (views_per_s, True),
        "share of the exchange that is hidden": (overlap, measured is not None),
    }
    return rows + _assumptions(cluster, facts, cfg, computed=not weak)


def _on(cfg: PretrainConfig, *, gpus: int, stage: int, turns: int) -> PretrainConfig:
    """The run with so many micro-batches a step on each of so many GPUs."""
    micro = cfg.micro_batch
    changes = {
        "global_batch": gpus * turns * micro,
        "engine": {"zero_stage": stage, "micro_batch": micro},
        "resources": {"workers": gpus},
        "model": {"compile": False},  # which stage 3 cannot; it changes nothing that is counted
    }
    return build(PretrainConfig, merge(cfg.model_dump(mode="json"), changes))


def _columns(said: Prediction) -> Row:
    return {
        "sent a GPU, MB": round(said.sent_bytes / 1e6),
        "exchange, s": said.exchange_s,
        "of it not hidden, s": said.exposed_s,
        "views take, s": said.feeding_s,
        "cores a GPU to keep up": round(said.cores, 1),
        "step, s": said.step_s,
        "efficiency, views at hand": round(said.efficiency_fed, 3),
        "efficiency": round(said.efficiency, 3),
        "limit": said.limit,
    }


def _assumptions(
    cluster: Cluster,
    facts: Mapping[str, tuple[float, bool]],
    cfg: PretrainConfig,
    *,
    computed: bool,
) -> list[Row]:
    """All that the predictions take for given; `facts` say whether each was measured."""
    sources = {True: "measured in this run", False: "assumed"}
    rows: list[Row] = [
        {"taken for given": what, "value": value, "source": sources[measured]}
        for what, (value, measured) in facts.items()
    ]
    assumed: dict[str, Any] = {
        "GPUs of a node": cluster.per_node,
        "GB/s within a node, each way (NVLink 4)": cluster.inside.bytes_per_s / 1e9,
        "GB/s between nodes, of a node (400 Gb/s)": cluster.between.bytes_per_s / 1e9,
        "share of a link's rate that collectives get": cluster.reached,
        "us of a hop within a node": cluster.inside.latency_s * 1e6,
        "us of a hop between nodes": cluster.between.latency_s * 1e6,
        "cores a GPU that make views": cluster.cores,
    }
    if computed:
        rows[0]["source"] = "computed from the next three"
        assumed = {
            "TFLOP of a sample, forward and backward": sum(flops(cfg).values()) / 1e12,
            "TFLOP/s of a GPU, dense (H100 SXM, bf16)": cluster.flops_per_s / 1e12,
            "share of those that a step reaches": cluster.used,
            **assumed,
        }
    rows += [
        {"taken for given": what, "value": value, "source": sources[False]}
        for what, value in assumed.items()
    ]
    not_counted = "stragglers, failures, checkpoints, start-up; the object store's share of a core"
    return [*rows, {"taken for given": "not counted", "value": not_counted}]


def _rate(case: Case, runs: Sequence[Times]) -> float:
    return case.global_batch / statistics.median(_pooled(runs, "together"))


def _pooled(runs: Sequence[Times], name: str) -> list[float]:
    return [second for run in runs for second in getattr(run, name)]
