"""Every sample once: workers are killed and their number changes, and the plan is still kept.

A model that does nothing but remember what it was shown goes through the pipeline, Ray Train and
the project's checkpoints. Two workers do not divide the three micro-batches of a step: one of them
repeats one, which must not count. Beside it each worker keeps a ledger of every step that it did,
those that a kill undid as well.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import random
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import ray.train
import torch
from ray.train.torch import TorchTrainer

from glmae_ray import checkpoint
from glmae_ray.config import PretrainConfig
from glmae_ray.jobs.resuming import resume
from glmae_ray.jobs.saving import Saver
from glmae_ray.jobs.sittings import begin_sitting, last_start
from glmae_ray.models.masking import draw_masks
from glmae_ray.pipeline import PlannedDataConfig, PlannedShards, rank_batches
from glmae_ray.ranks import Ranks
from glmae_ray.samples import SampleMaker, sample_maker
from tests.conftest import tiny_config

pytestmark = pytest.mark.ray

BATCH = 6  # divides among 1, 2 and 3 workers
KINDS = ("global", "local")
Moment = Literal["taken", "recorded", "saved"]


class Kill(NamedTuple):
    """One worker's end: at which step, of which rank, and how far into the step it got."""

    step: int
    rank: int
    moment: Moment


class Attempt(NamedTuple):
    """One life of a worker group; the last has no kill."""

    workers: int
    kill: Kill | None


class Line(NamedTuple):
    """What one rank did in one step of one attempt."""

    attempt: int
    workers: int
    rank: int
    step: int
    samples: list[str]


def test_kills_and_other_numbers_of_workers_lose_and_repeat_nothing(small_store, tmp_path):
    attempts = [
        Attempt(3, Kill(step=5, rank=1, moment="recorded")),  # the others wait for it, to save
        Attempt(2, Kill(step=7, rank=1, moment="saved")),
        Attempt(2, None),
    ]
    check_that_every_sample_is_seen_once(attempts, small_store, tmp_path, steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 4])
def test_any_kills_and_any_numbers_of_workers_lose_and_repeat_nothing(small_store, tmp_path, seed):
    attempts = random_attempts(random.Random(seed), kills=8)
    kill = attempts[-2].kill
    assert kill is not None
    check_that_every_sample_is_seen_once(attempts, small_store, tmp_path, steps=kill.step + 4)


def random_attempts(rng: random.Random, *, kills: int) -> list[Attempt]:
    """About half of the kills leave the number of workers alone: one trainer restarts them."""
    attempts: list[Attempt] = []
    workers, step = 1, 0
    for _ in range(kills):
        workers = rng.choice((workers, rng.randint(1, 3)))
        step += rng.randint(1, 4)  # later than the kill before, so that the attempt gets there
        moment: Moment = rng.choice(("taken", "recorded", "saved"))
        attempts.append(Attempt(workers, Kill(step, rng.randrange(workers), moment)))
    return [*attempts, Attempt(rng.randint(1, 3), None)]


def check_that_every_sample_is_seen_once(
    attempts: list[Attempt], store: Path, folder: Path, *, steps: int
) -> None:
    run = folder / "run"
    for workers, life in itertools.groupby(attempts, key=lambda attempt: attempt.workers):
        words = (f"store={store}", f"run={run}", f"steps={steps}", f"global_batch={BATCH}")
        cfg = tiny_config(*words, "resources.workers=[1,3]", "save.every_steps=2")
        train(cfg, attempts, workers, failures=[attempt.kill is not None for attempt in life])
    expected = made_in_process(cfg)
    assert len(set(expected)) == steps * BATCH  # a digest names one sample
    plan = [sorted(expected[step * BATCH :][:BATCH]) for step in range(steps)]
    assert len(list(run.glob("killed-*"))) == len(attempts) - 1  # nothing else ended an attempt
    lines = read_ledgers(run)
    assert all(line.workers == attempts[line.attempt].workers for line in lines)
    # Steps that a kill undid were made of the plan's samples as well, views and masks alike.
    assert [line for line in lines if not set(line.samples) <= set(plan[line.step])] == []
    assert surviving_history(lines) == plan
    assert remembered(run) == plan


def train(
    cfg: PretrainConfig, attempts: list[Attempt], workers: int, *, failures: list[bool]
) -> None:
    """Run one trainer: as many lives of its worker group as there are entries in `failures`."""
    shards = PlannedShards(maker_of(cfg), cfg, functools.partial(last_start, Path(cfg.run)))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"cfg": cfg.model_dump(mode="json"), "attempts": attempts},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": 0.5}
        ),
        run_config=ray.train.RunConfig(
            storage_path=cfg.run,
            name="ray",
            failure_config=ray.train.FailureConfig(max_failures=len(failures) - 1),
        ),
        datasets={"train": lambda: shards},
        dataset_config=PlannedDataConfig(),
    )
    if all(failures):
        with pytest.raises(ray.train.TrainingFailedError, match="its worker process has died"):
            trainer.fit()
    else:
        trainer.fit()


def train_loop(settings: dict[str, Any]) -> None:
    """What each worker does; it dies where its attempt's kill says."""
    context = ray.train.get_context()
    cfg = PretrainConfig.model_validate(settings["cfg"]).on(context.get_world_size())
    run, rank, memory = Path(cfg.run), context.get_world_rank(), Memory()
    ranks = Ranks.join(local_rank=context.get_local_rank(), timeout_s=60)
    found = resume(memory, run, ranks=ranks, tell=print)
    start = found.step if found else 0
    facts = {"start": start, "workers": ranks.size, "checkpoint": None}
    number = ranks.told(begin_sitting(run, **facts) if rank == 0 else -1)
    saver = Saver(run, cfg=cfg, ranks=ranks, sitting=number, tell=print)
    attempt = Attempt(*settings["attempts"][number])

    def perhaps_die(step: int, moment: Moment) -> None:
        if attempt.kill == (step, rank, moment):
            (run / f"killed-{number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    batches = batches_through_ray(cfg, start=start, rank=rank)
    with ledger(run, number, rank).open("w", buffering=1) as file:
        for step in range(start, cfg.steps):
            samples = []
            for turn in range(step * cfg.accumulation, (step + 1) * cfg.accumulation):
                shown = digests(next(batches), cfg)
                samples += shown if cfg.weight_of(turn, rank=rank) else []
            perhaps_die(step, "taken")
            memory.shown[step] = samples
            print(json.dumps(Line(number, attempt.workers, rank, step, samples)), file=file)
            perhaps_die(step, "recorded")
            if (step + 1) % cfg.save.every_steps == 0 or step + 1 == cfg.steps:
                saver.save(memory, state={"step": step + 1})
            perhaps_die(step, "saved")
    saver.close()


class Memory:
    """In the place of the engine: weights that are the samples of each step they were shown."""

    zero_stage = 0

    def __init__(self) -> None:
        self.shown: dict[int, list[str]] = {}

    def snapshot(self) -> dict[str, bytes]:
        """Every rank hands over what it knows, once all have come, as DeepSpeed does it."""
        torch.distributed.barrier()
        rank = ray.train.get_context().get_world_rank()
        return {f"shown-{rank}.json": json.dumps(self.shown).encode()}

    def load(self, folder: Path, *, saved_workers: int) -> None:
        """Rank 0 takes over what all ranks knew, however many they were."""
        assert len(list(folder.glob("shown-*.json"))) == saved_workers
        if ray.train.get_context().get_world_rank() == 0:
            self.shown = read_memory(folder)


def read_memory(folder: Path) -> dict[int, list[str]]:
    shown = defaultdict(list)
    for part in folder.glob("shown-*.json"):
        for step, samples in json.loads(part.read_text()).items():
            shown[int(step)] += samples
    return dict(shown)


def remembered(run: Path) -> list[list[str]]:
    """The samples of each step that led to the last checkpoint."""
    folder = Path(checkpoint.complete(run)[0].place)
    return [sorted(samples) for _, samples in sorted(read_memory(folder).items())]


def ledger(run: Path, attempt: int, rank: int) -> Path:
    return run / f"ledger-{attempt}-{rank}.jsonl"


def read_ledgers(run: Path) -> list[Line]:
    files = sorted(run.glob("ledger-*.jsonl"))
    return [Line(*json.loads(line)) for file in files for line in file.read_text().splitlines()]


def surviving_history(lines: list[Line]) -> list[list[str]]:
    """The samples of each step, as the last attempt did it that did it on every rank."""
    done: dict[tuple[int, int], list[Line]] = defaultdict(list)
    for line in lines:
        done[line.step, line.attempt].append(line)
    surviving: dict[int, list[str]] = {}
    for (step, _), parts in sorted(done.items()):
        if len(parts) == parts[0].workers:
            surviving[step] = sorted(itertools.chain.from_iterable(p.samples for p in parts))
    return [surviving[step] for step in range(len(surviving))]


# From here on: all that this module knows of the pipeline.


def batches_through_ray(
    cfg: PretrainConfig, *, start: int, rank: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard = ray.train.get_dataset_shard("train")
    return rank_batches(shard, cfg=cfg, maker=maker_of(cfg), start=start, rank=rank)


def maker_of(cfg: PretrainConfig) -> SampleMaker:
    return sample_maker(cfg, split="train", kinds=KINDS)


def made_in_process(cfg: PretrainConfig) -> list[str]:
    """The digest of every sample of the run, each made alone and without Ray."""
    maker = maker_of(cfg)
    made = (maker.make({"number": np.array([n])}) for n in range(cfg.steps * cfg.global_batch))
    tensors = ({name: torch.from_numpy(column) for name, column in s.items()} for s in made)
    return [name for sample in tensors for name in digests(sample, cfg)]


def digests(batch: dict[str, torch.Tensor], cfg: PretrainConfig) -> list[str]:
    """SHA-256 of each sample: its window and views, and their masks as drawn for the batch."""
    parts = [batch["window"]]
    for kind in KINDS:
        size, seeds = getattr(cfg.views, f"{kind}_size"), batch[f"{kind}_seeds"]
        tokens = math.prod(size) // math.prod(cfg.model.patch)
        kept, _ = draw_masks(seeds.flatten(), tokens=tokens, ratio=cfg.views.mask_ratio)
        parts += [batch[kind], seeds, kept.reshape(*seeds.shape, -1)]
    rows = zip(*(part.numpy() for part in parts), strict=True)
    return [hashlib.sha256(b"".join(part.tobytes() for part in row)).hexdigest() for row in rows]
