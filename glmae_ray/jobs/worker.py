"""What each training worker does, whatever it trains: assemble, resume, train, leave the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import ray.train
import ray.train.torch
import torch

from glmae_ray.config_train import TrainConfig
from glmae_ray.engine import Engine
from glmae_ray.errors import CommonError
from glmae_ray.jobs.machine import cpus_here
from glmae_ray.jobs.sitting import Beside, HeldOut, Sitting
from glmae_ray.loop import train_steps
from glmae_ray.pipeline import rank_batches
from glmae_ray.ranks import Ranks
from glmae_ray.reading import Maker

_PATIENCE_S = 600.0  # with a worker that does not come to a meeting

Job = TypeVar("Job", bound=TrainConfig)


class Parts(NamedTuple):
    """What a verb brings to the training of its module.

    Attributes:
        engine: Holds the module, with its first weights.
        maker: That of the samples.
        held_out: What is measured beside training.
        leave: Writes what the run is for, after its last step. Collective.
        beside: What is done beside training.
    """

    engine: Engine
    maker: Maker
    held_out: HeldOut
    leave: Callable[[], None]
    beside: Beside | None = None


def work(
    settings: dict[str, Any],
    kind: type[Job],
    assemble: Callable[[Job, Ranks, torch.device], Parts],
) -> tuple[str, ...]:
    """Run one worker of a run to its end.

    Args:
        settings: The run, as plain data.
        kind: Its config class.
        assemble: Gives the parts, the same on every rank. Collective.

    Returns:
        The lines of a `CommonError`; none where all went well.
    """
    context = ray.train.get_context()
    cfg = kind.model_validate(settings).on(context.get_world_size())
    _share_cores(context.get_local_world_size())
    torch.manual_seed(cfg.seed)  # the same first weights on every rank
    try:
        ranks = Ranks.join(local_rank=context.get_local_rank(), timeout_s=_PATIENCE_S)
        _train(cfg, assemble(cfg, ranks, ray.train.torch.get_device()), ranks)
    except CommonError as error:
        return error.lines
    return ()


def _train(cfg: TrainConfig, parts: Parts, ranks: Ranks) -> None:
    engine, maker, held_out, leave, beside = parts
    sitting = Sitting(cfg, engine, ranks=ranks, maker=maker, held_out=held_out, beside=beside)
    batches = rank_batches(
        ray.train.get_dataset_shard("train"),
        cfg=cfg,
        maker=maker,
        start=sitting.start,
        rank=ranks.rank,
        device=engine.device,
        tell=sitting.tell,
    )
    with sitting:
        sitting.begin()
        for info in train_steps(engine, batches, cfg=cfg, start=sitting.start, rank=ranks.rank):
            if not sitting.after_step(info):
                break
        else:
            leave()


def _share_cores(workers_here: int) -> None:
    """Divide the cores of this node among its workers; Ray allows each as many as its CPUs."""
    torch.set_num_threads(max(1, cpus_here() // workers_here))
