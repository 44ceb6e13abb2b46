"""Parameter groups, and the schedules of learning rate, teacher momentum and temperature.

The length of the warm-up is lineage, the default of the same group's other published code; the
shapes of the schedules and which weights decay are decisions of ours (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from glmae_ray.config import PretrainConfig
from glmae_ray.config_train import TrainConfig

Group = dict[str, Any]  # of AdamW's, with `lr_scale`, its share of the learning rate


class Schedule(NamedTuple):
    """The scheduled values of one optimizer step; those of the teacher where there is one."""

    lr: float
    teacher_momentum: float | None = None
    teacher_temperature: float | None = None

    def named(self) -> dict[str, float]:
        """Those that there are."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def rate(step: int, *, cfg: TrainConfig) -> float:
    """Learning rate of step number `step` (0 is the first): linear warm-up, then a cosine to 0."""
    warmup = cfg.warmup_steps
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * _half_cosine((step - warmup) / max(1, cfg.steps - warmup))


def schedule(step: int, *, cfg: TrainConfig) -> Schedule:
    """Values for step number `step` (0 is the first).

    The teacher's momentum ends at 1, on a cosine; its temperature rises over the warm-up and stays.
    """
    if not isinstance(cfg, PretrainConfig):
        return Schedule(rate(step, cfg=cfg))
    warmup = cfg.warmup_steps
    momentum = 1 - (1 - cfg.loss.teacher_momentum) * _half_cosine(step / cfg.steps)
    cold, warm = cfg.loss.teacher_temperature
    temperature = cold + (warm - cold) * min(1.0, step / max(1, warmup))
    return Schedule(rate(step, cfg=cfg), momentum, temperature)


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[Group]:
    """Two groups: matrices decay; biases, norms and the learned tokens do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (decayed if _is_matrix(name, parameter) else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": free, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def layer_groups(
    module: nn.Module, *, weight_decay: float, lr: float, layer_decay: float = 1.0
) -> list[Group]:
    """Groups of `parameter_groups` for each layer of the module's encoder, and for its head.

    The rate of a layer is that of the one above it times `layer_decay`, as in finetuning of BEiT
    (Bao et al., arXiv 2106.08254) and MAE (`util/lr_decay.py` of its public code): the head and the
    encoder's final norm have 1, the last of D blocks `layer_decay`, the first its D-th power,
    patch embedding and CLS token one power more. Layers of one rate share their groups.

    Args:
        module: Holds an `encoder` with `blocks`; what needs no gradient is in no group.
        weight_decay: Of matrices.
        lr: Of the head.
        layer_decay: In (0, 1].

    Returns:
        Groups for an optimizer; `lr_scale` is the share of the head's rate, also of scheduled ones.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = 1 + max((block for name, _ in named if (block := _block(name)) is not None), default=0)
    scales: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        scales.setdefault(layer_decay ** _layers_above(name, depth), []).append((name, parameter))
    return [
        group | {"lr": lr * scale, "lr_scale": scale}
        for scale, members in sorted(scales.items())
        for group in parameter_groups(members, weight_decay=weight_decay)
    ]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith("weight") and parameter.ndim > 1


def _block(name: str) -> int | None:
    """Number of the encoder's block that a parameter is of."""
    _, found, rest = name.rpartition("encoder.blocks.")
    return int(rest.split(".")[0]) if found else None


def _layers_above(name: str, depth: int) -> int:
    """How many layers lie between a parameter and the output, the head being none."""
    if (block := _block(name)) is not None:
        return depth - block
    is_first = any(f"encoder.{part}" in name for part in ("patch_embed", "cls_token"))
    return depth + 1 if is_first else 0
