"""How a step grows with the number of workers: what they send, over which links, fed by what.

Pure arithmetic over a run's config, without torch. What DeepSpeed 0.19.8 sends was counted
(tests/test_scaling_model.py counts it again):

* Stage 0: gradients in float32, one all-reduce a step.
* Stages 1 and 2: an all-reduce of gradients too, not a reduce-scatter: each rank gets all of them
  and keeps its share. Under autocast those of linear layers go in 16 bits (docs/method.md). Stage 1
  sends once a step, stage 2 after every micro-batch. Then the updated weights, in float32.
* Stage 3: a reduce-scatter of gradients and two gathers of weights a micro-batch, all in the
  arithmetic's own type, and one gather of the teacher's. After the step the teacher and what it
  follows are gathered in float32, and then sent from rank 0 to all. This is the most it can be:
  DeepSpeed keeps weights that it gathered as long as fewer than 10^9 are kept.

Rings carry the bytes, trees the latency. Not in it: stragglers, failures, checkpoints, start-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from glmae_ray.config import PretrainConfig
from glmae_ray.costs import BLOCK_WEIGHTS, flops, head_weights, parameters, trainable
from glmae_ray.costs_memory import reduce_bucket

_FLOAT, _NARROW = 4, 2  # bytes
_LINEAR_VECTORS = 9  # biases of a block's linear layers, in units of width: 3 + 1 + 4 + 1
_TENSORS_A_BLOCK, _OTHER_TENSORS = 12, 12  # weights, biases and norms; embedding, CLS, norm, head
_STAGE_0_BUCKET = 25 * 2**20 // _FLOAT  # numbers; that of torch's DistributedDataParallel

# Bytes that each worker sends on, per byte that is exchanged, as a function of n workers.
_RING = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "broadcast": lambda n: float(n > 1),
}
_PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "broadcast": 1}


class Exchange(NamedTuple):
    """What all workers exchange in one step for one purpose.

    Attributes:
        collective: `all_reduce`, `reduce_scatter`, `all_gather` or `broadcast`.
        bytes: Of the whole tensors.
        calls: In how many messages.
    """

    collective: str
    bytes: int
    calls: int


@dataclass(frozen=True)
class Link:
    """What a ring goes over at its narrowest.

    Attributes:
        bytes_per_s: That one worker can send while it receives as much.
        latency_s: Of one hop.
    """

    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Accelerators of which nothing was measured: every number is an assumption.

    Attributes:
        per_node: Accelerators of a node.
        inside: Within it. NVLink 4: 450 GB/s each way.
        between: Of a whole node to the others, through which its ring has to pass. 400 Gb/s.
        reached: Share of a link's rate that a collective gets.
        cores: CPU cores that make views, of each accelerator.
        flops_per_s: Of an accelerator, dense, 16 bits. H100 SXM: 989 TFLOP/s.
        used: Share of those that a step without exchange gets.
    """

    per_node: int = 8
    inside: Link = Link(450e9, 5e-6)
    between: Link = Link(50e9, 10e-6)
    reached: float = 0.8
    cores: int = 16
    flops_per_s: float = 989e12
    used: float = 0.35

    def link(self, workers: int) -> Link:
        """What a ring of so many goes over at its narrowest."""
        narrowest = self.inside if workers <= self.per_node else self.between
        return Link(narrowest.bytes_per_s * self.reached, narrowest.latency_s)

    def step_s(self, cfg: PretrainConfig) -> float:
        """Seconds of one worker's step without exchange."""
        samples = cfg.micro_batch * cfg.accumulation
        return samples * sum(flops(cfg).values()) / (self.flops_per_s * self.used)


@dataclass(frozen=True)
class Feeding:
    """What makes the views of one worker.

    Attributes:
        views_per_s: Of one core.
        cores: For each worker.
    """

    views_per_s: float
    cores: float


class Prediction(NamedTuple):
    """One step of one worker among many.

    Attributes:
        sent_bytes: By each worker.
        exchange_s: All of the exchange.
        exposed_s: What of it the worker waits for.
        feeding_s: That its views take to make.
        cores: For each worker that would keep up with it.
        step_s: Of all that the worker waits for; views are made meanwhile.
        efficiency_fed: Of a worker that never waits for views, against one that is alone as well.
        efficiency: The same with the wait for views.
        limit: What keeps it from more: `compute`, `exchange` or `views`.
    """

    sent_bytes: float
    exchange_s: float
    exposed_s: float
    feeding_s: float
    cores: float
    step_s: float
    efficiency_fed: float
    efficiency: float
    limit: str


def predict(
    cfg: PretrainConfig,
    *,
    alone_s: float,
    link: Link,
    overlap: float = 0.0,
    feeding: Feeding | None = None,
) -> Prediction:
    """What a step takes.

    Args:
        cfg: The run, `resources.workers` how many there are.
        alone_s: A worker's step without exchange.
        link: Between the workers.
        overlap: Share of the exchange that passes while the worker computes.
        feeding: What makes its views; None: they are there.
    """
    workers, sent = cfg.resources.workers, exchanges(cfg)
    exchange_s = seconds(sent, workers=workers, link=link)
    exposed_s = exchange_s * (1 - overlap)
    busy_s = alone_s + exposed_s
    core_s = views_per_step(cfg) / feeding.views_per_s if feeding else 0.0
    feeding_s = core_s / feeding.cores if feeding else 0.0
    step_s = max(busy_s, feeding_s)
    limit = "exchange" if exposed_s > alone_s else "compute"
    return Prediction(
        sent_bytes=bytes_sent(sent, workers=workers),
        exchange_s=exchange_s,
        exposed_s=exposed_s,
        feeding_s=feeding_s,
        cores=core_s / busy_s,
        step_s=step_s,
        efficiency_fed=alone_s / busy_s,
        efficiency=alone_s / step_s,
        limit="views" if feeding_s > busy_s else limit,
    )


def exchanges(cfg: PretrainConfig) -> list[Exchange]:
    """What one step exchanges; means of monitors and centre, kilobytes, are left out."""
    stage, turns, trained = cfg.engine.zero_stage, cfg.accumulation, trainable(cfg)
    if stage == 0:
        calls = math.ceil(trained / _STAGE_0_BUCKET)
        return [Exchange("all_reduce", _FLOAT * trained, calls)]
    gradients = _arithmetic_bytes(trained, linear_weights(cfg), cfg)
    buckets = math.ceil(trained / reduce_bucket(trained))
    if stage < 3:
        times = turns if stage == 2 else 1
        return [
            Exchange("all_reduce", times * gradients, times * buckets),
            Exchange("all_gather", _FLOAT * trained, 2),  # one for each parameter group
        ]
    return [
        Exchange("reduce_scatter", turns * gradients, turns * buckets),
        *_gathers(cfg, gradients),
    ]


def _gathers(cfg: PretrainConfig, weights: int) -> list[Exchange]:
    """What stage 3 fetches of weights that lie in pieces; `weights` are the bytes of all."""
    turns, depth = cfg.accumulation, cfg.model.depth
    teacher = parameters(cfg).get("teacher", 0)
    linear = linear_weights(cfg, teacher=True) if teacher else 0
    blocks = 2 * (depth + cfg.model.decoder_depth) + (depth if teacher else 0)
    passes = 2 * weights + _arithmetic_bytes(teacher, linear, cfg)
    found = [Exchange("all_gather", turns * passes, turns * blocks)]
    if teacher:
        both = 2 * _FLOAT * teacher  # and as many of the student's, which it follows
        tensors = 2 * (_TENSORS_A_BLOCK * depth + _OTHER_TENSORS)
        found += [Exchange("all_gather", both, tensors), Exchange("broadcast", both, tensors)]
    return found


def linear_weights(cfg: PretrainConfig, *, teacher: bool = False) -> int:
    """Weights and biases of linear layers: of the student, decoder included, or of the teacher."""
    model, values = cfg.model, cfg.model.channels * math.prod(cfg.model.patch)
    narrow = model.decoder_width
    count = model.depth * _block(model.width)
    if cfg.loss.uses_teacher:
        biases = 2 * model.head_hidden + model.head_bottleneck
        count += head_weights(cfg) - model.head_bottleneck * model.prototypes + biases
    if cfg.loss.reconstructed and not teacher:
        count += model.decoder_depth * _block(narrow)
        count += narrow * (model.width + 1) + values * (narrow + 1)
    return count


def _block(width: int) -> int:
    return BLOCK_WEIGHTS * width**2 + _LINEAR_VECTORS * width


def _arithmetic_bytes(count: int, linear: int, cfg: PretrainConfig) -> int:
    """Of so many numbers, those of linear layers in the type in which they are computed."""
    narrow = 0 if cfg.engine.precision == "float32" else linear
    return _FLOAT * (count - narrow) + _NARROW * narrow


def bytes_sent(sent: Sequence[Exchange], *, workers: int) -> float:
    """Bytes that each worker sends on in rings."""
    return sum(part.bytes * _RING[part.collective](workers) for part in sent)


def seconds(sent: Sequence[Exchange], *, workers: int, link: Link) -> float:
    """Seconds of an exchange."""
    hops = sum(part.calls * _PASSES[part.collective] for part in sent)
    depth = math.ceil(math.log2(workers))
    return bytes_sent(sent, workers=workers) / link.bytes_per_s + hops * depth * link.latency_s


def measured_link(numbers: int, *, workers: int, all_reduce_s: float) -> Link:
    """The link over which float32 numbers were summed; the rate includes its latency."""
    sent = bytes_sent([Exchange("all_reduce", _FLOAT * numbers, 1)], workers=workers)
    return Link(sent / all_reduce_s)


def views_per_step(cfg: PretrainConfig) -> int:
    """Views that one worker uses in a step."""
    a_sample = sum(getattr(cfg.views, f"{kind}_count") for kind in cfg.loss.kinds)
    return a_sample * cfg.micro_batch * cfg.accumulation
