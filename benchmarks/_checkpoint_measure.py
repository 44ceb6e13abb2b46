"""What the checkpoint benchmark measures: steps from save to save, and bytes of a checkpoint.

Engine, loop and saver are those of `glmae pretrain`; the views are noise.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._step_rows import batch
from glmae_ray import checkpoint
from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.jobs.saving import Saver
from glmae_ray.loop import train_steps
from glmae_ray.models.glmae import GLMAE
from glmae_ray.paths import Place, to_place
from glmae_ray.ranks import Ranks
from glmae_ray.watch import Event

EVERY = 25  # steps
SIZES = {"global_size": 96, "local_size": 64}  # about a second a step on 2 cores
_WARM_UP = 3  # steps
_PATIENCE_S = 600.0

Span = tuple[float, float]  # begin and end, seconds of one clock


class Mode(NamedTuple):
    """A way to write checkpoints.

    Attributes:
        name: In the table and in ratios.
        run: The run folder or its URL; empty: none is written.
        background: As `save.background`.
    """

    name: str
    run: str = ""
    background: bool = True


@dataclass(frozen=True)
class Block:
    """The steps from a save to the next one.

    Attributes:
        wall_s: Of all of it.
        steps: When each step was under way.
        held_s: For which training stood still: in the save, and for a write that outlasts the
            steps.
        held_cpu_s: Of CPU that the process took meanwhile.
        writes: When the writing thread was at work.
    """

    wall_s: float
    steps: list[Span]
    held_s: float = 0.0
    held_cpu_s: float = 0.0
    writes: list[Span] = field(default_factory=list)

    @property
    def step_s(self) -> list[float]:
        """Seconds of the steps beside which nothing was written."""
        return [end - begin for begin, end in self.steps if not self._writes_in((begin, end))]

    def slowed_s(self, undisturbed_s: float) -> float:
        """Seconds that steps beside a write took more than undisturbed ones."""
        beside = [end - begin for begin, end in self.steps if self._writes_in((begin, end))]
        return sum(beside) - len(beside) * undisturbed_s

    def _writes_in(self, step: Span) -> bool:
        return any(begin < step[1] and step[0] < end for begin, end in self.writes)


def config(
    *, stage: int = 0, workers: int = 1, background: bool = True, run: str = ""
) -> PretrainConfig:
    """A run of preset `small` in float32 with one sample a worker, as `glmae pretrain` has it."""
    return PretrainConfig.model_validate(
        {
            "store": "",
            "run": run,
            "steps": 10**6,
            "global_batch": workers,
            "views": SIZES,
            "model": {"preset": "small"},
            "engine": {"precision": "float32", "zero_stage": stage, "micro_batch": 1},
            "resources": {"workers": workers},
            # One stays, so that every save but the first has an old one to remove.
            "save": {"every_steps": EVERY, "keep": 1, "background": background},
        }
    )


def measure_blocks(
    modes: Sequence[Mode], environment: Mapping[str, str], *, rounds: int, threads: int
) -> dict[str, list[Block]]:
    """Blocks of one training that takes turns between the modes, by name of the mode.

    Args:
        modes: In every round each one has a block; the first in turn begins.
        environment: Variables that lead to the object store.
        rounds: How many.
        threads: Of torch.
    """
    os.environ |= environment
    torch.set_num_threads(threads)
    _join(rank=0, workers=1, port=0)
    training = _Training(config())
    ranks = Ranks.join(local_rank=0, timeout_s=_PATIENCE_S)
    savers = {mode.name: _WatchedSaver(mode, ranks=ranks) if mode.run else None for mode in modes}
    training.steps(_WARM_UP)
    for saver in savers.values():
        if saver is not None:  # what only the first save does: imports, connections
            saver.save(training.engine, state=training.state(), wait=True)
            training.steps(1)
    found: dict[str, list[Block]] = {mode.name: [] for mode in modes}
    for turn in range(rounds):
        first = turn % len(modes)
        for mode in (*modes[first:], *modes[:first]):
            found[mode.name].append(_block(training, savers[mode.name]))
    for saver in savers.values():
        if saver is not None:
            saver.close()
            saver.check(written=rounds + 1)
    return found


def _block(training: _Training, saver: _WatchedSaver | None) -> Block:
    """A save, if there is a saver, and the steps behind it."""
    began = time.perf_counter()
    if saver is None:
        steps = training.steps(EVERY)
        return Block(time.perf_counter() - began, steps)
    saver.writes.clear()
    cpu = time.process_time()
    held_s = saver.save(training.engine, state=training.state()).held_s
    held_cpu_s = time.process_time() - cpu
    steps = training.steps(EVERY)
    ended, cpu = time.perf_counter(), time.process_time()
    saver.wait()  # as the next save of the run would
    held_s += time.perf_counter() - ended
    held_cpu_s += time.process_time() - cpu
    wall_s = time.perf_counter() - began
    return Block(wall_s, steps, held_s, held_cpu_s, list(saver.writes))


class _Training:
    """An engine and its steps."""

    def __init__(self, cfg: PretrainConfig, *, rank: int = 0) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
        self.numbers = _count(module)
        self.engine = Engine(module, cfg=cfg, device=self._device)
        views = batch(cfg.model_copy(update={"global_batch": 1}), self._device)
        self._infos = train_steps(self.engine, itertools.repeat(views), cfg=cfg, rank=rank)
        self._step = 0

    def steps(self, count: int) -> list[Span]:
        """Train so many steps; when each was under way."""
        spans = []
        for _ in range(count):
            began = time.perf_counter()
            self._step = next(self._infos).step
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            spans.append((began, time.perf_counter()))
        return spans

    def state(self) -> dict[str, Any]:
        """What a sitting would have written of the last step."""
        return {"step": self._step, "samples": self._step, "passed": [], "val_loss": None}


class _WatchedSaver(Saver):
    """A saver that notes when its thread is at work, and for which a failure is one.

    Attributes:
        writes: When the thread wrote and tidied, since the last `clear`.
    """

    def __init__(self, mode: Mode, *, ranks: Ranks) -> None:
        self._place = to_place(mode.run)
        cfg = config(background=mode.background, run=mode.run)
        super().__init__(self._place, cfg=cfg, ranks=ranks, sitting=0, tell=_fail)
        self.writes: list[Span] = []
        self._steps: list[int] = []

    def _write(self, folder: Place, files: Mapping[str, bytes], step: int) -> None:
        began = time.perf_counter()
        super()._write(folder, files, step)
        self.writes.append((began, time.perf_counter()))
        self._steps.append(step)

    def check(self, *, written: int) -> None:
        """See that as many were written as should be, and that the last one alone stays."""
        stay = [found.step for found in checkpoint.complete(self._place)]
        if len(self._steps) != written or stay != self._steps[-1:]:
            raise RuntimeError(f"{self._place}: wrote {self._steps}, of which {stay} stay")


def _fail(event: Event) -> None:
    raise RuntimeError(event.line)


class Weighed(NamedTuple):
    """A checkpoint's bytes, and the numbers that it holds.

    Attributes:
        files: Name in the folder -> bytes.
        trained: Parameters that the optimizer changes.
        teacher: Parameters that follow them.
    """

    files: dict[str, int]
    trained: int
    teacher: int


def weigh(folder: Path, *, stage: int, rank: int, workers: int, port: int) -> Weighed:
    """Train a step as one of some workers, save, and weigh what all of them wrote. Collective."""
    torch.set_num_threads(1)
    _join(rank=rank, workers=workers, port=port)
    cfg = config(stage=stage, workers=workers, run=str(folder))
    training = _Training(cfg, rank=rank)
    training.steps(1)  # before it there are no moments
    ranks = Ranks.join(local_rank=rank, timeout_s=_PATIENCE_S)
    saver = Saver(folder, cfg=cfg, ranks=ranks, sitting=0, tell=_fail)
    saver.save(training.engine, state=training.state(), wait=True)
    saver.close()
    (found,) = checkpoint.complete(folder)
    assert isinstance(found.place, Path)
    files = {name: (found.place / name).stat().st_size for name in _names(found.place)}
    ranks.each(None)  # nobody leaves while another still sends
    return Weighed(files, **training.numbers)


def _names(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _count(module: torch.nn.Module) -> dict[str, int]:
    counts = {"trained": 0, "teacher": 0}
    for parameter in module.parameters():
        counts["trained" if parameter.requires_grad else "teacher"] += parameter.numel()
    return counts


def _join(*, rank: int, workers: int, port: int) -> None:
    """What Ray Train would tell a worker."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
