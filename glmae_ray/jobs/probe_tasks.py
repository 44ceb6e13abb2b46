"""Probes beside training: each a task of Ray that rank 0 starts and looks after.

Rank 0 copies the encoder's weights every `probe.every_steps`; all else happens in the task, so that
training waits for the copy alone. One runs at a time. The newest copy waits for its turn, an older
one that still waits then goes, and is told. When workers start again a probe that ran is lost with
them, unless the run goes on from its very step. docs/design/0006 says why this is not Ray Train's
validation of checkpoints.
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.models.vit3d import Encoder, Grid
from glmae_ray.paths import to_place
from glmae_ray.probing import Figures, probe
from glmae_ray.ranks import Ranks
from glmae_ray.tracking import RunLog, read_metrics, write_event
from glmae_ray.watch import Event

_END_S = 600.0  # that the end of a run waits for its last probe
_NICE = 19  # the least: where training shares the cores of a probe, it comes first


class _Snapshot(NamedTuple):
    """The encoder after a step.

    Attributes:
        step: Steps done.
        weights: Float32, by name.
        grid: Of a table of positions that is among them.
        held_s: Seconds for which training stood still.
    """

    step: int
    weights: dict[str, NDArray[np.float32]]
    grid: Grid | None
    held_s: float


class _Running(NamedTuple):
    """A task and what it was given, without the weights."""

    step: int
    held_s: float
    result: Any  # ray.ObjectRef of (Figures, seconds)


class Probes:
    """The probes of one sitting."""

    def __init__(self, cfg: PretrainConfig, engine: Engine, *, ranks: Ranks) -> None:
        """Begin without any.

        Args:
            cfg: The run, with `probe.every_steps` and `probe.cpus` stated.
            engine: Holds the module.
            ranks: This worker among the others.
        """
        self._cfg, self._engine, self._ranks = cfg, engine, ranks
        self._run = to_place(cfg.run)
        self._waiting: _Snapshot | None = None
        self._running: _Running | None = None
        self._is_over = False

    def begin(self, step: int, log: RunLog | None) -> None:
        """Probe what a sitting starts with, where it is due and not in the records. Collective."""
        self.after(step, log, known=log is not None and _is_recorded(self._run, step))

    def after(self, step: int, log: RunLog | None, *, known: bool = False) -> None:
        """Probe where it is due; write what has come. Collective.

        Args:
            step: Steps done.
            log: Takes the records; rank 0 has one.
            known: That of this step has been written before.
        """
        self._is_over = step == self._cfg.steps
        every = self._cfg.probe.every_steps
        assert every is not None
        if step % every == 0 or self._is_over:
            snapshot = self._take(step)
            if snapshot is not None and not known:
                self._queue(snapshot)
        if log is not None:
            self._advance(log, wait_s=0)

    def close(self, log: RunLog | None) -> None:
        """After the last step of the run wait for what is left; else stop it."""
        if log is None:
            return
        if self._is_over and not self._advance(log, wait_s=_END_S):
            line = f"its probe was not done {_END_S:.0f} s after training, and is left out"
            for step in [p.step for p in (self._running, self._waiting) if p is not None]:
                self._tell("probe_skipped", step, line)
        if self._running is not None:
            ray.cancel(self._running.result, force=True)

    def _take(self, step: int) -> _Snapshot | None:
        """A copy of the encoder; only rank 0 has one. Collective."""
        began = time.perf_counter()
        with self._engine.whole_parameters():
            if self._ranks.rank != 0:
                return None
            encoder = self._engine.module.encoder
            weights = {
                name: value.detach().to("cpu", torch.float32, copy=True).numpy()
                for name, value in encoder.state_dict().items()
            }
        return _Snapshot(step, weights, encoder.pos_grid, time.perf_counter() - began)

    def _queue(self, snapshot: _Snapshot) -> None:
        if self._waiting is not None:
            line = f"no probe: that of an earlier step still ran at step {snapshot.step}"
            self._tell("probe_skipped", self._waiting.step, line)
        self._waiting = snapshot

    def _advance(self, log: RunLog, *, wait_s: float) -> bool:
        """Start and finish what can be within some seconds; whether nothing is left."""
        until = time.monotonic() + wait_s
        while self._running or self._waiting:
            running = self._running or self._start()
            done, _ = ray.wait([running.result], timeout=max(0.0, until - time.monotonic()))
            if not done:
                return False
            self._running = None
            self._finish(running, log)
        return True

    def _start(self) -> _Running:
        snapshot, self._waiting = self._waiting, None
        assert snapshot is not None
        # A process of its own, which goes with its memory; a fault would come again.
        task = ray.remote(num_cpus=self._cfg.probe.cpus, max_calls=1, max_retries=0)(_probe_encoder)
        settings = self._cfg.model_dump(mode="json")
        result = task.remote(settings, snapshot.weights, snapshot.grid)
        self._running = _Running(snapshot.step, snapshot.held_s, result)
        return self._running

    def _finish(self, running: _Running, log: RunLog) -> None:
        """Write the record of a probe, or why there is none."""
        step = running.step
        try:
            figures, took_s = ray.get(running.result)
        except ray.exceptions.RayError as error:
            self._tell("probe_failed", step, f"the probe failed: {_reason(error)}")
            return
        for fault in figures.faults:
            self._tell("not_probed", step, f"probed without {fault}")
        if not figures.values:
            self._tell("probe_failed", step, "the probe failed: no case could be read")
            return
        samples = step * self._cfg.global_batch
        record = {"step": step, "samples": samples, "probe": figures.values}
        log.write(record | {"probe_s": took_s, "aside_s": running.held_s})

    def _tell(self, kind: str, step: int, line: str) -> None:
        event = Event(kind, f"step {step}: {line}", {"step": step})
        write_event(self._run, event, rank=self._ranks.rank)


def _is_recorded(run: Any, step: int) -> bool:
    return any(record["step"] == step and "probe" in record for record in read_metrics(run))


def _reason(error: ray.exceptions.RayError) -> str:
    """What was wrong in the task, or what befell it, in one line."""
    said = str(getattr(error, "cause", None) or error) or repr(error)
    return " ".join(said.split())[:300]


def _probe_encoder(
    settings: dict[str, Any], weights: dict[str, NDArray[np.float32]], grid: Grid | None
) -> tuple[Figures, float]:
    """Probe an encoder; the figures and the seconds it took."""
    began = time.perf_counter()
    os.nice(_NICE)
    cfg = PretrainConfig.model_validate(settings)
    torch.set_num_threads(max(1, int(cfg.probe.cpus or 0)))
    figures = probe(_encoder(cfg, weights, grid), cfg)
    return figures, time.perf_counter() - began


def _encoder(
    cfg: PretrainConfig, weights: dict[str, NDArray[np.float32]], grid: Grid | None
) -> Encoder:
    """The encoder that has such weights."""
    model = cfg.model
    encoder = Encoder(
        channels=model.channels,
        patch=model.patch,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
    )
    tensors = {name: torch.tensor(value) for name, value in weights.items()}
    if grid is not None:
        encoder.adopt_positions(tensors["pos_embed"][0], grid=grid)
    encoder.load_state_dict(tensors)
    return encoder.eval()
